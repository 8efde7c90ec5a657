// The documentation site: explorers of the notebook pages come alive. A page shows an explorer's static figure; its
// button starts the miniature in the browser, once per page, and puts the explorer in the figure's place.
import { Engine } from "./engine/index.js";
import explorer from "./explorer.js";
import { html } from "./dom.js";
import { Unsupported, VIEWS, WITHOUT_ENGINE, pageModel } from "./views/index.js";

const IN_THE_LAB = "Open this notebook in the lab to move it.";
const MEGABYTES = 14; // of weights, graphs and ONNX Runtime, compressed
const SCRIPT = document.currentScript?.src ?? document.baseURI; // the site may be below any path
const COST = `Loads the miniature (${MEGABYTES} MB, once) and computes it in your browser.`;
const READY = "The miniature is loaded; your browser computes it.";
let engine = null;

/** The miniature, started by the first explorer that needs it; a failed start can be repeated. */
function openEngine(onProgress) {
  const base = new URL("../play/", SCRIPT);
  engine ??= Engine.open({ base, onProgress: ({ loaded, total }) => onProgress(loaded / total) });
  engine.catch(() => (engine = null));
  return engine;
}

/** Below the figure: a button with a bar of progress. What needs no model is live at once. */
function invitation(still, message) {
  const button = html("button", { type: "button", textContent: "Make it live" });
  const note = html("span", { textContent: COST });
  const bar = html("progress", { max: 1, value: 0, hidden: true });
  bar.setAttribute("aria-label", "Progress");
  const box = html("div", { className: "fluxedu-live" }, button, bar, note);
  note.setAttribute("role", "status");
  const isLight = WITHOUT_ENGINE.includes(message.name);
  const start = async () => {
    button.disabled = true;
    bar.hidden = false;
    const show = (text) => (share) => {
      bar.value = share;
      note.textContent = `${text} ${Math.round(100 * share)} %`;
    };
    try {
      const opened = isLight ? null : await openEngine(show("Loading the miniature:"));
      note.textContent = "Starting …";
      if (opened) for (const other of document.querySelectorAll(".fluxedu-live span")) {
        if (other.textContent === COST) other.textContent = READY;
      }
      const model = await pageModel(opened, message, show("Computing:"));
      const el = Object.assign(html("div", { className: "fluxedu-page" }), { model });
      box.before(el);
      explorer.render({ model, el });
      (still.parentElement.children.length === 1 ? still.parentElement : still).hidden = true;
      box.remove();
      if (!isLight) el.querySelector("button, input, select, [tabindex='0']")?.focus({ preventScroll: true });
    } catch (error) {
      button.disabled = false;
      bar.hidden = true;
      note.textContent = error instanceof Unsupported ? IN_THE_LAB : `This did not work: ${error.message}`;
      button.hidden = error instanceof Unsupported;
    }
  };
  button.addEventListener("click", start);
  return { box, start: () => isLight && start() };
}

/** Every explorer's figure on the page. Files opened without a web server cannot start the miniature. */
function prepare() {
  const canStart = location.protocol !== "file:" && "DecompressionStream" in window;
  for (const still of document.querySelectorAll("img.fluxedu-still")) {
    const message = still.dataset.fluxedu ? JSON.parse(still.dataset.fluxedu) : null;
    const isLive = message && VIEWS[message.name] && (canStart || WITHOUT_ENGINE.includes(message.name));
    const note = html("p", { className: "fluxedu-live", textContent: IN_THE_LAB });
    if (message?.name === "architecture") {
      note.append(html("a", { href: new URL("../architecture.html", SCRIPT).href, textContent: "The same map, live" }));
    }
    const place = still.parentElement.closest("[style*='overflow']") ?? still;
    if (!isLive) place.after(note);
    else {
      const { box, start } = invitation(still, message);
      place.after(box);
      start();
    }
  }
}

if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", prepare);
else prepare();
