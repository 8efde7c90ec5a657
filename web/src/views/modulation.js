// Shift, scale and gate of every layer over time, as fluxedu/widgets/modulation.py.
import { fixed, largest, norm, percent, range, rms, smallest, sum } from "./numbers.js";
import { TIME_LABEL, between, lines, pixels, resizeTable, tableOf } from "./panels.js";
import { insideText, labelsOf, once } from "./run.js";

const KINDS = ["shift", "scale", "gate"], SOME = 5;
const PARTS = { txt: "text", img: "image", attn: "attention", mlp: "MLP" };

/** A layer's name in words. */
const readable = (layer) => {
  const words = layer.split(/[._]/).map((word) => PARTS[word] ?? word);
  return [words.slice(0, 2).join(" "), ...words.slice(2)].join(", ");
};

/** The layers in the order of the network: { name, sites: of shift, scale and gate }. */
const layersOf = (blocks) => blocks.flatMap((block) => {
  if (block.startsWith("single")) return [{ name: readable(block), sites: KINDS.map((kind) => `${block}.${kind}`) }];
  return ["txt", "img"].flatMap((stream) => ["attn", "mlp"].map((part, i) => ({
    name: readable(`${block}.${stream}_${part}`), sites: KINDS.map((kind) => `${block}.${stream}_mod.${kind}${i + 1}`),
  })));
});

export async function open(engine, message, onProgress) {
  const prompts = labelsOf(message, "prompt"), scales = labelsOf(message, "guidance").map(Number);
  const count = message.args.times, layers = layersOf(engine.info.blocks), sites = layers.flatMap((l) => l.sites);
  const times = range(count).map((i) => Math.fround(i < count / 2 ? 1 - i / (count - 1) : (count - 1 - i) / (count - 1)));

  /** The channels of every site at every time: [time] -> Map. */
  const channels = (prompt, guidance) => once(engine, ["modulation", prompt, guidance, count], async () => {
    const found = [];
    for (const [i, t] of times.entries()) {
      found.push(await insideText(engine, { prompt, t, guidance }, sites));
      onProgress?.((i + 1) / count);
    }
    return found;
  });
  const usual = await channels(prompts[0], scales[message.first.guidance]);

  /** How much a value differs from the usual one, as a share of its size. */
  const change = (now, before) => norm(now, before) / Math.max(norm(before), 1e-6 * Math.sqrt(before.length));

  return async ({ kind, prompt, guidance, cell: [layer, time] }) => {
    const found = await channels(prompts[prompt], scales[guidance]), { name, sites: three } = layers[layer];
    const values = (t, l = layer, k = kind) => found[t].get(layers[l].sites[k]).data;
    const size = tableOf(layers.length, count, (l, t) => rms(values(t, l)));
    const what = KINDS[kind], width = values(0).length;
    const means = range(width).map((c) => sum(times.map((_, t) => values(t)[c])) / count);
    const order = range(width).sort((a, b) => means[a] - means[b]);
    const some = range(SOME).map((i) => order[Math.floor((i * (width - 1)) / (SOME - 1))]);
    const columns = times.map((t) => `t=${fixed(t, 2)}`);
    const series = Object.fromEntries(KINDS.map((k, i) => [k, times.map((_, t) => rms(found[t].get(three[i]).data))]));
    const [low, high] = [smallest(size.data), largest(size.data)];
    const colours = resizeTable(between(size, low, high), 260, 260);
    const panels = [
      pixels(`Size of the ${what}, by layer and time`, colours, {
        cells: [layers.length, count], mark: [layer, time], key: [fixed(low, 2), fixed(high, 2)], colours: "viridis",
        rows: layers.map((l) => l.name), columns, unit: "root mean square over channels", axes: ["layer", "time"],
        pointer: "cell",
      }),
      lines(`Sizes in ${name}, over time`, times, series, TIME_LABEL, "root mean square over channels", { mark: times[time] }),
      lines(`The ${what} of ${SOME} of the ${width} channels, from the smallest mean to the largest`, times,
        Object.fromEntries(some.map((c) => [`channel ${c}`, times.map((_, t) => values(t)[c])])), TIME_LABEL, what,
        { mark: times[time] }),
    ];
    let text = `In ${name}, at t = ${fixed(times[time], 2)}, the root mean square of ${what} is ` +
      `${fixed(size.data[layer * count + time], 3)}; over channels it runs from ${fixed(smallest(values(time)), 2)} to ` +
      `${fixed(largest(values(time)), 2)}.`;
    if (found !== usual) {
      const share = change(values(time), usual[time].get(three[kind]).data);
      text += ` It differs by ${percent(share)} of its size from that of the first prompt at the usual guidance scale.`;
    }
    return { text, panels, shades: {} };
  };
}
