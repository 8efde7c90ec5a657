// CLIP's vectors of prompts, as fluxedu/widgets/similarity.py.
import { cosine, fixed, range } from "./numbers.js";
import { DIVERGING, diverging, lines, pixels, tableOf, upscale } from "./panels.js";
import { insideText, labelsOf, once } from "./run.js";

const NO_CHANGE = "(no change)";

export async function open(engine, message) {
  const prompts = labelsOf(message, "first"), words = labelsOf(message, "word"), count = prompts.length;
  const pooled = (prompt) => once(engine, ["pooled", prompt], async () =>
    (await insideText(engine, { prompt }, ["sample.pooled"])).get("sample.pooled").data);
  const vectors = [];
  for (const prompt of prompts) vectors.push(await pooled(prompt));
  const table = tableOf(count, count, (i, j) => cosine(vectors[i], vectors[j]));

  return async ({ first, second, index, word }) => {
    let prompt = prompts[second];
    if (words[word] !== NO_CHANGE) {
      const parts = prompt.trim().split(/\s+/);
      parts[Math.min(index, parts.length - 1)] = words[word];
      prompt = parts.join(" ");
    }
    const a = vectors[first], b = await pooled(prompt);
    const order = range(a.length).sort((i, j) => a[j] - a[i]), numbers = range(count).map((i) => i + 1);
    const panels = [
      pixels("Cosine of every two prompts, in the order of the lists", upscale(diverging(table, 1), 256), {
        cells: [count, count], mark: [first, second], key: ["-1", "1"], colours: DIVERGING, unit: "cosine similarity",
        axes: ["prompt", "prompt"], rows: numbers, columns: numbers,
      }),
      lines("The two vectors, number by number", range(order.length),
        { first: order.map((i) => a[i]), second: order.map((i) => b[i]) }, "channel, sorted by the first vector", "value"),
    ];
    return { text: `“${prompts[first]}” and “${prompt}”: cosine ${fixed(cosine(a, b), 3)}.`, panels, shades: {} };
  };
}
