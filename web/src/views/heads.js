// Removing attention heads, as fluxedu/widgets/heads.py: a run for every head without it, and for every head alone.
import { largest, norm, percent, range } from "./numbers.js";
import { differencePanel, pixels, resizeTable, sequential, table } from "./panels.js";
import { decoded, fewStepsNote, labelsOf, once, requestOf } from "./run.js";

const ENOUGH_STEPS = 8;

export async function open(engine, message, onProgress) {
  const steps = message.args.steps ?? Math.min(ENOUGH_STEPS, engine.info.defaults.steps), { blocks, heads } = engine.info;
  const request = { ...requestOf(engine, { ...message.args, steps }), decode: false }, removed = labelsOf(message, "removed");
  const removal = (block, head, alone) => range(heads).filter((i) => (alone ? i !== head : i === head))
    .map((i) => ({ kind: "scale", target: `${block}.head.${i}`, factor: 0 }));
  const runs = removed.flatMap((_, alone) => blocks.flatMap((b) => range(heads).map((head) => removal(b, head, alone === 1))));
  const latents = await once(engine, ["heads", request], async () => {
    const found = [];
    for (const changes of [[], ...runs]) { // of each run only the result is kept
      found.push((await engine.run({ ...request, changes })).latents.at(-1));
      onProgress?.(found.length / (runs.length + 1));
    }
    return found;
  });
  const [original, ...changed] = latents, count = blocks.length * heads;
  const shape = [engine.info.latent.channels, request.height / 8, request.width / 8];
  const tables = removed.map((_, i) => table(
    Float64Array.from(changed.slice(i * count, (i + 1) * count), (x) => norm(x, original) / norm(original)), blocks.length, heads));
  const picture = (i) => once(engine, ["heads", request, i], () => decoded(engine, latents[i], shape));
  const before = await picture(0), note = fewStepsNote(engine, steps);

  return async ({ removed: kind, cell: [block, head] }) => {
    const distances = tables[kind], index = block * heads + head, change = distances.data[index];
    const name = blocks[block].replace(".", " ");
    const what = kind === 0 ? `head ${head} of block ${name}` : `all heads of block ${name} except head ${head}`;
    const after = await picture(1 + kind * count + index);
    const panels = [
      pixels("How much the latent changes, by block and head",
        resizeTable(sequential(distances, { name: "viridis" }), 256, 200), {
          cells: [blocks.length, heads], mark: [block, head], key: ["0", percent(largest(distances.data))],
          colours: "viridis", rows: blocks, columns: range(heads), unit: "share of the latent's norm",
          axes: ["block", "head"], pointer: "cell",
        }),
      pixels("With all heads", before),
      pixels(`Without ${what}`, after),
      differencePanel(before, after),
    ];
    const more = distances.data.filter((d) => d > change).length;
    const text = `Without ${what} the latent changes by ${percent(change)} of its norm; ${more} of ${count} such ` +
      "ablations change it more.";
    return { text: text + note, panels, shades: {} };
  };
}
