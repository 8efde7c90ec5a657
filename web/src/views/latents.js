// Editing a latent, as fluxedu/widgets/latents.py; the latent is that of a drawn image.
import { fixed, largest, percent, signed } from "./numbers.js";
import { DIVERGING, diverging, pixels, sequential, table, tableOf, upscale } from "./panels.js";
import { Unsupported, draw as drawRun, fewStepsNote, labelsOf, requestOf } from "./run.js";

/** Numbers from -1 to 1 [3, H, W] as RGB bytes. */
function toRgb({ data, dims: [, height, width] }) {
  const size = height * width, made = new Uint8ClampedArray(3 * size);
  for (let i = 0; i < size; i++) for (let c = 0; c < 3; c++) made[3 * i + c] = (data[c * size + i] + 1) * 127.5;
  return { width, height, data: new Uint8Array(made.buffer) };
}

const clip = (x) => Math.min(Math.max(x, -1), 1);

export async function open(engine, message, onProgress) {
  const { image, ...args } = message.args;
  if (typeof image !== "string") throw new Unsupported("The page has no encoder for images.");
  const request = requestOf(engine, { ...args, prompt: image }), run = await drawRun(engine, request, onProgress);
  const [, h, w] = run.shape, latent = run.latents.at(-1), vmax = largest(latent.map(Math.abs));
  const before = await engine.decodeValues(latent, run.shape), [, height, width] = before.dims;
  const amounts = labelsOf(message, "amount").map(Number), note = fewStepsNote(engine, request.steps);

  return async ({ channel, amount, area, cell }) => {
    const edited = latent.slice(), add = amounts[amount], reach = area === 2 ? Infinity : area;
    for (let y = 0; y < h; y++)
      for (let x = 0; x < w; x++)
        if (Math.max(Math.abs(y - cell[0]), Math.abs(x - cell[1])) <= reach) edited[(channel * h + y) * w + x] += add;
    const after = await engine.decodeValues(edited, run.shape);
    const difference = tableOf(height, width, (y, x) => Math.max(...[0, 1, 2].map((c) => {
      const i = (c * height + y) * width + x;
      return Math.abs(clip(after.data[i]) - clip(before.data[i])) / 2;
    })));
    const visible = difference.data.filter((d) => d > 0.02).length / difference.data.length;
    const shown = table(edited.subarray(channel * h * w, (channel + 1) * h * w), h, w);
    const panels = [
      pixels(`Channel ${channel} of the latent after the edit`, upscale(diverging(shown, vmax), 256), {
        cells: [h, w], mark: area === 2 ? null : cell, key: [fixed(-vmax, 1), fixed(vmax, 1)], colours: DIVERGING,
        unit: "value of the latent", pointer: "cell",
      }),
      pixels("Decoded before the edit", toRgb(before)),
      pixels("Decoded after the edit", toRgb(after)),
      pixels("Change of each pixel", sequential(difference, { vmax: 0.5 }), {
        key: ["0", "0.5 or more"], unit: "largest change of a colour, as a share of its range",
      }),
    ];
    const here = `row ${cell[0] + 1}, column ${cell[1] + 1}`;
    const where = [`in ${here}`, `in the 3 x 3 cells around ${here}`, "in every cell"][area];
    const text = `${signed(add)} in channel ${channel}, ${where}: ${percent(visible)} of the pixels change visibly.`;
    return { text: text + note, panels, shades: {} };
  };
}
