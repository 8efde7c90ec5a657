// Runs as points on a plane through their images, as fluxedu/widgets/velocity.py.
import { fixed, largest, norm, range, smallest, sum } from "./numbers.js";
import { pixels, points } from "./panels.js";
import { Unsupported, decoded, draw as drawRun, fewStepsNote, once, requestOf } from "./run.js";

const dot = (a, b) => a.reduce((total, v, i) => total + v * b[i], 0);
const scaled = (a, factor) => Float64Array.from(a, (v) => v * factor);
const minus = (a, b, factor = 1) => Float64Array.from(a, (v, i) => v - factor * b[i]);
const mean = (rows) => scaled(rows.reduce((total, row) => minus(total, row, -1), new Float64Array(rows[0].length)), 1 / rows.length);

/** The direction along which the rows vary most, by power iteration; the first row is on its positive side. */
function widest(rows) {
  const products = rows.map((a) => rows.map((b) => dot(a, b)));
  let weights = range(rows.length).map((i) => 1 + 0.1 * i);
  for (let i = 0; i < 3000; i++) {
    const next = products.map((row) => dot(row, weights)), length = norm(next);
    weights = next.map((v) => v / length);
  }
  const direction = rows.reduce((total, row, i) => minus(total, row, -weights[i]), new Float64Array(rows[0].length));
  return scaled(direction, (dot(rows[0], direction) < 0 ? -1 : 1) / norm(direction));
}

/** The mean of the ends and two directions: between the means of the first two groups, and where the ends vary most. */
function plane(ends, group) {
  const centre = mean(ends), directions = [];
  let rest = ends.map((end) => minus(end, centre));
  if (group.at(-1) > 0) {
    const [from, to] = [0, 1].map((g) => mean(ends.filter((_, i) => group[i] === g))), between = minus(to, from);
    directions.push(scaled(between, 1 / norm(between)));
  }
  while (directions.length < 2) {
    for (const direction of directions) rest = rest.map((row) => minus(row, direction, dot(row, direction)));
    const size = (rows) => Math.sqrt(sum(rows.map((row) => norm(row) ** 2)));
    if (size(rest) < 1e-3 * size(ends)) throw new Unsupported("Too few runs for a plane.");
    directions.push(widest(rest));
  }
  return { centre, directions };
}

export async function open(engine, message, onProgress) {
  const { prompts: given, seeds, steps, ...args } = message.args;
  const prompts = [given].flat(), count = prompts.length * seeds, group = range(count).map((i) => Math.floor(i / seeds));
  const runs = [];
  for (const i of range(count)) {
    const request = requestOf(engine, { ...args, steps, prompt: prompts[group[i]], seed: i % seeds });
    runs.push(await drawRun(engine, request));
    onProgress?.((i + 1) / count);
  }
  const { times, shape } = runs[0], { centre, directions } = plane(runs.map((run) => run.latents[steps]), group);
  const project = (x) => directions.map((direction) => dot(direction, x));
  const origin = project(centre);
  const xy = range(steps + 1).map((n) => runs.map((run) => project(run.latents[n]).map((v, i) => v - origin[i])));
  const arrows = range(steps + 1).map((n) => runs.map((run) =>
    (n < steps ? project(run.velocities[n]).map((v) => -0.2 * times[n] * v) : [0, 0])));
  const limits = [0, 1].map((axis) => {
    const all = xy.flat().map((point) => point[axis]), [low, high] = [smallest(all), largest(all)];
    const margin = 0.06 * (high - low) + 1e-6;
    return [low - margin, high + margin];
  });
  const note = fewStepsNote(engine, steps);
  const prediction = (step, i) => once(engine, ["prediction", message.args, step, i], () =>
    decoded(engine, step < steps ? runs[i].x0[step] : runs[i].latents[steps], shape));

  return async ({ step, particle }) => {
    const t = fixed(times[step], 2), seed = particle % seeds;
    let xLabel = "direction in which the images differ most", distance = "";
    if (prompts.length > 1) {
      const means = prompts.map((_, g) => sum(xy[step].filter((_, i) => group[i] === g).map(([x]) => x)) / seeds);
      xLabel = "from the first prompt's images to the second's";
      distance = ` The means of the prompts are ${fixed(largest(means) - smallest(means), 1)} apart in the horizontal ` +
        "direction.";
    }
    const panels = [
      points(`State and direction of each run, t = ${t}`, xy[step].flat(), arrows[step].flat(), group, prompts, limits,
        xLabel, "at right angles: where they differ most",
        { mark: particle, pointer: "particle", trails: runs.map((_, i) => xy.slice(0, step + 1).flatMap((at) => at[i])) }),
      pixels(`Predicted x0 of seed ${seed}, “${prompts[group[particle]]}”`, await prediction(step, particle)),
    ];
    const text = "Each arrow is a fifth of the way that remains if the velocity stays as it is; the line behind a point " +
      "is its path so far. The vertical direction is at right angles to the horizontal one, where the images differ most.";
    const end = times[step] > 0 ? text : "Every run has reached its image.";
    return { text: `t = ${t}.${distance} ${end}${note}`, panels, shades: {} };
  };
}
