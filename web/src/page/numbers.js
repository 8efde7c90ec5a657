// Tables of numbers with the names of their tokens, as panels: the colours, the names, and the element for the map.
import { html } from "../dom.js";
import { pixels as tablePanel } from "../tables.js";
import { DIVERGING, diverging, sequential, table } from "../views/panels.js";

const number = (x) => String(Number(x.toPrecision(2))).replace("-", "−");

/**
 * Numbers around 0 as colours. A few channels are a hundred times as large as the others, so the scale ends at the value
 * that one number in a hundred exceeds.
 */
export function signed(data, rows, columns) {
  const sizes = Float32Array.from(data, Math.abs).sort(), largest = Math.max(sizes.at(-1), 1e-12);
  const end = Math.max(sizes[Math.floor(0.99 * (sizes.length - 1))], largest / 1000);
  const beyond = largest > 1.5 * end
    ? `The darkest colours stand for ${number(end)} and more; 1 number in 100 is larger, at most ${number(largest)}.` : "";
  return { image: diverging(table(data, rows, columns), end), key: [`−${number(end)}`, number(end)], colours: DIVERGING, note: beyond };
}

/** Shares of attention as colours. */
export function shares(data, rows, columns) {
  const image = sequential(table(data, rows, columns), { scale: "root" });
  return { image, key: ["0", number(data.reduce((a, b) => Math.max(a, b), 0))], note: image.note };
}

/** The names of text tokens, padded to `count`: “circle”, end, padding. */
function textNames(pieces, count) {
  return Array.from({ length: count }, (_, i) => {
    const piece = pieces[i];
    if (piece === undefined) return "padding";
    if (/^<.*end.*>$|^<\/s>$/.test(piece)) return "end";
    return /^<.*>$/.test(piece) ? "start" : `“${piece.replaceAll("▁", "").replace("</w>", "") || "␣"}”`;
  });
}

/** { names, groups } of the `count` tokens of a value at a site; null if its rows are no tokens. */
export function tokensOf(site, count, run, txtLen) {
  const [, h, w] = run.shape, patches = (h * w) / 4, pieces = (site.startsWith("clip") ? run.clipTokens : run.tokens) ?? [];
  const places = Array.from({ length: patches }, (_, i) => `patch in row ${Math.floor(i / (w / 2)) + 1}, column ${(i % (w / 2)) + 1}`);
  const texts = textNames(pieces, txtLen), used = texts.filter((name) => name.startsWith("“")).length;
  const textGroups = [...(texts[0] === "start" ? [["", 1]] : []), ["words", used]];
  textGroups.push(["padding", txtLen - used - (textGroups.length - 1)]);
  if (count === txtLen + patches) return { names: [...texts, ...places], groups: [...textGroups, ["patches", patches]] };
  if (count === txtLen) return { names: texts, groups: textGroups };
  return count === patches ? { names: places, groups: [["patches", patches]] } : null;
}

/** The panel with all of its numbers: messages of explorers leave some out, which are too large to be sent. */
export function whole(panel, image, groups = null) {
  const values = new DataView(Float32Array.from(image.values.data).buffer);
  return { ...panel, values, table: [image.values.rows, image.values.columns], groups };
}

let ids = 0;

/** A panel as an element for the map: { kind, el, paint }. */
export function drawn(title, panel, { tip, move = () => {} }) {
  const painter = tablePanel(panel, { tip, move, id: (name) => `table-${name}-${ids++}` });
  const el = html("div", {}, ...(title ? [html("p", { className: "map-axes", textContent: title })] : []), painter.el);
  return { kind: "element", el, paint: (next = panel, pointer = next.mark) => painter.paint(next, pointer) };
}
