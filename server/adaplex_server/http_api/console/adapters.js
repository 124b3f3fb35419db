// The table of adapters with their state and latency, upload and removal.

import { ask, askJson } from "./api.js";
import { Means, parse, sum } from "./metrics.js";
import { byId, make, onSubmit, twice } from "./page.js";

const means = new Means();
const rows = new Map();
const milliseconds = (seconds) => (seconds === undefined ? "–" : `${(seconds * 1000).toFixed(seconds < 0.1 ? 1 : 0)} ms`);

const ENGINE = [
  ["Rows running", "adaplex_requests_running"], ["waiting", "adaplex_requests_waiting"],
  ["KV pages", "adaplex_kv_pages_used"], ["of", "adaplex_kv_pages_capacity"],
  ["Adapters on the device", "adaplex_adapters_resident"], ["loads", "adaplex_adapter_loads_total"],
  ["evictions", "adaplex_adapter_evictions_total"],
];

function makeRow(name, changed) {
  const cells = Array.from({ length: 8 }, (_, i) => make(i ? "td" : "th", i > 2 && i < 7 ? { className: "number" } : {}));
  cells[0].scope = "row";
  cells[0].textContent = name;
  if (changed) {
    const remove = twice("Remove", "Really remove?", async () => {
      await ask(`v1/adapters/${name.split("/").map(encodeURIComponent).join("/")}`, { method: "DELETE" });
      await changed();
    });
    remove.setAttribute("aria-label", `Remove ${name}`);
    cells[7].append(remove);
  }
  const row = make("tr", {}, ...cells);
  row.dataset.name = name;
  return row;
}

function fill(row, adapter, metrics) {
  const label = { adapter: adapter.name };
  const requests = sum(metrics, "adaplex_requests_total", label);
  const told = [
    adapter.rank ? `${adapter.kind}, rank ${adapter.rank}` : adapter.kind, adapter.state, adapter.running ?? "",
    milliseconds(means.of(metrics, "adaplex_time_to_first_token_seconds", label)),
    milliseconds(means.of(metrics, "adaplex_inter_token_latency_seconds", label)), requests ?? 0,
  ];
  told.forEach((value, i) => (row.cells[i + 1].textContent = value));
  row.cells[2].className = `state-${adapter.state}`;
  row.cells[2].title = adapter.reason ?? "";
}

// Shows what there is now; the base is the first row.
export async function showAdapters(base, changed) {
  const [list, text] = await Promise.all([askJson("v1/adapters"), ask("metrics").then((answer) => answer.text())]);
  const metrics = parse(text);
  const all = [{ name: base, kind: "base", state: "resident" }, ...list.data];
  const names = new Set(all.map((one) => one.name));
  for (const [name, row] of rows) {
    if (names.has(name)) continue;
    row.remove();
    rows.delete(name);
  }
  for (const adapter of all) {
    let row = rows.get(adapter.name);
    if (!row) {
      row = makeRow(adapter.name, adapter.kind === "base" ? null : changed);
      rows.set(adapter.name, row);
      byId("adapter-rows").append(row);
    }
    fill(row, adapter, metrics);
  }
  byId("engine").replaceChildren(...ENGINE.map(([word, name]) => make("div", {}, make("dt", { textContent: word }), make("dd", { textContent: sum(metrics, name) ?? "–" }))));
}

export function setUpUpload(changed) {
  const form = byId("upload-form");
  onSubmit(form, async (data) => {
    const adapter = await askJson("v1/adapters", { method: "POST", body: data });
    form.reset();
    await changed();
    return `${adapter.name} is served.`;
  });
}
