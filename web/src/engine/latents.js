// Latents as tokens, their positions, and a quick look at them; as fluxedu/sampling/latents.py and rope_table.
// A latent is [channels, h, w] cells; a token is a patch of 2 x 2 cells.

/** For each number of the tokens [h/2 * w/2, 4 * channels], its index in the latent; inside a token the order is
 * (channel, row, column). */
function tokenIndices([channels, h, w]) {
  const indices = new Uint32Array(channels * h * w);
  let i = 0;
  for (let row = 0; row < h; row += 2)
    for (let column = 0; column < w; column += 2)
      for (let c = 0; c < channels; c++)
        for (let y = 0; y < 2; y++)
          for (let x = 0; x < 2; x++) indices[i++] = (c * h + row + y) * w + column + x;
  return indices;
}

/** Latent -> tokens. */
export function pack(latent, shape) {
  return Float32Array.from(tokenIndices(shape), (index) => latent[index]);
}

/** Tokens -> latent. */
export function unpack(tokens, shape) {
  const latent = new Float32Array(tokens.length);
  tokenIndices(shape).forEach((index, i) => (latent[index] = tokens[i]));
  return latent;
}

/** The position ids of the image tokens: [frame, row, column] of each patch. */
export function imageIds([, h, w]) {
  const ids = [];
  for (let row = 0; row < h / 2; row++) for (let column = 0; column < w / 2; column++) ids.push([0, row, column]);
  return ids;
}

/** Cosines and sines of the rotation of each channel pair, [tokens, head width / 2]. */
export function ropeTable(ids, axesDim, theta) {
  const angles = ids.flatMap((id) =>
    axesDim.flatMap((dim, axis) =>
      Array.from({ length: dim / 2 }, (_, i) => id[axis] * theta ** (-(2 * i) / dim)),
    ),
  );
  return { cos: Float32Array.from(angles, Math.cos), sin: Float32Array.from(angles, Math.sin) };
}

/** The colours of the latent's cells by a linear map: RGBA bytes, one pixel per cell. */
export function previewPixels(latent, [channels, h, w], { matrix, bias }) {
  const pixels = new Uint8ClampedArray(4 * h * w);
  for (let cell = 0; cell < h * w; cell++) {
    for (let rgb = 0; rgb < 3; rgb++) {
      let level = bias[rgb];
      for (let c = 0; c < channels; c++) level += latent[c * h * w + cell] * matrix[c][rgb];
      pixels[4 * cell + rgb] = 255 * level;
    }
    pixels[4 * cell + 3] = 255;
  }
  return pixels;
}

/** The decoder's image [3, H, W], about -1 to 1, as RGBA bytes. */
export function imagePixels(image, height, width) {
  const pixels = new Uint8ClampedArray(4 * height * width), size = height * width;
  for (let i = 0; i < size; i++) {
    for (let rgb = 0; rgb < 3; rgb++) pixels[4 * i + rgb] = (image[rgb * size + i] + 1) * 127.5;
    pixels[4 * i + 3] = 255;
  }
  return pixels;
}
