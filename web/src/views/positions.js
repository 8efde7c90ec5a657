// Scores of a query and a key on a grid of patches, as fluxedu/widgets/positions.py.
import { imageIds, ropeTable } from "../engine/latents.js";
import { fixed, largest, range, smallest } from "./numbers.js";
import { between, lines, pixels, table, tableOf, upscale } from "./panels.js";
import { Unsupported, draw as drawRun, inside, once, requestOf } from "./run.js";

const PROMPT = "a red circle left of a blue square"; // EXAMPLE_PROMPT

/** q . k / sqrt(d) of one query and one key vector at all pairs of positions. */
function scores(q, k, { cos, sin }, count) {
  const half = q.length / 2, pairs = range(half);
  const rotated = (v) => range(count).map((n) => pairs.flatMap((i) => {
    const [a, b, c, s] = [v[2 * i], v[2 * i + 1], cos[n * half + i], sin[n * half + i]];
    return [a * c - b * s, a * s + b * c];
  }));
  const [queries, keys] = [rotated(q), rotated(k)], scale = q.length ** -0.5;
  return tableOf(count, count, (i, j) => {
    let total = 0;
    for (let c = 0; c < q.length; c++) total += queries[i][c] * keys[j][c];
    return total * scale;
  });
}

export async function open(engine, message, onProgress) {
  const { side, block, head } = message.args, { config, txtLen } = engine.info;
  if (!block.startsWith("single.")) throw new Unsupported("A double-stream block has two sets of queries.");
  const rope = ropeTable(imageIds([1, 2 * side, 2 * side]), config.axes_dim, config.theta), count = side * side;
  const ones = new Float32Array(config.head_dim).fill(1), flat = scores(ones, ones, rope, count);

  /** The mean query and key of the image tokens in the last step of a run. */
  const trained = () => once(engine, ["positions", side, block, head], async () => {
    const request = requestOf(engine, { prompt: PROMPT }), run = await drawRun(engine, request, onProgress);
    const sites = [`${block}.q_norm`, `${block}.k_norm`], values = await inside(engine, run, request.steps - 1, sites);
    const means = sites.map((site) => {
      const { dims: [, tokens, width], data } = values.get(site), mean = new Float64Array(width);
      for (let token = txtLen; token < tokens; token++)
        for (let c = 0; c < width; c++) mean[c] += data[(head * tokens + token) * width + c] / (tokens - txtLen);
      return mean;
    });
    return scores(...means, rope, count);
  });

  return async ({ vectors, query, key }) => {
    const all = vectors ? await trained() : flat, middle = Math.floor(side / 2);
    const [low, high] = [smallest(all.data), largest(all.data)];
    const [q, k] = [query, key].map(([row, column]) => row * side + column);
    const offset = [key[0] - query[0], key[1] - query[1]], ends = [fixed(low, 1), fixed(high, 1)];
    const from = all.data.subarray((middle * side + middle) * count, (middle * side + middle + 1) * count);
    const series = {
      "along a row": from.subarray(middle * side, (middle + 1) * side),
      "along a column": range(side).map((row) => from[row * side + middle]),
    };
    const keys = table(all.data.subarray(q * count, (q + 1) * count), side, side);
    const queries = tableOf(side, side, (row, column) => all.data[(row * side + column) * count + k]);
    const note = "colours from the lowest score on the grid to the highest";
    const options = { cells: [side, side], key: ends, colours: "viridis", unit: "score before softmax", note };
    const panels = [
      pixels("Query (frame): its score with a key at each patch", upscale(between(keys, low, high), 256),
        { ...options, mark: query, pointer: "query" }),
      pixels("Key (frame): its score with a query at each patch", upscale(between(queries, low, high), 256),
        { ...options, mark: key, pointer: "key" }),
      lines("Score for each offset", range(side).map((i) => i - middle), series, "offset from query to key (patches)",
        "score before softmax", { mark: Math.max(-middle, Math.min(offset[1], side - 1 - middle)), dashed: ["along a column"] }),
    ];
    const text = `The query is in row ${query[0] + 1}, column ${query[1] + 1}, the key in row ${key[0] + 1}, column ` +
      `${key[1] + 1}: their offset is ${offset[0]} rows and ${offset[1]} columns, their score ` +
      `${fixed(all.data[q * count + k], 2)}. The score is the same for every pair with this offset.`;
    return { text, panels, shades: {} };
  };
}
