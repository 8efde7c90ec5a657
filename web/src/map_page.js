// The map for a page of one file, without a server: fluxedu trace and the documentation. The page holds the data.
import { createMap } from "./map.js";

/** Bytes of a base64 string that zlib has compressed. */
async function unpack(text) {
  const packed = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** The index of the last number in `steps` that is at most `step`. */
const lastUpTo = (steps, step) => Math.max(0, steps.findLastIndex((s) => s <= step));

/** values(site, step) of a recorded run; `data` as fluxedu/trace.py writes it. */
function recorded(data) {
  const { sites, pictures, times, frameSteps, curveSteps, colours } = data, bytes = unpack(data.values);
  const css = colours.map((table) => table.map((rgb) => `rgb(${rgb.join(" ")})`));
  const starts = {};
  let at = data.curves;
  for (const [name, site] of Object.entries(sites)) {
    starts[name] = at;
    at += 16 * site[6];
  }
  const short = (x) => String(Number(x.toPrecision(3)));
  return async (place, at) => {
    const [name, step] = place === "sample.next" ? ["sample.x", at + 1] : [place, at]; // the state after the step
    const all = await bytes, site = sites[name], picture = pictures[name];
    if (!site) return null;
    const [start, frames, height, width, signed, largest, count, ratio] = site;
    const numbers = new Float32Array(all.buffer, starts[name], 4 * count), now = count === 1 ? 0 : lastUpTo(curveSteps, step);
    const [mean, deviation, low, high] = numbers.subarray(4 * now, 4 * now + 4);
    const text = `Mean ${short(mean)}, standard deviation ${short(deviation)}, from ${short(low)} to ${short(high)}.`;
    const share = `A token receives ${short(low)} to ${short(high)} times an equal share of attention.`; // a map's summary
    const series = ["mean", "standard deviation", "smallest", "largest"].map((label, i) => ({ name: label, y: Array.from({ length: count }, (_, n) => numbers[4 * n + i]) }));
    const curves = count > 1 ? { x: curveSteps.map((s) => times[s]), series, mark: times[step], x_label: "time t" } : null;
    const value = { kind: "pixels", text: name.endsWith(".map") ? share : text, curves, title: "" };
    if (picture) {
      const [from, found, h, w] = picture, i = Math.min(step, found - 1);
      return { ...value, width: w, height: h, data: all.subarray(from + 3 * i * h * w, from + 3 * (i + 1) * h * w), smooth: true, title: "As an image, decoded" };
    }
    const frame = frames === 1 ? 0 : Math.min(lastUpTo(frameSteps, step), frames - 1), table = colours[signed];
    const repeats = Math.max(1, Math.round(width / (8 * height))); // a vector is drawn as a strip
    const rgb = new Uint8Array(3 * width * height * repeats);
    for (let y = 0; y < height * repeats; y++) {
      for (let x = 0; x < width; x++) rgb.set(table[all[start + (frame * height + Math.floor(y / repeats)) * width + x]], 3 * (y * width + x));
    }
    const key = [signed ? short(-largest) : "0", short(largest)];
    return { ...value, width, height: height * repeats, data: rgb, ratio, key, colours: css[signed], title: "Tokens or rows run down; channels, heads or keys run across. Neighbours are averaged." };
  };
}

/** The map with the values of a recorded run, or without values. */
function show(element, data, options = {}) {
  const run = data.values ? { values: recorded(data), times: data.times } : {};
  return createMap(element, { wiring: data.wiring, ...run, ...options });
}

globalThis.fluxeduMap = { createMap, recorded, show };
