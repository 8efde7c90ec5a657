// What the map shows of the value at a site: a picture, a table of colours, or a curve.
import { magma, preview } from "./paint.js";

const BLUE = [33, 102, 172], WHITE = [247, 247, 247], RED = [178, 24, 43]; // blue below 0, red above
const mix = (a, b, part) => a.map((value, c) => value + part * (b[c] - value));
const hex = (rgb) => `rgb(${rgb.map(Math.round)})`;
const number = (x) => String(Number(x.toPrecision(2)));

/**
 * A table [rows x columns] with its colour scale: shares of attention from 0 up, other values around 0. A few channels
 * are a hundred times as large as the others, so the scale ends at the value that one number in a hundred exceeds.
 */
function table(data, rows, columns, fromZero, title) {
  const sizes = Float32Array.from(data, Math.abs).sort(), largest = Math.max(sizes.at(-1), 1e-12);
  const end = fromZero ? largest : Math.max(sizes[Math.floor(0.99 * (sizes.length - 1))], largest / 1000);
  const rgb = new Uint8Array(3 * rows * columns);
  data.forEach((value, i) => {
    const share = Math.min(1, Math.abs(value) / end);
    rgb.set(fromZero ? magma(share) : mix(WHITE, value < 0 ? BLUE : RED, share), 3 * i);
  });
  const colours = fromZero ? [0, 0.25, 0.5, 0.75, 1].map((share) => hex(magma(share))) : [BLUE, WHITE, RED].map(hex);
  const beyond = largest > 1.5 * end ? `The scale ends at ${number(end)}; 1 number in 100 lies beyond it, at most ${number(largest)} from 0.` : null;
  return { kind: "pixels", width: columns, height: rows, data: rgb, title, colours, text: beyond,
    key: [fromZero ? "0" : `−${number(end)}`, number(end)] };
}

/** [heads, rows, columns] -> the mean of the heads. */
function meanOfHeads(data, heads, size) {
  const mean = new Float32Array(size);
  for (let h = 0; h < heads; h++) for (let i = 0; i < size; i++) mean[i] += data[h * size + i] / heads;
  return mean;
}

export function valueFor(site, { dims, data }) {
  if (dims.length === 3 && site.startsWith("sample.")) {
    if (site === "sample.velocity") {
      const mean = meanOfHeads(data, dims[0], dims[1] * dims[2]);
      return table(mean, dims[1], dims[2], false, "mean of the 16 channels of each cell");
    }
    return { kind: "pixels", image: preview(data, dims), title: "as a picture, quickly decoded" };
  }
  const last = site.split(".").at(-1);
  if (dims.length === 3 && (last === "map" || last === "scores")) {
    const [heads, rows, columns] = dims, what = last === "map" ? "attention" : "scores";
    return table(meanOfHeads(data, heads, rows * columns), rows, columns, last === "map",
      `${what}, mean of ${heads} heads: one row per query, one column per key; words first, then patches`);
  }
  if (dims.length === 3) { // heads side by side
    const [heads, rows, size] = dims, beside = new Float32Array(heads * rows * size);
    for (let h = 0; h < heads; h++) {
      for (let r = 0; r < rows; r++) {
        beside.set(data.subarray((h * rows + r) * size, (h * rows + r + 1) * size), (r * heads + h) * size);
      }
    }
    return table(beside, rows, heads * size, false, `one row per token; ${heads} heads of ${size} numbers side by side`);
  }
  const [rows, columns] = dims.length === 2 ? dims : [1, dims[0]];
  if (rows === 1) {
    return { kind: "lines", x: [...data.keys()], series: [{ name: `${columns} numbers`, y: [...data] }], x_label: "channel", title: site };
  }
  return table(data, rows, columns, false, `one row per token, ${columns} numbers each`);
}
