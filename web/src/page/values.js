// What the map shows of the value at a site: a picture, a table of colours, or a curve. The chosen box shows a table with
// the names of its tokens and the number at the pointer.
import { pixels } from "../views/panels.js";
import { arithmetic } from "./arithmetic.js";
import { drawn, shares, signed, tokensOf, whole } from "./numbers.js";
import { preview } from "./paint.js";

/** [heads, rows, columns] -> [rows, heads * columns], heads side by side. */
function sideBySide(data, [heads, rows, size]) {
  const beside = new Float32Array(heads * rows * size);
  for (let h = 0; h < heads; h++) {
    for (let r = 0; r < rows; r++) {
      beside.set(data.subarray((h * rows + r) * size, (h * rows + r + 1) * size), (r * heads + h) * size);
    }
  }
  return beside;
}

/** The mean of the heads: [heads, size] -> [size]. */
function meanOfHeads(data, heads, size) {
  const mean = new Float32Array(size);
  for (let h = 0; h < heads; h++) for (let i = 0; i < size; i++) mean[i] += data[h * size + i] / heads;
  return mean;
}

const isAttention = (site) => /\.(map|scores)$/.test(site);

/** The rows, columns and colours of a value: { data, rows, columns, heads, title, axes }. */
function laidOut(site, { dims, data }) {
  const [heads, rows, size] = dims;
  if (dims.length === 3) {
    return { data: sideBySide(data, dims), rows, columns: heads * size, heads, title: `one row per token; ${heads} heads of ${size} numbers side by side` };
  }
  const [height, width] = dims.length === 2 ? dims : [1, dims[0]];
  return { data, rows: height, columns: width, title: `one row per token, ${width} numbers each` };
}

/** A small picture of the value, for a box of the overview and for the pointer. */
export function pictureOf(site, value) {
  const { dims, data } = value;
  if (dims.length === 3 && site.startsWith("sample.")) {
    if (site !== "sample.velocity") return { kind: "pixels", image: preview(data, dims), title: "as a picture, quickly decoded" };
    const mean = meanOfHeads(data, dims[0], dims[1] * dims[2]);
    return coloured(signed(mean, dims[1], dims[2]), "mean of the 16 channels of each cell");
  }
  if (dims.length === 3 && isAttention(site)) {
    const mean = meanOfHeads(data, dims[0], dims[1] * dims[2]);
    return coloured(site.endsWith("map") ? shares(mean, dims[1], dims[2]) : signed(mean, dims[1], dims[2]), `mean of ${dims[0]} heads`);
  }
  const { data: flat, rows, columns, title } = laidOut(site, value);
  if (rows === 1) return curve(flat, columns, site);
  return coloured(signed(flat, rows, columns), title);
}

const coloured = ({ image, key, note }, title) =>
  ({ kind: "pixels", width: image.width, height: image.height, data: image.data, title, key, text: note });

const curve = (data, count, site) =>
  ({ kind: "lines", x: [...data.keys()], series: [{ name: `${count} numbers`, y: [...data] }], x_label: "channel", title: site });

/** What the description of a chosen box shows: `of`: { run, values, txtLen, tip }. */
export function valueFor(site, value, of) {
  const { dims } = value, isTable = !site.startsWith("sample.") || dims.length < 3;
  const worked = isTable && arithmetic(site, of);
  if (worked) return worked;
  if (!isTable) return pictureOf(site, value);
  if (dims.length === 3 && isAttention(site)) { // of T5 and CLIP
    const [heads, rows, columns] = dims, picture = shares(meanOfHeads(value.data, heads, rows * columns), rows, columns);
    return shown(site, picture, rows, columns, { ...of, title: `attention, mean of ${heads} heads`, axes: ["query", "key"], square: true });
  }
  const { data, rows, columns, heads, title } = laidOut(site, value);
  if (rows === 1) return curve(data, columns, site);
  return shown(site, signed(data, rows, columns), rows, columns, { ...of, title, heads });
}

/** A table with named rows and the number at the pointer. */
function shown(site, { image, key, colours, note }, rows, columns, { run, txtLen, tip, title, heads, axes, square }) {
  const tokens = tokensOf(site, rows, run, txtLen), size = columns / (heads ?? 1);
  const numbers = heads ? Array.from({ length: columns }, (_, i) => `${Math.floor(i / size)}, channel ${i % size}`) : [];
  const groups = tokens && { rows: tokens.groups };
  if (groups && heads) groups.columns = Array.from({ length: heads }, (_, h) => [`head ${h}`, size]);
  if (groups && square) groups.columns = tokens.groups;
  const isText = groups && rows === txtLen && !square; // few enough tokens for the name of every word
  const words = tokens?.names.filter((name) => name.startsWith("“")) ?? [];
  if (isText) groups.rows = [...tokens.groups.slice(0, -2), ...words.map((name) => [name, 1]), tokens.groups.at(-1)];
  const panel = whole(pixels(title, image, {
    key, colours, note, rows: tokens?.names ?? [], columns: square ? tokens?.names ?? [] : numbers,
    axes: axes ?? [tokens ? "token" : "row", heads ? "head" : "channel"],
  }), image, groups);
  return drawn(title, isText ? { ...panel, aspect: 0.75 } : panel, { tip });
}
