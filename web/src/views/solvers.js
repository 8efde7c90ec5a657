// Solvers at equal numbers of model evaluations, as fluxedu/widgets/solvers.py.
import { argmax, norm, percent } from "./numbers.js";
import { contactSheet, lines, pixels } from "./panels.js";
import { draw as drawRun, fewStepsNote, labelsOf, requestOf } from "./run.js";

const STAGES = { euler: 1, midpoint: 2, heun: 2 }; // model evaluations per step

export async function open(engine, message, onProgress) {
  const { evaluations: given, solvers, shifts: _, reference, ...args } = message.args;
  const evaluations = [...given].sort((a, b) => a - b), shifts = labelsOf(message, "shift").map(Number);
  const base = requestOf(engine, args);
  const goal = (await drawRun(engine, { ...base, solver: "midpoint", steps: reference, shift: shifts.at(-1) })).latents.at(-1);
  const total = shifts.length * solvers.length * evaluations.length, images = [], errors = [];
  let done = 0;
  for (const [s, shift] of shifts.entries()) {
    images.push(solvers.map(() => []));
    errors.push(solvers.map(() => []));
    for (const [i, solver] of solvers.entries())
      for (const n of evaluations) {
        const run = await drawRun(engine, { ...base, solver, shift, steps: n / STAGES[solver] });
        images[s][i].push(run.picture);
        errors[s][i].push(norm(run.latents.at(-1), goal) / norm(goal));
        onProgress?.(++done / total);
      }
  }

  return ({ shift, cell: [row, column] }) => {
    const mine = errors[shift], n = evaluations[column];
    const best = solvers[argmax(mine.map((e) => -e[column]))];
    const panels = [
      pixels("Images by solver (rows) and model evaluations (columns)", contactSheet(images[shift]), {
        cells: [solvers.length, evaluations.length], mark: [row, column], rows: solvers, columns: evaluations,
        axes: ["solver", "model evaluations"], pointer: "cell",
      }),
      pixels(`${solvers[row]}, ${n} model evaluations`, images[shift][row][column]),
      lines("Error: distance from a run of many steps", evaluations, Object.fromEntries(solvers.map((s, i) => [s, mine[i]])),
        "model evaluations (NFE)", "distance / norm of the latent", { mark: n }),
    ];
    const text = `With ${n} model evaluations, ${solvers[row]} has an error of ${percent(mine[row][column])} of the ` +
      `latent's norm; at this cost ${best} has the smallest error.`;
    return { text: text + fewStepsNote(engine, n, "model evaluation"), panels, shades: {} };
  };
}
