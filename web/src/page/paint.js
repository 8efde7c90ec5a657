// Pictures and heat maps on canvases.
import LAYERS from "./preview.json";

/** matplotlib's magma at five points, the project's colours for values from 0 up. */
const MAGMA = [[0, 0, 4], [81, 18, 124], [183, 55, 121], [252, 137, 97], [252, 253, 191]];
const RAMP = Array.from({ length: 256 }, (_, i) => {
  const place = (i / 255) * (MAGMA.length - 1), low = Math.min(Math.floor(place), MAGMA.length - 2), part = place - low;
  return MAGMA[low].map((value, c) => value + part * (MAGMA[low + 1][c] - value));
});

export const magma = (share) => RAMP[Math.max(0, Math.min(255, Math.round(255 * share)))];

/** Puts an image on a canvas, which takes on its size. */
export function show(canvas, image) {
  if (canvas.width !== image.width) canvas.width = image.width;
  if (canvas.height !== image.height) canvas.height = image.height;
  canvas.getContext("2d").putImageData(image, 0, 0);
}

/** Weights [rows x columns] as an image, one pixel per weight; the largest is the brightest. */
export function heat(weights, rows, columns, largest) {
  const image = new ImageData(columns, rows);
  for (let i = 0; i < rows * columns; i++) image.data.set([...magma(weights[i] / largest), 255], 4 * i);
  return image;
}

/** Weights of patches over the picture in grey: the larger a weight, the more opaque its patch. */
export function overlay(picture, weights, rows, columns) {
  const { width, height, data } = picture, image = new ImageData(width, height);
  const largest = Math.max(...weights, 1e-12);
  for (let y = 0; y < height; y++) {
    const row = Math.floor((y * rows) / height);
    for (let x = 0; x < width; x++) {
      const i = 4 * (y * width + x), share = weights[row * columns + Math.floor((x * columns) / width)] / largest;
      const grey = 40 + 0.62 * (0.3 * data[i] + 0.59 * data[i + 1] + 0.11 * data[i + 2]);
      const alpha = 0.9 * share ** 0.7, colour = magma(share);
      for (let c = 0; c < 3; c++) image.data[i + c] = (1 - alpha) * grey + alpha * colour[c];
      image.data[i + 3] = 255;
    }
  }
  return image;
}

/** The largest difference of each pixel's red, green and blue; and how many pixels differ visibly. */
export function difference(before, after) {
  const image = new ImageData(before.width, before.height), count = before.width * before.height;
  let visible = 0;
  for (let i = 0; i < count; i++) {
    let most = 0;
    for (let c = 0; c < 3; c++) most = Math.max(most, Math.abs(before.data[4 * i + c] - after.data[4 * i + c]));
    if (most > 30) visible++;
    image.data.set([...magma(most / 255), 255], 4 * i);
  }
  return { image, share: visible / count };
}

/**
 * A quick picture of latents [16, h, w] with 2 x 2 pixels per cell: a small network for each cell's 16 numbers, fitted to
 * the decoder's pictures by web/preview.py. It does not know the neighbours, so it is coarser than the decoder.
 */
export function preview(latents, [channels, height, width]) {
  const image = new ImageData(2 * width, 2 * height), cells = width * height;
  const states = LAYERS.map(({ bias }) => new Float32Array(bias.length)), input = new Float32Array(channels);
  for (let i = 0; i < cells; i++) {
    for (let k = 0; k < channels; k++) input[k] = latents[k * cells + i];
    LAYERS.forEach(({ weight, bias }, l) => {
      const from = l ? states[l - 1] : input, to = states[l];
      for (let j = 0; j < bias.length; j++) {
        let sum = bias[j];
        for (let k = 0; k < from.length; k++) sum += weight[j][k] * from[k];
        to[j] = l < LAYERS.length - 1 ? Math.max(0, sum) : sum;
      }
    });
    const colours = states.at(-1), x = 2 * (i % width), y = 2 * Math.floor(i / width);
    for (let q = 0; q < 4; q++) {
      const at = 4 * ((y + (q >> 1)) * 2 * width + x + (q & 1));
      for (let c = 0; c < 3; c++) image.data[at + c] = 127.5 * (colours[3 * q + c] + 1);
      image.data[at + 3] = 255;
    }
  }
  return image;
}
