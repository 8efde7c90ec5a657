// Pictures and heat maps on canvases.
import { sequential, table } from "../views/panels.js";
import PREVIEW from "./preview.json";

const QUICK = Object.fromEntries(["near", "all", "hidden", "out"].map((name) => [name, Float32Array.from(PREVIEW[name].flat())]));
const [NEAR_BIAS, HIDDEN_BIAS, OUT_BIAS] = PREVIEW.biases.map((bias) => Float32Array.from(bias));

/** Puts an image on a canvas, which takes on its size. */
export function show(canvas, image) {
  if (canvas.width !== image.width) canvas.width = image.width;
  if (canvas.height !== image.height) canvas.height = image.height;
  canvas.getContext("2d").putImageData(image, 0, 0);
}

/** An image of RGB bytes, as views/panels.js makes them, as ImageData. */
export function opaque({ width, height, data }) {
  const image = new ImageData(width, height);
  for (let i = 0; i < width * height; i++) {
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = data[3 * i + c];
    image.data[4 * i + 3] = 255;
  }
  return image;
}

/** The largest difference of each pixel's red, green and blue; and how many pixels differ visibly. */
export function difference(before, after) {
  const { width, height } = before, most = new Float64Array(width * height);
  most.forEach((_, i) => {
    for (let c = 0; c < 3; c++) most[i] = Math.max(most[i], Math.abs(before.data[4 * i + c] - after.data[4 * i + c]));
  });
  const image = opaque(sequential(table(most, height, width), { vmax: 255 }));
  return { image, share: most.filter((x) => x > 30).length / most.length };
}

/**
 * A quick picture of latents [16, h, w] with 2 x 2 pixels per cell: a small network that web/preview.py has fitted to the
 * decoder's pictures. It reads a cell, its neighbours, and the means over the picture.
 */
export function preview(latents, [channels, height, width]) {
  const image = new ImageData(2 * width, 2 * height), cells = width * height, { data } = image;
  const means = new Float32Array(channels), near = new Float32Array(9 * channels);
  for (let k = 0; k < channels; k++) for (let i = 0; i < cells; i++) means[k] += latents[k * cells + i] / cells;
  const start = linear(QUICK.all, means, NEAR_BIAS, new Float32Array(NEAR_BIAS.length), false);
  const first = new Float32Array(start.length), second = new Float32Array(start.length), colours = new Float32Array(12);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      let at = 0;
      for (let dy = -1; dy <= 1; dy++) {
        for (let dx = -1; dx <= 1; dx++) {
          const inside = y + dy >= 0 && y + dy < height && x + dx >= 0 && x + dx < width, i = (y + dy) * width + x + dx;
          for (let k = 0; k < channels; k++) near[at++] = inside ? latents[k * cells + i] : 0;
        }
      }
      linear(QUICK.near, near, start, first, true);
      linear(QUICK.hidden, first, HIDDEN_BIAS, second, true);
      linear(QUICK.out, second, OUT_BIAS, colours, false);
      for (let q = 0; q < 4; q++) {
        const place = 4 * ((2 * y + (q >> 1)) * 2 * width + 2 * x + (q & 1));
        for (let c = 0; c < 3; c++) data[place + c] = 127.5 * (colours[3 * q + c] + 1);
        data[place + 3] = 255;
      }
    }
  }
  return image;
}

/** weight [outputs x inputs] * input + bias, without what is below 0 if `isRelu`; written into `output`. */
function linear(weight, input, bias, output, isRelu) {
  const count = input.length;
  for (let j = 0; j < output.length; j++) {
    let sum = bias[j];
    for (let k = 0, at = j * count; k < count; k++, at++) sum += weight[at] * input[k];
    output[j] = isRelu && sum < 0 ? 0 : sum;
  }
  return output;
}
