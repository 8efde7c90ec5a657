// Panels: each function takes the panel's first message and { move, id, tip, figure }, and returns
// { el, paint(panel, pointer) }.
import { lines, points, widthOf } from "./charts.js";
import { arrow, attributes, clamp, html, svg, textWidth, words } from "./dom.js";
import { map } from "./map_panel.js";
import { pixels } from "./tables.js";

/** A diagram whose boxes are buttons. It is as wide as its panel; where that would leave most boxes with arrows between
 * them too small for their labels, its panel scrolls. */
function boxes(first, { move, id, tip }) {
  const el = html("div", { className: "drawing diagram" });
  let panel = null, built = "", buttons = [];
  const to = (i) => {
    buttons[i].focus();
    move({ [panel.pointer]: i });
  };
  const box = ([label, x, y, w, h, colour], i, scale) => {
    const [left, top, width, height] = [x, y, w, h].map((v) => v * scale);
    const rect = svg("rect", { x: left, y: top, width, height, rx: 3, fill: colour, stroke: colour });
    const button = attributes(svg("g", {}, rect), { role: "button", "aria-label": label });
    const middle = { "text-anchor": "middle", "dominant-baseline": "central" };
    const [x0, y0] = [left + width / 2, top + height / 2], cut = label.lastIndexOf(" ");
    const halves = [label.slice(0, cut + 1), label.slice(cut + 1)];
    if (textWidth(label) + 4 <= width && height >= 10) {
      button.append(words(label, x0, y0, middle));
    } else if (cut > 0 && height >= 28 && halves.every((half) => textWidth(half.trim()) + 4 <= width)) {
      const lines = halves.map((half, i) => svg("tspan", { x: x0, y: y0 + 14 * i - 7 }, half));
      button.append(svg("text", middle, ...lines));
    } else if (width >= 30 && height >= 10) {
      const room = { x: left + 4, y: top, width: width - 8, height, class: "cut" }; // cut off here, and whole in the tip
      button.append(svg("svg", room, words(label, 0, height / 2, { "dominant-baseline": "central" })));
    }
    const hover = (isSpoken) => tip.show(() => {
      if (!rect.isConnected) return null;
      const place = rect.getBoundingClientRect();
      return [[label], place.left + place.width / 2, place.top];
    }, isSpoken);
    button.addEventListener("pointerenter", () => hover(false));
    button.addEventListener("pointerleave", () => tip.hide());
    button.addEventListener("click", () => to(i));
    button.addEventListener("keydown", (e) => {
      const steps = arrow(e);
      if (steps) to(clamp(i + steps[0] + steps[1], buttons.length));
      else if (e.key === "Enter" || e.key === " ") e.preventDefault(), to(i);
    });
    return button;
  };
  const build = () => {
    const [width, height] = panel.size, room = widthOf(el);
    const needed = panel.boxes.map(([label, , , w, h]) => Math.max(Math.min(textWidth(label) + 6, 90) / w, 13 / h));
    needed.sort((a, b) => a - b);
    const least = panel.arrows.length ? needed[Math.floor(needed.length * 0.7)] : 0; // tiles fit at any width
    const scale = Math.max(Math.min(room / width, 1.8), Math.min(least, 1.35));
    buttons = panel.boxes.map((b, i) => box(b, i, scale));
    const head = svg("marker", { id: id("arrow"), markerWidth: 7, markerHeight: 7, refX: 6, refY: 3.5, orient: "auto" },
      svg("path", { d: "M0 0L7 3.5L0 7Z", class: "tip-of-arrow" }));
    const ends = { class: "flow", "marker-end": `url(#${head.id})`, fill: "none" };
    const arrows = panel.arrows.map((path) => svg("polyline", { points: path.map((v) => v * scale).join(" "), ...ends }));
    const [w, h] = [Math.ceil(width * scale), Math.ceil(height * scale)];
    el.replaceChildren(svg("svg", { viewBox: `0 0 ${w} ${h}`, width: w, height: h }, svg("defs", {}, head), ...arrows, ...buttons));
  };
  const paint = (now) => {
    panel = now;
    const current = JSON.stringify([now.boxes, now.arrows, el.clientWidth]);
    const isFocused = el.contains(document.activeElement);
    if (current !== built) build();
    built = current;
    buttons.forEach((button, i) => {
      button.setAttribute("aria-pressed", i === now.mark);
      button.setAttribute("tabindex", i === now.mark ? 0 : -1);
    });
    if (isFocused && !el.contains(document.activeElement)) buttons[now.mark]?.focus();
  };
  return { el, paint };
}

export const PANELS = { pixels, lines, points, boxes, map };
