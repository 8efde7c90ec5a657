// The messages of panels, as fluxedu/widgets/panels.py sends them, and numbers as 8-bit colours.
import HEX from "./colours.json";
import { largest, range, rounded } from "./numbers.js";

/** Okabe and Ito's colours, as fluxedu/plots.py has them. */
export const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"];
export const SEQUENTIAL = "magma", DIVERGING = "RdBu_r";
export const TIME_LABEL = "time t (1 = pure noise, 0 = image)";
const MAX_SIDE = 192, BACKGROUND = 0.3;

// ---------------------------------------------------------------- tables of numbers

/** A table: { rows, columns, data }. */
export const table = (data, rows, columns) => ({ rows, columns, data });

/** A table of the cells that `value(row, column)` gives. */
export function tableOf(rows, columns, value) {
  const data = new Float64Array(rows * columns);
  for (let y = 0; y < rows; y++) for (let x = 0; x < columns; x++) data[y * columns + x] = value(y, x);
  return { rows, columns, data };
}

/** Every second, third, ... row and column, so that at most `rows` and `columns` are left. */
function thinned(values, rows, columns) {
  const [dy, dx] = [Math.ceil(values.rows / rows), Math.ceil(values.columns / columns)];
  if (dy === 1 && dx === 1) return values;
  return tableOf(Math.ceil(values.rows / dy), Math.ceil(values.columns / dx),
    (y, x) => values.data[y * dy * values.columns + x * dx]);
}

// ---------------------------------------------------------------- images: { width, height, data: RGB bytes }

const ramps = new Map();

/** 256 colours as RGB bytes. */
function ramp(name) {
  if (!ramps.has(name)) ramps.set(name, Uint8Array.from(HEX[name].match(/../g), (byte) => parseInt(byte, 16)));
  return ramps.get(name);
}

const hex = (bytes) => `#${Array.from(bytes, (b) => b.toString(16).padStart(2, "0")).join("")}`;
const nine = (name) => range(9).map((i) => 3 * Math.round((i * 255) / 8)).map((i) => hex(ramp(name).subarray(i, i + 3)));

/** Numbers from 0 to vmax as colours, one pixel per number. scale: "linear", "root", "log" or "row". */
export function sequential(values, { vmax = largest(values.data), name = SEQUENTIAL, scale = "linear" } = {}) {
  const { rows, columns } = values, data = new Uint8Array(3 * rows * columns);
  for (let y = 0; y < rows; y++) {
    const row = values.data.subarray(y * columns, (y + 1) * columns), top = scale === "row" ? largest(row) : vmax;
    row.forEach((x, i) => {
      let share = x / Math.max(top, 1e-12);
      if (scale === "root") share = Math.sqrt(Math.max(share, 0));
      if (scale === "log") share = 1 + Math.log10(Math.min(Math.max(share, 1e-3), 1)) / 3;
      const level = Math.trunc(Math.min(Math.max(share, 0), 1) * 255);
      data.set(ramp(name).subarray(3 * level, 3 * level + 3), 3 * (y * columns + i));
    });
  }
  const note = {
    linear: "", root: "square-root colour scale", log: "logarithmic colour scale over a factor of 1000",
    row: "each row has its own colour scale, up to its largest value",
  }[scale];
  return { width: columns, height: rows, data, values, note };
}

/** Numbers from -vmax (blue) over 0 (white) to vmax (red). */
export function diverging(values, vmax = largest(values.data.map(Math.abs))) {
  const shares = table(Float64Array.from(values.data, (x) => x / Math.max(vmax, 1e-12) + 1), values.rows, values.columns);
  return { ...sequential(shares, { vmax: 2, name: DIVERGING }), values, note: "" };
}

/** Numbers from low to high as colours, for numbers that are far from 0. */
export function between(values, low, high, name = "viridis") {
  const above = table(values.data.map((x) => x - low), values.rows, values.columns);
  return { ...sequential(above, { vmax: Math.max(high - low, 1e-12), name }), values, note: "" };
}

/** Each pixel repeated to a block of so many rows and columns. */
function repeated(image, down, across) {
  const { width, height, data } = image, made = new Uint8Array(3 * width * height * down * across);
  for (let y = 0; y < height * down; y++) {
    const from = Math.floor(y / down) * width;
    for (let x = 0; x < width * across; x++) {
      const i = 3 * (from + Math.floor(x / across)), j = 3 * (y * width * across + x);
      for (let c = 0; c < 3; c++) made[j + c] = data[i + c];
    }
  }
  return { ...image, width: width * across, height: height * down, data: made };
}

/** Pixels repeated until the longer side is about `side`. */
export function upscale(image, side) {
  const times = Math.max(1, Math.floor(side / Math.max(image.width, image.height)));
  return repeated(image, times, times);
}

/** A table of colours stretched to about height x width; of a larger one every second, third, ... row is kept. */
export function resizeTable(image, height, width) {
  const [dy, dx] = [Math.ceil(image.height / height), Math.ceil(image.width / width)];
  const rows = Math.ceil(image.height / dy), columns = Math.ceil(image.width / dx);
  const data = new Uint8Array(3 * rows * columns);
  for (let y = 0; y < rows; y++)
    for (let x = 0; x < columns; x++)
      for (let c = 0; c < 3; c++) data[3 * (y * columns + x) + c] = image.data[3 * (y * dy * image.width + x * dx) + c];
  const small = { ...image, width: columns, height: rows, data };
  return repeated(small, Math.max(1, Math.floor(height / rows)), Math.max(1, Math.floor(width / columns)));
}

/** Rows of images as one image, each at half its size. */
export function contactSheet(images) {
  const { width: w, height: h } = images[0][0], [rows, columns] = [images.length, images[0].length];
  const [sw, sh] = [Math.floor(w / 2), Math.floor(h / 2)], width = sw * columns, height = sh * rows;
  const data = new Uint8Array(3 * width * height);
  for (let y = 0; y < height; y++)
    for (let x = 0; x < width; x++) {
      const source = images[Math.floor(y / sh)][Math.floor(x / sw)], i = 3 * (2 * (y % sh) * w + 2 * (x % sw));
      for (let c = 0; c < 3; c++) data[3 * (y * width + x) + c] = source.data[i + c];
    }
  return { width, height, data };
}

/** An ImageData without its opacity. */
export function rgb({ width, height, data }) {
  const made = new Uint8Array(3 * width * height);
  for (let i = 0; i < width * height; i++) made.set(data.subarray(4 * i, 4 * i + 3), 3 * i);
  return { width, height, data: made };
}

/** How a weight's share of the largest one changes a pixel: what is left of the pixel, and the colour added to it. The
 * larger the share, the brighter and more opaque the colour. */
function blending(share, background) {
  const part = Math.min(Math.max(share, 0), 1), alpha = 0.9 * part ** 0.7, at = 3 * Math.trunc(Math.fround(part) * 255);
  return { left: background * (1 - alpha), added: [0, 1, 2].map((c) => ramp(SEQUENTIAL)[at + c] * alpha) };
}

/** Weights over a darkened image; `background`: what is left of its brightness. scale: "linear" or "root". */
export function overlay(image, values, { background = BACKGROUND, scale = "linear" } = {}) {
  const { width, height } = image, data = new Uint8Array(3 * width * height), top = Math.max(largest(values.data), 1e-12);
  const place = scale === "root" ? (share) => Math.sqrt(Math.max(share, 0)) : (share) => share;
  const cells = Array.from(values.data, (weight) => blending(place(weight / top), background)), total = [0, 0, 0];
  for (let y = 0; y < height; y++) {
    const row = Math.floor((y * values.rows) / height) * values.columns;
    for (let x = 0; x < width; x++) {
      const { left, added } = cells[row + Math.floor((x * values.columns) / width)], i = 3 * (y * width + x);
      for (let c = 0; c < 3; c++) {
        data[i + c] = image.data[i + c] * left + added[c];
        total[c] += image.data[i + c];
      }
    }
  }
  const keyColours = range(9).map((i) => { // over the image's mean colour
    const { left, added } = blending(i / 8, background);
    return hex(total.map((value, c) => Math.trunc((value / (width * height)) * left + added[c])));
  });
  return { width, height, data, values, note: "", keyColours };
}

// ---------------------------------------------------------------- panels

/** A panel of pixels; the options are the fields of the Python class. */
export function pixels(title, image, options = {}) {
  const { cells = [1, 1], mark = null, key = null, rows = [], columns = [], unit = "", axes = ["row", "column"] } = options;
  const { pointer = null, note = image.note ?? "", colours = SEQUENTIAL, values = image.values ?? null } = options;
  const thin = values && thinned(values, MAX_SIDE, MAX_SIDE);
  return {
    kind: "pixels", title, pointer, cells, mark, key, unit, axes, note,
    rows: rows.map(String), columns: columns.map(String),
    colours: key ? (image.keyColours ?? (Array.isArray(colours) ? colours : nine(colours))) : [],
    height: image.height, width: image.width, data: image.data,
    values: thin && new DataView(Float32Array.from(thin.data).buffer), table: thin && [thin.rows, thin.columns],
  };
}

/** Where `after` is brighter or darker than `before`. */
export function differencePanel(before, after) {
  const mean = ({ data, width, height }) => tableOf(height, width, (y, x) => {
    const i = 3 * (y * width + x);
    return (data[i] + data[i + 1] + data[i + 2]) / 3;
  });
  const [a, b] = [mean(before), mean(after)];
  const difference = table(b.data.map((value, i) => (value - a.data[i]) / 255), a.rows, a.columns);
  const title = "Difference: brighter (red) or darker (blue)";
  const unit = "change of brightness, as a share of its range";
  return pixels(title, diverging(difference, 1), { key: ["-1", "1"], colours: DIVERGING, unit });
}

/** Curves. series: { name: values }. */
export function lines(title, x, series, xLabel, yLabel, options = {}) {
  const { mark = null, xNames = [], units = {}, log = false, dashed = [], pointer = null } = options;
  return {
    kind: "lines", title, pointer, x: rounded(x), x_label: xLabel, y_label: yLabel, mark, log, colours: COLOURS,
    series: Object.entries(series).map(([name, y]) => ({ name, y: rounded(y), unit: units[name] ?? yLabel })),
    x_names: xNames.map(String), dashed,
  };
}

/** Points with arrows: xy and arrows as [x, y, x, y, ...]. */
export function points(title, xy, arrows, group, groups, limits, xLabel, yLabel, options = {}) {
  const { mark = null, unit = "", trails = [], pointer = null } = options;
  return {
    kind: "points", title, pointer, xy: rounded(xy), arrows: rounded(arrows), group, groups, mark, unit, colours: COLOURS,
    x_label: xLabel, y_label: yLabel, trails: trails.map(rounded),
    limits: limits.map((ends) => rounded(Array.isArray(ends) ? ends : [-ends, ends])),
  };
}

/** A diagram: boxes as [label, x, y, width, height, colour]. */
export const boxes = (title, all, arrows, size, mark, pointer = null) =>
  ({ kind: "boxes", title, pointer, boxes: all, arrows, size, mark });
