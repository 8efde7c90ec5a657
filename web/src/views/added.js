// Sizes of tokens, and of what attention and the MLP of each block add to them, as measure_contributions in
// fluxedu/widgets/contributions.py.
import { rowRms } from "./numbers.js";
import { draw as drawRun, inside, once } from "./run.js";

const DOUBLE = ["img", "txt", "img_attn_contribution", "txt_attn_contribution", "img_mlp_contribution", "txt_mlp_contribution"];
const SINGLE = ["x", "attn_out", "gate", "contribution"];

const joined = (a, b) => Float32Array.from({ length: a.length + b.length }, (_, i) => (i < a.length ? a[i] : b[i - a.length]));
const added = (a, b, sign = 1) => a.map((v, i) => v + sign * b[i]);

/** { run, blocks, times, sizes[block][step], sums[block][source][step] }: root mean squares, one per token, text first;
 * the sources are attention, the MLP, and the sum of both. */
export function measure(engine, request, onProgress) {
  return once(engine, ["added", request], async () => {
    const run = await drawRun(engine, request, (share) => onProgress?.(share / 4)), { blocks, config } = engine.info;
    const steps = run.velocities.length, width = config.hidden_size;
    const sites = blocks.flatMap((block) => (block.startsWith("double") ? DOUBLE : SINGLE).map((site) => `${block}.${site}`));
    const sizes = blocks.map(() => []), sums = blocks.map(() => [[], [], []]);
    for (let step = 0; step < steps; step++) {
      const values = await inside(engine, run, step, sites);
      blocks.forEach((block, i) => {
        const at = (site) => values.get(`${block}.${site}`).data;
        let x, attention, both;
        if (block.startsWith("double")) {
          const streams = (site) => joined(at(`txt${site}`), at(`img${site}`));
          x = streams("");
          attention = streams("_attn_contribution");
          both = added(attention, streams("_mlp_contribution"));
        } else {
          const gate = at("gate");
          x = at("x");
          attention = at("attn_out").map((v, j) => v * gate[j % width]);
          both = at("contribution");
        }
        sizes[i].push(rowRms(x, width));
        [attention, added(both, attention, -1), both].forEach((v, source) => sums[i][source].push(rowRms(v, width)));
      });
      onProgress?.((1 + (3 * (step + 1)) / steps) / 4);
    }
    return { run, blocks, times: [...run.times].slice(0, steps), sizes, sums };
  });
}
