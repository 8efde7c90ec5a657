// What attention and the MLP of each block add, as fluxedu/widgets/contributions.py.
import { measure } from "./added.js";
import { fixed, largest, percent, range, rms } from "./numbers.js";
import { TIME_LABEL, lines, overlay, pixels, resizeTable, sequential, table, tableOf } from "./panels.js";
import { fewStepsNote, requestOf } from "./run.js";

const SOURCES = ["attention", "MLP", "sum"], STREAMS = ["image", "text"];

export async function open(engine, message, onProgress) {
  const request = requestOf(engine, message.args), { txtLen } = engine.info;
  const { run, blocks, times, sizes, sums } = await measure(engine, request, onProgress), [rows, columns] = run.grid;
  const note = fewStepsNote(engine, request.steps);

  return ({ source, stream, cell: [block, step] }) => {
    const [what, tokens, name] = [SOURCES[source], STREAMS[stream], blocks[block].replace(".", " ")], t = fixed(times[step], 2);
    const ofStream = (values) => rms(stream === 0 ? values.subarray(txtLen) : values.subarray(0, txtLen));
    const share = (b, kind, s) => ofStream(sums[b][kind][s]) / ofStream(sizes[b][s]);
    const shares = tableOf(blocks.length, times.length, (b, s) => share(b, source, s));
    const patches = sums[block][source][step].slice(txtLen);
    const series = Object.fromEntries(SOURCES.map((kind, i) => [kind, range(times.length).map((s) => share(block, i, s))]));
    const panels = [
      pixels(`Size of what ${what} adds to ${tokens} tokens, by block and time`,
        resizeTable(sequential(shares, { name: "viridis", scale: "row" }), 240, 260), {
          cells: [blocks.length, times.length], mark: [block, step], key: ["0", "largest of the row"],
          colours: "viridis", rows: blocks, columns: times.map((time) => `t=${fixed(time, 2)}`),
          unit: "share of the token's size", axes: ["block", "time"], pointer: "cell",
        }),
      lines(`Block ${name} over time, ${tokens} tokens`, times, series, TIME_LABEL, "share of the token's size",
        { mark: times[step] }),
      pixels(`Size of what ${what} of ${name} adds to each patch, t = ${t}`,
        overlay(run.picture, table(patches, rows, columns)),
        { key: ["0", fixed(largest(patches), 2)], unit: "root mean square over channels" }),
    ];
    const [attention, mlp, both] = SOURCES.map((_, i) => share(block, i, step));
    const cosine = (both ** 2 - attention ** 2 - mlp ** 2) / Math.max(2 * attention * mlp, 1e-12);
    const relation = cosine > 0.2 ? "similar" : cosine < -0.2 ? "opposite" : "unrelated";
    const text = `Block ${name} at t = ${t}: relative to the ${tokens} tokens, attention adds ${percent(attention)}, the MLP ` +
      `${percent(mlp)}, both together ${percent(both)}; the two point in ${relation} directions (cosine ` +
      `${fixed(Number(fixed(cosine, 1)) + 0, 1)}).`;
    return { text: text + note, panels, shades: {} };
  };
}
