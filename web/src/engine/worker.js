// The worker: answers the calls of index.js, one after another. An abort is heard between two steps of a run.
import { Model } from "./model.js";
import { drawNoise } from "./noise.js";
import { schedule } from "./sampling.js";

let model = null;
let queue = Promise.resolve();
const aborted = new Set();

/** Lets messages in. */
const tick = () => new Promise((resolve) => {
  const { port1, port2 } = new MessageChannel();
  port1.onmessage = () => { port1.close(); resolve(); };
  port2.postMessage(null);
});

const CALLS = {
  async open(id, { base }) {
    let last = 0;
    model = await Model.open(base, (progress) => {
      if (performance.now() - last < 50 && progress.loaded < progress.total) return;
      last = performance.now();
      postMessage({ id, progress });
    });
    return model.info;
  },
  tokenize: (id, { prompt }) => model.tokenize(prompt),
  run(id, { request }) {
    const pause = async () => {
      await tick();
      if (aborted.has(id)) throw new DOMException("The run was aborted.", "AbortError");
    };
    return model.run(request, (step) => postMessage({ id, step }), pause);
  },
  decode: (id, { latents, shape }) => model.decode(latents, shape),
  decodeValues: (id, { latents, shape }) => model.decodeValues(latents, shape),
  inside: (id, call) => model.inside(call),
  noise: (id, { seed, size }) => drawNoise(seed, size),
  times: (id, { steps, shift = model.manifest.defaults.shift }) => schedule(steps, shift),
  prepare: async () => void (await model.session("inside")),
};

async function answer({ id, call, ...values }) {
  try {
    if (aborted.has(id)) throw new DOMException("The run was aborted.", "AbortError");
    postMessage({ id, result: await CALLS[call](id, values) });
  } catch (error) {
    postMessage({ id, error: { name: error.name, message: error.message } });
  }
  aborted.delete(id);
}

self.onmessage = ({ data }) => {
  if (data.call === "abort") aborted.add(data.of);
  else queue = queue.then(() => answer(data));
};
