// A treemap of the parameters of networks, as fluxedu/widgets/parameters.py. No network is needed, only names and shapes.
import { fixed, percent, sum } from "./numbers.js";
import { COLOURS, boxes } from "./panels.js";

const SIZE = [454, 250], MIN_SHARE = 0.004, REST = "everything else", GREY = "#888888";

/** Tensors by the first two parts of their names, the largest part first, all small ones together at the end. */
function partsOf(groups) {
  const found = new Map();
  for (const group of groups) {
    const words = group.name.split(".").slice(0, -1).filter((word) => word !== "#");
    const name = words.slice(0, 2).join(".");
    found.set(name, [...(found.get(name) ?? []), group]);
  }
  const size = (members) => sum(members.map((group) => group.size));
  const limit = MIN_SHARE * size(groups), all = [...found].map(([name, members]) => ({ name, members, size: size(members) }));
  const large = all.filter((part) => part.size >= limit).sort((a, b) => b.size - a.size);
  const members = all.filter((part) => part.size < limit).flatMap((part) => part.members);
  return members.length ? [...large, { name: REST, members, size: size(members) }] : large;
}

/** Colour by what the weights are for: modulation, the image, the text, or both. */
function colourOf(part) {
  if (part.split(".").at(-1).includes("mod")) return COLOURS[2];
  if (part.startsWith("double_blocks")) return part.includes(".img") ? COLOURS[0] : COLOURS[1];
  return part.startsWith("single_blocks") ? COLOURS[3] : GREY;
}

/** A rectangle for each item, its area in proportion to its size: the whole is cut in two along its longer side, as
 * evenly as the items allow, and each half again. */
function treemap(items, x, y, w, h) {
  if (items.length === 1) return [[items[0], x, y, w, h]];
  const total = sum(items.map((item) => item.size));
  let first = 0, cut = 0;
  while (cut < items.length - 1 && (cut === 0 || first + items[cut].size / 2 < total / 2)) first += items[cut++].size;
  const share = first / total, [a, b] = [items.slice(0, cut), items.slice(cut)];
  return w >= h ? [...treemap(a, x, y, w * share, h), ...treemap(b, x + w * share, y, w * (1 - share), h)]
    : [...treemap(a, x, y, w, h * share), ...treemap(b, x, y + h * share, w, h * (1 - share))];
}

function rectangles(parts, total) {
  return treemap(parts, 0, 0, ...SIZE).map(([part, x, y, w, h]) => {
    const short = part.name.split(".").at(-1), labels = [`${short} ${percent(part.size / total)}`, short];
    return [labels.find((text) => 4.6 * text.length < w) ?? short, x + 1, y + 1, w - 2, h - 2, colourOf(part.name)];
  });
}

const thousands = (x) => x.toLocaleString("en-US");

export async function open(engine, message) {
  const { names, networks } = message.args;
  const all = Object.entries(networks).map(([variant, groups]) => {
    const found = groups.map(([index, count, shape]) => {
      const [name, diffusersNames] = names[index];
      return { name, diffusersNames, count, shape, size: shape.reduce((a, b) => a * b, count) };
    });
    return { variant, groups: found, parts: partsOf(found), total: sum(found.map((group) => group.size)) };
  });

  return ({ variant: chosen, part, tensor }) => {
    const { variant, groups, parts, total } = all[chosen], at = Math.min(part, parts.length - 1);
    const { name, members, size } = parts[at], index = Math.min(tensor, members.length - 1), height = 20;
    const rows = members.map((group, i) => [
      `${group.name.split("#.").at(-1)}  [${group.shape.join(", ")}]  × ${group.count}`,
      2, 2 + i * height, 320, height - 2, colourOf(name),
    ]);
    const million = thousands(Number(fixed(size / 1e6)));
    const panels = [
      boxes("Area: number of parameters (blue: image, orange: text, pink: both, green: modulation)",
        rectangles(parts, total), [], SIZE, at, "part"),
      boxes(`${name}: ${million} million parameters, ${percent(size / total, 1)}`, rows, [],
        [324, 4 + Math.max(height * members.length, 120)], index, "tensor"),
    ];
    const group = members[index], start = /^(?:.*#\.)?/.exec(group.diffusersNames[0])[0]; // up to the block's number
    const theirs = group.diffusersNames.map((text) => (text.startsWith(start) ? text.slice(start.length) : text));
    const text = `${variant}: ${thousands(total)} parameters in ${sum(groups.map((g) => g.count))} tensors. ${group.name} ` +
      `(× ${group.count}) has ${thousands(group.size)}; diffusers calls it ${start}${theirs.join(", ")}.`;
    return { text, panels, shades: {} };
  };
}
