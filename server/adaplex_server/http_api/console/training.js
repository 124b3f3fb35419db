// Jobs: start one, list them, and watch one's loss while it trains.

import { ask, askJson, events } from "./api.js";
import { byId, complain, make, makeSvg, onSubmit, twice } from "./page.js";

const OVER = ["succeeded", "failed", "cancelled"];
const [WIDTH, HEIGHT, LEFT, BOTTOM, TOP] = [640, 240, 48, 24, 12];
let watched = null;
let watching = null;

function draw(points) {
  const svg = byId("curve").querySelector("svg");
  const title = svg.querySelector("title");
  svg.replaceChildren(title);
  const all = [...points.train, ...points.heldOut];
  if (!all.length) return;
  const steps = Math.max(...all.map((one) => one.step), 1);
  const high = Math.max(...all.map((one) => one.loss));
  const low = Math.min(...all.map((one) => one.loss), high * 0.5);
  const x = (step) => LEFT + (step / steps) * (WIDTH - LEFT - 12);
  const y = (loss) => TOP + ((high - loss) / (high - low || 1)) * (HEIGHT - TOP - BOTTOM);
  for (const loss of [low, (low + high) / 2, high]) {
    svg.append(makeSvg("line", { class: "axis", x1: LEFT, x2: WIDTH - 12, y1: y(loss), y2: y(loss) }));
    svg.append(makeSvg("text", { x: 6, y: y(loss) + 4 }, loss.toFixed(3)));
  }
  svg.append(makeSvg("text", { x: WIDTH - 90, y: HEIGHT - 6 }, `step ${steps}`));
  const path = (series) => series.map((one, i) => `${i ? "L" : "M"}${x(one.step).toFixed(1)} ${y(one.loss).toFixed(1)}`).join("");
  svg.append(makeSvg("path", { class: "train", d: path(points.train) }));
  svg.append(makeSvg("path", { class: "held-out", d: path(points.heldOut) }));
  for (const one of points.heldOut) svg.append(makeSvg("circle", { class: "held-out", cx: x(one.step), cy: y(one.loss), r: 3 }));
  title.textContent = `Loss by step: ${points.train.length} of training, ${points.heldOut.length} of held-out rows; last ${all.at(-1).loss.toFixed(3)}`;
}

async function watch(job) {
  watching?.abort();
  watching = new AbortController();
  watched = job.id;
  const figure = byId("curve");
  figure.hidden = false;
  figure.querySelector("figcaption").textContent = `${job.adapter}: loss while training (line) and on held-out rows (dots)`;
  byId("job-said").textContent = "";
  const points = { train: [], heldOut: [] };
  draw(points);
  try {
    const response = await ask(`v1/fine_tuning/jobs/${job.id}/events?stream=true`, { signal: watching.signal });
    for await (const event of events(response)) {
      const { type, step, loss, adapter_loss: heldOut } = event.data ?? {};
      const measured = type === "evaluation" ? (heldOut ?? loss) : loss;
      if (event.type === "metrics" && Number.isFinite(step) && Number.isFinite(measured)) {
        (type === "evaluation" ? points.heldOut : points.train).push({ step, loss: measured });
        draw(points);
      } else if (event.type === "message") byId("job-said").textContent = event.message;
    }
    await showJobs();
  } catch (error) {
    complain(error);
  }
}

function item(job) {
  const act = (word) => () => ask(`v1/fine_tuning/jobs/${job.id}/${word}`, { method: "POST" }).then(showJobs);
  const see = make("button", { type: "button", textContent: "Watch" });
  see.setAttribute("aria-label", `Watch ${job.adapter}`);
  see.addEventListener("click", () => watch(job));
  const status = make("span", { className: job.status, textContent: job.status.replaceAll("_", " ") });
  const line = make("li", {}, make("strong", { textContent: job.adapter }), status, see);
  if (job.error) line.append(make("span", { className: "failed", textContent: job.error.message }));
  if (!OVER.includes(job.status)) line.append(twice("Cancel", "Really cancel?", act("cancel")));
  line.dataset.told = `${job.id} ${job.status}`;
  return line;
}

// Lines that say the same stay, so that the focus does.
export async function showJobs() {
  const { data } = await askJson("v1/fine_tuning/jobs?limit=20");
  const list = byId("jobs");
  const kept = new Map([...list.children].map((line) => [line.dataset.told, line]));
  const lines = data.map((job) => kept.get(`${job.id} ${job.status}`) ?? item(job));
  if (lines.some((line, i) => list.children[i] !== line) || lines.length !== list.children.length) list.replaceChildren(...lines);
  const running = data.find((job) => !OVER.includes(job.status));
  if (!watched && running) watch(running);
}

export function setUpTraining(base) {
  const form = byId("train-form");
  onSubmit(form, async (data) => {
    const body = new FormData();
    body.append("purpose", "fine-tune");
    body.append("file", data.get("file"));
    const file = await askJson("v1/files", { method: "POST", body });
    const wish = { model: base(), training_file: file.id };
    if (data.get("name")) wish.suffix = data.get("name");
    if (data.get("epochs")) wish.hyperparameters = { n_epochs: Number(data.get("epochs")) };
    const job = await askJson("v1/fine_tuning/jobs", { method: "POST", json: wish });
    form.reset();
    await showJobs();
    watch(job);
    return `${job.adapter} is queued.`;
  });
}
