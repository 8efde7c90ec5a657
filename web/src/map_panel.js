// The map of the model as the panel of an explorer: the kernel computes the value of the chosen box.
import { html } from "./dom.js";
import { createMap } from "./map.js";
import { PANELS } from "./panels.js";

/** `context`: as of every panel. data: { wiring, ids, pictures: site -> a message per step, or one, numbers: site -> a sentence per step }. */
export function map(first, context) {
  const { data, move } = context, el = html("div", { className: "map" });
  let now = first, shown = null, isMoved = false, painter = null;
  const waiting = []; // who waits for the value of the chosen box

  /** The value as one of the explorer's own panels, with its values at the pointer. */
  const painted = ({ value, text }) => {
    if (!value) return { kind: "text", text: "This run has no value here." };
    painter?.destroy?.();
    painter = PANELS[value.kind](value, context);
    const el = html("div", {}, html("p", { className: "map-axes", textContent: value.title }), painter.el);
    return { kind: "element", el, paint: () => painter.paint(value, null) };
  };
  const values = (site, step, isChosen) => {
    if (!isChosen) {
      const found = data.pictures[site] ?? [], picture = found[Math.min(step, found.length - 1)] ?? null;
      return Promise.resolve(picture && { ...picture, text: null });
    }
    return new Promise((resolve) => {
      waiting.push(resolve);
      answer();
    });
  };
  /** Gives the value to those who wait for it, if the kernel has sent that of the box chosen now. */
  const answer = () => {
    if (shown && waiting.length && data.ids[now.mark] === shown.selected() && now.step === shown.step()) {
      const value = painted(now);
      for (const resolve of waiting.splice(0)) resolve(value);
    }
  };

  shown = createMap(el, {
    wiring: data.wiring, values, step: first.step, hint: "",
    hoverText: (site, step) => data.numbers[site]?.[step] ?? "",
    onSelect: (box) => {
      const index = data.ids.indexOf(box.id);
      if (index >= 0 && index !== now.mark) isMoved = true, move({ [now.pointer]: index });
    },
  });
  const paint = (next, pointer) => {
    const isNew = next.mark !== now.mark || next === first;
    now = next;
    shown.setStep(next.step);
    const id = data.ids[pointer ?? next.mark];
    if (isNew && !isMoved && id !== shown.selected()) shown.show(id);
    if (next === first) shown.root.classList.remove("has-choice"); // nothing is chosen by hand yet: the map stays uncovered
    isMoved = false;
    answer();
  };
  return { el, paint, destroy: shown.destroy };
}
