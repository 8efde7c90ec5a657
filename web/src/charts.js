// Charts: curves, and points with arrows; panels as in tables.js.
import { ticks } from "d3-array";
import { arrow, attributes, clamp, format, html, svg, textWidth, words } from "./dom.js";
import { LINE, measured } from "./tables.js";

/** The names of series or groups, with their colours. */
function legend(names, colours) {
  const entries = names.map((name, i) => {
    const dot = html("i");
    dot.style.background = ink(colours[i % colours.length]);
    return html("span", {}, dot, name);
  });
  return html("div", { className: "legend" }, ...entries);
}

/** Black is the colour of text, which is light on a dark page. */
const ink = (colour) => (colour === "#000000" ? "currentColor" : colour);

const isWhole = (numbers) => numbers.every((v) => Number.isInteger(v));

/** Four or more ticks between a and b. */
function ticksOf(a, b, room, whole) {
  const found = ticks(a, b, Math.max(4, Math.min(7, Math.round(room / 60))));
  return whole ? found.filter((v) => Number.isInteger(v)) : found;
}

/** Powers of ten, with halves where there are few, between a and b. */
function logTicks(a, b) {
  const from = Math.floor(Math.log10(a)), to = Math.ceil(Math.log10(b)), all = [];
  const steps = to - from <= 2 ? [1, 2, 5] : [1];
  for (let e = from; e <= to; e++) for (const s of steps) all.push(s * 10 ** e);
  return all.filter((v) => v >= a * 0.999 && v <= b * 1.001);
}

/** A frame with ticks, labels and a grid in px: { X, Y, parts, width, height, left, bottom }. `names`: [value, text]. */
function frame({ width, height, x, y, xLabel, yLabel, whole = false, names = null, log = false }) {
  const yTicks = log ? logTicks(...y) : ticksOf(y[0], y[1], height, false);
  const left = Math.ceil(Math.max(20, ...yTicks.map((v) => textWidth(format(v))))) + 8 + (yLabel ? LINE + 2 : 0);
  const bottom = height - (xLabel ? 38 : 22), top = 8, right = width - 10;
  const X = (v) => left + ((v - x[0]) / (x[1] - x[0] || 1)) * (right - left);
  const share = log ? (v) => Math.log(v / y[0]) / Math.log(y[1] / y[0]) : (v) => (v - y[0]) / (y[1] - y[0] || 1);
  const Y = (v) => bottom - share(v) * (bottom - top);
  const parts = [];
  for (const v of yTicks) {
    parts.push(svg("path", { d: `M${left} ${Y(v)}H${right}`, class: "grid" }));
    parts.push(words(format(v), left - 6, Y(v), { "text-anchor": "end", "dominant-baseline": "central" }));
  }
  const marks = names ?? ticksOf(x[0], x[1], right - left, whole).map((v) => [v, format(v)]);
  const widest = Math.max(...marks.map(([, text]) => textWidth(text))) + 6;
  const every = Math.max(1, Math.ceil((widest * (marks.length - 1)) / (right - left))); // as many as have room
  marks.forEach(([v, text], i) => {
    parts.push(svg("path", { d: `M${X(v)} ${bottom}v4`, class: "axis" }));
    if (i % every) return;
    const half = textWidth(text) / 2, at = Math.min(Math.max(X(v), half), width - half);
    parts.push(words(text, at, bottom + 15, { "text-anchor": "middle" }));
  });
  parts.push(svg("path", { d: `M${left} ${top}V${bottom}H${right}`, class: "axis" }));
  if (xLabel) parts.push(words(xLabel, (left + right) / 2, height - 5, { "text-anchor": "middle", class: "label" }));
  if (yLabel) {
    const middle = (top + bottom) / 2;
    const place = { "text-anchor": "middle", class: "label", transform: `rotate(-90 11 ${middle})` };
    parts.push(words(yLabel, 11, middle, place));
  }
  return { X, Y, parts, left, right, top, bottom };
}

/** The height of a chart in px: as tall as an image beside it, if there is one, else as `usual`. */
function heightBeside(el, usual) {
  const mine = el.closest("figure"), stages = [...(mine?.parentElement?.querySelectorAll("figure.pixels .stage") ?? [])];
  const beside = stages.find((stage) => Math.abs(stage.closest("figure").offsetTop - mine.offsetTop) < 2);
  if (!(beside?.clientHeight > 100)) return usual;
  return Math.max(beside.clientHeight - (el.querySelector(".legend")?.offsetHeight ?? 20) - 4, 230);
}

/** A chart's width, as wide as its panel: its units are px, so that text has its size at any width. */
export const widthOf = (el) => Math.max(200, Math.floor(el.clientWidth) || 320);

/** Where a label of an axis is too long for it, the legend above has room for it. */
function fitted(text, room) {
  if (textWidth(text) <= room) return text;
  let cut = text;
  while (cut.length > 4 && textWidth(`${cut}…`) > room) cut = cut.slice(0, -1);
  return `${cut}…`;
}

export function lines(first, { tip }) {
  const el = attributes(html("div", { className: "drawing chart" }), { role: "application" });
  let panel = first, charts = [], cursor = 0; // charts: { sheet, X, cross }
  el.tabIndex = 0;
  const xName = (i) => {
    const name = panel.x_names[i];
    return name ? name : `${panel.x_label ? `${panel.x_label}: ` : ""}${format(panel.x[i])}`;
  };
  const describe = (i) => [xName(i), ...panel.series.map((s) => {
    const several = panel.series.length > 1 ? `${s.name}: ` : "";
    return several + measured(s.y[i], s.unit.length <= 24 ? s.unit : "");
  })];
  const hover = (i, e, isSpoken) => {
    cursor = i;
    tip.show(() => {
      if (!charts.length || !el.isConnected) return null;
      const index = clamp(i, panel.x.length), box = charts[0].sheet.getBoundingClientRect();
      charts.forEach((c) => {
        c.cross.setAttribute("d", `M${c.X(panel.x[index])} ${c.top}V${c.bottom}`);
        c.cross.removeAttribute("hidden");
      });
      const x = box.left + (charts[0].X(panel.x[index]) * box.width) / charts[0].width;
      return [describe(index), x, e ? e.clientY : box.top + box.height / 3];
    }, isSpoken);
  };
  const leave = () => {
    tip.hide();
    charts.forEach((c) => c.cross.setAttribute("hidden", ""));
  };
  const nearest = (e) => {
    if (!charts.length) return;
    const box = charts[0].sheet.getBoundingClientRect(), x = ((e.clientX - box.left) / box.width) * charts[0].width;
    const far = panel.x.map((v) => Math.abs(charts[0].X(v) - x));
    hover(far.indexOf(Math.min(...far)), e, false);
  };
  el.addEventListener("pointermove", nearest);
  el.addEventListener("pointerdown", nearest);
  el.addEventListener("pointerleave", leave);
  el.addEventListener("focus", () => el.matches(":focus-visible") && hover(cursor, null, true));
  el.addEventListener("blur", leave);
  el.addEventListener("keydown", (e) => {
    const steps = arrow(e);
    if (steps) hover(clamp(cursor + steps[1] - steps[0], panel.x.length), null, true);
  });
  const paint = (now) => {
    panel = now;
    const units = [...new Set(now.series.map((s) => s.unit))], width = widthOf(el);
    const colourOf = new Map(now.series.map((s, i) => [s.name, ink(now.colours[i % now.colours.length])]));
    const usual = Math.min(Math.max(width * 0.66, 190), 340);
    const height = Math.round(units.length > 1 ? Math.max(120, width * 0.36) : heightBeside(el, usual));
    const ends = now.x.length > 1 ? [now.x[0], now.x.at(-1)] : [now.x[0] - 1, now.x[0] + 1];
    charts = units.map((unit, u) => {
      const mine = now.series.filter((s) => s.unit === unit);
      const all = mine.flatMap((s) => s.y).filter(Number.isFinite);
      let low = Math.min(...all), high = Math.max(...all);
      if (high === low && low > 0) low = 0;
      if (now.log) low = Math.max(low, high / 1e6, 1e-12);
      else if (low > 0 && high - low > 0.3 * high) low = 0; // from 0, unless that would flatten the curves
      else if (low < 0 || high - low > 0) low -= low === 0 ? 0 : (high - low) * 0.06;
      if (high === low) high = low + (Math.abs(low) || 1);
      if (!now.log) high += (high - low) * 0.05;
      const isLast = u === units.length - 1, label = `${unit}${now.log ? " (logarithmic)" : ""}`;
      const drawn = frame({
        width, height, x: ends, y: [low, high], xLabel: isLast ? fitted(now.x_label, width - 60) : "",
        yLabel: units.length > 1 ? "" : fitted(label, height - 30), whole: isWhole(now.x), log: now.log,
        names: now.x_names.length ? now.x.map((v, i) => [v, now.x_names[i]]) : null,
      });
      const { X, Y, parts, top, bottom } = drawn;
      if (now.mark !== null) parts.push(svg("path", { d: `M${X(now.mark)} ${top}V${bottom}`, class: "at" }));
      for (const { name, y } of mine) {
        const stroke = colourOf.get(name), isDashed = now.dashed.includes(name);
        const style = isDashed ? { "stroke-width": 2, "stroke-dasharray": "5 5" } : { "stroke-width": now.dashed.length ? 4 : 2 };
        const path = y.map((v, j) => `${X(now.x[j]).toFixed(1)},${Y(now.log ? Math.max(v, low) : v).toFixed(1)}`);
        parts.push(svg("polyline", { points: path.join(" "), fill: "none", stroke, ...style }));
        if (y.length <= 24) {
          for (const point of path) {
            const [cx, cy] = point.split(",");
            parts.push(svg("circle", { cx, cy, r: 2.6, fill: stroke }));
          }
        }
      }
      const cross = svg("path", { class: "cross", hidden: "" });
      const sheet = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, "aria-hidden": "true" }, ...parts, cross);
      const names = mine.map((s) => (units.length > 1 && s.unit !== s.name ? `${s.name} (${s.unit})` : s.name));
      const key = legend(names, mine.map((s) => colourOf.get(s.name)));
      return { sheet, key, X, cross, top, bottom, width };
    });
    el.setAttribute("aria-label", `${now.title}. Arrow keys read the values.`);
    el.replaceChildren(...charts.flatMap((c) => [c.key, c.sheet]));
  };
  return { el, paint };
}

/** An arrow of px; one too short for a head has none. */
function headed(x, y, x2, y2, stroke) {
  const length = Math.hypot(x2 - x, y2 - y), [u, v] = [(x2 - x) / length, (y2 - y) / length];
  const line = svg("line", { x1: x, y1: y, x2, y2, stroke, "stroke-width": 1.6 });
  if (!(length > 9)) return [line];
  const corner = (side) => `${x2 - 7 * u - side * 3.5 * v},${y2 - 7 * v + side * 3.5 * u}`;
  return [line, svg("polygon", { points: `${x2},${y2} ${corner(1)} ${corner(-1)}`, fill: stroke })];
}

/** Points with arrows. The one nearest to the mouse is chosen; arrow keys choose the next or the previous one. */
export function points(first, { move, tip }) {
  const el = attributes(html("div", { className: "drawing chart" }), { role: "application" });
  let panel = first, at = [], sheet = null, chosen = first.mark ?? 0;
  const describe = (i) => {
    const [x, y] = [panel.xy[2 * i], panel.xy[2 * i + 1]], unit = panel.unit;
    return [panel.groups[panel.group[i]] ?? `point ${i}`,
      `${panel.x_label || "x"}: ${measured(x, unit)}`, `${panel.y_label || "y"}: ${measured(y, unit)}`];
  };
  const hover = (i, isSpoken) => tip.show(() => {
    if (!sheet?.isConnected || !at[i]) return null;
    const box = sheet.getBoundingClientRect();
    return [describe(i), box.left + at[i][0], box.top + at[i][1]];
  }, isSpoken);
  const to = (i) => {
    if (i === chosen) return;
    chosen = i;
    if (panel.pointer) move({ [panel.pointer]: i });
  };
  const nearest = (e) => {
    if (!sheet) return;
    const box = sheet.getBoundingClientRect(), p = [e.clientX - box.left, e.clientY - box.top];
    const far = at.map(([x, y]) => (x - p[0]) ** 2 + (y - p[1]) ** 2), least = Math.min(...far);
    if (least > 900) return tip.hide();
    to(far.indexOf(least));
    hover(chosen, false);
  };
  el.addEventListener("pointermove", (e) => e.pointerType !== "touch" && nearest(e));
  el.addEventListener("click", nearest);
  el.addEventListener("pointerleave", () => tip.hide());
  el.addEventListener("focus", () => el.matches(":focus-visible") && hover(chosen, true));
  el.addEventListener("blur", () => tip.hide());
  el.tabIndex = 0;
  el.addEventListener("keydown", (e) => {
    const steps = arrow(e);
    if (!steps) return;
    to(clamp(chosen + steps[0] + steps[1], at.length));
    hover(chosen, true);
  });
  const paint = (now, pointer) => {
    panel = now;
    chosen = pointer ?? now.mark ?? chosen;
    const width = widthOf(el), height = Math.round(heightBeside(el, Math.min(Math.max(width * 0.75, 220), 400)));
    const drawn = frame({
      width, height, x: now.limits[0], y: now.limits[1], xLabel: fitted(now.x_label, width - 60),
      yLabel: fitted(now.y_label, height - 40),
    });
    const { X, Y, parts } = drawn;
    at = now.group.map((_, i) => [X(now.xy[2 * i]), Y(now.xy[2 * i + 1])]);
    const colourOf = (i) => ink(now.colours[now.group[i] % now.colours.length]);
    now.trails.forEach((trail, i) => {
      const path = trail.map((v, j) => (j % 2 ? Y(v) : X(v)).toFixed(1)).join(" ");
      parts.push(svg("polyline", { points: path, fill: "none", stroke: colourOf(i), "stroke-opacity": 0.4, "stroke-width": 1.2 }));
    });
    now.group.forEach((_, i) => {
      const stroke = colourOf(i), [x, y] = at[i];
      const [x2, y2] = [X(now.xy[2 * i] + now.arrows[2 * i]), Y(now.xy[2 * i + 1] + now.arrows[2 * i + 1])];
      parts.push(...headed(x, y, x2, y2, stroke));
      parts.push(svg("circle", { cx: x, cy: y, r: 3.5, fill: stroke }));
      if (i === now.mark) parts.push(svg("circle", { cx: x, cy: y, r: 8, class: "ring" }));
    });
    el.dataset.pointer = now.pointer ?? "";
    el.setAttribute("aria-label", `${now.title}. Arrow keys choose a point.`);
    sheet = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, "aria-hidden": "true" }, ...parts);
    el.replaceChildren(legend(now.groups, now.colours), sheet);
  };
  return { el, paint };
}
