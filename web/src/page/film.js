// The film of a run: the noisy picture x_t and the model's guess of the finished one, at every step.
//
// A quick preview (a weighted sum of each cell's 16 numbers) is there at once. The decoder's exact picture takes a
// third of a second, so it follows: first of the step that is looked at, then of the others while nothing else runs.
import { term } from "./glossary.js";
import { preview, show } from "./paint.js";

/** The latents of x_t after `index` steps, and of the guess of the finished picture that leads on from there. */
export function latentsAt(run, index) {
  const last = index >= run.steps;
  return { noisy: run.latents[index], guess: last ? run.latents[run.steps] : guessOf(run, index) };
}

function guessOf(run, index) {
  if (run.x0?.[index]) return run.x0[index];
  const x = run.latents[index], v = run.velocities[index], t = run.times[index];
  return x.map((value, i) => value - t * v[i]);
}

export function createFilm({ store, decode }) {
  const $ = (selector) => document.querySelector(selector);
  const main = $("#main"), noisy = $("#noisy"), guess = $("#guess"), slider = $("#step"), play = $("#play");
  const now = $("#now"), thumbs = $(".thumbs"), caption = $("#main-caption");
  let run = null, drawing = false, timer = 0, busy = false, paused = 0;
  const exact = new WeakMap(), quick = new WeakMap(); // run -> Map "noisy 3" -> ImageData: decoded, and previews

  // without a choice, a step in which the guess has taken shape, but the noise is still there
  const index = () => Math.min(store.state.step ?? Math.round(0.45 * run.steps), run.steps);
  const key = (kind, i) => (i >= run.steps ? "noisy " : `${kind} `) + i;

  const imageOf = (kind, i) => exact.get(run)?.get(key(kind, i)) ?? quickOf(kind, i);

  function quickOf(kind, i) {
    const name = key(kind, i);
    if (!quick.has(run)) quick.set(run, new Map());
    if (!quick.get(run).has(name)) quick.get(run).set(name, preview(latentsAt(run, i)[kind], run.shape));
    return quick.get(run).get(name);
  }

  function paint() {
    if (!run) return;
    const i = index();
    show(main, run.image);
    main.classList.remove("soft");
    for (const [canvas, kind] of [[noisy, "noisy"], [guess, "guess"]]) {
      const image = imageOf(kind, i);
      show(canvas, image);
      canvas.classList.toggle("soft", image.width < run.image.width); // a preview
    }
    slider.max = run.steps;
    slider.value = i;
    const t = run.times[i].toFixed(2), count = run.steps;
    slider.setAttribute("aria-valuetext", i ? (i < count ? `step ${i + 1} of ${count}` : "finished") : `step 1 of ${count}, pure noise`);
    const share = (part) => `${(100 * part).toFixed(0)}\u00a0%`, time = term("time", `<i>t</i>\u00a0=\u00a0${i ? t : 1}`);
    const isLate = run.times[i] > 1 - i / count + 0.05; // more noise is left than after steps of one size
    now.innerHTML = i === 0
      ? `<b>Step 1 of ${count}</b> (${time}): pure noise goes in. From it and your prompt, the model makes its first guess.`
      : i < count
        ? `<b>Step ${i + 1} of ${count}</b> (${time}): ${share(1 - run.times[i])} picture and ${share(run.times[i])} noise go in.${isLate ? " The first steps remove less noise than the last ones." : ""}`
        : `<b>After step ${count} of ${count}</b> (<i>t</i> = 0): no noise is left, and this is the picture.`;
    caption.textContent = `“${run.request.prompt}”, seed ${run.request.seed}`;
    main.setAttribute("aria-label", `The picture drawn for the prompt: ${run.request.prompt}`);
    document.dispatchEvent(new CustomEvent("fluxedu:shown", { detail: { step: i } }));
  }

  const stripSteps = ({ steps }) => {
    const count = Math.min(steps + 1, 11);
    return Array.from({ length: count }, (_, k) => Math.round((k * steps) / (count - 1)));
  };

  function strip() {
    const count = Math.min(run.steps + 1, 11);
    if (thumbs.childElementCount !== count) {
      thumbs.replaceChildren(...Array.from({ length: count }, () => document.createElement("canvas")));
    }
    const steps = stripSteps(run);
    const isExact = steps.every((i) => exact.get(run).has(key("guess", i))); // all previews or all exact: never a mixture
    [...thumbs.children].forEach((canvas, k) => show(canvas, isExact ? imageOf("guess", steps[k]) : quickOf("guess", steps[k])));
  }

  /** Decodes one picture after the other: what is looked at first. */
  async function work() {
    if (busy || paused || !run || drawing) return;
    const mine = run, pictures = exact.get(mine), i = index();
    const wanted = [["noisy", i], ["guess", i]];
    if (!timer) wanted.push(...stripSteps(mine).map((k) => ["guess", k]));
    if (!timer) for (const k of [...Array(mine.steps).keys()].reverse()) wanted.push(["guess", k], ["noisy", k]);
    const next = wanted.find(([kind, k]) => !pictures.has(key(kind, k)));
    if (!next) return;
    busy = true;
    try {
      const image = await decode(latentsAt(mine, next[1])[next[0]], mine.shape);
      pictures.set(key(...next), image);
      if (run === mine && next[1] === index()) paint();
      if (run === mine && next[0] === "guess") strip();
    } finally { busy = false; }
    setTimeout(work, 30);
  }

  slider.addEventListener("input", () => { stop(); store.set({ step: +slider.value }); });

  function stop() {
    clearInterval(timer);
    timer = 0;
    play.classList.remove("playing");
    play.setAttribute("aria-label", "Play the steps");
  }
  function start(from = index()) {
    if (!run) return;
    stop();
    let i = from >= run.steps ? 0 : from;
    store.set({ step: i });
    play.classList.add("playing");
    play.setAttribute("aria-label", "Stop");
    timer = setInterval(() => {
      i++;
      store.set({ step: i });
      if (i >= run.steps) stop();
    }, Math.max(120, 3000 / run.steps));
  }
  play.addEventListener("click", () => (timer ? stop() : start()));

  return {
    get run() { return run; },
    get index() { return run ? index() : 0; },
    /** The exact picture of x_t ("noisy") or of the guess ("guess") at a step, if it is decoded already. */
    decoded: (of, kind, i) => exact.get(of)?.get(key(kind, i)),
    get isPlaying() { return timer !== 0; },
    stop,
    /** Runs through all steps. */
    play: () => start(0),
    /** While a picture is drawn: what is known after a step. */
    drawing({ latents, x0, shape, t, step, request: { prompt, steps } }) {
      drawing = true;
      stop();
      const image = preview(latents, shape);
      show(main, image);
      show(noisy, image);
      show(guess, preview(x0, shape));
      for (const canvas of [main, noisy, guess]) canvas.classList.add("soft");
      slider.max = steps;
      slider.value = step;
      now.innerHTML = `<b>Drawing: step ${step}</b> of ${steps} (<i>t</i> = ${t.toFixed(2)}).`;
      caption.textContent = `“${prompt}”: drawing …`;
    },
    /** A finished run. */
    set(next) {
      drawing = false;
      run = next;
      if (!exact.has(run)) exact.set(run, new Map([[`noisy ${run.steps}`, run.image]]));
      slider.disabled = false;
      paint();
      strip();
      work();
    },
    paint() { paint(); work(); },
    /** Holds the decoding of the other steps back, as long as the engine has something more important to do. */
    pause() { paused++; },
    resume() { paused = Math.max(0, paused - 1); work(); },
  };
}
