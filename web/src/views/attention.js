// The attention of a run, as fluxedu/widgets/attention.py.
import { argmax, largest, percent, sum, wholePercentages } from "./numbers.js";
import { overlay, pixels, table, upscale } from "./panels.js";
import { draw as drawRun, fewStepsNote, inside, labelsOf, once, plain, requestOf } from "./run.js";

const SIDE = 256;

export async function open(engine, message, onProgress) {
  const request = requestOf(engine, message.args), { txtLen } = engine.info;
  const run = await drawRun(engine, request, onProgress), blocks = labelsOf(message, "block"), pieces = run.tokens;
  const words = pieces.map(plain), [rows, columns] = run.grid, picture = upscale(run.picture, SIDE);
  const note = fewStepsNote(engine, request.steps);
  const sites = blocks.map((block) => `${block}.attn.map`);
  const maps = (step) => once(engine, ["maps", request, blocks, step], () => inside(engine, run, step, sites));

  /** Attention of tokens to tokens, of one head or the mean of all: `index(token)` is a place in one head's map. */
  const attention = ({ dims: [heads, tokens], data }, head, count, index) => Float64Array.from({ length: count }, (_, i) => {
    if (head) return data[(head - 1) * tokens * tokens + index(i, tokens)];
    let total = 0;
    for (let h = 0; h < heads; h++) total += data[h * tokens * tokens + index(i, tokens)];
    return total / heads;
  });

  return async ({ block, step, head, word, patch }) => {
    const map = (await maps(step)).get(sites[block]), tokens = map.dims[1];
    const query = txtLen + patch[0] * columns + patch[1];
    const row = attention(map, head, tokens, (key) => query * tokens + key);
    const column = attention(map, head, rows * columns, (i) => (txtLen + i) * tokens + word);
    const toPatches = row.subarray(txtLen, txtLen + rows * columns), toWords = row.subarray(0, pieces.length);
    const strongest = argmax(toWords), peak = argmax(column), top = largest(column);
    const shares = [toPatches, toWords, row.subarray(pieces.length, txtLen)].map(sum), total = sum(shares);
    const [ofImage, ofPrompt, ofPadding] = wholePercentages(shares.map((share) => share / total));
    const text = `The patch in row ${patch[0] + 1}, column ${patch[1] + 1} gives ${ofImage}% of its attention to ` +
      `the image, ${ofPrompt}% to the prompt (most to “${words[strongest]}”, ` +
      `${percent(toWords[strongest], 1)}) and ${ofPadding}% to the padding. The patch that attends most to ` +
      `“${words[word]}” is in row ${Math.floor(peak / columns) + 1}, column ${(peak % columns) + 1} ` +
      `(${percent(top, 1)} of its attention).`;
    const panels = [
      pixels("Attention of the framed patch to every patch", overlay(picture, table(toPatches, rows, columns)), {
        cells: run.grid, mark: patch, key: ["0", percent(largest(toPatches), 1)], pointer: "patch",
        unit: "share of the framed patch's attention",
      }),
      pixels(`Attention of every patch to “${words[word]}”`, overlay(picture, table(column, rows, columns)), {
        cells: run.grid, key: ["0", percent(top, 1)], unit: "share of each patch's attention",
      }),
    ];
    const most = Math.max(largest(toWords), 1e-12);
    return { text: text + note, panels, shades: { word: Array.from(toWords, (share) => share / most) } };
  };
}
