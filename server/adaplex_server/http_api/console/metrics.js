// Reads the Prometheus exposition, and tells means of histograms since the last time it was read.

const LINE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;

// name -> [{labels, value}]
export function parse(text) {
  const found = new Map();
  for (const line of text.split("\n")) {
    const match = line.startsWith("#") ? null : LINE.exec(line);
    if (!match) continue;
    const labels = {};
    for (const [, name, value] of (match[2] ?? "").matchAll(LABEL)) labels[name] = value.replace(/\\(.)/g, "$1");
    if (!found.has(match[1])) found.set(match[1], []);
    found.get(match[1]).push({ labels, value: Number(match[3]) });
  }
  return found;
}

export function sum(metrics, name, wanted = {}) {
  const fits = (labels) => Object.entries(wanted).every(([label, value]) => labels[label] === value);
  const values = (metrics.get(name) ?? []).filter(({ labels }) => fits(labels)).map(({ value }) => value);
  return values.length ? values.reduce((a, b) => a + b, 0) : undefined;
}

// Of each histogram and label the mean of what was observed since the last call; the last one while nothing is new.
export class Means {
  #before = new Map();

  of(metrics, name, wanted) {
    const id = `${name} ${JSON.stringify(wanted)}`;
    const count = sum(metrics, `${name}_count`, wanted) ?? 0;
    const total = sum(metrics, `${name}_sum`, wanted) ?? 0;
    const before = this.#before.get(id);
    let mean = before?.mean;
    if (before && count > before.count) mean = (total - before.total) / (count - before.count);
    else if (!before || count < before.count) mean = count ? total / count : undefined;
    this.#before.set(id, { count, total, mean });
    return mean;
  }
}
