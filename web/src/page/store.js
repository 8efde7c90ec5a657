// The state of the page. All of it is in the address, so that a shared link shows the same view.

export const DEFAULTS = {
  prompt: "a red circle left of a blue square", negative: "", seed: 0, steps: 20, guidance: 6, shape: "128x128",
  step: null, // null: the last
  block: "single.1", head: "mean", at: "patch:34", // what the attention is shown of
  change: null, // see change.js
  open: "", // the box of the map that is open
  tour: 0, // 0: no tour
};
const SHORT = { prompt: "p", negative: "not", seed: "seed", steps: "steps", guidance: "g", shape: "size", step: "step",
  block: "block", head: "head", at: "at", change: "change", open: "open", tour: "tour" };

/** The state that an address (its part after #) stands for; unreadable parts are ignored. */
export function parse(hash) {
  const state = { ...DEFAULTS }, found = new URLSearchParams(hash.replace(/^#/, ""));
  for (const [name, short] of Object.entries(SHORT)) {
    const text = found.get(short);
    if (text === null) continue;
    if (name === "change") state.change = readChange(text);
    else if (typeof DEFAULTS[name] === "number" || name === "step") {
      if (text !== "" && Number.isFinite(Number(text))) state[name] = Number(text);
    } else state[name] = text;
  }
  state.steps = Math.min(50, Math.max(1, Math.round(state.steps)));
  state.seed = Math.min(4294967295, Math.max(0, Math.round(state.seed)));
  state.guidance = Math.min(10, Math.max(1, state.guidance));
  return state;
}

export function format(state) {
  const parts = new URLSearchParams();
  for (const [name, short] of Object.entries(SHORT)) {
    const value = state[name];
    if (JSON.stringify(value) === JSON.stringify(DEFAULTS[name])) continue;
    parts.set(short, name === "change" ? writeChange(value) : value);
  }
  return parts.toString();
}

/** A change as a short text: hide:3,4 · positions:mirror,0,0 · mute:double.0/head.2 · prompts:for T5~for CLIP */
function writeChange(change) {
  if (!change) return "";
  const { kind, tokens, columns, dx, dy, block, part, t5, clip } = change;
  return `${kind}:${{ hide: () => tokens, positions: () => [columns, dx, dy], mute: () => `${block}/${part}`,
    prompts: () => `${t5}~${clip}` }[kind]()}`;
}

/** Null for a text that is none. */
function readChange(text) {
  const [, kind, rest] = /^(hide|positions|mute|prompts):(.*)$/.exec(text) ?? [];
  const whole = (list) => list.map(Number).every(Number.isInteger);
  if (kind === "hide") {
    const tokens = rest.split(",");
    return whole(tokens) ? { kind, tokens: tokens.map(Number).filter((i) => i >= 0 && i < 32) } : null;
  }
  if (kind === "positions") {
    const [columns, ...moved] = rest.split(",");
    if (!["", "mirror", "same"].includes(columns) || moved.length !== 2 || !whole(moved)) return null;
    return { kind, columns, dx: Number(moved[0]), dy: Number(moved[1]) };
  }
  if (kind === "mute") {
    const [block, part] = rest.split("/");
    return /^(block|mod|head\.\d)$/.test(part) ? { kind, block, part } : null;
  }
  if (kind === "prompts") {
    const [t5, clip = t5] = rest.split("~");
    return { kind, t5, clip };
  }
  return null;
}

/** `set(changes)` tells every listener the new state and the names of what is different. */
export function createStore(state) {
  const listeners = [];
  let pending = 0;
  const write = () => {
    const text = format(store.state);
    history.replaceState(null, "", text ? `#${text}` : location.pathname + location.search);
  };
  const store = {
    state,
    on: (listener) => listeners.push(listener),
    set(changes) {
      const names = Object.keys(changes).filter(
        (name) => JSON.stringify(changes[name]) !== JSON.stringify(store.state[name]));
      if (!names.length) return;
      store.state = { ...store.state, ...changes };
      for (const listener of listeners) listener(store.state, new Set(names));
      clearTimeout(pending); // browsers refuse many changes of the address within a second
      pending = setTimeout(write, 150);
    },
    address() { write(); return location.href; },
  };
  return store;
}
