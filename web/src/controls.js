// Controls: each function takes the control's message and { move, id }, and returns { el, show(index, shades) }.
import { arrow, attributes, clamp, html } from "./dom.js";

function slider({ name, label, labels }, { move, id }) {
  const input = html("input", { type: "range", id: id(name), min: 0, max: labels.length - 1, step: 1 });
  const output = html("output", { htmlFor: input.id });
  const showLabel = (index) => {
    output.textContent = labels[index];
    input.setAttribute("aria-valuetext", labels[index]);
  };
  const to = (index) => {
    showLabel((input.value = index));
    move({ [name]: Number(index) });
  };
  input.addEventListener("input", () => to(input.value));
  input.addEventListener("keydown", (e) => { // handled here, since notebooks use the arrow keys themselves
    const steps = arrow(e);
    if (steps) to(clamp(Number(input.value) + steps[1] - steps[0], labels.length));
  });
  const show = (index) => {
    if (!input.matches(":active")) input.value = index;
    showLabel(input.value);
  };
  const text = html("label", { htmlFor: input.id, textContent: label });
  output.style.minWidth = `${Math.max(...labels.map((l) => l.length))}ch`; // the row does not move with the label
  return { el: html("div", { className: "control" }, text, input, output), show };
}

function choice({ name, label, labels }, { move, id }) {
  const options = labels.map((text, value) => html("option", { value, textContent: text }));
  const select = html("select", { id: id(name) }, ...options);
  select.addEventListener("change", () => move({ [name]: Number(select.value) }));
  const show = (index) => (select.value = index);
  const text = html("label", { htmlFor: select.id, textContent: label });
  return { el: html("div", { className: "control" }, text, select), show };
}

/** Buttons of which one is chosen, with a label to their left that names the group. */
function group(label, role, id, buttons) {
  const text = html("span", { id: id("group"), textContent: label });
  const all = attributes(html("div", { className: "buttons" }, ...buttons), { role, "aria-labelledby": text.id });
  return [all, html("div", { className: "control wide" }, text, all)];
}

function chips({ name, label, labels }, { move, id }) {
  const shown = labels.map((label) => label.replace(/^[▁Ġ]/u, "") || label); // the mark of a tokenizer for a new word
  const buttons = shown.map((textContent) => html("button", { type: "button", textContent, className: "chip" }));
  const to = (i, focus) => {
    if (focus) buttons[i].focus();
    move({ [name]: i });
  };
  buttons.forEach((button, i) => {
    button.setAttribute("role", "radio");
    button.addEventListener("pointerenter", (e) => e.pointerType === "mouse" && to(i));
    button.addEventListener("click", () => to(i));
    button.addEventListener("keydown", (e) => {
      const steps = arrow(e);
      if (steps) to(clamp(i + steps[0] + steps[1], labels.length), true);
    });
  });
  const [, el] = group(label, "radiogroup", id, buttons);
  const show = (index, shades) => {
    buttons.forEach((button, i) => {
      button.setAttribute("aria-checked", i === index);
      button.tabIndex = i === index ? 0 : -1;
      button.style.setProperty("--shade", shades?.[i] ?? 0);
    });
  };
  return { el, show };
}

/** Left, the same or right, by button or arrow key. The state is [question, answer], with one answer per question. */
function vote({ name, label, labels }, { move, id }) {
  let question = 0, answered = true;
  const to = (answer) => {
    if (answered) return;
    answered = true;
    move({ [name]: [question, answer] });
  };
  const buttons = labels.slice(1).map((text, i) => {
    const button = html("button", { type: "button", textContent: `${text} ${"←↓→"[i]}` });
    button.addEventListener("click", () => to(i + 1));
    return button;
  });
  const [all, el] = group(label, "group", id, buttons);
  all.addEventListener("keydown", (e) => {
    const steps = arrow(e);
    if (steps && steps[0] >= 0 && !e.repeat) to(2 + steps[1]);
  });
  const show = ([current]) => {
    question = current;
    answered = false;
  };
  return { el, show };
}

export const CONTROLS = { slider, choice, chips, vote };
