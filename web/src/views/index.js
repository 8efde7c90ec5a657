// Views of explorers that the page computes itself, from the miniature in the browser: the same messages as those of
// the Python explorers with the same arguments (tests/browser/test_views.py compares them).
//
// Each module's `open(engine, message, onProgress)` makes the runs of the call message.args, and resolves with
// `draw(state) -> { text, panels, shades }`, which may be a promise. Title, instruction, controls and suggestions are
// Python's: they are part of the message that the page carries, see Explorer._repeatable in explorer.py.
import { open as attention } from "./attention.js";
import { open as contributions } from "./contributions.js";
import { open as grid } from "./grid.js";
import { open as heads } from "./heads.js";
import { open as latents } from "./latents.js";
import { open as modulation } from "./modulation.js";
import { open as parameters } from "./parameters.js";
import { open as positions } from "./positions.js";
import { open as similarity } from "./similarity.js";
import { open as solvers } from "./solvers.js";
import { open as streams } from "./streams.js";
import { open as tokens } from "./tokens.js";
import { open as trajectory } from "./trajectory.js";
import { open as velocity } from "./velocity.js";

export const VIEWS = {
  attention, contributions, grid, heads, latents, modulation, parameters, positions, similarity, solvers,
  streams, tokens, trajectory, velocity,
};
/** Those that need no model. */
export const WITHOUT_ENGINE = ["parameters"];
export { Unsupported } from "./run.js";

/** A model as anywidget's, for explorer.js, of which the page is the kernel. */
export async function pageModel(engine, message, onProgress) {
  const draw = await VIEWS[message.name](engine, message, onProgress), calls = new Map();
  const values = { ...message, data: {}, still: "", state: { ...message.state, moves: 0 } };
  values.view = { ...(await draw(values.state)), moves: 0 };
  const answer = async () => {
    const { moves, ...state } = values.state;
    try {
      values.view = { ...(await draw(state)), moves };
    } catch (error) {
      values.view = { ...values.view, text: `This cannot be shown: ${error.message}`, moves };
    }
    for (const call of calls.get("change:view") ?? []) call();
  };
  return {
    get: (name) => values[name],
    set: (name, value) => (values[name] = value),
    save_changes: () => void answer(),
    on: (name, call) => calls.set(name, [...(calls.get(name) ?? []), call]),
    off: (name, call) => calls.set(name, (calls.get(name) ?? []).filter((c) => c !== call)),
  };
}
