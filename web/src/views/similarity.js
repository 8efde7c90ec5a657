// CLIP's vectors of prompts, as fluxedu/widgets/similarity.py.
import { cosine, fixed, largest, range } from "./numbers.js";
import { lines, pixels, sequential, tableOf, upscale } from "./panels.js";
import { insideText, labelsOf, once } from "./run.js";

const NO_CHANGE = "(no change)";

export async function open(engine, message) {
  const prompts = labelsOf(message, "first"), words = labelsOf(message, "word"), count = prompts.length;
  const pooled = (prompt) => once(engine, ["pooled", prompt], async () =>
    (await insideText(engine, { prompt }, ["sample.pooled"])).get("sample.pooled").data);
  const vectors = [];
  for (const prompt of prompts) vectors.push(await pooled(prompt));
  const distances = tableOf(count, count, (i, j) => Math.max(1 - cosine(vectors[i], vectors[j]), 0));

  return async ({ first, second, index, word }) => {
    let prompt = prompts[second];
    if (words[word] !== NO_CHANGE) {
      const parts = prompt.trim().split(/\s+/);
      parts[Math.min(index, parts.length - 1)] = words[word];
      prompt = parts.join(" ");
    }
    const a = vectors[first], b = await pooled(prompt);
    const order = range(a.length).sort((i, j) => a[j] - a[i]), numbers = range(count).map((i) => i + 1);
    const colours = upscale(sequential(distances, { name: "viridis", scale: "log" }), 256);
    const panels = [
      pixels("How different every two prompts are: 1 - cosine", colours, {
        cells: [count, count], mark: [first, second], key: ["0", fixed(largest(distances.data), 2)], colours: "viridis",
        unit: "1 - cosine", axes: ["prompt", "prompt"], rows: numbers.map((n, i) => `${n}  ${prompts[i]}`), columns: numbers,
      }),
      lines("The first vector, and what is different in the second", range(order.length),
        { first: order.map((i) => a[i]), "second - first": order.map((i) => b[i] - a[i]) },
        "channel, sorted by the first vector", "value", { units: { "second - first": "difference" } }),
    ];
    return { text: `“${prompts[first]}” and “${prompt}”: cosine ${fixed(cosine(a, b), 4)}.`, panels, shades: {} };
  };
}
