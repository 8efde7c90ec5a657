// Images and tables of numbers, with the value at the pointer. A panel is a function of its first message and
// { move, id, tip, figure } that returns { el, paint(panel, pointer) }. A panel with a pointer is also a control:
// pointing at it moves the state.
import { arrow, attributes, clamp, format, html, textWidth } from "./dom.js";

const TALLEST = 520; // px
export const LINE = 14; // px from one line of small text to the next

/** A number with its unit; a "share of ..." in per cent. */
export function measured(value, unit) {
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

/** The names of groups of rows or columns, each at a line as long as the group. groups: [name, count]. */
function showGroups(el, groups, side) {
  const total = groups.reduce((sum, [, count]) => sum + count, 0), [start, length] = side === "rows" ? ["top", "height"] : ["left", "width"];
  let at = 0;
  el.replaceChildren(...groups.map(([name, count]) => {
    const one = html("div", { className: "group" }, html("span", { textContent: name }));
    one.style[start] = `calc(${(100 * at) / total}% + 1px)`;
    one.style[length] = `calc(${(100 * count) / total}% - 2px)`;
    at += count;
    return one;
  }));
  if (side === "rows") el.style.width = `${Math.ceil(Math.max(...groups.map(([name]) => textWidth(name)))) + 9}px`;
  else el.style.height = `${LINE + 6}px`;
}

/** A canvas of cells. Pointing at a cell or an arrow key moves the pointer; a click pins it, the next one releases it;
 * on a touch screen a tap moves it. A panel without a pointer shows its values in the same way. */
export function pixels(first, { move, tip, id, link }) {
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
    if (labels.length) return `${name} ${label}`.trim();
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
    const aspect = now.aspect ?? (isTable ? Math.min(Math.max(width / height, 0.5), 2.2) : width / height);
    stage.style.aspectRatio = String(aspect);
    stage.style.maxWidth = `${Math.round(TALLEST * aspect)}px`;
    rows.hidden = !now.rows.length;
    columns.hidden = !now.columns.length;
    const { rows: rowGroups, columns: columnGroups } = now.groups ?? {}; // instead of all names, where they are many
    if (rowGroups) showGroups(rows, rowGroups, "rows");
    else if (now.rows.length) showNames(rows, now.rows, "rows", 100);
    const wide = stage.clientWidth || 240;
    if (now.rows.length && !rowGroups) showNames(rows, now.rows, "rows", wide / aspect);
    if (columnGroups) showGroups(columns, columnGroups, "columns");
    else if (now.columns.length) showNames(columns, now.columns, "columns", wide);
    hint.hidden = !isTable || !now.axes[0] || now.axes.join() === "row,column";
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
