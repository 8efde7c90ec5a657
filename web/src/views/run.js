// Runs of the miniature for views: each is drawn once per page, however many explorers show it.
import { rgb } from "./panels.js";

/** What the page cannot compute: the explorer stays a picture. */
export class Unsupported extends Error {}

const NAMES = {
  prompt: "prompt", seed: "seed", steps: "steps", guidance: "guidance", shift: "shift", height: "height", width: "width",
  negative_prompt: "negative", true_cfg_scale: "trueCfg", solver: "solver",
};
const ENOUGH_STEPS = 8; // fluxedu/instruments/lenses/run.py

/** The arguments of the pipeline as a request of the engine. `own`: names that the explorer itself reads. */
export function requestOf(engine, args, own = []) {
  const [height, width] = engine.info.shapes[0], request = { seed: 0, height, width, ...engine.info.defaults };
  delete request.mu;
  for (const [name, value] of Object.entries(args)) {
    if (name === "progress" || own.includes(name) || value === null) continue;
    if (!NAMES[name]) throw new Unsupported(`The page has no ${name}.`);
    request[NAMES[name]] = value;
  }
  if (request.height % 16 || request.width % 16) throw new Unsupported("Sizes are multiples of 16.");
  if (typeof request.prompt !== "string" && request.prompt !== undefined) throw new Unsupported("One prompt, please.");
  return request;
}

const kept = new WeakMap(); // engine -> key -> promise

/** What `compute` returns, once per engine and key. */
export function once(engine, key, compute) {
  if (!kept.has(engine)) kept.set(engine, new Map());
  const found = kept.get(engine), text = JSON.stringify(key);
  if (!found.has(text)) found.set(text, compute());
  return found.get(text);
}

/** A run: as Engine.run returns it, with `picture` as RGB bytes and the grid of its patches. */
export function draw(engine, request, onProgress) {
  return once(engine, ["run", request], async () => {
    const onStep = onProgress && (({ step }) => onProgress((step + 1) / request.steps));
    const run = await engine.run(request, { onStep });
    return { ...run, picture: rgb(run.image), grid: run.shape.slice(1).map((n) => n / 2) };
  });
}

/** Values at some sites of one step of a run, without keeping them. */
export const inside = (engine, run, step, sites) => engine.inside(run, step, sites);

/** Values inside the networks that depend on the prompt, the time and the guidance scale alone: the image is one patch. */
export function insideText(engine, { prompt, t = 1, guidance }, sites) {
  const shape = [engine.info.latent.channels, 2, 2], latents = new Float32Array(shape[0] * 4);
  return engine.inside({ request: { prompt, guidance, changes: [] }, shape, latents: [latents], times: [t] }, 0, sites);
}

/** A latent as an image of RGB bytes. */
export const decoded = async (engine, latents, shape) => rgb(await engine.decode(latents, shape));

/** The labels of a control in the message. */
export const labelsOf = (message, name) => message.controls.find((control) => control.name === name).labels;

/** A sentence for runs of few steps, else nothing. */
export function fewStepsNote(engine, steps, unit = "step") {
  const enough = Math.min(ENOUGH_STEPS, engine.info.defaults.steps);
  if (steps >= enough) return "";
  const number = steps === 1 ? `1 ${unit}` : `${steps} ${unit}s`;
  return ` This run has ${number}; with fewer than ${enough}, this model's images can be wrong.`;
}

/** A token's text without T5's mark of the beginning of a word. */
export const plain = (piece) => piece.replaceAll("▁", "");
