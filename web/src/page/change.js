// One change to the model or to its inputs; the picture before and after, from the same seed.
import { difference, show } from "./paint.js";

const TABS = {
  prompts: ["Two prompts", "Let the two text encoders read different prompts: edit one of them and press Enter. Which one does the picture follow?"],
  hide: ["Hide words", "Choose words. No token of the model can attend to them; but T5 and CLIP have read them before."],
  positions: ["Move positions", "Every patch knows its row and column by its position. Give the patches other positions."],
  mute: ["Mute a part", "Leave out what one block or head adds, in every step. If the picture hardly changes, it did not depend on this part."],
};
const COLUMNS = { "": "as they are", mirror: "mirrored", same: "all the same" };

/** What the engine is asked for: the request of the picture, with the change. */
export function changed(request, change) {
  if (!change) return request;
  if (change.kind === "prompts") return { ...request, prompt: change.t5, clipPrompt: change.clip };
  if (change.kind === "hide") return { ...request, changes: change.tokens.map((token) => ({ kind: "hide", token })) };
  if (change.kind === "positions") {
    const { dx = 0, dy = 0, columns } = change;
    return { ...request, changes: [{ kind: "positions", dx, dy, ...(columns && { columns }) }] };
  }
  const target = change.part === "block" ? change.block : `${change.block}.${change.part}`;
  return { ...request, changes: [{ kind: "scale", target, factor: 0 }] };
}

/** True if the change changes nothing, such as no word hidden. */
export const isEmpty = (change, request) => !change
  || (change.kind === "hide" && !change.tokens.length)
  || (change.kind === "positions" && !change.dx && !change.dy && !change.columns)
  || (change.kind === "prompts" && change.t5 === request.prompt && change.clip === request.prompt);

export function describe(change, pieces, info) {
  const short = (block) => block.replace(".", " ");
  if (change.kind === "prompts") return `T5 reads “${change.t5}”, CLIP reads “${change.clip}”`;
  if (change.kind === "hide") return `hidden: ${change.tokens.map((i) => `“${(pieces[i] ?? "").replaceAll("▁", "")}”`).join(", ")}`;
  if (change.kind === "positions") {
    const parts = [];
    if (change.columns) parts.push(`columns ${COLUMNS[change.columns]}`);
    if (change.dx) parts.push(`columns ${change.dx > 0 ? "+" : "−"} ${Math.abs(change.dx)}`);
    if (change.dy) parts.push(`rows ${change.dy > 0 ? "+" : "−"} ${Math.abs(change.dy)}`);
    return parts.join(", ");
  }
  const part = { block: "the whole block", mod: "modulation" }[change.part] ?? `head ${change.part.split(".")[1]}`;
  return `muted: ${short(change.block)}, ${part}`;
}

export function createChange({ store, info, getRun, draw }) {
  const $ = (selector) => document.querySelector(`#change ${selector}`);
  const tabs = $(".tabs"), controls = $(".controls"), tries = $(".tries"), finding = $("#change-finding");
  const [before, after, diff] = ["#before", "#after", "#difference"].map($);
  const captions = [before, after].map((canvas) => canvas.parentElement.querySelector("figcaption"));
  let kind = store.state.change?.kind ?? "prompts", wait = 0, number = 0, shown = "";

  for (const [name, [title]] of Object.entries(TABS)) {
    const label = document.createElement("label");
    label.innerHTML = `<input type="radio" name="change" value="${name}"><span>${title}</span>`;
    label.firstChild.addEventListener("change", () => { kind = name; build(); if (store.state.change) store.set({ change: initial(name) }); });
    tabs.append(label);
  }

  const prompt = () => getRun()?.request.prompt ?? store.state.prompt;
  const swapColour = (text) => {
    const colours = info.vocabulary.colours, found = colours.find((colour) => text.includes(colour));
    return found ? text.replace(found, found === "green" ? "blue" : "green") : text;
  };
  function initial(name) {
    return { prompts: { kind: name, t5: prompt(), clip: prompt() }, hide: { kind: name, tokens: [] },
      positions: { kind: name, columns: "", dx: 0, dy: 0 },
      mute: { kind: name, block: "double.0", part: "block" } }[name];
  }
  const current = () => (store.state.change?.kind === kind ? store.state.change : initial(kind));

  const label = (text, control) => {
    const element = document.createElement("label");
    element.append(text, " ", control);
    return element;
  };
  const select = (options, value, onChange) => {
    const element = document.createElement("select");
    for (const [name, title] of options) element.append(new Option(title, name, false, name === value));
    element.addEventListener("change", () => onChange(element.value));
    return element;
  };
  const set = (part) => store.set({ change: { ...current(), ...part } });

  function build() {
    tabs.querySelector(`[value="${kind}"]`).checked = true;
    const change = current(), run = getRun();
    controls.textContent = "";
    const about = document.createElement("p");
    about.className = "hint";
    about.textContent = TABS[kind][1];
    controls.append(about);
    if (kind === "prompts") {
      for (const [name, title] of [["t5", "T5 reads"], ["clip", "CLIP reads"]]) {
        const input = document.createElement("input");
        input.type = "text";
        input.spellcheck = false;
        input.value = change[name];
        input.addEventListener("change", () => set({ [name]: input.value.trim() }));
        controls.append(label(title, input));
      }
    } else if (kind === "hide") {
      const group = document.createElement("div");
      group.className = "words";
      group.setAttribute("role", "group");
      group.setAttribute("aria-label", "Words to hide");
      const pieces = run?.tokens ?? [], end = pieces.indexOf("</s>");
      pieces.slice(0, end < 0 ? undefined : end).forEach((piece, i) => {
        const button = document.createElement("button"), hidden = change.tokens.includes(i);
        button.type = "button";
        button.textContent = piece.replaceAll("▁", "") || "␣";
        button.setAttribute("aria-pressed", hidden);
        button.addEventListener("click", () => {
          const tokens = current().tokens;
          set({ tokens: tokens.includes(i) ? tokens.filter((k) => k !== i) : [...tokens, i].sort((a, b) => a - b) });
          controls.querySelectorAll(".words button")[i]?.focus();
        });
        group.append(button);
      });
      controls.append(group);
    } else if (kind === "positions") {
      controls.append(label("columns", select(Object.entries(COLUMNS), change.columns, (columns) => set({ columns }))));
      for (const [name, title] of [["dx", "added to every column"], ["dy", "added to every row"]]) {
        const input = document.createElement("input");
        Object.assign(input, { type: "number", min: -8, max: 8, step: 1, value: change[name] });
        input.addEventListener("change", () => set({ [name]: Math.max(-8, Math.min(8, Math.round(+input.value || 0))) }));
        controls.append(label(title, input));
      }
    } else {
      controls.append(
        label("block", select(info.blocks.map((b) => [b, b.replace(".", " ")]), change.block, (block) => set({ block }))),
        label("part", select([["block", "the whole block"], ...Array.from({ length: info.heads }, (_, h) => [`head.${h}`, `head ${h}`]),
          ["mod", "its modulation (scales, shifts, gates)"]], change.part, (part) => set({ part }))));
    }
    if (store.state.change) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = "Undo the change";
      button.disabled = Boolean(run) && isEmpty(store.state.change, run.request);
      button.addEventListener("click", () => { store.set({ change: null }); build(); });
      controls.append(button);
    }
  }

  function buildTries() {
    const text = prompt(), pieces = getRun()?.tokens.map((p) => p.replaceAll("▁", "")) ?? [];
    const other = swapColour(text), left = pieces.indexOf("left");
    const list = [];
    if (other !== text) {
      list.push(["T5 reads another colour", { kind: "prompts", t5: other, clip: text }]);
      list.push(["CLIP reads another colour", { kind: "prompts", t5: text, clip: other }]);
    }
    if (left >= 0) list.push(["Hide “left of”", { kind: "hide", tokens: [left, left + 1] }]);
    list.push(["Mirror the columns", { kind: "positions", columns: "mirror", dx: 0, dy: 0 }]);
    list.push(["Mute the first block", { kind: "mute", block: "double.0", part: "block" }]);
    tries.replaceChildren(Object.assign(document.createElement("span"), { textContent: "Try:" }), ...list.map(([title, change]) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = title;
      button.addEventListener("click", () => store.set({ change }));
      return button;
    }));
  }

  function clear() {
    after.classList.add("none");
    diff.classList.add("none");
  }

  async function update() {
    const run = getRun(), change = store.state.change;
    if (!run) return;
    show(before, run.image);
    captions[0].textContent = `before: seed ${run.request.seed}`;
    if (isEmpty(change, run.request)) {
      shown = "";
      number++; // what is still being drawn is not shown
      document.querySelector("#change").classList.remove("busy");
      clear();
      captions[1].textContent = "after: nothing is changed yet";
      finding.textContent = "Choose a change, or one of the examples.";
      return;
    }
    const request = changed(run.request, change), mine = ++number, text = JSON.stringify(request);
    if (text === shown) {
      after.classList.remove("none");
      diff.classList.remove("none");
      document.querySelector("#change").classList.remove("busy");
      return;
    }
    document.querySelector("#change").classList.add("busy");
    clear();
    captions[1].textContent = "after: drawing with the change …";
    finding.textContent = "";
    try {
      const other = await draw(request);
      if (mine !== number) return;
      shown = text;
      show(after, other.image);
      const { image, share } = difference(run.image, other.image);
      show(diff, image);
      after.classList.remove("none");
      diff.classList.remove("none");
      captions[1].textContent = `after: ${describe(change, run.tokens, info)}`;
      const much = share < 0.005 ? "Almost no pixel changes visibly" : `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} % of the pixels change visibly`;
      finding.textContent = `${much} (red, green or blue by more than 30 of 255).`;
      document.dispatchEvent(new CustomEvent("fluxedu:changed"));
    } catch (error) {
      if (error.name === "AbortError" || mine !== number) return;
      finding.textContent = `This change could not be computed: ${error.message}`;
      captions[1].textContent = "after";
    } finally {
      if (mine === number) document.querySelector("#change").classList.remove("busy");
    }
  }

  store.on((state, names) => {
    if (!names.has("change")) return;
    if (state.change) kind = state.change.kind;
    if (getRun() && !isEmpty(state.change, getRun().request)) { // the old result must not be taken for the new one
      clear();
      document.querySelector("#change").classList.add("busy");
    }
    build();
    clearTimeout(wait);
    wait = setTimeout(update, 60);
  });

  return {
    /** The picture before has changed. */
    refresh() { shown = ""; build(); buildTries(); update(); },
  };
}
