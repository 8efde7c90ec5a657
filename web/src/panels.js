// Panels: each function takes the panel's first message and { move, id, tip, figure }, and returns
// { el, paint(panel, pointer) }. A panel with a pointer is also a control: pointing at it moves the state.
import { ticks } from "d3-array";
import { arrow, attributes, clamp, format, html, svg, textWidth, words } from "./dom.js";
import { map } from "./map_panel.js";

const TALLEST = 520; // px
const LINE = 14; // px from one line of small text to the next

/** A number with its unit; a "share of ..." in per cent. */
function measured(value, unit) {
  if (/^share\b/.test(unit)) return `${format(100 * value)}%${unit.slice("share".length)}`;
  return unit ? `${format(value)} ${unit}` : format(value);
}

// ---------------------------------------------------------------- the value at the pointer

/** A label at the pointer. With the keyboard, its text is read out as well. */
export class Tip {
  constructor(root) {
    this.root = root;
    this.el = attributes(html("div", { className: "tip", hidden: true }), { "aria-hidden": "true" });
    this.spoken = attributes(html("div", { className: "spoken" }), { "aria-live": "polite" });
    this.again = null;
  }

  /** `describe()` gives [lines of text, x, y in the window], or null; it is asked again whenever the view changes. */
  show(describe, isSpoken = false) {
    this.again = describe;
    const found = describe();
    if (!found) return this.hide();
    const [lines, x, y] = found, box = this.root.getBoundingClientRect();
    this.el.replaceChildren(...lines.map((textContent) => html("div", { textContent })));
    this.el.hidden = false;
    const { offsetWidth: w, offsetHeight: h } = this.el;
    const left = Math.min(Math.max(x - box.left + 14, 2), Math.max(box.width - w - 2, 2));
    const above = y - box.top - h - 12;
    this.el.style.cssText = `left:${left}px;top:${above > 2 ? above : y - box.top + 18}px`;
    if (isSpoken) this.spoken.textContent = lines.join(", ");
  }

  refresh() {
    if (this.again) this.show(this.again, this.root.contains(document.activeElement) && this.spoken.textContent !== "");
  }

  hide() {
    this.again = null;
    this.el.hidden = true;
    this.spoken.textContent = "";
  }
}

// ---------------------------------------------------------------- images and tables

/** Labels of a table's rows or columns, as many as have room; `size`: px of that side of the table. */
function showNames(el, labels, side, size) {
  const isLong = side === "rows" && Math.max(...labels.map((l) => textWidth(l))) > 110 && size / labels.length > 2 * LINE;
  el.classList.toggle("long", isLong);
  const isUpright = side === "columns" && labels.length * (Math.max(...labels.map((l) => textWidth(l))) + 6) > size;
  const need = side === "rows" || isUpright ? LINE : Math.max(...labels.map((l) => textWidth(l))) + 6;
  const every = Math.max(1, Math.ceil((need * labels.length) / Math.max(size, 1)));
  const shown = labels.flatMap((label, i) => {
    if (i % every) return [];
    const one = html("span", { textContent: label });
    one.style[side === "rows" ? "top" : "left"] = `${(100 * (i + 0.5)) / labels.length}%`;
    return [one];
  });
  el.classList.toggle("upright", isUpright);
  const longest = Math.min(Math.max(...labels.map((l) => textWidth(l))), isLong ? 190 : 150);
  if (side === "rows") el.style.width = `${longest + 6}px`;
  else el.style.height = `${isUpright ? longest + 6 : LINE}px`;
  el.replaceChildren(...shown);
}

/** A canvas of cells. Pointing at a cell or an arrow key moves the pointer; a click pins it, the next one releases it;
 * on a touch screen a tap moves it. A panel without a pointer shows its values in the same way. */
function pixels(first, { move, tip, id, link }) {
  const canvas = html("canvas"), mark = html("div", { className: "mark" }), probe = html("div", { className: "probe" });
  const frame = html("div", { className: "echo", hidden: true });
  const stage = html("div", { className: "stage" }, canvas, mark, probe, frame);
  const rows = html("div", { className: "names rows" }), columns = html("div", { className: "names columns" });
  const sheet = html("div", { className: "sheet" }, columns, rows, stage);
  const hint = html("div", { className: "axis-names" }), key = html("div", { className: "key" });
  let panel = first, pointer = [0, 0], pinned = false, values = null, rgb = null, at = null; // at: [row, column], not whole

  const grid = () => (panel.pointer || panel.table === null ? panel.cells : panel.table);
  const to = (row, column) => {
    const next = [clamp(row, panel.cells[0]), clamp(column, panel.cells[1])];
    if (next[0] === pointer[0] && next[1] === pointer[1]) return;
    pointer = next;
    move({ [panel.pointer]: pointer });
  };
  const named = (labels, name, share, count) => {
    const label = labels.length && labels[Math.min(Math.floor(share * labels.length), labels.length - 1)];
    if (labels.length) return `${name} ${label}`;
    const index = Math.min(Math.floor(share * count), count - 1), isPlace = /^(row|column)\b/.test(name);
    return name.replace(/^[^;]*/, (word) => `${word} ${isPlace ? index + 1 : index}`); // places are counted from 1
  };
  /** What lies at a place, given as shares of the height and the width. */
  const describe = (down, across) => {
    const size = panel.table ?? panel.cells, [height, width] = [panel.height, panel.width];
    const place = panel.table || panel.pointer || panel.rows.length
      ? `${named(panel.rows, panel.axes[0], down, size[0])}, ${named(panel.columns, panel.axes[1], across, size[1])}`
      : `pixel in row ${Math.floor(down * height) + 1}, column ${Math.floor(across * width) + 1}`;
    if (values) {
      const [r, c] = [clamp(Math.floor(down * size[0]), size[0]), clamp(Math.floor(across * size[1]), size[1])];
      return [place, measured(values[r * size[1] + c], panel.unit)];
    }
    const i = 3 * (clamp(Math.floor(down * height), height) * width + clamp(Math.floor(across * width), width));
    return [place, `red ${rgb[i]}, green ${rgb[i + 1]}, blue ${rgb[i + 2]}`];
  };
  const hover = ([down, across], isSpoken) => {
    at = [down, across];
    const [n, m] = grid(), [r, c] = [clamp(Math.floor(down * n), n), clamp(Math.floor(across * m), m)];
    if (shape() && n * m > 1) link?.(self, { shape: shape(), top: r / n, left: c / m, height: 1 / n, width: 1 / m });
    tip.show(() => {
      if (!at || !canvas.isConnected) return null;
      const box = canvas.getBoundingClientRect();
      return [describe(...at), box.left + at[1] * box.width, box.top + at[0] * box.height];
    }, isSpoken);
  };
  const shares = (e) => {
    const box = canvas.getBoundingClientRect();
    return [(e.clientY - box.top) / box.height, (e.clientX - box.left) / box.width].map((v) => Math.min(Math.max(v, 0), 0.9999));
  };
  const point = (e) => {
    const place = shares(e);
    hover(place, false);
    if (panel.pointer) to(Math.floor(place[0] * panel.cells[0]), Math.floor(place[1] * panel.cells[1]));
  };
  /** The shape of an image of the scene; null for a table of anything else. */
  const shape = () => (panel.rows.length || panel.columns.length ? null : panel.width / panel.height);
  /** Frame the place that is pointed at in another panel, if both show the same scene. */
  const echo = (place) => {
    frame.hidden = !place || !shape() || Math.abs(place.shape / shape() - 1) > 0.05;
    if (frame.hidden) return;
    for (const side of ["top", "left", "height", "width"]) frame.style[side] = `${100 * place[side]}%`;
  };
  const leave = () => {
    at = null;
    tip.hide();
    link?.(self, null);
  };
  const pin = (isPinned) => stage.classList.toggle("pinned", (pinned = isPinned));
  canvas.addEventListener("pointermove", (e) => {
    if (e.pointerType === "touch") return;
    if (pinned) hover(shares(e), false);
    else point(e);
  });
  canvas.addEventListener("pointerdown", (e) => {
    if (e.pointerType === "touch") return;
    if (panel.pointer) pin(!pinned);
    point(e);
  });
  canvas.addEventListener("click", (e) => { // a tap; the finger may scroll the page from here too
    if (e.pointerType !== "touch") return;
    if (panel.pointer) pin(true);
    point(e);
  });
  canvas.addEventListener("pointerleave", (e) => {
    if (e.pointerType !== "touch") leave();
  });

  // the keyboard: the state's cell, or a frame of our own where the panel has no pointer
  let cursor = [0, 0];
  const centre = () => {
    const [r, c] = panel.pointer ? pointer : cursor, [n, m] = panel.pointer ? panel.cells : grid();
    return [(clamp(r, n) + 0.5) / n, (clamp(c, m) + 0.5) / m];
  };
  const showProbe = () => {
    const [n, m] = grid(), isShown = !panel.pointer && canvas.matches(":focus-visible");
    probe.hidden = !isShown;
    probe.style.cssText = `top:${(100 * cursor[0]) / n}%;left:${(100 * cursor[1]) / m}%;height:${100 / n}%;width:${100 / m}%`;
  };
  canvas.tabIndex = 0;
  canvas.addEventListener("keydown", (e) => {
    const steps = arrow(e);
    if (!steps) return e.key === "Escape" ? tip.hide() : undefined;
    if (panel.pointer) to(pointer[0] + steps[0], pointer[1] + steps[1]);
    else cursor = [clamp(cursor[0] + steps[0], grid()[0]), clamp(cursor[1] + steps[1], grid()[1])];
    showProbe();
    hover(centre(), true);
  });
  canvas.addEventListener("focus", () => {
    if (!canvas.matches(":focus-visible")) return;
    showProbe();
    hover(centre(), true);
  });
  canvas.addEventListener("blur", () => {
    leave();
    showProbe();
  });
  const about = html("span", { className: "spoken", id: id("about") });
  attributes(canvas, { role: "application", "aria-describedby": about.id });

  const paint = (now, newPointer) => {
    panel = now;
    if (newPointer) pointer = newPointer;
    const { width, height, data } = now, image = new ImageData(width, height), rgba = image.data;
    rgb = new Uint8Array(data.buffer, data.byteOffset ?? 0, data.byteLength);
    values = now.values && new DataView(now.values.buffer, now.values.byteOffset ?? 0, now.values.byteLength);
    values &&= Float32Array.from({ length: values.byteLength / 4 }, (_, i) => values.getFloat32(4 * i, true));
    for (let i = 0, j = 0; i < rgb.length; i += 3, j += 4) {
      rgba[j] = rgb[i], rgba[j + 1] = rgb[i + 1], rgba[j + 2] = rgb[i + 2], rgba[j + 3] = 255;
    }
    if (canvas.width !== width || canvas.height !== height) canvas.width = width, canvas.height = height;
    canvas.getContext("2d").putImageData(image, 0, 0);
    canvas.classList.toggle("smooth", !now.values); // a picture, not a table

    const isTable = Boolean(now.values) && (now.rows.length > 0 || now.columns.length > 0);
    const aspect = isTable ? Math.min(Math.max(width / height, 0.5), 2.2) : width / height;
    stage.style.aspectRatio = String(aspect);
    stage.style.maxWidth = `${Math.round(TALLEST * aspect)}px`;
    rows.hidden = !now.rows.length;
    columns.hidden = !now.columns.length;
    if (now.rows.length) showNames(rows, now.rows, "rows", 100);
    const wide = stage.clientWidth || 240;
    if (now.rows.length) showNames(rows, now.rows, "rows", wide / aspect);
    if (now.columns.length) showNames(columns, now.columns, "columns", wide);
    hint.hidden = !isTable || now.axes.join() === "row,column";
    hint.textContent = `${now.axes[0]} ↓   ${now.axes[1]} →`;

    canvas.dataset.pointer = now.pointer ?? "";
    canvas.setAttribute("aria-label", now.title);
    about.textContent = now.pointer ? "Arrow keys move the pointer." : "Arrow keys read the values.";
    const spot = now.mark && (now.pointer ? pointer : now.mark); // the pointer moves at once, before the answer
    mark.hidden = !spot;
    if (spot) {
      const [down, across] = [100 / now.cells[0], 100 / now.cells[1]];
      mark.style.cssText = `top:${spot[0] * down}%;left:${spot[1] * across}%;height:${down}%;width:${across}%`;
    }
    key.hidden = !now.key && !now.note;
    key.replaceChildren();
    if (now.key) {
      const strip = html("i");
      strip.style.background = `linear-gradient(to right, ${now.colours.join(",")})`;
      key.append(html("span", { textContent: now.key[0] }), strip, html("span", { textContent: now.key[1] }));
    }
    const remark = [now.key ? now.unit : "", now.note].filter(Boolean).join("; ");
    if (remark) key.append(html("small", { textContent: remark }));
    showProbe();
  };
  const self = { el: html("div", {}, hint, sheet, key, about), paint, echo };
  return self;
}

// ---------------------------------------------------------------- charts

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
const widthOf = (el) => Math.max(200, Math.floor(el.clientWidth) || 320);

/** Where a label of an axis is too long for it, the legend above has room for it. */
function fitted(text, room) {
  if (textWidth(text) <= room) return text;
  let cut = text;
  while (cut.length > 4 && textWidth(`${cut}…`) > room) cut = cut.slice(0, -1);
  return `${cut}…`;
}

function lines(first, { tip }) {
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
function points(first, { move, tip }) {
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

// ---------------------------------------------------------------- diagrams

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
