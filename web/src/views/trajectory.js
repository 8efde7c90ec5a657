// A run step by step, as fluxedu/widgets/trajectory.py.
import { cosine, fixed, largest } from "./numbers.js";
import { TIME_LABEL, lines, pixels, sequential, tableOf, upscale } from "./panels.js";
import { decoded, draw as drawRun, fewStepsNote, once, requestOf } from "./run.js";

export async function open(engine, message, onProgress) {
  const request = requestOf(engine, message.args), run = await drawRun(engine, request, onProgress);
  const [channels, h, w] = run.shape, times = [...run.times].slice(0, -1), count = times.length;
  const note = fewStepsNote(engine, count);
  const angles = times.slice(1).map((t, i) => {
    const angle = Math.acos(Math.min(Math.max(cosine(run.velocities[i], run.velocities[i + 1]), -1), 1));
    return (angle * 180) / Math.PI / (times[i] - t);
  });
  const image = (name, step) =>
    once(engine, ["decoded", request, name, step], () => decoded(engine, run[name][step], run.shape));

  const ahead = async () => { // one after another, so that a move waits for one of them at most
    const first = message.state.step;
    for (let i = 0; i < count; i++) for (const name of ["latents", "x0"]) await image(name, (first + i) % count);
  };
  ahead().catch(() => {}); // a move shows the error

  return async ({ step }) => {
    const v = run.velocities[step];
    const speed = tableOf(h, w, (y, x) => {
      let total = 0;
      for (let c = 0; c < channels; c++) total += v[(c * h + y) * w + x] ** 2;
      return Math.sqrt(total / channels);
    });
    const [state, x0] = await Promise.all(["latents", "x0"].map((name) => image(name, step)));
    const panels = [
      pixels(`State before step ${step + 1} of ${count}, t = ${fixed(times[step], 2)}, decoded`, state),
      pixels("Predicted x0, decoded", x0),
      pixels("Size of the velocity in each cell", upscale(sequential(speed), 256), {
        key: ["0", fixed(largest(speed.data), 1)], unit: "root mean square over channels",
      }),
    ];
    if (count > 2) {
      const mark = step > 0 ? times[step] : null; // the first step has no velocity before it
      panels.push(lines("How fast the velocity changes direction", times.slice(1), { angle: angles }, TIME_LABEL,
        "degrees per unit of time", { mark }));
    }
    const noise = Number(fixed(100 * times[step]));
    const text = `The state is ${noise}% noise and ${100 - noise}% image; this step leads to ` +
      `t = ${fixed(run.times[step + 1], 2)}.`;
    return { text: text + note, panels, shades: {} };
  };
}
