// The miniature in ONNX Runtime: prompt to text embeddings, velocities, a run, and images. One thread, on the CPU.
import * as ort from "onnxruntime-web/wasm";

import { forNegative, inputsOf } from "./changes.js";
import { openFolder, weightsOf } from "./files.js";
import { imagePixels, pack, ropeTable, unpack } from "./latents.js";
import { drawNoise } from "./noise.js";
import { SOLVERS, guide, predictedX0, schedule } from "./sampling.js";
import { FixedLengthTokenizer, unknownWords } from "./text.js";

const float = (data, dims) => new ort.Tensor("float32", data, dims);
const int = (data) => new ort.Tensor("int64", BigInt64Array.from(data, BigInt), [1, data.length]);
const utf8 = (bytes) => JSON.parse(new TextDecoder().decode(bytes));
const MOST_TEXTS = 16; // encoded prompts that are kept

export class Model {
  /** The files are those that files.json in the folder `base` lists. */
  static async open(base, onProgress) {
    const manifest = await (await fetch(new URL("graphs/manifest.json", base))).json();
    const weightFiles = [...new Set(Object.values(manifest.weights).flatMap((w) => w.segments.map(([file]) => file)))];
    const tokenizerFiles = Object.values(manifest.tokenizers).flatMap(({ folder }) =>
      [`${folder}/tokenizer.json`, `${folder}/tokenizer_config.json`]);
    const graphFiles = Object.keys(manifest.graphs).map((name) => `graphs/${name}.onnx`);
    const names = ["ort.wasm.gz", ...weightFiles, ...tokenizerFiles, ...graphFiles];
    const load = await openFolder(base, names, onProgress);
    const what = (name) => (name.startsWith("ort") ? "runtime" : weightFiles.includes(name) ? "weights" : "graphs");
    const loaded = await Promise.all(names.map(async (name) => [name, await load(name, what(name))]));
    const model = new Model(manifest, new Map(loaded));
    for (const name of ["text", "step", "decoder"]) await model.session(name); // the fourth, inside, when it is needed
    return model;
  }

  constructor(manifest, files) {
    Object.assign(this, { manifest, files, sessions: new Map(), weights: new Map(), texts: new Map() });
    ort.env.wasm.numThreads = 1;
    ort.env.wasm.wasmBinary = files.get("ort.wasm.gz");
    ort.env.logLevel = "error";
    this.tokenizers = Object.fromEntries(Object.entries(manifest.tokenizers).map(([name, settings]) => {
      const [tokenizer, config] = ["tokenizer", "tokenizer_config"].map((file) =>
        utf8(files.get(`${settings.folder}/${file}.json`)));
      return [name, new FixedLengthTokenizer(tokenizer, config, settings)];
    }));
    this.words = [...new Set(Object.values(manifest.vocabulary).flat().flatMap((phrase) => phrase.split(" ")))];
    this.known = new Set(this.words);
  }

  /** What the page may know about the model. */
  get info() {
    const { config, shapes, defaults, txtLen, vocabulary, colours, factors, preview, latent } = this.manifest;
    const blocks = [
      ...Array.from({ length: config.depth }, (_, i) => `double.${i}`),
      ...Array.from({ length: config.depth_single_blocks }, (_, i) => `single.${i}`),
    ];
    const { words } = this;
    return { config, shapes, defaults, txtLen, vocabulary, colours, factors, preview, latent, blocks, words,
      heads: config.num_heads, solvers: Object.keys(SOLVERS) };
  }

  /** The session of a graph; the weights are shared by the graphs that use the same ones. */
  async session(name) {
    if (!this.sessions.has(name)) {
      const set = this.manifest.graphs[name].weights;
      if (!this.weights.has(set)) this.weights.set(set, weightsOf(this.manifest.weights[set], this.files));
      this.sessions.set(name, await ort.InferenceSession.create(this.files.get(`graphs/${name}.onnx`), {
        executionProviders: ["wasm"], graphOptimizationLevel: "all",
        externalData: [{ path: set, data: this.weights.get(set) }],
      }));
    }
    return this.sessions.get(name);
  }

  /** The outputs of a graph by name: tensors. `names`: which of them; all by default. */
  async compute(graph, inputs, names) {
    const session = await this.session(graph);
    const results = await session.run(inputs, names ? names.map((name) => `site:${name}`) : undefined);
    return new Map(Object.entries(results).map(([name, value]) => [name.slice("site:".length), value]));
  }

  tokenize(prompt) {
    const [t5, clip] = [this.tokenizers.t5.encode(prompt), this.tokenizers.clip.encode(prompt)];
    const unknown = unknownWords(prompt, this.known);
    return { t5, clip, unknown, truncated: t5.truncated };
  }

  /** The encoders' outputs (txt, pooled) and inner values by name, for one prompt in T5 and one in CLIP. */
  async encode(prompt, clipPrompt = prompt) {
    const key = JSON.stringify([prompt, clipPrompt]);
    if (!this.texts.has(key)) {
      const t5 = this.tokenizers.t5.encode(prompt), clip = this.tokenizers.clip.encode(clipPrompt);
      const values = await this.compute("text", { t5_ids: int(t5.ids), clip_ids: int(clip.ids) });
      if (this.texts.size >= MOST_TEXTS) this.texts.delete(this.texts.keys().next().value);
      this.texts.set(key, values);
    }
    return this.texts.get(key);
  }

  /** One model evaluation: the outputs of the graph `step` or `inside` for a latent x at the time t. */
  evaluate(graph, names, x, t, texts, { guidance, changes, shape, step }) {
    const { config, factors: counts, txtLen } = this.manifest;
    const { factors, keyBias, ids } = inputsOf(changes, { factors: counts, txtLen, shape, step });
    const textIds = Array.from({ length: txtLen }, () => [0, 0, 0]);
    const { cos, sin } = ropeTable([...textIds, ...ids], config.axes_dim, config.theta);
    const pairs = [txtLen + ids.length, config.head_dim / 2];
    return this.compute(graph, {
      img: float(pack(x, shape), [1, ids.length, config.in_channels]),
      txt: texts.get("txt"), pooled: texts.get("pooled"),
      t: float([t], [1]), guidance: float([guidance], [1]),
      cos: float(cos, pairs), sin: float(sin, pairs),
      factors: float(factors, [factors.length]), key_bias: float(keyBias, [keyBias.length]),
    }, names);
  }

  async velocity(x, t, texts, settings) {
    const values = await this.evaluate("step", ["velocity"], x, t, texts, settings);
    return unpack(values.get("velocity").data, settings.shape);
  }

  /** From noise to image. `onStep({ step, t, latents, velocity, x0 })` after each step; `pause()` between steps. */
  async run(request, onStep, pause) {
    const { defaults, latent } = this.manifest;
    const { prompt, clipPrompt, negative = "", seed = 0, changes = [], solver = "euler" } = request;
    const { steps = defaults.steps, guidance = defaults.guidance, trueCfg = 1, shift = defaults.shift } = request;
    const { height, width } = request;
    const shape = [latent.channels, height / latent.downscale, width / latent.downscale];
    const texts = await this.encode(prompt, clipPrompt);
    const negatives = trueCfg === 1 ? null : await this.encode(negative);
    const times = schedule(steps, shift);
    const latents = [drawNoise(seed, shape[0] * shape[1] * shape[2])], velocities = [], x0 = [];
    for (let step = 0; step < steps; step++) {
      await pause();
      const velocity = async (x, t) => {
        const prompted = await this.velocity(x, t, texts, { guidance, changes, shape, step });
        if (!negatives) return prompted;
        const settings = { guidance, changes: forNegative(changes), shape, step };
        return guide(await this.velocity(x, t, negatives, settings), prompted, trueCfg);
      };
      const [t, tNext] = [times[step], times[step + 1]];
      const [next, v] = await SOLVERS[solver](latents[step], t, tNext, velocity);
      latents.push(next);
      velocities.push(v);
      x0.push(predictedX0(latents[step], t, v));
      onStep({ step, t: tNext, latents: next, velocity: v, x0: x0[step] });
    }
    await pause();
    const image = request.decode === false ? null : await this.decode(latents[steps], shape);
    const tokens = this.tokenizers.t5.encode(prompt).pieces;
    return { times, latents, velocities, x0, shape, tokens, image };
  }

  /** RGBA bytes of the image of a latent, with its size. */
  async decode(latents, shape) {
    const { data, dims: [, height, width] } = await this.decodeValues(latents, shape);
    return { pixels: imagePixels(data, height, width), height, width };
  }

  /** The image of a latent as numbers [3, H, W], about -1 to 1. */
  async decodeValues(latents, shape) {
    const values = await this.compute("decoder", { latent: float(latents, [1, ...shape]) }, ["image"]);
    const { data, dims } = values.get("image");
    return { data: data.slice(), dims: dims.slice(1) };
  }

  /** The values at the sites of one step: [[site, { dims, data }]]. Without `sites`, all except the decoder's. */
  async inside({ request, latents, t, step, shape, sites, final }) {
    const { defaults, graphs } = this.manifest;
    const { prompt, clipPrompt, changes, guidance = defaults.guidance } = request;
    const isWanted = (name) => !sites || sites.includes(name);
    const texts = await this.encode(prompt, clipPrompt);
    const names = graphs.inside.outputs.filter((name) => name === "velocity" || isWanted(name));
    const values = await this.evaluate("inside", names, latents, t, texts, { guidance, changes, shape, step });
    const decoderNames = graphs.decoder_inside.outputs.filter((name) => sites?.includes(name));
    const decoded = decoderNames.length
      ? await this.compute("decoder_inside", { latent: float(final, [1, ...shape]) }, decoderNames) : [];
    const velocity = unpack(values.get("velocity").data, shape);
    const own = { "sample.x": latents, "sample.velocity": velocity, "sample.x0": predictedX0(latents, t, velocity) };
    own["sample.latent"] = final;
    const tensors = [...texts, ...values, ...decoded].map(([name, { dims, data }]) => {
      const full = { txt: "sample.txt", pooled: "sample.pooled" }[name] ?? name;
      return [full, dims.length > 1 && dims[0] === 1 ? dims.slice(1) : dims, data]; // without the batch's axis
    });
    return [...tensors, ...Object.entries(own).map(([name, data]) => [name, shape, data])]
      .filter(([name]) => isWanted(name))
      .map(([name, dims, data]) => [name, { dims: [...dims], data: data.slice() }]);
  }
}
