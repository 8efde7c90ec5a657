// Text and image tokens in every block, as fluxedu/widgets/streams.py.
import { measure } from "./added.js";
import { fixed, largest, range, rms, smallest } from "./numbers.js";
import { TIME_LABEL, lines, overlay, pixels, table } from "./panels.js";
import { fewStepsNote, labelsOf, plain, requestOf } from "./run.js";

const UNIT = "root mean square over channels";

export async function open(engine, message, onProgress) {
  const request = requestOf(engine, message.args, ["block"]), { txtLen } = engine.info;
  const { run, blocks, times, sizes, sums } = await measure(engine, request, onProgress), [rows, columns] = run.grid;
  const pieces = run.tokens, quantities = labelsOf(message, "quantity"), note = fewStepsNote(engine, request.steps);
  const parts = { text: (v) => v.subarray(0, txtLen), image: (v) => v.subarray(txtLen) };

  return ({ quantity, block, step, word }) => {
    const name = blocks[block].replace(".", " "), t = fixed(times[step], 2), overDepth = {}, overTime = {};
    for (const [stream, part] of Object.entries(parts)) {
      overDepth[stream] = blocks.map((_, b) => rms(part(sizes[b][step])));
      ["attention", "MLP"].forEach((source, i) => {
        overTime[`${source}, ${stream}`] = times.map((_, s) => rms(part(sums[block][i][s])));
      });
    }
    const values = quantity === 0 ? sizes[block][step] : sums[block][quantity - 1][step];
    const words = values.subarray(0, pieces.length), patches = values.slice(txtLen), least = smallest(words);
    const spread = Math.max(largest(words) - least, 1e-12);
    const panels = [
      lines(`Size of the tokens that enter each block, t = ${t}`, range(blocks.length), overDepth, "block", UNIT,
        { mark: block, xNames: blocks }),
      lines(`Size of what block ${name} adds, over time`, times, overTime, TIME_LABEL, UNIT, { mark: times[step] }),
      pixels(`Image tokens: ${quantities[quantity]}`, overlay(run.picture, table(patches, rows, columns)),
        { key: ["0", fixed(largest(patches), 2)], unit: UNIT }),
    ];
    const size = (v) => fixed(v[word], 1);
    const text = `Block ${name} at t = ${t}: the size of a text token is ${fixed(overDepth.text[block], 1)}, of an image token ` +
      `${fixed(overDepth.image[block], 1)}. The token “${plain(pieces[word])}” has size ${size(sizes[block][step])}; ` +
      `attention adds ${size(sums[block][0][step])} and the MLP ${size(sums[block][1][step])}.`;
    return { text: text + note, panels, shades: { word: Array.from(words, (v) => (v - least) / spread) } };
  };
}
