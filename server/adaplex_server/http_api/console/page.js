// Small things that all parts of the page do: make elements, say what went wrong, send a form without leaving.

import { key } from "./api.js";

export const byId = (id) => document.getElementById(id);

// An element with properties and children; text is only ever text.
export function make(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}

export function makeSvg(name, attributes, text = "") {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [attribute, value] of Object.entries(attributes)) element.setAttribute(attribute, value);
  element.textContent = text;
  return element;
}

export function complain(error) {
  if (error?.name === "AbortError") return;
  const place = byId("problem");
  place.textContent = error.message;
  place.hidden = false;
  if (error.status === 401) byId("key").focus();
}

export function calm() {
  byId("problem").hidden = true;
}

// Calls `send` with the form; while it runs the button is off, and `output` says how it went.
export function onSubmit(form, send) {
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const button = form.querySelector("button:not([type])");
    const output = form.querySelector("output");
    button.disabled = true;
    calm();
    try {
      if (output) output.textContent = "…";
      const said = await send(new FormData(form));
      if (output) output.textContent = said ?? "";
    } catch (error) {
      if (output) output.textContent = "";
      complain(error);
    } finally {
      button.disabled = false;
    }
  });
}

// A button that acts when it is pressed a second time.
export function twice(word, sure, act) {
  const button = make("button", { type: "button", textContent: word });
  let armed = false;
  const calmDown = () => {
    armed = false;
    button.textContent = word;
  };
  button.addEventListener("blur", calmDown);
  button.addEventListener("click", async () => {
    if (!armed) {
      armed = true;
      button.textContent = sure;
      return;
    }
    calmDown();
    button.disabled = true;
    await act().catch(complain);
    button.disabled = false;
  });
  return button;
}

export function rememberKey(onChange) {
  byId("key").value = key.get();
  onSubmit(byId("key-form"), async () => {
    key.set(byId("key").value.trim());
    onChange();
  });
}
