// One front end for every explorer: a question, controls, panels side by side, one sentence below.
// Whoever holds the model (a kernel, or the page itself) computes the view. This script shows it and sends moves, one
// at a time. `render({ model, el })` needs of its model get, set, on, off and save_changes, as anywidget has them.
import { CONTROLS } from "./controls.js";
import { attributes, html, identifiers, isDark } from "./dom.js";
import { PANELS } from "./panels.js";
import { Tip } from "./tables.js";

const RERUN = "This explorer could not be drawn. Re-run this cell.";
const NO_KERNEL = "The kernel has not answered for four seconds: it is busy or not running. This is the last view. " +
  "If it stays, re-run this cell.";

// ---------------------------------------------------------------- moves

/** Sends moves to the model. The next one goes when the last has been answered; newer moves replace older ones. */
function mover(model, root) {
  let sent = 0, waiting = null, since = null, timer = null;
  const go = () => {
    if (since !== null || waiting === null) return;
    const state = { ...model.get("state"), ...waiting.changes };
    state.moves = sent = Math.max(sent, state.moves ?? 0) + 1;
    since = waiting.since;
    waiting = null;
    timer = setTimeout(giveUp, 4000);
    model.set("state", state);
    model.save_changes();
  };
  const giveUp = () => { // show a message, and let the next move try again
    root.classList.add("no-answer");
    since = null;
  };
  const answered = () => {
    if (model.get("view").moves < sent) return;
    clearTimeout(timer);
    root.classList.remove("no-answer");
    if (since === null) return;
    const milliseconds = performance.now() - since;
    root.dispatchEvent(new CustomEvent("fluxedu:answered", { detail: { milliseconds } }));
    since = null;
    go();
  };
  const move = (changes) => {
    waiting = { changes: { ...waiting?.changes, ...changes }, since: waiting?.since ?? performance.now() };
    go();
  };
  const isWaiting = () => since !== null || waiting !== null;
  /** The state as the model knows it, with the moves that are still on their way to it. */
  const currentState = () => ({ ...model.get("state"), ...waiting?.changes });
  return { move, answered, currentState, isWaiting };
}

// ---------------------------------------------------------------- play

/** A button that runs a control, or the columns of a pointer, from the present one to the last. Where motion is
 * unwelcome, a click is one move. What is played: { name, label, count() }. */
function player({ name, label, count }, { move, currentState, isWaiting }) {
  const index = () => [currentState()[name]].flat().at(-1);
  const to = (i) => {
    const now = currentState()[name];
    move({ [name]: Array.isArray(now) ? [now[0], i] : i });
  };
  const isCalm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const button = html("button", { type: "button", className: "play" });
  let timer = null, before = 0;
  const showState = () => {
    const text = isCalm ? `Next ${label}` : timer === null ? "Play" : "Pause";
    button.textContent = `${isCalm || timer === null ? "▶" : "⏸"}\u{fe0e} ${text}`;
    button.setAttribute("aria-label", isCalm ? text : `${text} ${label}`);
  };
  const stop = () => {
    clearInterval(timer);
    timer = null;
    showState();
  };
  const next = () => (!isCalm && index() >= count() - 1 ? stop() : to((index() + 1) % count()));
  const start = () => {
    if (index() >= count() - 1) to(0);
    before = performance.now();
    timer = setInterval(() => { // the next option comes when this one has been seen for a while
      if (isWaiting()) return;
      if (performance.now() - before < 450) return;
      before = performance.now();
      next();
    }, 50);
    showState();
  };
  button.addEventListener("click", () => (isCalm ? next() : timer === null ? start() : stop()));
  showState();
  return { el: button, stop: () => timer !== null && stop() };
}

// ---------------------------------------------------------------- the explorer

/** A heading one level below the page's last one. */
function heading(text, el) {
  const before = [...document.querySelectorAll("h1, h2, h3, h4, h5, h6")]
    .filter((h) => !h.closest(".fluxedu") && h.compareDocumentPosition(el) & Node.DOCUMENT_POSITION_FOLLOWING);
  const level = !el.isConnected ? 3 : Math.min(6, before.length ? Number(before.at(-1).tagName[1]) + 1 : 2);
  return html(`h${level}`, { className: "question", textContent: text });
}

/** anywidget refuses, for good, all messages to a widget whose script took more than two seconds to load, as on a slow
 * machine. The script runs now, so such a widget passes its messages on as ipywidgets does, and asks for the last view. */
async function repairMessages(model) {
  const name = model.get("still")?.slice("fluxedu-".length);
  if (!name || !model.widget_manager?.get_model) return;
  const widget = await model.widget_manager.get_model(name);
  try {
    await widget._handle_comm_msg({ content: { data: { method: "custom" } }, buffers: [] });
  } catch {
    const plain = Object.getPrototypeOf(Object.getPrototypeOf(widget));
    widget.comm?.on_msg((message) => plain._handle_comm_msg.call(widget, message));
    widget.comm?.send({ method: "request_state" }, {});
  }
}

/** Titles of panels side by side are equally tall, so that what is below them begins at one height. */
function alignTitles(pairs) {
  for (const [, title] of pairs) title.style.minHeight = "";
  const found = pairs.map(([figure, title]) => [figure.offsetTop, title, title.offsetHeight]);
  for (const [top, title] of found) {
    const tallest = Math.max(...found.filter(([other]) => Math.abs(other - top) < 2).map(([, , height]) => height));
    title.style.minHeight = `${tallest}px`;
  }
}

function build({ model, root, el }) {
  const id = identifiers();
  const moving = mover(model, root), { answered, currentState } = moving;
  const controls = model.get("controls"), first = model.get("first") ?? {};
  let play = null;
  const move = (changes) => { // by hand
    play?.stop();
    moving.move(changes);
  };

  const title = heading(model.get("title"), el);
  title.id = id("title");
  root.setAttribute("aria-labelledby", title.id);
  const instruction = html("p", { className: "instruction", textContent: model.get("instruction") ?? "" });
  instruction.hidden = !instruction.textContent;

  const tries = (model.get("tries") ?? []).map(({ label, moves }) => {
    const button = html("button", { type: "button", className: "try" }, html("b", { textContent: "Try: " }), label);
    button.addEventListener("click", () => move(moves));
    return button;
  });
  const isMovable = controls.length > 0 || (model.get("view").panels ?? []).some((p) => p.pointer);
  const reset = html("button", { type: "button", className: "reset", textContent: "Reset" });
  reset.hidden = !isMovable || !Object.keys(first).length || controls.some((c) => c.kind === "vote");
  reset.addEventListener("click", () => move({ ...first }));
  const suggestions = html("div", { className: "tries" }, ...tries, reset);

  const made = controls.map((c) => [c.name, CONTROLS[c.kind](c, { move, id })]);
  const bar = html("div", { className: "bar" }, ...made.map(([, c]) => c.el));
  const played = model.get("play"), control = controls.find((c) => c.name === played);
  if (control) {
    play = player({ name: played, label: control.label, count: () => control.labels.length }, moving);
    made.find(([name]) => name === played)[1].el.prepend(play.el);
  } else if (played) {
    const columns = () => model.get("view").panels.find((p) => p.pointer === played)?.cells[1] ?? 1;
    play = player({ name: played, label: "time", count: columns }, moving);
    bar.append(html("div", { className: "control" }, play.el));
  }

  const row = html("div", { className: "row" }), caption = html("p", { className: "caption" });
  caption.setAttribute("aria-live", "polite");
  const warning = html("p", { className: "no-kernel", textContent: NO_KERNEL });
  const tip = new Tip(root);

  let shown = []; // { kind, panel, figure, title }
  const link = (from, place) => shown.forEach(({ panel }) => panel !== from && panel.echo?.(place));
  const show = () => {
    const { panels = [], text = "", shades = {} } = model.get("view"), state = currentState();
    root.dataset.dark = isDark(root);
    if (panels.map((p) => p.kind).join() !== shown.map((p) => p.kind).join()) {
      for (const { panel } of shown) panel.destroy?.();
      shown = panels.map((p) => {
        const title = html("figcaption"), figure = html("figure", { className: p.kind }, title);
        return { kind: p.kind, title, figure, panel: PANELS[p.kind](p, { move, id, tip, link, figure, model, data: model.get("data") }) };
      });
      row.replaceChildren(...shown.map(({ figure, panel }) => (figure.append(panel.el), figure)));
    }
    panels.forEach((p, i) => {
      shown[i].title.textContent = p.title;
      shown[i].panel.paint(p, p.pointer ? state[p.pointer] : null);
    });
    alignTitles(shown.map(({ figure, title }) => [figure, title]));
    made.forEach(([name, control]) => control.show(state[name], shades[name]));
    caption.textContent = text;
    tip.refresh();
    answered();
  };
  root.replaceChildren(title, instruction, suggestions, bar, row, caption, warning, tip.el, tip.spoken);
  return { show, destroy: () => (play?.stop(), shown.forEach(({ panel }) => panel.destroy?.())) };
}

function render({ model, el }) {
  const root = attributes(html("div", { className: "fluxedu" }), { role: "group" });
  root.dataset.lmSuppressShortcuts = "true"; // keeps JupyterLab from using our keys
  el.append(root);
  let explorer = null;
  const fail = (error) => {
    console.warn(error);
    root.replaceChildren(html("p", { className: "failed", textContent: RERUN }));
  };
  const show = () => {
    try {
      if (!model.get("view")?.panels) throw new Error("there is no view");
      explorer ??= build({ model, root, el });
      explorer.show();
      return true;
    } catch (error) {
      return fail(error);
    }
  };
  model.on("change:view", show);
  const showStill = (isShown) => {
    const name = model.get("still");
    if (name) for (const still of document.getElementsByClassName(name)) still.hidden = !isShown;
  };
  // the static figure goes only when this one has been painted
  if (show()) requestAnimationFrame(() => requestAnimationFrame(() => showStill(false)));
  repairMessages(model).catch((error) => console.warn(error));

  let width = 0;
  const watch = new ResizeObserver(([{ contentRect }]) => { // drawings have as many units as pixels: draw them again
    if (Math.abs(contentRect.width - width) < 1) return;
    width = contentRect.width;
    if (explorer) show();
  });
  watch.observe(root);
  return () => {
    watch.disconnect();
    model.off("change:view", show);
    explorer?.destroy();
  };
}

export default { render };
