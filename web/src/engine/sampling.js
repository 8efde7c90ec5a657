// The schedule of times and the solvers, as fluxedu/sampling/solvers.py. Time 1 is noise, time 0 is the image.

const { fround } = Math;

/** The times of a run: steps + 1 from 1 to 0, moved towards 1 by `shift` (e to the power of mu). */
export function schedule(steps, shift) {
  const factor = fround(shift);
  return Float32Array.from({ length: steps + 1 }, (_, i) => {
    // both halves are counted from their own end, as torch.linspace does
    const t = fround(i < (steps + 1) / 2 ? 1 - i / steps : (steps - i) / steps);
    return t === 0 ? 0 : fround(factor / fround(factor + fround(fround(1 / t) - 1)));
  });
}

/** x + factor * v */
const add = (x, factor, v) => x.map((value, i) => value + fround(fround(factor) * v[i]));

/** One step of each solver: (x, t, tNext, velocity) -> [x at tNext, velocity at t]; `velocity(x, t)` is async. */
export const SOLVERS = {
  async euler(x, t, tNext, velocity) {
    const v = await velocity(x, t);
    return [add(x, tNext - t, v), v];
  },
  async midpoint(x, t, tNext, velocity) {
    const v = await velocity(x, t), half = (t + tNext) / 2;
    return [add(x, tNext - t, await velocity(add(x, half - t, v), half)), v];
  },
  async heun(x, t, tNext, velocity) {
    const v = await velocity(x, t);
    const vNext = await velocity(add(x, tNext - t, v), tNext);
    return [add(x, (tNext - t) * 0.5, v.map((value, i) => value + vNext[i])), v];
  },
};

/** The predicted x0: the point that the tangent at x reaches at time 0. */
export const predictedX0 = (x, t, v) => add(x, -t, v);

/** Classifier-free guidance: from the velocity for the negative prompt through the one for the prompt. */
export const guide = (negative, prompted, scale) => add(negative, scale, prompted.map((v, i) => v - negative[i]));
