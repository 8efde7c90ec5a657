// Numbers as Python's format strings write them, so that a sentence reads the same from both engines.

/** f"{x:.{digits}f}": of two equally near numbers, Python takes the even one, JavaScript the larger. */
export function fixed(x, digits = 0) {
  const scaled = Math.abs(x) * 10 ** digits, floor = Math.floor(scaled);
  const isTie = scaled - floor === 0.5 && Number.isInteger(x * 2 ** 20);
  if (!isTie) return x.toFixed(digits);
  return (Math.sign(x) * ((floor % 2 ? floor + 1 : floor) / 10 ** digits)).toFixed(digits);
}

/** f"{x:.{digits}%}" */
export const percent = (x, digits = 0) => `${fixed(100 * x, digits)}%`;

/** Shares of a whole as whole percentages that sum to 100: those cut off most are rounded up. */
export function wholePercentages(shares) {
  const all = Array.from(shares, (share) => 100 * share), found = all.map(Math.floor);
  const order = range(all.length).sort((a, b) => all[b] - found[b] - (all[a] - found[a]));
  for (const i of order.slice(0, Math.max(100 - sum(found), 0))) found[i] += 1;
  return found;
}

/** f"{x:.{digits}g}" of numbers that need no exponent. */
export const general = (x, digits = 6) => String(Number(x.toPrecision(digits)));

/** f"{x:+g}" */
export const signed = (x) => `${x < 0 ? "" : "+"}${general(x)}`;

/** Four significant digits, as messages have them. */
export const rounded = (values) => Array.from(values, (v) => Number(v.toPrecision(4)));

export const range = (count) => Array.from({ length: count }, (_, i) => i);

export const argmax = (values) => values.reduce((best, v, i) => (v > values[best] ? i : best), 0);

/** Math.max for arrays of any length. */
export const largest = (values) => values.reduce((a, b) => Math.max(a, b), -Infinity);
export const smallest = (values) => values.reduce((a, b) => Math.min(a, b), Infinity);
export const sum = (values) => values.reduce((a, b) => a + b, 0);

/** The norm of a vector; of the difference of two, if there is a second. */
export function norm(a, b) {
  let total = 0;
  for (let i = 0; i < a.length; i++) total += (b ? a[i] - b[i] : a[i]) ** 2;
  return Math.sqrt(total);
}

/** The root mean square of each row of a matrix [..., width]. */
export function rowRms(data, width) {
  return Float64Array.from({ length: data.length / width }, (_, row) => {
    let total = 0;
    for (let i = row * width; i < (row + 1) * width; i++) total += data[i] ** 2;
    return Math.sqrt(total / width);
  });
}

/** The root mean square of numbers. */
export const rms = (values) => rowRms(values, values.length)[0];

/** The cosine of the angle between two vectors. */
export function cosine(a, b) {
  let product = 0;
  for (let i = 0; i < a.length; i++) product += a[i] * b[i];
  return product / Math.max(norm(a) * norm(b), 1e-8);
}
