// What the page shows until the model has drawn its first picture: one step of a run that web/recorded.py has recorded.
import { expanded } from "../engine/files.js";
import { difference, preview, show } from "./paint.js";
import RECORDED from "./recorded.json";

export const { blocks, heads, txtLen } = RECORDED; // as in the engine's `info`

/** The picture in a file, as ImageData. */
async function imageIn(file) {
  const image = new Image();
  image.src = file;
  await image.decode();
  const canvas = Object.assign(document.createElement("canvas"), { width: image.width, height: image.height });
  const pen = canvas.getContext("2d");
  pen.drawImage(image, 0, 0);
  return pen.getImageData(0, 0, image.width, image.height);
}

/** The attention maps [heads, tokens, tokens] of all blocks; the rows of text tokens, which were not recorded, are 0. */
function mapsOf(bytes, patches) {
  const tokens = txtLen + patches, rows = blocks.length * heads * patches, values = new Map();
  const largest = new Float32Array(bytes.slice(0, 4 * rows)), levels = new Uint8Array(bytes, 4 * rows);
  let row = 0;
  for (const block of blocks) {
    const data = new Float32Array(heads * tokens * tokens);
    for (let h = 0; h < heads; h++) {
      for (let p = 0; p < patches; p++, row++) {
        const start = (h * tokens + txtLen + p) * tokens;
        for (let k = 0; k < tokens; k++) data[start + k] = largest[row] * (levels[row * tokens + k] / 255) ** 2;
      }
    }
    values.set(`${block}.attn.map`, { dims: [heads, tokens, tokens], data });
  }
  return values;
}

/** Fills film, attention and the pictures of a change, as long as `isNeeded()`. */
export async function showRecorded(attention, isNeeded) {
  const [image, after, packed] = await Promise.all([imageIn("still.png"), imageIn("still-green.png"),
    fetch("recorded.gz").then((response) => response.arrayBuffer())]);
  const bytes = (await expanded(new Uint8Array(packed))).buffer;
  if (!isNeeded()) return;
  const $ = (selector) => document.querySelector(selector), { shape, tokens, step, request: { steps, prompt }, change } = RECORDED;
  const [noisy, guess] = [0, 1].map((i) => new Float32Array(bytes, 4 * i * shape[0] * shape[1] * shape[2], shape[0] * shape[1] * shape[2]));
  document.body.classList.add("recorded");
  show($("#main"), image);
  for (const [canvas, latents] of [[$("#noisy"), noisy], [$("#guess"), guess]]) {
    show(canvas, preview(latents, shape));
    canvas.classList.add("soft");
  }
  $("#now").textContent = `Recorded earlier: step ${step + 1} of ${steps}.`;
  attention.set({ image, shape, tokens, isRecorded: true }, mapsOf(bytes.slice(8 * noisy.length), (shape[1] * shape[2]) / 4));
  for (const output of document.querySelectorAll(".stepper output")) output.textContent = `step ${step + 1} of ${steps}`;
  const { image: changed, share } = difference(image, after), figures = [["before", image], ["after", after], ["difference", changed]];
  for (const [name, picture] of figures) {
    show($(`#${name}`), picture);
    $(`#${name}`).classList.remove("none");
  }
  $("#after + figcaption").textContent = `after: T5 reads “${change.t5}”, CLIP reads “${prompt}”`;
  $("#change-finding").textContent = `${(100 * share).toFixed(0)} % of the pixels change visibly (red, green or blue by more than 30 of 255).`;
}
