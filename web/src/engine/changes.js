// Changes of a run as inputs of the graphs. Each means what the instrument in Python means:
//
//   { kind: "scale", target, factor }    fe.intervene(site, lambda x, ctx: factor * x) at the sites of the target
//   { kind: "hide", token | tokens }     fe.ablate("*.attn.map", tokens=[...]): no token attends to these text tokens
//   { kind: "positions", dx, dy, columns, rows }   other position ids of the patches, in all blocks; columns and rows
//                                        may be "mirror" or "same" (all 0), which act before dx and dy are added
//
// A change may have `steps: [...]`, the steps at which it acts. Targets:
//
//   vec.text, double.0.img_mod.gate1, single.2.heads, ...   a site of the manifest's `factors`
//   double.0 · single.3                   all that the block adds to the residual stream
//   double.0.attn · double.0.mlp          what its attention, or its MLPs, add (both streams)
//   single.3.attn · single.3.mlp          its heads' outputs; its MLP's hidden values
//   double.0.head.2                       the output of one head
//   double.0.mod · double.0.mod.img · single.3.mod   all shifts, scales and gates of the block, or of a stream

import { imageIds } from "./latents.js";

/** Site -> [index of its first factor, their number]. */
function slots(counts) {
  const found = new Map();
  let first = 0;
  for (const [site, count] of Object.entries(counts)) {
    found.set(site, [first, count]);
    first += count;
  }
  return found;
}

/** The sites of a target, and the head if it is one head. */
function sitesOf(target, names) {
  if (names.includes(target)) return { sites: [target] };
  const [, block, part, which] = /^((?:double|single)\.\d+)(?:\.(attn|mlp|mod|head)(?:\.(\w+))?)?$/.exec(target) ?? [];
  const isDouble = block?.startsWith("double");
  const ending = {
    undefined: /contribution$/,
    attn: isDouble ? /_attn_contribution$/ : /\.heads$/,
    mlp: isDouble ? /_mlp_contribution$/ : /\.mlp_hidden$/,
    head: /\.heads$/,
    mod: isDouble ? new RegExp(`\\.${which ?? "(img|txt)"}_mod\\.\\w+$`) : /\.(shift|scale|gate)$/,
  }[part];
  const sites = block ? names.filter((name) => name.startsWith(`${block}.`) && ending.test(name)) : [];
  if (!sites.length) throw new Error(`There is nothing called ${target} that can be scaled.`);
  return part === "head" ? { sites, head: Number(which) } : { sites };
}

/** The factors of all sites, the bias of all keys, and the position ids of the patches, for one step. */
export function inputsOf(changes, { factors: counts, txtLen, shape, step }) {
  const places = slots(counts), names = [...places.keys()];
  const factors = new Float32Array([...places.values()].reduce((sum, [, count]) => sum + count, 0)).fill(1);
  let ids = imageIds(shape);
  const keyBias = new Float32Array(txtLen + ids.length);
  for (const change of changes ?? []) {
    if (change.steps && !change.steps.includes(step)) continue;
    if (change.kind === "scale") {
      const { sites, head } = sitesOf(change.target, names);
      for (const site of sites) {
        const [first, count] = places.get(site);
        if (head !== undefined && !(head < count)) throw new Error(`There is no ${change.target}.`);
        for (let i = 0; i < count; i++) if (head === undefined || head === i) factors[first + i] *= change.factor;
      }
    } else if (change.kind === "hide") {
      for (const token of change.tokens ?? [change.token]) keyBias[token] = -Infinity;
    } else if (change.kind === "positions") {
      ids = movedIds(ids, change, shape);
    } else {
      throw new Error(`There is no change of the kind ${change.kind}.`);
    }
  }
  return { factors, keyBias, ids };
}

function movedIds(ids, { dx = 0, dy = 0, columns, rows }, [, h, w]) {
  const edit = { mirror: (id, last) => last - id, same: () => 0 };
  return ids.map(([frame, row, column]) => [
    frame,
    (rows ? edit[rows](row, h / 2 - 1) : row) + dy,
    (columns ? edit[columns](column, w / 2 - 1) : column) + dx,
  ]);
}

/** What the negative prompt's pass receives: as in Python, changes act on the prompt's pass, and positions on both. */
export const forNegative = (changes) => (changes ?? []).filter((change) => change.kind === "positions");
