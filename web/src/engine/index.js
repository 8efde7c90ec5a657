// The miniature in the browser: a promise for every call, while a worker computes.
//
//   const engine = await Engine.open({ base, onProgress });
//   const run = await engine.run({ prompt: "a red circle", seed: 0, height: 128, width: 128 }, { onStep, signal });
//   const values = await engine.inside(run, 3);          // Map: site -> { dims, data }
import { previewPixels } from "./latents.js";

const toImageData = ({ pixels, height, width }) => new ImageData(pixels, width, height);

export class Engine {
  /**
   * base: URL of the folder with the page's files, the page's own by default. onProgress({ loaded, total, what })
   * counts bytes; `what` is "runtime", "weights" or "graphs".
   */
  static async open({ base = document.baseURI, onProgress = () => {} } = {}) {
    const engine = new Engine(new URL(base, document.baseURI));
    engine.info = await engine.call("open", { base: engine.base.href }, { onProgress });
    return engine;
  }

  constructor(base) {
    this.base = base;
    this.calls = new Map();
    this.count = 0;
    this.worker = new Worker(new URL("worker.js", base), { type: "module" });
    this.worker.onmessage = ({ data }) => this.receive(data);
    this.worker.onerror = (event) => {
      const error = new Error(event.message || "The worker could not be started.");
      for (const { reject } of this.calls.values()) reject(error);
      this.calls.clear();
    };
  }

  call(name, values = {}, { onProgress, onStep, signal } = {}) {
    const id = ++this.count;
    return new Promise((resolve, reject) => {
      if (signal?.aborted) return reject(new DOMException("The run was aborted.", "AbortError"));
      signal?.addEventListener("abort", () => this.worker.postMessage({ call: "abort", of: id }), { once: true });
      this.calls.set(id, { resolve, reject, onProgress, onStep });
      this.worker.postMessage({ id, call: name, ...values });
    });
  }

  receive({ id, progress, step, result, error }) {
    const call = this.calls.get(id);
    if (!call) return;
    if (progress) return call.onProgress?.(progress);
    if (step) return call.onStep?.(step);
    this.calls.delete(id);
    if (error) call.reject(error.name === "AbortError" ? new DOMException(error.message, error.name) : named(error));
    else call.resolve(result);
  }

  /** { t5: { ids, pieces }, clip: { ids, pieces }, unknown: [{ word, start, end }], truncated } */
  tokenize(prompt) {
    return this.call("tokenize", { prompt });
  }

  /**
   * Draws a picture. request: { prompt, clipPrompt, negative, seed, steps, guidance, trueCfg, shift, height, width,
   * solver, changes, decode }; changes as in changes.js; decode: false leaves out the image. onStep({ step, t, latents,
   * velocity, x0, preview }) after each step: `latents` are those at the time t that the step has reached; `preview` is
   * an ImageData of the predicted x0, one pixel per latent cell. Rejects with an AbortError after `signal` has aborted.
   *
   * Returns { times, latents, velocities, x0, shape, tokens, image, request }: the times and latents of all steps and
   * the end (steps + 1), the velocity and the predicted x0 of each step, T5's tokens as text, an ImageData.
   */
  async run(request, { onStep, signal } = {}) {
    const onEach = onStep && ((step) => onStep({ ...step, preview: this.preview(step.x0, shape) }));
    const { height, width } = request, { channels, downscale } = this.info.latent;
    const shape = [channels, height / downscale, width / downscale];
    const run = await this.call("run", { request }, { onStep: onEach, signal });
    return { ...run, image: run.image && toImageData(run.image), request };
  }

  /** The image of a latent: ImageData of 8 x 8 pixels per cell. */
  async decode(latents, shape) {
    return toImageData(await this.call("decode", { latents, shape }));
  }

  /** The same before rounding: { data, dims [3, H, W] }, about -1 to 1. */
  decodeValues(latents, shape) {
    return this.call("decodeValues", { latents, shape });
  }

  /** At once, and roughly: an ImageData of one pixel per latent cell. */
  preview(latents, shape) {
    return new ImageData(previewPixels(latents, shape, this.info.preview), shape[2], shape[1]);
  }

  /**
   * The values inside the networks at one step of a run, with the run's changes: Map of site -> { dims, data }, without
   * the batch axis, such as "double.0.attn.map" [heads, tokens, tokens], text tokens first. With a negative prompt,
   * those of the prompt's pass. sites: a list of names, if not all are needed. Those of the decoder, "ae.decoder.*", of
   * the finished picture, are large, and only in the result if they are named.
   */
  async inside(run, step, sites) {
    const { request, shape } = run, final = run.latents.at(-1);
    const call = { request, latents: run.latents[step], t: run.times[step], step, shape, sites, final };
    return new Map(await this.call("inside", call));
  }

  /** Gets ready for `inside`, whose first call is otherwise slower. */
  prepare() {
    return this.call("prepare");
  }

  /** Keeps all files in the browser, so that the page opens without a network; resolves once they are kept. */
  async keepOffline() {
    if (!navigator.serviceWorker) return false; // a page without https, or in a private window
    const registration = await navigator.serviceWorker.register(new URL("sw.js", this.base));
    const worker = registration.installing;
    if (!worker) return Boolean(registration.active);
    return new Promise((resolve) => worker.addEventListener("statechange", () => {
      if (worker.state === "activated") resolve(true);
      if (worker.state === "redundant") resolve(false);
    }));
  }

  close() {
    this.worker.terminate();
  }
}

const named = ({ name, message }) => Object.assign(new Error(message), { name });
