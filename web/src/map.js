// The map of the model: an overview from the prompt to the image, and below it the wiring of the box that is open.
// What it shows is data: see fluxedu/instruments/wiring.py. Sizes are CSS pixels, so text never shrinks with the page.

import { lines } from "./charts.js";
import { html, svg } from "./dom.js";
import { Tip } from "./tables.js";
import { COLOURS } from "./views/panels.js";

const icon = (d) => svg("svg", { width: 12, height: 12, viewBox: "0 0 12 12", class: "icon", "aria-hidden": "true" }, svg("path", { d }));
const clamp = (x, low, high) => Math.min(Math.max(x, low), high);
const isCalm = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

// ---------------------------------------------------------------- the wiring

/** Every box by id: { box, parent, depth }; the templates' boxes under the names of their blocks. */
function indexOf(wiring) {
  const found = new Map();
  const add = (box, parent) => {
    found.set(box.id, { box, parent });
    if (box.inside) forEachBox(groupOf(wiring, box), (inner) => add(inner, box.id));
  };
  for (const box of wiring.boxes) add(box, null);
  return found;
}

const filled = new WeakMap(); // box -> its group with the block's name filled in

function groupOf(wiring, box) {
  const { inside } = box;
  if (!inside.template) return inside;
  if (!filled.has(box)) {
    const text = JSON.stringify(wiring.templates[inside.template]).replaceAll("{b}", inside.b);
    filled.set(box, JSON.parse(text));
  }
  return filled.get(box);
}

function forEachBox(group, visit) {
  for (const row of group.rows) for (const cell of row) (cell.rows ? forEachBox(cell, visit) : visit(cell));
  for (const plus of group.pluses ?? []) visit(plus);
}

// ---------------------------------------------------------------- layouts: { width, height, rects, under, over }

const centre = (r) => [r.x + r.w / 2, r.y + r.h / 2];
const down = ([x1, y1], [x2, y2]) => `M${x1} ${y1}C${x1} ${(y1 + y2) / 2} ${x2} ${(y1 + y2) / 2} ${x2} ${y2}`;
const across = ([x1, y1], [x2, y2]) => `M${x1} ${y1}C${(x1 + x2) / 2} ${y1} ${(x1 + x2) / 2} ${y2} ${x2} ${y2}`;
const TEXT_BAND = 9, IMAGE_BAND = 14;

/** The overview: left to right where there is room, else top to bottom. Lanes: text, CLIP, time, image. */
function overview(wiring, width) {
  return width >= 880 ? wide(wiring, width) : narrow(wiring, width);
}

const FULL_TITLE = 108; // px that "Double-stream / blocks" needs
const blocksOf = (box) => box.inside.rows.map(([block]) => block);
const LANES = [26, 70, 114, 160], BOX = 38;

function wide(wiring, width) {
  const c = clamp(width * 0.066, 72, 92), g = clamp(width * 0.014, 8, 22), pad = 3;
  const height = 252, rects = new Map(), labels = [];
  const get = (id) => wiring.boxes.find((box) => box.id === id);
  const counts = ["double", "single"].map((kind) => blocksOf(get(kind)).length);
  const rest = width - 2 * pad - 9 * c - 10 * g, total = counts[0] + counts[1];
  const tile = (rest - 16) / total - 3, tiled = tile >= 11;
  const share = [0, 1].map((i) => (tiled ? 8 + counts[i] * ((rest - 16) / total) : rest / 2));
  if (tiled && rest > 2 * FULL_TITLE) { // few blocks of a kind still have room for their title
    share[0] = clamp(share[0], FULL_TITLE, rest - FULL_TITLE);
    share[1] = rest - share[0];
  }
  const x = [];
  for (let column = 0, at = pad; column < 11; column++) {
    x.push(at);
    at += (column === 4 ? share[0] : column === 5 ? share[1] : c) + g;
  }
  for (const box of wiring.boxes) {
    const [column, lane, lanes] = box.place, y = LANES[lane];
    if (box.id === "double" || box.id === "single") {
      const i = column - 4, frame = { x: x[column], y: 4, w: share[i], h: 224 };
      rects.set(box.id, { ...frame, box, frame: true, lines: tiled ? frameTitle(box, counts[i], share[i]) : null });
      if (tiled) {
        const pitch = (share[i] - 8) / counts[i];
        blocksOf(box).forEach((block, n) => {
          const r = { x: x[column] + 5.5 + n * pitch, y: 42, w: pitch - 3, h: 180 };
          rects.set(block.id, { ...r, box: block, short: String(n), tile: true });
        });
      }
    } else {
      const tall = lanes > 1 && column > 4, h = lane === 3 ? 64 : lanes > 1 ? LANES[1] - LANES[0] + BOX : BOX;
      rects.set(box.id, { x: x[column], y: tall ? y - 10 : y, w: c, h: tall ? h + 20 : h, box });
    }
  }
  const R = (id) => rects.get(id), right = (r) => [r.x + r.w, r.y + r.h / 2], left = (r) => [r.x - 1, r.y + r.h / 2];
  const over = wiring.flow.map(([a, b]) => {
    const to = left(R(b)), from = right(R(a));
    const r = R(a), t = R(b); // an arrow leaves a tall box at the height of a lower or higher one
    if (r.h > t.h && Math.abs(from[1] - to[1]) < r.h / 2) from[1] = to[1];
    else if (t.h > r.h && Math.abs(from[1] - to[1]) < t.h / 2) to[1] = from[1];
    return { d: across(from, to), kind: R(a).box.kind, ends: [a, b] };
  });
  const [d, s, final] = [R("double"), R("single"), R("final")], middle = centre(final)[1];
  const ty = centre(R("text"))[1], iy = centre(R("img_in"))[1], join = 156;
  const tEnd = s.x + s.w, under = [
    { d: `${across(right(R("text")), [d.x, ty])}H${d.x + d.w}${curve(d.x + d.w, ty, s.x, join)}H${tEnd}`, kind: "text", w: TEXT_BAND },
    { d: `${across(right(R("img_in")), [d.x, iy])}H${d.x + d.w}${curve(d.x + d.w, iy, s.x, join + 12)}H${tEnd}${curve(tEnd, join + 12, final.x, middle)}`, kind: "image", w: IMAGE_BAND },
    { d: `M${right(R("vec.all")).join(" ")}H${final.x - 1}`, kind: "time", w: 2.5, head: true },
  ];
  const [solver, latent] = [R("solver"), R("sample.x")], bottom = 244;
  const [sx] = centre(solver), [lx] = centre(latent);
  over.push({ d: `M${sx} ${solver.y + solver.h}V${bottom - 8}Q${sx} ${bottom} ${sx - 8} ${bottom}H${lx + 8}Q${lx} ${bottom} ${lx} ${bottom - 8}V${latent.y + latent.h + 1}`, kind: "image", dashed: true, ends: ["solver", "sample.x"] });
  labels.push({ text: "next step", x: (sx + lx) / 2, y: bottom - 5 });
  return { width, height, rects, under, over, labels };
}

const fall = (x1, y1, x2, y2) => `C${x1} ${(y1 + y2) / 2} ${x2} ${(y1 + y2) / 2} ${x2} ${y2}`;
const curve = (x1, y1, x2, y2) => `C${(x1 + x2) / 2} ${y1} ${(x1 + x2) / 2} ${y2} ${x2} ${y2}`;

function frameTitle(box, n, width) {
  if (width > 150) return [box.title];
  return width >= FULL_TITLE ? box.title.split(" ") : [`${box.id === "double" ? "Double" : "Single"}${width > 74 ? ` × ${n}` : ""}`];
}

const ROW = 32; // px from one block to the next

function narrow(wiring, width) {
  const pad = 3, margin = 14, pitch = (width - pad - margin) / 4, gap = 22, h = 42, rects = new Map(), labels = [];
  const get = (id) => wiring.boxes.find((box) => box.id === id);
  const tall = 66; // of the row with the latent, which shows its picture
  const top = [4, 4 + h + gap, 4 + 2 * (h + gap), 4 + 2 * (h + gap) + tall + gap];
  let y = top[3] + h + gap;
  for (const kind of ["double", "single"]) { // one block per row, so that both streams pass through every block
    const box = get(kind), blocks = blocksOf(box), w = width - pad - margin, tiled = blocks.length <= 24;
    const frame = tiled ? 28 + blocks.length * ROW : h;
    rects.set(box.id, { x: pad, y, w, h: frame, box, frame: tiled, lines: [tiled ? box.title : `${blocks.length} ${box.title.toLowerCase()}`], start: tiled ? pad + pitch / 2 + 12 : null });
    if (tiled) blocks.forEach((block, n) => {
      rects.set(block.id, { x: pad + 5, y: y + 26 + n * ROW, w: w - 10, h: ROW - 6, box: block, short: block.id.replace(".", " "), tile: true });
    });
    y += frame + 34;
  }
  const third = (width - pad - margin) / 3;
  const tail = { final: [0, 0, third], "velocity.all": [1, 0, third], solver: [2, 0, third], decoder: [2, 1, third], "sample.image": [1, 1, third] };
  for (const box of wiring.boxes) {
    const [row, lane, lanes] = box.place;
    if (rects.has(box.id)) continue;
    if (tail[box.id]) {
      const [i, line, w] = tail[box.id];
      rects.set(box.id, { x: pad + i * w + 3, y: y + line * (74 + gap), w: w - 10, h: 74, box });
    } else rects.set(box.id, { x: pad + lane * pitch + 2, y: top[row], w: lanes * pitch - 6, h: box.id === "sample.x" ? tall : h, box });
  }
  const R = (id) => rects.get(id), bottom = (r) => [r.x + r.w / 2, r.y + r.h], above = (r) => [r.x + r.w / 2, r.y - 1];
  const over = wiring.flow.map(([a, b]) => {
    const [r, t] = [R(a), R(b)];
    if (Math.abs(r.y - t.y) < 2) return { d: r.x < t.x ? `M${r.x + r.w} ${centre(r)[1]}H${t.x - 1}` : `M${r.x} ${centre(r)[1]}H${t.x + t.w + 1}`, kind: r.box.kind, ends: [a, b] };
    const from = bottom(r), to = above(t);
    if (r.w > t.w && to[0] > r.x && to[0] < r.x + r.w) from[0] = to[0];
    else if (t.w > r.w && from[0] > t.x && from[0] < t.x + t.w) to[0] = from[0];
    return { d: down(from, to), kind: r.box.kind, ends: [a, b] };
  });
  const [d, s, final] = [R("double"), R("single"), R("final")], tx = centre(R("text"))[0], ix = centre(R("img_in"))[0];
  const last = s.y + s.h, join = ix - (TEXT_BAND + IMAGE_BAND) / 2, [fx] = centre(final), vec = R("vec.all");
  const vx = vec.x + vec.w - 12, vf = final.x + final.w - 12; // beside the titles of the frames
  const under = [
    { d: `M${tx} ${R("text").y + h}V${d.y + d.h}${fall(tx, d.y + d.h, join, s.y)}V${last}`, kind: "text", w: TEXT_BAND },
    { d: `M${ix} ${R("img_in").y + h}V${last}${fall(ix, last, fx, final.y)}`, kind: "image", w: IMAGE_BAND },
    { d: `M${vx} ${vec.y + vec.h}V${last}${fall(vx, last, vf, final.y - 1)}`, kind: "time", w: 2.5, head: true },
  ];
  const [solver, latent] = [R("solver"), R("sample.x")], edge = width - 5;
  over.push({ d: `M${solver.x + solver.w} ${centre(solver)[1]}H${edge - 6}Q${edge} ${centre(solver)[1]} ${edge} ${centre(solver)[1] - 6}V${centre(latent)[1] + 6}Q${edge} ${centre(latent)[1]} ${edge - 6} ${centre(latent)[1]}H${latent.x + latent.w + 1}`, kind: "image", dashed: true, ends: ["solver", "sample.x"] });
  return { width, height: y + 2 * (74 + gap) - gap + 6, rects, under, over, labels, stacked: true };
}

/** The width in px that a group can use, if each box has its full width. */
function need(group) {
  const wanted = (cell) => (cell.rows?.length ? need(cell) : 190 * (cell.weight ?? 1));
  const widest = Math.max(...group.rows.map((row) => row.reduce((sum, cell) => sum + wanted(cell), 0)), 190);
  return widest + 46 * (group.rails?.length ?? 0) + 16;
}

/** The wiring inside a box, from top to bottom; residual streams run down the sides. */
function detail(group, width, blockKind) {
  const rails = group.rails ?? [], has = (side) => rails.some((rail) => rail.side === side);
  const left = has("left") ? 46 : 8, right = has("right") ? 46 : 8, rects = new Map(), labels = [];
  const maximum = 176, gap = 26;
  const place = (rows, x, w, y) => {
    for (const row of rows) {
      const total = row.reduce((sum, cell) => sum + (cell.weight ?? 1), 0);
      let at = x, height = 0;
      for (const cell of row) {
        const cw = (w * (cell.weight ?? 1)) / total;
        if (cell.rows) {
          let start = y;
          if (cell.title) labels.push({ text: cell.title, x: at + cw / 2, y: y + 6, strong: true }), (start += 38);
          height = Math.max(height, place(cell.rows, at, cw, start) - y);
        } else {
          const bw = Math.min(cw - 6, maximum), r = { x: at + (cw - bw) / 2, y, w: bw, h: 38, box: cell };
          if (cell.edge === "left" || cell.edge === "both") r.w = r.x + r.w - 4, (r.x = 4);
          if (cell.edge === "right" || cell.edge === "both") r.w = width - 4 - r.x;
          rects.set(cell.id, r);
          height = Math.max(height, 38);
        }
        at += cw;
      }
      y += height + gap;
    }
    return y - gap;
  };
  const height = place(group.rows, left, width - left - right, rails.some((rail) => !rail.from) ? 30 : 10) + 12;
  const R = (id) => rects.get(id), under = [], over = [];
  for (const rail of rails) {
    const isLeft = rail.side === "left", x = isLeft ? 14 : width - 14, mx = isLeft ? 36 : width - 36;
    const side = (r) => (isLeft ? r.x - 1 : r.x + r.w + 1);
    const from = rail.from ? R(rail.from).y + 38 : 0, to = R(rail.to).y;
    rail.kinds.forEach((kind, i) => {
      const w = kind === "text" ? TEXT_BAND : IMAGE_BAND;
      const offset = rail.kinds.length > 1 ? (i ? 1 : -1) * (TEXT_BAND + IMAGE_BAND - w) / 2 : 0;
      under.push({ d: `M${x + offset} ${from}V${to}`, kind, w });
    });
    for (const id of rail.taps) over.push({ d: `M${x} ${centre(R(id))[1]}H${side(R(id))}`, kind: rail.kinds.at(-1), ends: [rail.from, id] });
    if (rail.modulation) {
      const m = R(rail.modulation), lowest = Math.max(...rail.modulates.map((id) => R(id).y)) - 11;
      under.push({ d: `M${side(m)} ${centre(m)[1]}H${mx}V${lowest}`, kind: "time", w: 1.6, thin: true });
      for (const id of rail.modulates) {
        const r = R(id), [cx] = centre(r);
        over.push({ d: `M${mx} ${r.y - 11}H${cx}V${r.y - 1}`, kind: "time", ends: [rail.modulation, id] });
      }
      const name = m.w > 120 ? "modulation vector" : "vec";
      labels.push({ text: name, x: centre(m)[0] + (m.w > 120 ? 58 : 18), y: m.y - 8 });
      over.push({ d: `M${centre(m)[0]} ${m.y - 20}V${m.y - 1}`, kind: "time", ends: ["vec", rail.modulation] });
    }
    for (const plus of (group.pluses ?? []).filter((p) => R(p.at) && isNear(R(p.at), isLeft, width, rails.length))) {
      const r = R(plus.at), y = centre(r)[1];
      rects.set(plus.id, { x: x - 11, y: y - 11, w: 22, h: 22, box: plus, plus: true });
      over.push({ d: `M${side(r)} ${y}H${isLeft ? x + 12 : x - 12}`, kind: rail.kinds.at(-1), ends: [plus.at, plus.id] });
    }
  }
  const row = (r) => r.y;
  for (const [a, b] of group.flow) {
    const [r, t] = [R(a), R(b)];
    if (!r || !t) continue;
    if (row(r) === row(t)) {
      const [from, to] = r.x < t.x ? [r.x + r.w, t.x - 1] : [r.x, t.x + t.w + 1];
      over.push({ d: `M${from} ${centre(r)[1]}H${to}`, kind: r.box.kind, ends: [a, b] });
    } else over.push({ d: longWay(r, t) ?? down([centre(r)[0], r.y + r.h], [centre(t)[0], t.y - 1]), kind: r.box.kind, ends: [a, b] });
  }
  // shift and scale act on the box below them
  for (const { modulates = [] } of rails) {
    for (const id of modulates) {
      const r = R(id), name = id.split(".").at(-1), isGate = name.startsWith("gate");
      const target = [...rects.values()].filter((t) => (isGate ? t.y === r.y && t !== r : t.y > r.y) && sameSide(t, r, width, rails.length) && t.box.kind !== "time" && !t.plus)
        .sort((p, q) => (isGate ? Math.abs(p.x - r.x) - Math.abs(q.x - r.x) : p.y - q.y))[0];
      if (!target) continue;
      if (isGate) {
        const [from, to] = r.x < target.x ? [r.x + r.w, target.x - 1] : [r.x, target.x + target.w + 1];
        over.push({ d: `M${from} ${centre(r)[1]}H${to}`, kind: "time", ends: [id, target.box.id] });
      } else over.push({ d: down([centre(r)[0], r.y + r.h], [centre(target)[0] + clamp(centre(r)[0] - centre(target)[0], -24, 24), target.y - 1]), kind: "time", ends: [id, target.box.id] });
    }
  }
  return { width, height, rects, under, over, labels };
}

/** Past other rows: straight down, then into the side of the box. */
function longWay(r, t) {
  const [x, y] = [centre(r)[0], centre(t)[1]];
  if (t.y - r.y < 130) return null;
  if (x > t.x + 8 && x < t.x + t.w - 8) return `M${x} ${r.y + r.h}V${t.y - 1}`;
  if (x > t.x - 10 && x < t.x + t.w + 10) return null;
  const to = x < t.x ? t.x - 1 : t.x + t.w + 1, turn = x < t.x ? x + 8 : x - 8;
  return `M${x} ${r.y + r.h}V${y - 8}Q${x} ${y} ${turn} ${y}H${to}`;
}

const isNear = (r, isLeft, width, sides) => sides < 2 || (r.x + r.w / 2 < width / 2) === isLeft;
const sameSide = (t, r, width, sides) => sides < 2 || t.x + t.w / 2 < width / 2 === r.x + r.w / 2 < width / 2;

// ---------------------------------------------------------------- values

/** Curves as the panel of an explorer: { el, paint }; it is painted once it is on the page and has a width. */
function curves({ title = "", x, series, mark = null, x_label = "" }, tip) {
  const named = series.map((one) => ({ ...one, unit: "" }));
  const panel = { title, x, series: named, mark, x_label, x_names: [], dashed: [], log: false, colours: COLOURS };
  const { el, paint } = lines(panel, { tip });
  return { el, paint: () => paint(panel) };
}

/** Paints what `values` returned into `host`: pixels (RGB bytes, ImageData or a canvas), lines, text, or an element. */
function paintValue(host, value, tip) {
  if (!value) return host.replaceChildren();
  if (value.kind === "lines") value = { kind: "element", ...curves(value, tip) };
  if (value.kind === "element") return host.replaceChildren(value.el), value.paint?.();
  if (value.kind === "text") return host.replaceChildren(html("p", { className: "map-words", textContent: value.text }));
  const canvas = toCanvas(value), figure = html("div", { className: "map-pixels" }, canvas);
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", value.title ?? "the value as an image");
  const ratio = value.ratio || canvas.width / canvas.height; // pictures, latents and maps keep their shape
  canvas.style.aspectRatio = String(ratio);
  canvas.style.width = `min(100%, ${Math.round(260 * ratio)}px)`;
  const parts = [figure];
  if (value.title) parts.unshift(html("p", { className: "map-axes", textContent: value.title }));
  if (value.key) {
    const strip = html("i");
    if (value.colours?.length) strip.style.background = `linear-gradient(to right, ${value.colours.join(",")})`;
    parts.push(html("div", { className: "map-key" }, value.key[0], strip, value.key[1]));
  }
  if (value.text) parts.push(html("p", { className: "map-words", textContent: value.text }));
  const below = value.curves && curves(value.curves, tip);
  if (below) parts.push(below.el);
  canvas.classList.toggle("smooth", Boolean(value.smooth));
  host.replaceChildren(...parts);
  below?.paint();
}

function toCanvas(value) {
  if (value.image instanceof HTMLCanvasElement) {
    const copy = html("canvas", { width: value.image.width, height: value.image.height });
    copy.getContext("2d").drawImage(value.image, 0, 0);
    return copy;
  }
  const { width, height } = value.image ?? value, canvas = html("canvas", { width, height });
  let picture = value.image;
  if (!picture) {
    picture = new ImageData(width, height);
    const { data } = value, rgb = data instanceof Uint8Array ? data : new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
    for (let i = 0, j = 0; i < rgb.length; i += 3, j += 4) {
      picture.data[j] = rgb[i], (picture.data[j + 1] = rgb[i + 1]), (picture.data[j + 2] = rgb[i + 2]), (picture.data[j + 3] = 255);
    }
  }
  canvas.getContext("2d").putImageData(picture, 0, 0);
  return canvas;
}

// ---------------------------------------------------------------- the map

/**
 * Draws the map into `element`.
 *
 * wiring: see fluxedu/instruments/wiring.py · values(site, step, isChosen): a promise of what paintValue takes, or null · times: of
 * the steps; shows a time slider · onSelect(box), onStep(step), onOpen(id or null) · link(source): a URL for
 * "models/blocks.py:78", or null · letters(): numbers behind the letters of shapes, where they differ from the wiring's
 * · hoverText(site, step): a sentence · hint: the line shown before anything is chosen.
 */
export function createMap(element, options) {
  const { wiring, values = null, times = null, onSelect, onStep, onOpen, link = () => null } = options;
  const hint = options.hint ?? "Choose a box to see what it computes. A box with ▾ opens: it shows its parts.";
  // ids occur once on a page, although each widget has its own copy of this module
  const prefix = `map-${Math.random().toString(36).slice(2, 10)}`, boxes = indexOf(wiring);
  let step = options.step ?? 0, openId = null, selected = null, width = 0, pulsing = null, playing = null, latest = 0;

  const crumbs = html("div", { className: "map-crumbs" });
  crumbs.setAttribute("role", "group"); // not a landmark: a page may have several maps
  crumbs.setAttribute("aria-label", "Where you are in the model");
  const tools = html("div", { className: "map-tools" }), legend = html("span", { className: "map-lit", hidden: true });
  const top = viewer("The model, from the prompt to the image"), inner = viewer("");
  const panel = html("div", { className: "map-panel" }), panelId = `${prefix}-panel`;
  panel.id = panelId;
  panel.setAttribute("role", "group");
  panel.setAttribute("aria-label", "The chosen box");
  panel.setAttribute("aria-live", "polite");
  const below = html("div", { className: "map-below" }, inner.el, panel), tip = html("div", { className: "map-tip", hidden: true });
  tip.setAttribute("aria-hidden", "true");
  const root = html("div", { className: "fluxedu-map" }, html("div", { className: "map-bar" }, crumbs, legend, tools), top.el, below, tip);
  const numbers = new Tip(root); // the value at the pointer
  root.append(numbers.el, numbers.spoken);
  root.dataset.lmSuppressShortcuts = "true"; // keeps JupyterLab from using our keys
  element.append(root);

  // -------------------------------------------------------------- drawing

  /** A scrolling frame with one drawing; ctrl + wheel, a pinch, + and - zoom it, dragging moves it. */
  function viewer(label) {
    const sheet = svg("svg", { role: "group", "aria-label": label }), el = html("div", { className: "map-view" });
    el.append(sheet);
    const view = { el, sheet, zoom: 1, layout: null, groups: new Map(), arrows: [] };
    const zoomTo = (zoom, cx, cy) => {
      zoom = clamp(zoom, 1, 3);
      if (!view.layout || zoom === view.zoom) return;
      const box = el.getBoundingClientRect(), [px, py] = [(cx ?? box.width / 2) + el.scrollLeft, (cy ?? box.height / 2) + el.scrollTop];
      const ratio = zoom / view.zoom;
      view.zoom = zoom;
      size(view);
      el.scrollTo(px * ratio - (cx ?? box.width / 2), py * ratio - (cy ?? box.height / 2));
      el.classList.toggle("zoomed", zoom > 1);
    };
    view.zoomBy = (factor, x, y) => zoomTo(view.zoom * factor, x, y);
    view.reset = () => zoomTo(1);
    el.addEventListener("wheel", (e) => {
      if (!e.ctrlKey && !e.metaKey) return;
      e.preventDefault();
      const box = el.getBoundingClientRect();
      view.zoomBy(Math.exp(-e.deltaY / 200), e.clientX - box.left, e.clientY - box.top);
    }, { passive: false });
    const fingers = new Map();
    let spread = 0, grab = null;
    el.addEventListener("pointerdown", (e) => {
      fingers.set(e.pointerId, e);
      spread = 0;
      if (e.pointerType === "mouse" && !e.target.closest("[role=button]")) grab = [e.clientX + el.scrollLeft, e.clientY + el.scrollTop];
    });
    el.addEventListener("pointermove", (e) => {
      if (grab && e.buttons) el.scrollTo(grab[0] - e.clientX, grab[1] - e.clientY);
      if (!fingers.has(e.pointerId)) return;
      fingers.set(e.pointerId, e);
      if (fingers.size !== 2) return;
      const [a, b] = fingers.values(), far = Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY), box = el.getBoundingClientRect();
      if (spread) view.zoomBy(far / spread, (a.clientX + b.clientX) / 2 - box.left, (a.clientY + b.clientY) / 2 - box.top);
      spread = far;
    });
    for (const end of ["pointerup", "pointercancel", "pointerleave"]) el.addEventListener(end, (e) => (fingers.delete(e.pointerId), (grab = null)));
    sheet.addEventListener("keydown", (e) => keys(e, view));
    return view;
  }

  function size(view) {
    const { width: w, height: h } = view.layout;
    view.sheet.setAttribute("viewBox", `0 0 ${w} ${h}`);
    view.sheet.style.width = `${w * view.zoom}px`;
    view.sheet.style.height = `${h * view.zoom}px`;
  }

  function draw(view, layout) {
    view.layout = layout;
    view.groups.clear();
    const defs = svg("defs");
    for (const kind of ["text", "time", "flow", "image"]) {
      const id = `${prefix}-${view === top ? "a" : "b"}-${kind}`;
      defs.append(svg("marker", { id, viewBox: "0 0 8 8", markerWidth: 7, markerHeight: 7, refX: 7, refY: 4, orient: "auto", markerUnits: "userSpaceOnUse" }, svg("path", { d: "M0 0.5L8 4L0 7.5Z", class: `tip k-${kind}` })));
    }
    const head = (kind) => `url(#${prefix}-${view === top ? "a" : "b"}-${kind})`;
    const bands = layout.under.map(({ d, kind, w, head: ends, thin }) => svg("path", { d, class: `band k-${kind}${ends || thin ? " line" : ""}`, "stroke-width": w, ...(ends ? { "marker-end": head(kind) } : {}) }));
    view.arrows = layout.over.map((arrow) => ({ ...arrow, el: svg("path", { d: arrow.d, class: `arrow k-${arrow.kind}${arrow.dashed ? " dashed" : ""}`, "marker-end": head(arrow.kind) }) }));
    const labels = layout.labels.map(({ text, x, y, strong }) => words(text, x, y, strong ? "label strong" : "label"));
    const ordered = [...layout.rects.entries()].sort(([, a], [, b]) => (b.frame ? 1 : 0) - (a.frame ? 1 : 0));
    const frames = ordered.filter(([, r]) => r.frame).map(([id, r]) => shape(view, id, r));
    const rest = ordered.filter(([, r]) => !r.frame).map(([id, r]) => shape(view, id, r));
    view.sheet.replaceChildren(defs, ...frames, svg("g", { "aria-hidden": "true" }, ...bands, ...view.arrows.map((a) => a.el), ...labels), ...rest);
    const first = [...view.groups.values()][0];
    view.groups.forEach((g) => g.setAttribute("tabindex", -1));
    (view.groups.get(selected) ?? view.groups.get(openId) ?? first)?.setAttribute("tabindex", 0);
    size(view);
    marks();
  }

  const words = (text, x, y, name) => Object.assign(svg("text", { x, y, class: name, "text-anchor": "middle" }), { textContent: text });

  /** A title in at most three lines that fit into `w`; 6.2 px is the usual width of a letter. */
  function broken(title, w) {
    const lines = [];
    for (const word of title.split(" ")) {
      const last = lines.at(-1);
      if (last !== undefined && (last.length + 1 + word.length) * 6.3 <= w - 8) lines[lines.length - 1] = `${last} ${word}`;
      else lines.push(word);
    }
    return lines;
  }

  /** The short title, where there is one, in a box too narrow for the longest word. */
  const fitting = (box, w) => (box.short && box.title.split(" ").some((word) => word.length * 8 > w - 2) ? box.short : box.title);

  function shape(view, id, r) {
    const { box } = r, classes = `box k-${box.kind}${r.tile ? " tile" : ""}${r.frame ? " frame" : ""}${r.plus ? " plus" : ""}`;
    const lines = r.lines ?? (r.short ? [r.short] : null) ?? (r.plus ? [] : null) ?? broken(fitting(box, r.w), r.w), seen = lines.join(" ");
    const name = (box.title.includes(seen) ? "" : `${seen}: `) + box.title + (box.inside ? ", opens" : ""); // with what is seen
    const g = svg("g", { class: classes, role: "button", "aria-label": name, "data-id": id });
    if (box.inside) g.setAttribute("aria-expanded", "false");
    else g.setAttribute("aria-pressed", "false");
    if (r.plus) {
      const [cx, cy] = centre(r);
      g.append(svg("circle", { cx, cy, r: 10 }), svg("path", { d: `M${cx - 5} ${cy}H${cx + 5}M${cx} ${cy - 5}V${cy + 5}`, class: "cross" }));
    } else {
      g.append(svg("rect", { x: r.x, y: r.y, width: r.w, height: r.h, rx: r.tile ? 4 : 7 }));
      const hasPicture = box.picture && r.h > 50, isRow = r.tile && r.w > r.h, opens = box.inside && !isRow ? 8 : 0;
      const at = r.frame ? r.y + 16 : hasPicture ? r.y + 14 : r.y + (r.h - (lines.length < 3 ? opens : 0)) / 2 - (lines.length - 1) * 6.5 + 4;
      const tspans = lines.map((line, i) => Object.assign(svg("tspan", { x: r.start ?? r.x + r.w / 2, y: at + i * 13 }), { textContent: i < lines.length - 1 ? `${line} ` : line }));
      g.append(svg("text", { class: "title", "text-anchor": r.start ? "start" : "middle" }, ...tspans));
      if (hasPicture) {
        const above = 8 + lines.length * 13, side = Math.min(r.w - 10, r.h - above - 6 - opens);
        g.append(svg("image", { x: r.x + (r.w - side) / 2, y: r.y + above + 1, width: side, height: side, preserveAspectRatio: "xMidYMid meet", class: "live" }));
      }
      if (box.inside) { // the sign of what opens: at the bottom, in a row of blocks at the right, after the title of a frame
        const half = lines.at(-1).length * 3.7;
        const ox = r.frame ? (r.start ? r.start + 2 * half : r.x + r.w / 2 + half) + 9 : isRow ? r.x + r.w - 14 : r.x + r.w / 2;
        const oy = r.frame ? at + (lines.length - 1) * 13 - 7 : isRow ? r.y + r.h / 2 - 3 : r.y + r.h - 9;
        g.append(svg("path", { d: `M${ox - 4.5} ${oy}h9l-4.5 6Z`, class: "opens" }));
      }
    }
    g.addEventListener("click", () => (hover(null), choose(id, box), uncover(g)));
    g.addEventListener("pointerenter", (e) => hover(id, box, g, e));
    g.addEventListener("pointerleave", () => hover(null));
    g.addEventListener("focus", () => rove(view, g));
    view.groups.set(id, g);
    return g;
  }

  function rove(view, g) {
    view.groups.forEach((other) => other.setAttribute("tabindex", other === g ? 0 : -1));
  }

  // -------------------------------------------------------------- choosing and opening

  const pathTo = (id) => {
    const path = [];
    for (let at = id; at; at = boxes.get(at)?.parent) path.unshift(at);
    return path;
  };

  function choose(id, box) {
    if (box.inside && openId !== id) open(id);
    else if (box.inside && selected === id && openId === id) close();
    else select(id);
  }

  /** On a narrow page the description lies over the lower part of the window: moves what was chosen out from under it. */
  function uncover(g) {
    const hidden = g.getBoundingClientRect().bottom - 0.52 * innerHeight;
    if (width < 820 && selected && hidden > 0) scrollBy({ top: hidden, behavior: isCalm() ? "auto" : "smooth" });
  }

  function select(id) {
    selected = boxes.has(id) ? id : null;
    root.classList.add("has-choice");
    marks();
    showPanel();
    if (selected) onSelect?.(boxes.get(id).box);
  }

  /** Opens a box: its wiring grows out of the place where the box stands. */
  function open(id, quiet = false) {
    const known = boxes.get(id);
    if (!known) return;
    if (!known.box.inside) {
      if (known.parent) open(known.parent, true);
      return select(id);
    }
    const from = (inner.groups.get(id) ?? top.groups.get(id) ?? top.groups.get(pathTo(id).find((p) => top.groups.has(p))))?.getBoundingClientRect();
    openId = id;
    showDetail();
    if (!quiet) select(id);
    grow(from);
    onOpen?.(id);
  }

  /** Closes the open box and opens the one that it lies in, if `isAll` is not true. */
  function close(isAll = false) {
    const parent = openId && boxes.get(openId).parent;
    if (parent && !isAll) return open(parent);
    openId = null;
    selected = null;
    showDetail();
    marks();
    showPanel();
    onOpen?.(null);
  }

  function grow(from) {
    if (!from || isCalm()) return;
    const to = inner.sheet.getBoundingClientRect(), sx = Math.max(from.width / to.width, 0.02), sy = Math.max(from.height / to.height, 0.02);
    inner.el.classList.add("growing");
    inner.sheet.animate(
      [
        { transform: `translate(${from.left - to.left}px, ${from.top - to.top}px) scale(${sx}, ${sy})`, opacity: 0.2 },
        { transform: "none", opacity: 1 },
      ],
      { duration: 420, easing: "cubic-bezier(0.22, 0.8, 0.25, 1)" },
    ).finished.catch(() => {}).finally(() => inner.el.classList.remove("growing"));
  }

  function showDetail() {
    root.classList.toggle("open", openId !== null);
    below.hidden = openId === null && selected === null;
    inner.el.hidden = openId === null;
    showCrumbs();
    if (openId === null) return wedge();
    const { box } = boxes.get(openId);
    inner.sheet.setAttribute("aria-label", `Inside: ${box.title}`);
    inner.zoom = 1;
    const group = groupOf(wiring, box), room = innerWidth();
    draw(inner, detail(group, Math.max(Math.min(room, need(group)), group.rails ? SMALLEST : 0)));
    inner.el.scrollTo(0, 0);
    wedge();
  }

  const SMALLEST = 344; // px: the words of a block still fit into its boxes; narrower pages scroll
  const innerWidth = () => Math.floor(Math.min(width >= 820 ? width - 372 : width, 900));

  /** Two lines that lead from the open box in the overview to its wiring. */
  function wedge() {
    top.sheet.querySelector(".wedge")?.remove();
    const shown = openId && pathTo(openId).findLast((id) => top.layout?.rects.has(id));
    if (!shown || !top.layout || top.layout.stacked) return;
    const r = top.layout.rects.get(shown), { height } = top.layout, end = inner.layout.width;
    const d = `M${r.x} ${r.y + r.h}L0 ${height}H${end}L${r.x + r.w} ${r.y + r.h}Z`;
    top.sheet.insertBefore(svg("path", { d, class: `wedge k-${r.box.kind}`, "aria-hidden": "true" }), top.sheet.firstChild);
  }

  function showCrumbs() {
    const path = openId ? pathTo(openId) : [];
    const button = (label, click, current) => {
      const el = html("button", { type: "button", textContent: label, onclick: click });
      if (current) el.setAttribute("aria-current", "true");
      return el;
    };
    const parts = [button("The model", () => (openId ? ((openId = null), (selected = null), showDetail(), marks(), showPanel(), onOpen?.(null)) : 0), !path.length)];
    path.forEach((id, i) => parts.push(html("span", { textContent: "›", ariaHidden: "true" }), button(boxes.get(id).box.title, () => open(id), i === path.length - 1)));
    crumbs.replaceChildren(...parts);
    if (!path.length && !selected) crumbs.append(html("span", { className: "map-hint", textContent: hint }));
  }

  function marks() {
    const path = openId ? pathTo(openId) : [];
    for (const view of [top, inner]) {
      view.groups.forEach((g, id) => {
        const isOpen = path.includes(id);
        if (g.hasAttribute("aria-expanded")) g.setAttribute("aria-expanded", isOpen);
        else g.setAttribute("aria-pressed", id === selected);
        g.classList.toggle("chosen", id === selected);
        g.classList.toggle("unfolded", isOpen);
      });
      for (const { el, ends } of view.arrows) el.classList.toggle("near", selected !== null && ends?.includes(selected));
    }
  }

  // -------------------------------------------------------------- the panel

  const siteOf = (box) => box.site ?? box.shows ?? null;
  const valueSite = (box) => (typeof box.picture === "string" ? box.picture : siteOf(box)); // what is painted

  const numbersOf = () => ({ ...wiring.letters, ...options.letters?.() });

  function shapeText(box) {
    const site = siteOf(box), { shape: own } = box.shape ? box : boxes.get(site)?.box ?? {};
    if (!own) return "";
    const letters = numbersOf(), numbers = own.map((n) => letters[n] ?? n);
    const text = `[${own.join(", ")}]`, exact = `[${numbers.join(", ")}]`;
    return text === exact ? text : `${text} = ${exact}`;
  }

  /** What the letters of a box's shape stand for. */
  function meanings(box) {
    const { shape: own } = box.shape ? box : boxes.get(siteOf(box))?.box ?? {}, { L, N } = numbersOf();
    const T = L && N ? `T: tokens (${L} of text, padding included, and ${N} image patches)` : "T: text and image tokens";
    const all = { B: "B: images drawn at once", C: "C: channels", L: "L: text tokens, padding included", N: "N: image patches", T };
    const found = [...new Set(own ?? [])].map((letter) => all[letter]).filter(Boolean);
    if (own?.includes("h")) found.push("h, w: rows and columns of the latent");
    return found.join(" · ");
  }

  /** On a narrow page the description covers what is drawn below the overview: a way there. */
  function seeParts(box) {
    if (!box.inside || openId !== box.id || width >= 820) return [];
    const button = html("button", { type: "button", className: "map-parts", textContent: "See its parts" });
    button.addEventListener("click", () => (unselect(), inner.el.scrollIntoView({ block: "start", behavior: isCalm() ? "auto" : "smooth" })));
    return [button];
  }

  function unselect() {
    selected = null;
    marks();
    showPanel();
  }

  function showPanel() {
    below.hidden = openId === null && selected === null;
    panel.hidden = selected === null;
    showCrumbs();
    if (selected === null) return;
    const { box } = boxes.get(selected), formula = html("div", { className: "map-formula", innerHTML: wiring.formulas[box.formula] ?? "" });
    formula.tabIndex = 0;
    formula.setAttribute("role", "group");
    formula.setAttribute("aria-label", "Formula");
    const facts = html("dl"), add = (name, ...value) => facts.append(html("dt", { textContent: name }), html("dd", {}, ...value));
    if (shapeText(box)) add("Shape", shapeText(box));
    const letters = meanings(box);
    if (letters) add("", letters);
    if (siteOf(box)) add("Name in code", html("code", { textContent: siteOf(box) }));
    const url = link(box.source, box.code), source = html("code", { textContent: box.source });
    add("Code", url ? html("a", { href: url }, source) : source, html("pre", { tabIndex: 0, textContent: box.code }));
    const value = html("div", { className: "map-value" });
    const shut = html("button", { type: "button", className: "map-shut", title: "Close", onclick: unselect }, icon("M2 2L10 10M10 2L2 10"));
    shut.setAttribute("aria-label", "Close the description");
    panel.className = `map-panel k-${box.kind}`;
    panel.replaceChildren(shut, html("div", { className: "map-title", textContent: box.title }), html("p", { textContent: box.text }), ...seeParts(box), formula, ...(box.where ? [html("p", { className: "map-where", textContent: box.where })] : []), value, facts);
    showValue(box, value);
  }

  async function showValue(box, host) {
    const site = valueSite(box), ticket = ++latest;
    if (!site || !values) return;
    const value = await values(site, step, true);
    if (ticket === latest && host.isConnected) paintValue(host, value ?? { kind: "text", text: "This run has no value here." }, numbers);
  }

  let hovered = null;
  async function hover(id, box, g, e) {
    hovered = id;
    tip.hidden = true;
    if (!id || e.pointerType === "touch") return;
    const site = valueSite(box), value = site && values ? await values(site, step) : null;
    if (hovered !== id) return;
    const host = html("div", { className: "map-tip-value" });
    if (value && value.kind === "pixels") paintValue(host, { ...value, title: null, key: null, text: null, curves: null }, numbers);
    tip.replaceChildren(html("strong", { textContent: box.title }), html("span", { textContent: box.text }), html("span", { className: "quiet", textContent: shapeText(box) }), host);
    if (box.inside && openId !== id) tip.append(html("span", { className: "quiet", textContent: "Click to see its parts." }));
    const more = value?.text || (site && options.hoverText?.(site, step));
    if (more) tip.append(html("span", { textContent: more }));
    tip.hidden = false;
    const r = g.getBoundingClientRect(), home = root.getBoundingClientRect();
    const x = clamp(r.left - home.left + r.width / 2 - tip.offsetWidth / 2, 0, Math.max(0, home.width - tip.offsetWidth));
    const under = r.bottom - home.top + 6, fits = r.bottom + tip.offsetHeight + 12 < innerHeight;
    tip.style.cssText = `left:${x}px;top:${fits ? under : r.top - home.top - tip.offsetHeight - 6}px`;
  }

  /** The small pictures in the overview's boxes. */
  async function pictures() {
    if (!values) return;
    const at = step;
    for (const [id, g] of top.groups) {
      const picture = g.querySelector("image.live"), { box } = boxes.get(id);
      if (!picture) continue;
      const value = await values(valueSite(box), at);
      if (at !== step) return;
      if (value?.kind === "pixels") picture.setAttribute("href", toCanvas(value).toDataURL());
      else picture.removeAttribute("href");
    }
  }

  // -------------------------------------------------------------- time, keys

  const ui = {};
  function timeTools() {
    const id = `${prefix}-time`, last = times.length - 1;
    ui.slider = html("input", { type: "range", id, min: 0, max: last, step: 1, value: step });
    ui.label = html("output", {}), ui.label.setAttribute("for", id);
    ui.play = html("button", { type: "button", className: "map-play", onclick: () => (playing ? stop() : play()) });
    ui.slider.addEventListener("input", () => (stop(), setStep(Number(ui.slider.value))));
    tools.append(html("label", { htmlFor: id, textContent: "Time" }), ui.slider, ui.label, ui.play);
    stop();
    showTime();
  }

  function showTime() {
    if (!times) return;
    const text = `t = ${Number(times[step]).toFixed(2)}`;
    ui.slider.value = step;
    ui.label.textContent = text;
    ui.slider.setAttribute("aria-valuetext", `step ${step + 1} of ${times.length}, ${text}`);
  }

  function play() {
    if (step >= times.length - 1) setStep(0);
    ui.play.textContent = "❚❚ Pause";
    playing = setInterval(() => (step >= times.length - 1 ? stop() : setStep(step + 1)), 320);
  }

  function stop() {
    clearInterval(playing);
    playing = null;
    ui.play.textContent = "▶ Play";
  }

  function setStep(next) {
    if (next === step) return;
    step = next;
    showTime();
    refresh();
    onStep?.(step);
  }

  function refresh() {
    pictures();
    const host = panel.querySelector(".map-value");
    if (selected && host) showValue(boxes.get(selected).box, host);
  }

  function zoomTools() {
    const button = (label, d, click) => {
      const el = html("button", { type: "button", onclick: click }, icon(d));
      el.setAttribute("aria-label", label);
      el.title = label;
      return el;
    };
    const view = () => (openId ? inner : top);
    tools.append(html("span", { className: "map-zoom" }, button("Zoom out", "M2 6H10", () => view().zoomBy(1 / 1.3)), button("Zoom in", "M2 6H10M6 2V10", () => view().zoomBy(1.3)), button("Fit to the width", "M1 2V10M11 2V10M3 6H9M5 4L3 6L5 8M7 4L9 6L7 8", () => view().reset())));
  }

  function keys(e, view) {
    const g = e.target.closest("[data-id]");
    if (!g) return;
    const id = g.dataset.id, direction = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] }[e.key];
    const handled = () => (e.preventDefault(), e.stopPropagation());
    if (direction) {
      handled();
      const here = centre(view.layout.rects.get(id)), [dx, dy] = direction;
      let best = null, least = Infinity;
      for (const [other, r] of view.layout.rects) {
        const [x, y] = centre(r), along = (x - here[0]) * dx + (y - here[1]) * dy, aside = Math.abs((x - here[0]) * dy) + Math.abs((y - here[1]) * dx);
        if (other === id || along < 4 || along + 2.5 * aside >= least) continue;
        [best, least] = [other, along + 2.5 * aside];
      }
      if (best) view.groups.get(best).focus(), select(best);
    } else if (e.key === "Enter" || e.key === " ") {
      handled();
      const before = openId;
      choose(id, boxes.get(id).box);
      if (openId !== before && openId) [...inner.groups.values()][0]?.focus({ preventScroll: false });
    } else if (e.key === "Escape" && openId) {
      handled();
      const last = openId;
      close();
      (inner.groups.get(last) ?? top.groups.get(last) ?? top.groups.get(pathTo(last)[0]))?.focus();
    } else if (e.key === "+" || e.key === "=") handled(), view.zoomBy(1.3);
    else if (e.key === "-") handled(), view.zoomBy(1 / 1.3);
    else if (e.key === "0") handled(), view.reset();
  }

  // -------------------------------------------------------------- the run

  /** Shows which box is being computed; null for none. */
  function pulse(id) {
    if (pulsing === id) return;
    pulsing = id;
    const shown = id && boxes.has(id) && pathTo(id).findLast((p) => top.groups.has(p));
    root.classList.toggle("running", Boolean(shown));
    top.groups.forEach((g, other) => g.classList.toggle("pulse", other === shown));
    for (const { el, ends } of top.arrows) el.classList.toggle("flowing", Boolean(shown) && ends?.[1] === shown);
  }

  /** Marks boxes, in the overview and inside; an empty list marks none. `meaning`: what the mark says. */
  function highlight(ids, meaning = "") {
    legend.hidden = !ids.length || !meaning;
    legend.replaceChildren(html("i"), meaning);
    for (const view of [top, inner]) view.groups.forEach((g, id) => g.classList.toggle("lit", ids.includes(id)));
  }

  function resize() {
    const next = Math.floor(root.clientWidth);
    if (!next || Math.abs(next - width) < 2) return;
    width = next;
    root.classList.toggle("side", width >= 820);
    draw(top, overview(wiring, width));
    showDetail();
    refresh();
  }

  if (times) timeTools();
  zoomTools();
  showCrumbs();
  below.hidden = true;
  panel.hidden = true;
  const watcher = new ResizeObserver(() => resize());
  watcher.observe(root);
  resize();
  if (options.open) open(options.open);
  else if (options.selected) select(options.selected);

  const ids = wiring.boxes.flatMap((box) => (["double", "single"].includes(box.id) ? blocksOf(box).map((b) => b.id) : [box.id]));
  const destroy = () => (watcher.disconnect(), clearInterval(playing), root.remove());
  /** Selects a box and opens what it is in, so that it can be seen. */
  const show = (id) => (top.groups.has(id) && !boxes.get(id).box.inside ? ((openId = null), showDetail(), select(id)) : open(id));
  return { tip: numbers, setStep, refresh, open, close, select, show, selected: () => selected, step: () => step, highlight, pulse, destroy, ids, root };
}
