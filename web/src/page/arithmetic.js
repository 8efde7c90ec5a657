// The arithmetic of one number, with the model's own values: of one attention score, and of one modulated number. The
// cell is the one that is pointed at in the table above it.
import { format, html } from "../dom.js";
import { DIVERGING, SEQUENTIAL, diverging, pixels, sequential, table } from "../views/panels.js";
import { drawn, shares, tokensOf, whole } from "./numbers.js";

const exact = (x) => x.toFixed(4).replace("-", "−");
const bracketed = (x) => (x < 0 ? `(${exact(x)})` : exact(x));
const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)}\u00a0%`;

/**
 * One score and its weight, step by step. `values`: of the sites of one step; `head`, `query`, `key`: numbers from 0.
 * Returns { q, k, products, dot, score, exponential, sum, weight, scores, weights }; the last two of the whole row.
 */
export function scoreOf(values, block, head, query, key) {
  const [queries, keys, all] = ["q", "k", "scores"].map((name) => values.get(`${block}.attn.${name}`));
  const [, tokens, d] = queries.dims, row = (tensor, token, size) => tensor.data.subarray((head * tokens + token) * size, (head * tokens + token + 1) * size);
  const q = row(queries, query, d), k = row(keys, key, d), scores = row(all, query, tokens);
  const products = Float64Array.from(q, (x, c) => x * k[c]), dot = products.reduce((a, b) => a + b, 0), score = dot / Math.sqrt(d);
  const exponentials = Float64Array.from(scores, Math.exp), sum = exponentials.reduce((a, b) => a + b, 0);
  const weights = exponentials.map((x) => x / sum);
  return { q, k, products, dot, score, exponential: Math.exp(score), sum, weight: Math.exp(score) / sum, scores, weights };
}

/** Where the numbers of a modulation come from: site -> { before, factor, shift }; the factor is 1 + scale, or the gate. */
function modulationOf(site) {
  const [, block, stream, layer] = /^(double\.\d+)\.(img|txt)_modulated([12])$/.exec(site) ?? [];
  if (block) return { before: `${block}.${stream}_norm${layer}`, scale: `${block}.${stream}_mod.scale${layer}`, shift: `${block}.${stream}_mod.shift${layer}` };
  const [, owner] = /^(single\.\d+|final_layer)\.modulated$/.exec(site) ?? [];
  if (owner) return { before: `${owner}.norm`, scale: `${owner}.scale`, shift: `${owner}.shift` };
  const [, double, side, part] = /^(double\.\d+)\.(img|txt)_(attn|mlp)_contribution$/.exec(site) ?? [];
  if (double) return { before: `${double}.${side}_${part}_out`, gate: `${double}.${side}_mod.gate${part === "attn" ? 1 : 2}` };
  const [, single] = /^(single\.\d+)\.contribution$/.exec(site) ?? [];
  return single ? { before: `${single}.added`, gate: `${single}.gate` } : null;
}

/** The value of a site with the arithmetic of one of its numbers; null for a site without one. */
export function arithmetic(site, of) {
  const [, block] = /^((?:double|single)\.\d+)\.attn\.(?:map|scores)$/.exec(site) ?? [];
  if (block) return attention(site, block, of);
  const parts = modulationOf(site);
  return parts && modulation(site, parts, of);
}

// ---------------------------------------------------------------- attention

const cell = { head: null, query: null, key: null, token: null, channel: 0 }; // what is looked at; it stays from step to step

/** The head in which a patch attends to one word the most, and this word. */
function strongest({ dims: [heads, tokens], data }, query, words) {
  let most = 0, found = [0, 0];
  for (let h = 0; h < heads; h++) {
    for (let k = 0; k < words; k++) {
      const weight = data[(h * tokens + query) * tokens + k];
      if (weight > most) [most, found] = [weight, [h, k]];
    }
  }
  return found;
}

function attention(site, block, of) {
  const { values, run, txtLen, tip } = of, map = values.get(`${block}.attn.map`), [heads, tokens] = map.dims;
  const { names, groups } = tokensOf(site, tokens, run, txtLen), words = names.filter((name) => name.startsWith("“")).length;
  if (cell.query === null || cell.query >= tokens) {
    cell.query = txtLen + Math.min(of.patch, tokens - txtLen - 1);
    [cell.head, cell.key] = strongest(map, cell.query, words);
  }
  cell.key = Math.min(cell.key, tokens - 1);
  const isMap = site.endsWith("map"), both = { rows: groups, columns: groups }, head = select("head", [...Array(heads).keys()].map(String));
  const query = select("query", names), key = select("key", names);
  const matrix = () => {
    const { data } = values.get(site), mine = data.subarray(cell.head * tokens * tokens, (cell.head + 1) * tokens * tokens);
    const largest = mine.reduce((a, b) => Math.max(a, Math.abs(b)), 1e-12);
    const { image, note } = isMap ? shares(mine, tokens, tokens) : { image: diverging(table(mine, tokens, tokens), largest), note: "" };
    return whole(pixels("", image, {
      cells: [tokens, tokens], pointer: "cell", mark: [cell.query, cell.key], rows: names, columns: names, axes: ["query", "key"], note,
      unit: isMap ? "share of the query's attention" : "", colours: isMap ? SEQUENTIAL : DIVERGING,
      key: isMap ? ["0 %", percent(largest)] : [`−${format(largest)}`, format(largest)],
    }), image, both);
  };
  let panel = matrix();
  const move = ({ cell: at, key: inRow }) => {
    if (at) [cell.query, cell.key] = at;
    if (inRow) cell.key = inRow[1];
    update();
  };
  const main = drawn("", panel, { tip, move });
  const worked = html("div", { className: "worked" });
  const heading = html("p", { className: "worked-title" }), lines = html("dl", {}), own = html("p", { className: "map-axes" });
  const all = html("tbody", {}), list = html("details", {}, html("summary", { textContent: "All numbers of this query and key" }),
    html("div", { className: "scroll", tabIndex: 0 }, html("table", {}, html("thead", {}, row("th", ["channel", "q", "k", "q × k"])), all)));
  list.querySelector(".scroll").setAttribute("role", "region");
  list.querySelector(".scroll").setAttribute("aria-label", "All numbers of this query and key");
  const tables = ({ q, k, products, scores, weights }) => [
    strips("", [["q", q], ["k", k], ["q × k", products]], "channel"),
    strips("", [["score", scores], ["weight", weights]], "key", { columns: names, groups: { columns: groups }, mark: [isMap ? 1 : 0, cell.key], pointer: "key" }),
  ];
  const [first, second] = tables(scoreOf(values, block, cell.head, cell.query, cell.key));
  const vectors = drawn("the numbers of query and key, and their products", first, { tip });
  const softmax = drawn("this query's scores and weights for all keys", second, { tip, move });
  function update() {
    const found = scoreOf(values, block, cell.head, cell.query, cell.key), d = found.q.length, [a, b] = tables(found);
    [head.control.value, query.control.value, key.control.value] = [cell.head, cell.query, cell.key];
    heading.replaceChildren(html("b", { textContent: names[cell.query] }), " attends to ", html("b", { textContent: names[cell.key] }), `, head ${cell.head}`);
    lines.replaceChildren(
      ...line("q · k", `the sum of the ${d} products`, exact(found.dot), "dot"),
      ...line("score", `${exact(found.dot)} ÷ √${d}`, exact(found.score), "score"),
      ...line("softmax", html("span", {}, "e", html("sup", { textContent: exact(found.score) })), format(found.exponential), "exponential"),
      ...line("", html("span", {}, "sum of e", html("sup", { textContent: "score" }), ` over all ${tokens} keys`), format(found.sum), "sum"),
      ...line("weight", `${format(found.exponential)} ÷ ${format(found.sum)}`, `${exact(found.weight)} = ${percent(found.weight)}`, "weight"));
    const at = (tensor) => tensor.data[(cell.head * tokens + cell.query) * tokens + cell.key];
    own.textContent = `The model's own numbers: score ${exact(at(values.get(`${block}.attn.scores`)))}, weight ${exact(at(map))}.`;
    all.replaceChildren(...Array.from(found.q, (x, c) => row("td", [c, exact(x), exact(found.k[c]), exact(found.products[c])])));
    main.paint(panel, [cell.query, cell.key]);
    vectors.paint(a);
    softmax.paint(b, b.mark);
  }
  head.control.addEventListener("change", () => { cell.head = Number(head.control.value); panel = matrix(); update(); });
  query.control.addEventListener("change", () => { cell.query = Number(query.control.value); update(); });
  key.control.addEventListener("change", () => { cell.key = Number(key.control.value); update(); });
  worked.append(heading, vectors.el, lines, softmax.el, own, list);
  const el = html("div", { className: "worked-out" }, html("div", { className: "worked-cell" }, head.label, query.label, key.label), main.el, worked);
  return { kind: "element", el, paint: update };
}

// ---------------------------------------------------------------- modulation

function modulation(site, { before, scale, shift, gate }, of) {
  const { values, run, txtLen, tip } = of, value = values.get(site), [rows, columns] = value.dims;
  const tokens = tokensOf(site, rows, run, txtLen), token = select("token", tokens.names);
  const channel = select("channel", [...Array(columns).keys()].map(String));
  cell.token ??= rows > txtLen ? txtLen + of.patch : 0;
  [cell.token, cell.channel] = [Math.min(cell.token, rows - 1), Math.min(cell.channel, columns - 1)];
  const sizes = Float32Array.from(value.data, Math.abs).sort(), end = sizes[Math.floor(0.99 * (sizes.length - 1))];
  const image = diverging(table(value.data, rows, columns), end);
  const panel = whole(pixels("", image, {
    cells: [rows, columns], pointer: "cell", mark: [cell.token, cell.channel], rows: tokens.names,
    axes: ["token", "channel"], colours: DIVERGING, key: [`−${format(end)} and less`, `${format(end)} and more`],
  }), image, { rows: tokens.groups });
  const main = drawn("", panel, { tip, move: ({ cell: [r, c] }) => { [cell.token, cell.channel] = [r, c]; update(); } });
  const heading = html("p", { className: "worked-title" }), lines = html("dl", {});
  const strip = () => {
    const row = ({ dims, data }) => (dims[0] === 1 || dims.length === 1 ? data : data.subarray(cell.token * columns, (cell.token + 1) * columns));
    const names = gate ? [["output", before], ["gate", gate], ["added", site]] : [["norm", before], ["scale", scale], ["shift", shift], ["result", site]];
    return strips("", names.map(([name, from]) => [name, row(values.get(from))]), "channel", { mark: [names.length - 1, cell.channel] });
  };
  const numbers = drawn("this token's numbers; each row has its own scale", strip(), { tip });
  function update() {
    const at = (from) => {
      const { dims, data } = values.get(from);
      return data[(dims.length === 1 || dims[0] === 1 ? 0 : cell.token * columns) + cell.channel];
    };
    [token.control.value, channel.control.value] = [cell.token, cell.channel];
    heading.replaceChildren(html("b", { textContent: tokens.names[cell.token] }), `, channel ${cell.channel}`);
    const x = at(before);
    if (gate) lines.replaceChildren(...line("output", "of the layer", exact(x), "before"), ...line("added", `gate × output = ${bracketed(at(gate))} × ${bracketed(x)}`, exact(at(gate) * x), "result"));
    else lines.replaceChildren(
      ...line("norm", "after the layer norm", exact(x), "before"),
      ...line("result", `norm × (1 + scale) + shift = ${bracketed(x)} × (1 + ${bracketed(at(scale))}) + ${bracketed(at(shift))}`, exact(x * (1 + at(scale)) + at(shift)), "result"));
    main.paint(panel, [cell.token, cell.channel]);
    numbers.paint(strip());
  }
  token.control.addEventListener("change", () => { cell.token = Number(token.control.value); update(); });
  channel.control.addEventListener("change", () => { cell.channel = Number(channel.control.value); update(); });
  const el = html("div", { className: "worked-out" }, html("div", { className: "worked-cell" }, token.label, channel.label), main.el,
    html("div", { className: "worked" }, heading, numbers.el, lines));
  return { kind: "element", el, paint: update };
}

// ---------------------------------------------------------------- pieces

/** Rows of numbers as strips of colours, each with its own scale. rows: [name, numbers]. */
function strips(title, rows, axis, { columns = null, groups = null, mark = null, pointer = null } = {}) {
  const count = rows[0][1].length, data = new Float32Array(rows.length * count), rgb = new Uint8Array(3 * data.length);
  rows.forEach(([name, numbers], r) => {
    data.set(numbers, r * count);
    const one = table(Float32Array.from(numbers), 1, count);
    rgb.set((name === "weight" ? sequential(one, { scale: "root" }) : diverging(one)).data, 3 * r * count);
  });
  const image = { width: count, height: rows.length, data: rgb, values: table(data, rows.length, count), note: "" };
  return { ...whole(pixels(title, image, {
    cells: [rows.length, count], rows: rows.map(([name]) => name), columns: columns ?? [], axes: ["", axis], mark, pointer,
  }), image, groups), aspect: 15 / rows.length };
}

/** A term, how it is computed (a text or an element), and its value. */
function line(name, how, value, className) {
  return [html("dt", { textContent: name }), html("dd", {}, how, " = ", html("b", { className: `n-${className}`, textContent: value }))];
}

const row = (tag, cells) => html("tr", {}, ...cells.map((text) => html(tag, { textContent: text })));

/** A label with a choice of names; its value is the name's index. */
function select(name, options) {
  const control = html("select", {}, ...options.map((text, i) => new Option(text, i)));
  return { control, label: html("label", {}, name, control) };
}
