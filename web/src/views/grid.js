// Images over numbers of steps and guidance scales, as fluxedu/widgets/grid.py.
import { general, norm, percent, range } from "./numbers.js";
import { contactSheet, lines, pixels } from "./panels.js";
import { draw as drawRun, fewStepsNote, labelsOf, requestOf } from "./run.js";

export async function open(engine, message, onProgress) {
  const { steps: given, guidance_scales: scales, shifts: _, ...args } = message.args;
  const steps = [...given].sort((a, b) => a - b), shifts = labelsOf(message, "shift").map(Number);
  const base = requestOf(engine, args), total = shifts.length * scales.length * steps.length, runs = [];
  let done = 0;
  for (const [s, shift] of shifts.entries()) {
    runs.push([]);
    for (const n of steps) {
      const row = [];
      for (const guidance of scales) {
        row.push(await drawRun(engine, { ...base, steps: n, guidance, shift }));
        onProgress?.(++done / total);
      }
      runs[s].push(row);
    }
  }

  return ({ shift, cell: [row, column] }) => {
    const mine = runs[shift], times = [...mine[row][column].times], count = times.length, last = steps.at(-1);
    const [end, goal] = [mine[row][column], mine.at(-1)[column]].map((run) => run.latents.at(-1));
    const even = range(count).map((i) => times[0] * (1 - i / (count - 1)));
    const panels = [
      pixels("Images by number of steps (rows) and guidance scale (columns)",
        contactSheet(mine.map((line) => line.map((run) => run.picture))), {
          cells: [steps.length, scales.length], mark: [row, column], rows: steps, columns: scales.map((s) => general(s)),
          axes: ["steps", "guidance scale"], pointer: "cell",
        }),
      pixels(`${steps[row]} steps, guidance scale ${general(scales[column])}`, mine[row][column].picture),
      lines("Schedule: the time after each step", range(count).map((i) => i / (count - 1)),
        { "this schedule": times, "even steps": even }, "share of the steps done", "time t (1 = noise, 0 = image)"),
    ];
    const text = `This latent differs by ${percent(norm(end, goal) / norm(goal))} of its norm from the one after ${last} ` +
      "steps at the same guidance scale.";
    return { text: text + fewStepsNote(engine, steps[row]), panels, shades: {} };
  };
}
