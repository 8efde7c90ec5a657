// T5's token vectors layer by layer, as fluxedu/widgets/tokens.py.
import { cosine, fixed, range } from "./numbers.js";
import { DIVERGING, diverging, lines, pixels, tableOf, upscale } from "./panels.js";
import { insideText, labelsOf, plain } from "./run.js";

export async function open(engine, message) {
  const names = labelsOf(message, "layer"), pieces = labelsOf(message, "first"), count = pieces.length;
  const sites = ["t5.embedded", ...range(names.length - 2).map((i) => `t5.encoder.block.${i}.out`), "sample.txt"];
  const values = await insideText(engine, { prompt: message.args.prompt }, sites);
  const cosines = sites.map((site) => {
    const { dims, data } = values.get(site), width = dims.at(-1);
    const vectors = range(count).map((i) => data.subarray(i * width, (i + 1) * width));
    return tableOf(count, count, (i, j) => cosine(vectors[i], vectors[j]));
  });
  const words = pieces.map((piece) => plain(piece) || piece);
  const clip = (x) => Math.min(Math.max(x, 0), 1);

  return ({ layer, first, second }) => {
    const at = (i, j, k = layer) => cosines[k].data[i * count + j];
    const others = range(count).filter((i) => i !== first);
    const nearest = others.reduce((best, i) => (at(first, i) > at(first, best) ? i : best), others[0]);
    const panels = [
      pixels(`Cosine of every two tokens, ${names[layer]}`, upscale(diverging(cosines[layer], 1), 256), {
        cells: [count, count], mark: [first, second], key: ["-1", "1"], colours: DIVERGING, rows: words,
        columns: range(count), unit: "cosine similarity", axes: ["token", "token"],
      }),
      lines(`“${words[first]}” and “${words[second]}”, layer by layer`, range(names.length),
        { cosine: range(names.length).map((k) => at(first, second, k)) }, "layer", "cosine similarity",
        { mark: layer, xNames: names }),
    ];
    const text = `“${words[first]}” (token ${first}) and “${words[second]}” (token ${second}), ${names[layer]}: cosine ` +
      `${fixed(at(first, second), 2)}. The most similar token to the first is “${words[nearest]}” (token ${nearest}), ` +
      `with ${fixed(at(first, nearest), 2)}.`;
    const shades = { first: range(count).map((i) => clip(at(second, i))), second: range(count).map((i) => clip(at(first, i))) };
    return { text, panels, shades };
  };
}
