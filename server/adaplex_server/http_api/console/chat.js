// One conversation with the base and with an adapter, side by side and at the same time.

import { ask, events } from "./api.js";
import { byId, calm, complain, make } from "./page.js";

const sides = {
  base: { turns: byId("base-turns"), title: byId("base-name"), messages: [] },
  adapter: { turns: byId("adapter-turns"), title: byId("adapter-name"), messages: [] },
};
let stopping = null;

async function answer(side, model, wishes, signal) {
  const said = make("p", { className: "turn assistant busy" });
  const figures = make("p", { className: "figures" });
  side.turns.append(said, figures);
  const began = performance.now();
  let first, tokens, text = "";
  try {
    const body = { model, messages: side.messages, stream: true, stream_options: { include_usage: true }, ...wishes };
    const response = await ask("v1/chat/completions", { method: "POST", json: body, signal });
    for await (const event of events(response)) {
      const delta = event.choices[0]?.delta?.content;
      tokens = event.usage?.completion_tokens ?? tokens;
      if (!delta) continue;
      first ??= performance.now() - began;
      text += delta;
      said.append(delta);
      side.turns.scrollTop = side.turns.scrollHeight;
    }
    const seconds = (performance.now() - began) / 1000;
    figures.textContent = `${tokens ?? 0} tokens in ${seconds.toFixed(2)} s, the first after ${(first ?? 0).toFixed(0)} ms`;
  } catch (error) {
    figures.textContent = error.name === "AbortError" ? "stopped" : error.message;
    if (error.name !== "AbortError") complain(error);
  } finally {
    said.classList.remove("busy");
    side.messages.push({ role: "assistant", content: text });
  }
}

async function send(form, base) {
  const adapter = form.elements.adapter.value;
  const prompt = form.elements.prompt.value;
  const wishes = { max_completion_tokens: form.elements.tokens.valueAsNumber || 200, temperature: form.elements.temperature.valueAsNumber || 0 };
  calm();
  form.elements.prompt.value = "";
  form.elements.send.disabled = true;
  byId("stop").disabled = false;
  stopping = new AbortController();
  const asked = [[sides.base, base], [sides.adapter, adapter]].filter(([, model]) => model);
  for (const [side, model] of asked) {
    side.title.textContent = model;
    side.messages.push({ role: "user", content: prompt });
    side.turns.append(make("p", { className: "turn user", textContent: prompt }));
  }
  await Promise.all(asked.map(([side, model]) => answer(side, model, wishes, stopping.signal)));
  form.elements.send.disabled = false;
  byId("stop").disabled = true;
  form.elements.prompt.focus();
}

function forget() {
  stopping?.abort();
  for (const side of Object.values(sides)) {
    side.messages = [];
    side.turns.replaceChildren();
  }
}

// Keeps the choice while the adapters change.
export function offer(names) {
  const select = byId("chat-form").elements.adapter;
  if ([...select.options].map((one) => one.value).join("\n") === names.join("\n")) return;
  const chosen = select.value;
  select.replaceChildren(...names.map((name) => make("option", { value: name, textContent: name })));
  if (names.includes(chosen)) select.value = chosen;
}

export function setUpChat(base) {
  const form = byId("chat-form");
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (!form.elements.send.disabled) send(form, base());
  });
  form.elements.prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      form.requestSubmit(form.elements.send);
    }
  });
  form.elements.adapter.addEventListener("change", forget);
  byId("stop").addEventListener("click", () => stopping?.abort());
  byId("forget").addEventListener("click", forget);
}
