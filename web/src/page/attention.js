// Attention: for one patch or one word, exact maps of every block and head.
import { wholePercentages } from "../views/numbers.js";
import { overlay, rgb, sequential, table } from "../views/panels.js";
import { term } from "./glossary.js";
import { opaque, show } from "./paint.js";

const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)}\u00a0%`;

/** Shares that sum to 1, in words. */
const wholes = (shares) => wholePercentages(shares).map((whole) => (whole ? `${whole}\u00a0%` : "less than 1\u00a0%"));

const short = (block) => block.replace("double.", "double ").replace("single.", "single ");

export function createAttention({ store, info, onBlock, onOpen }) {
  const $ = (selector) => document.querySelector(`#attention ${selector}`);
  const canvas = $("#patches"), box = $(".box"), words = $(".words"), finding = $("#attention-finding"), gallery = $(".gallery");
  const open = $("#open-block"), { blocks, heads, txtLen } = info;
  let run = null, values = null, pieces = [], hovered = null, cells = new Map();

  // ---- the gallery: a column per block, a row per head
  const corner = document.createElement("span");
  gallery.style.setProperty("--columns", blocks.length);
  gallery.append(corner);
  for (const block of blocks) {
    const name = document.createElement("span");
    name.className = "column";
    name.textContent = short(block);
    gallery.append(name);
  }
  for (const head of ["mean", ...Array(heads).keys()]) {
    const name = document.createElement("span");
    name.className = "row";
    name.textContent = head === "mean" ? "mean" : `head ${head}`;
    gallery.append(name);
    for (const block of blocks) {
      const button = document.createElement("button"), map = document.createElement("canvas");
      button.type = "button";
      button.append(map);
      button.setAttribute("aria-label", `${short(block)}, ${name.textContent}`);
      button.addEventListener("click", () => store.set({ block, head: String(head) }));
      cells.set(`${block} ${head}`, { button, map });
      gallery.append(button);
    }
  }

  open.addEventListener("click", () => onOpen(store.state.block));

  const at = () => hovered ?? store.state.at;
  const grid = () => [run.shape[1] / 2, run.shape[2] / 2]; // patches of 2 x 2 cells

  /** Weights of one head, or of the mean of all: over the patches, and over the text tokens. */
  function weightsOf(block, head, place) {
    const map = values.get(`${block}.attn.map`), [, tokens] = map.dims.slice(-3), [kind, number] = place.split(":");
    const size = tokens * tokens, patches = tokens - txtLen;
    const text = new Float32Array(txtLen), picture = new Float32Array(patches);
    const used = head === "mean" ? [...Array(heads).keys()] : [Number(head)];
    for (const h of used) {
      const start = h * size;
      if (kind === "word") { // how much each patch attends to this word
        for (let p = 0; p < patches; p++) picture[p] += map.data[start + (txtLen + p) * tokens + Number(number)] / used.length;
      } else {
        const row = start + (txtLen + Number(number)) * tokens;
        for (let k = 0; k < txtLen; k++) text[k] += map.data[row + k] / used.length;
        for (let p = 0; p < patches; p++) picture[p] += map.data[row + txtLen + p] / used.length;
      }
    }
    return { text, picture };
  }

  function drawWords() {
    words.textContent = "";
    const end = pieces.indexOf("</s>");
    const count = end < 0 ? pieces.length : end;
    pieces.slice(0, count).forEach((piece, i) => {
      const button = document.createElement("button");
      button.type = "button";
      button.dataset.token = i;
      button.append(piece.replaceAll("▁", "") || "␣", document.createElement("small"));
      const look = () => hover(`word:${i}`);
      button.addEventListener("pointerenter", look);
      button.addEventListener("pointerleave", () => hover(null));
      button.addEventListener("click", () => { hovered = null; store.set({ at: `word:${i}` }); });
      words.append(button);
    });
    const rest = document.createElement("span");
    rest.className = "rest";
    rest.innerHTML = `+ ${term("padding", "end and padding")} `;
    rest.append("");
    words.append(rest);
  }

  function paint() {
    if (!run || !values) return;
    const started = performance.now();
    const [rows, columns] = grid(), { block, head } = store.state;
    let place = at();
    const [kind, number] = place.split(":");
    if (kind === "patch" && Number(number) >= rows * columns) place = "patch:0";
    if (kind === "word" && Number(number) >= pieces.length) place = "word:0";
    for (const [name, { button, map }] of cells) {
      const [b, h] = name.split(" "), { picture } = weightsOf(b, h, place);
      show(map, opaque(sequential(table(picture, rows, columns), { scale: "root" })));
      const chosen = b === block && h === head;
      if (button.ariaPressed !== String(chosen)) button.setAttribute("aria-pressed", chosen);
    }
    open.textContent = `Open ${short(block)} in the map`;
    const { text, picture } = weightsOf(block, head, place);
    const seen = overlay(run.rgb ??= rgb(run.image), table(picture, rows, columns), { scale: "root", background: 0.55 });
    show(canvas, opaque(seen));
    $(".key i").style.background = `linear-gradient(to right, ${seen.keyColours.join(",")})`;
    const isPatch = place.startsWith("patch"), n = Number(place.split(":")[1]);
    box.hidden = !isPatch;
    $("#key-most").textContent = percent(Math.max(...picture));
    if (isPatch) {
      Object.assign(box.style, { left: `${(100 * (n % columns)) / columns}%`, top: `${(100 * Math.floor(n / columns)) / rows}%`,
        width: `${100 / columns}%`, height: `${100 / rows}%` });
    }
    const most = Math.max(...text.slice(0, words.children.length - 1), 1e-12);
    $("#attention-read").textContent = isPatch
      ? "The outlined patch attends to the bright patches most; the words show their own shares."
      : "The brighter a patch, the more it attends to the word.";
    words.classList.toggle("plain", !isPatch);
    let named = 0;
    [...words.children].forEach((button, i) => {
      if (button.className === "rest") return;
      named += text[i];
      button.style.setProperty("--shade", isPatch ? `${(70 * text[i]) / most}%` : "0%");
      button.setAttribute("aria-pressed", String(!isPatch && n === i));
      if (isPatch) button.lastChild.textContent = percent(text[i]); // hidden else, so that no word moves
    });
    const inText = text.reduce((a, b) => a + b, 0), rest = words.querySelector(".rest");
    rest.hidden = !isPatch;
    rest.lastChild.textContent = ` ${percent(inText - named)}`;
    const who = `${short(block)}, ${head === "mean" ? "mean of the 5 heads" : `head ${head}`}`;
    if (isPatch) {
      const best = [...text.slice(0, words.children.length - 1).keys()].sort((a, b) => text[b] - text[a])[0];
      const name = pieces[best]?.replaceAll("▁", ""), [inWords, inPatches, inRest] = wholes([named, 1 - inText, inText - named]);
      finding.innerHTML = `<b>Row ${Math.floor(n / columns) + 1}, column ${(n % columns) + 1}</b> (${who}) gives ${inWords} of its attention to words (most to <b></b>, ${percent(text[best])}), ${inPatches} to patches and ${inRest} to end and padding.`;
      finding.querySelectorAll("b")[1].textContent = `“${name}”`;
    } else {
      const best = picture.indexOf(Math.max(...picture));
      finding.innerHTML = `<b></b> (${who}): the patch in row ${Math.floor(best / columns) + 1}, column ${(best % columns) + 1} attends to it most, with ${percent(picture[best])} of its attention.`;
      finding.firstChild.textContent = `“${pieces[n]?.replaceAll("▁", "")}”`;
    }
    document.dispatchEvent(new CustomEvent("fluxedu:hovered", { detail: { ms: performance.now() - started } }));
  }

  function hover(place) {
    if (place === hovered) return;
    hovered = place;
    requestAnimationFrame(paint);
  }

  function patchUnder(event) {
    const area = canvas.getBoundingClientRect(), [rows, columns] = grid();
    const x = Math.floor(((event.clientX - area.left) / area.width) * columns);
    const y = Math.floor(((event.clientY - area.top) / area.height) * rows);
    return x >= 0 && y >= 0 && x < columns && y < rows ? `patch:${y * columns + x}` : null;
  }
  canvas.addEventListener("pointermove", (event) => run && hover(patchUnder(event)));
  canvas.addEventListener("pointerleave", () => hover(null));
  canvas.addEventListener("click", (event) => {
    const place = run && patchUnder(event);
    if (place) { hovered = null; store.set({ at: place }); }
  });
  canvas.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!move || !run) return;
    event.preventDefault();
    const [rows, columns] = grid(), [kind, number] = store.state.at.split(":"), n = kind === "patch" ? Number(number) : 0;
    const row = Math.min(rows - 1, Math.max(0, Math.floor(n / columns) + move[0]));
    const column = Math.min(columns - 1, Math.max(0, (n % columns) + move[1]));
    store.set({ at: `patch:${row * columns + column}` });
  });

  store.on((_, names) => {
    if (["at", "block", "head"].some((name) => names.has(name))) paint();
    if (names.has("block")) onBlock(store.state.block);
  });

  return {
    /** The values inside the model at one step of a run. */
    set(nextRun, nextValues) {
      if (nextRun !== run) {
        run = nextRun;
        pieces = run.tokens;
        canvas.parentElement.style.setProperty("--ratio", run.shape[2] / run.shape[1]);
        gallery.style.setProperty("--ratio", run.shape[2] / run.shape[1]);
        drawWords();
      }
      values = nextValues;
      paint();
    },
    paint,
  };
}
