// The page: opens the engine, draws, and gives every part of the page the values of the chosen step.
import { Engine } from "../engine/index.js";
import { createMap } from "../map.js";
import { createAttention } from "./attention.js";
import { createChange } from "./change.js";
import { createFilm } from "./film.js";
import { createGlossary } from "./glossary.js";
import { preview } from "./paint.js";
import { createPrompt, randomPrompt } from "./prompt.js";
import { createQuestions } from "./questions.js";
import * as recorded from "./recorded.js";
import { DEFAULTS, createStore, parse } from "./store.js";
import { createTour } from "./tour.js";
import { pictureOf, valueFor } from "./values.js";
import WIRING from "../wiring.json";
import { colours, vocabulary } from "../../../fluxedu/play/graphs/manifest.json";

const $ = (selector) => document.querySelector(selector);
const REQUEST = ["prompt", "negative", "seed", "steps", "guidance", "shape"];
const RUNS = 8; // that are kept
const isSite = location.pathname.includes("/play/"); // beside the documentation, or served alone
const say = (text) => { $("#status").textContent = text; };

const store = createStore(parse(location.hash));
createGlossary();
const tour = createTour(store, (isFinished) => {
  if (!isFinished) return;
  $("#draw").scrollIntoView();
  toast("That was the tour. Now change the prompt and draw a picture of your own.");
});
createQuestions((part, play) => { tour.open(part); if (play) playSteps(); });
let engine, film, run = null, abort = null;
const runs = new Map(); // request as JSON -> run

for (const links of document.querySelectorAll("[data-docs]")) links.hidden = !isSite;
$("#docs-hint").hidden = isSite;

// ---- light and dark
$("#theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  try { localStorage.setItem("fluxedu-theme", root.dataset.theme); } catch { /* private windows forget it */ }
});
$("#share").addEventListener("click", async () => {
  const address = store.address();
  try { await navigator.clipboard.writeText(address); say("The link to this view is copied."); toast("Link copied"); }
  catch { toast("Copy the address of this page: it contains this view."); }
});
function toast(text) {
  const note = Object.assign(document.createElement("div"), { className: "toast", textContent: text });
  document.body.append(note);
  setTimeout(() => note.remove(), 2500);
}

// ---- loading
const progress = $("#progress");
const onProgress = ({ loaded, total }) => {
  progress.value = total ? loaded / total : 0;
  const mb = (bytes) => (bytes / 1e6).toFixed(1);
  $("#what").textContent = loaded < total
    ? `${mb(loaded)} of ${mb(total)} MB; later visits work offline` : "Everything is here: the model is being started …";
};
if (matchMedia("(max-width: 700px)").matches) $("#vocabulary").open = false;
const opening = Engine.open({ base: new URL("./", location.href).href, onProgress });
const tokenize = async (text) => (await opening).tokenize(text);
const prompt = createPrompt({ vocabulary, colours, tokenize, onPrompt: submit }); // can be written while the model loads
prompt.set(store.state.prompt);
let opened = ""; // the box of the map that is open
const map = createMap($("#map-view"), {
  wiring: WIRING, step: 0, values: valueOf, letters, onSelect: chosen, link, open: store.state.open,
  onOpen: (id) => { opened = id ?? ""; store.set({ open: opened }); },
});
const attention = createAttention({ store, info: recorded, onBlock: (block) => map.highlight([block], "its attention is shown below"), onOpen: openBlock });
recorded.showRecorded(attention, () => !run && !document.body.classList.contains("drawing")).catch(console.error);
const change = createChange({ store, info: { ...recorded, vocabulary }, getRun: () => run, draw: (request) => busy(() => obtain(request)) });
change.refresh();
open().catch((error) => {
  $("#loading").innerHTML = "<p><strong>The model could not be loaded.</strong><br></p>";
  $("#loading p").append(error.message);
  console.error(error);
});

async function open() {
  engine = await opening;
  const { info } = engine;
  buildForm(info);
  film = createFilm({ store, decode: (latents, shape) => engine.decode(latents, shape) });
  store.on(changed);
  document.documentElement.dataset.ready = Math.round(performance.now()); // interactive: for measurements
  $("#loading").remove();
  $("#go").disabled = false;
  await draw();
  tour.show();
  await engine.keepOffline().catch(() => false); // not in a private window
}

// ---- the form
function buildForm(info) {
  const form = $("#form"), shape = $("#shape");
  shape.textContent = "";
  for (const [height, width] of info.shapes) shape.append(new Option(`${width} × ${height}`, `${height}x${width}`));
  fillForm();
  form.addEventListener("submit", (event) => { event.preventDefault(); submit(); });
  for (const name of ["seed", "steps", "guidance", "shape"]) $(`#${name}`).addEventListener("change", submit);
  $("#dice").addEventListener("click", () => { $("#seed").value = Math.floor(Math.random() * 10000); submit(); });
  $("#surprise").addEventListener("click", () => {
    prompt.set(randomPrompt(info.vocabulary));
    $("#seed").value = Math.floor(Math.random() * 10000);
    submit();
  });
  const million = info.parameters ? `${(info.parameters / 1e6).toFixed(1)} million` : "4.4 million";
  $("#facts").textContent = `The model on this page: ${million} parameters in the transformer, ${info.blocks.length} blocks of `
    + `${info.heads} heads, ${info.shapes.length} sizes of pictures. FLUX.1: 11.9 billion `
    + "parameters, 57 blocks of 24 heads. The results on this page are those of the miniature; what holds for it need not hold for FLUX.1.";
}

function fillForm() {
  const { state } = store;
  prompt.set(state.prompt);
  for (const name of ["negative", "seed", "steps", "guidance", "shape"]) $(`#${name}`).value = state[name];
  $("#few").hidden = state.steps >= 8;
}

function submit() {
  const number = (name) => {
    const { min, max, value } = $(`#${name}`), found = value === "" ? DEFAULTS[name] : Number(value);
    return Math.min(Number(max), Math.max(Number(min), name === "guidance" ? found : Math.round(found)));
  };
  store.set({
    prompt: prompt.value, negative: $("#negative").value.trim(), seed: number("seed"), steps: number("steps"),
    guidance: number("guidance"), shape: $("#shape").value || DEFAULTS.shape, step: null, change: null,
  });
}

// ---- drawing
function requestOf(state) {
  const [height, width] = state.shape.split("x").map(Number);
  const known = engine.info.shapes.some(([h, w]) => h === height && w === width);
  return {
    prompt: state.prompt, seed: state.seed, steps: state.steps, guidance: state.guidance,
    ...(state.negative && { negative: state.negative, trueCfg: 2 }),
    height: known ? height : 128, width: known ? width : 128, changes: [],
  };
}

/** Something that the engine computes at once, before it decodes the film's other pictures. */
async function busy(task) {
  film.pause();
  try { return await task(); } finally { film.resume(); }
}

/** The run of a request, from memory or from the engine. */
async function obtain(request, onStep, signal) {
  const name = JSON.stringify(request);
  let found = runs.get(name);
  if (!found) {
    found = await engine.run(request, { onStep, signal });
    found.request = request;
    found.steps = request.steps;
    found.clipTokens = (await engine.tokenize(request.prompt)).clip.pieces;
    runs.set(name, found);
    if (runs.size > RUNS) runs.delete(runs.keys().next().value);
  }
  return found;
}

async function draw() {
  abort?.abort();
  const { signal } = (abort = new AbortController()), { state } = store, request = requestOf(state);
  const started = performance.now(), isKnown = runs.has(JSON.stringify(request));
  document.body.classList.add("drawing");
  const { channels, downscale } = engine.info.latent;
  const shape = [channels, request.height / downscale, request.width / downscale];
  const onStep = ({ step, t, latents, x0 }) => {
    if (!signal.aborted) film.drawing({ latents, x0, shape, t, step: step + 1, request });
  };
  const stopPulse = pulse();
  try {
    const found = await busy(() => obtain(request, onStep, signal));
    if (signal.aborted) return;
    run = found;
    document.body.classList.remove("drawing");
    film.pause();
    film.set(run);
    $("#took").textContent = isKnown ? "" : `drawn in ${((performance.now() - started) / 1000).toFixed(1)} s`;
    document.documentElement.dataset.drawn = Math.round(performance.now());
    say(`Drawn: ${request.prompt}`);
    await look(0).finally(film.resume);
    change.refresh();
    if (isToPlay) playSteps();
  } catch (error) {
    failed(error);
  } finally {
    stopPulse();
    if (!signal.aborted) document.body.classList.remove("drawing");
  }
}

let isToPlay = false; // as soon as the picture is drawn

function playSteps() {
  isToPlay = !run || document.body.classList.contains("drawing");
  if (!isToPlay) film.play();
}

/** A light runs through the map: once through the text encoders, then again and again through the blocks. */
function pulse() {
  const { ids } = map, loop = [ids.indexOf("img_in"), ids.indexOf("solver")];
  let place = 0;
  const timer = setInterval(() => {
    map.pulse(ids[place]);
    place = place === loop[1] ? loop[0] : place + 1;
  }, 100);
  return () => { clearInterval(timer); map.pulse(null); };
}

// ---- the values inside the model, of one step at a time
const inside = new WeakMap(); // run -> Map step -> promise of values

function valuesAt(of, step) {
  if (!inside.has(of)) inside.set(of, new Map());
  const known = inside.get(of);
  if (!known.has(step)) {
    known.set(step, busy(() => engine.inside(of, step)));
    if (known.size > 6) known.delete(known.keys().next().value);
  }
  return known.get(step);
}

const evaluation = () => Math.min(film.index, run.steps - 1); // the values at the end are those of the last step

let mapped = null, cancel = () => {};

/** Shows the values at the chosen step, unless another step is chosen within `delay` milliseconds. */
function look(delay = 150) {
  cancel();
  return new Promise((resolve) => {
    const timer = setTimeout(() => lookNow().catch(failed).finally(resolve), delay);
    cancel = () => { clearTimeout(timer); resolve(); };
  });
}

async function lookNow() {
  const of = run, step = evaluation(), values = await valuesAt(of, step);
  if (run !== of || evaluation() !== step) return;
  document.body.classList.remove("recorded");
  attention.set(of, values);
  map.setStep(step);
  if (mapped !== of) map.refresh();
  mapped = of;
  for (const output of document.querySelectorAll(".stepper output")) output.textContent = `step ${step + 1} of ${of.steps}`;
}

function failed(error) {
  if (error.name === "AbortError") return;
  toast(`This could not be computed: ${error.message}`);
  console.error(error);
}

/** Numbers behind the letters of the map's shapes: those of the picture drawn last. */
function letters() {
  if (!run) return {};
  const [C, h, w] = run.shape, N = (h * w) / 4;
  return { C, h, w, N, T: N + WIRING.letters.L };
}

/** What the map shows of a site at a step: of the chosen box a table with its numbers, else a picture. */
async function valueOf(site, step, isChosen) {
  if (!run) return { kind: "text", text: "The picture is still being drawn." };
  const of = run;
  if (site === "sample.image" || site === "ae.decoder.image") return { kind: "pixels", image: of.image, title: "the picture" };
  if (site === "sample.next") { // the state after the step
    return step + 1 < of.steps ? valueOf("sample.x", step + 1) : { kind: "pixels", image: of.image, title: "the picture" };
  }
  if (site === "sample.noise") return { kind: "pixels", image: preview(of.latents[0], of.shape), title: "the noise, quickly decoded" };
  const picture = { "sample.x": "noisy", "sample.x0": "guess" }[site], image = picture && film.decoded(of, picture, step);
  if (image) return { kind: "pixels", image, title: "as a picture" };
  const values = await valuesAt(of, Math.min(step, of.steps - 1)), value = values.get(site);
  if (!value) return null;
  if (!isChosen) return pictureOf(site, value);
  const [kind, patch] = store.state.at.split(":");
  return valueFor(site, value, { run: of, values, txtLen: engine.info.txtLen, tip: map.tip, patch: kind === "patch" ? Number(patch) : 0 });
}

/** The documentation's page with the code of "models/blocks.py:43". */
function link(source, code) {
  if (!isSite || !source || source.startsWith("sampling/prompts")) return null; // which the site does not list
  const text = code ? `#:~:text=${encodeURIComponent(code).replaceAll("-", "%2D")}` : ""; // where the browser scrolls to
  return `../_modules/fluxedu/${source.replace(/\.py(:\d+)?$/, ".html")}${text}`;
}

function openBlock(block) {
  unfold(block);
  $(isNarrow() ? "#map-view .map-below .map-view" : "#map").scrollIntoView();
  $(`#map-view [data-id="${block}"]`)?.focus({ preventScroll: true });
}

const isNarrow = () => matchMedia("(max-width: 860px)").matches;

/** Opens a box of the map. Where its description would lie over its parts, only the parts are shown. */
function unfold(id) {
  if (isNarrow()) map.select(null);
  map.open(id, isNarrow());
}

/** A box of the map was chosen: if it belongs to a block, its attention is shown. */
function chosen({ id }) {
  const [block] = /^(double|single)\.\d+/.exec(id) ?? [];
  if (block) store.set({ block });
}

function changed(state, names) {
  if (names.has("open") && state.open !== opened) state.open ? unfold(state.open) : map.close(true);
  if (REQUEST.some((name) => names.has(name))) { fillForm(); draw(); }
  else if (names.has("step")) { film.paint(); look(film.isPlaying ? 600 : 150); }
}
for (const button of document.querySelectorAll(".stepper button")) {
  button.addEventListener("click", () => run && store.set({ step: Math.min(run.steps - 1, Math.max(0, evaluation() + Number(button.value))) }));
}
addEventListener("hashchange", () => store.set(parse(location.hash)));
