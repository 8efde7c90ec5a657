// Helpers that all modules of the front end share.

const isPage = typeof document !== "undefined";

// read from an element, since a recorded run's page contains no address at all, not even a namespace's
const SVG = isPage && Object.assign(document.createElement("template"), { innerHTML: "<svg>" }).content.firstChild.namespaceURI;

/** An HTML element with these properties and children. */
export function html(tag, set = {}, ...children) {
  const el = Object.assign(document.createElement(tag), set);
  el.append(...children);
  return el;
}

/** An SVG element with these attributes and children. */
export function svg(tag, attributes = {}, ...children) {
  const el = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) el.setAttribute(name, value);
  el.append(...children);
  return el;
}

/** Text in a drawing. */
export function words(text, x, y, more = {}) {
  return svg("text", { x, y, ...more }, text);
}

/** Set several attributes; returns the element. */
export function attributes(el, set) {
  for (const [name, value] of Object.entries(set)) el.setAttribute(name, value);
  return el;
}

/** An arrow key as a step [down, right]; null for any other key. The event goes no further: notebooks use these keys. */
export function arrow(event) {
  const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  if (steps && !event.ctrlKey && !event.metaKey && !event.altKey) {
    event.preventDefault();
    event.stopPropagation();
    return steps;
  }
  return null;
}

/** An index within 0 and count - 1. */
export const clamp = (value, count) => Math.min(Math.max(value, 0), count - 1);

/** Makes ids that occur once on a page, although each widget has its own copy of this module. */
export function identifiers() {
  const prefix = `fluxedu-${Math.random().toString(36).slice(2, 10)}`;
  let count = 0;
  return (name) => `${prefix}-${name}-${count++}`;
}

/** A number with three significant digits, as people write it. */
export function format(x) {
  if (!Number.isFinite(x)) return String(x);
  const size = Math.abs(x);
  if (size >= 1e6 || (size > 0 && size < 1e-4)) return x.toExponential(1).replace("-", "−").replace("+", "");
  const digits = size >= 1000 ? 0 : size >= 100 ? 1 : 3;
  return String(Number(size >= 100 ? x.toFixed(digits) : x.toPrecision(digits))).replace("-", "−");
}

const pen = isPage && document.createElement("canvas").getContext("2d");

/** Width of a text in px, in the font of drawings. */
export function textWidth(text, size = 11) {
  pen.font = `${size}px system-ui, sans-serif`;
  return pen.measureText(text).width * 1.06; // a little room for other fonts
}

/** Whether an element's text is light, as it is on a dark page. */
export function isDark(el) {
  const [r, g, b] = (getComputedStyle(el).color.match(/[\d.]+/g) ?? [0, 0, 0]).map(Number);
  return 0.3 * r + 0.6 * g + 0.1 * b > 140;
}
