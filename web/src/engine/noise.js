// The noise that torch.randn draws on the CPU from a seeded generator, so that a seed means the same picture in Python.
// torch fills the tensor with uniform numbers of 24 bits, then turns each group of 16 into normal ones by the
// Box-Muller transform: number j and number j + 8 become a radius and an angle.

const N = 624, M = 397; // the Mersenne Twister's state and its recurrence (Matsumoto and Nishimura 1998)

/** A function that returns the next 32-bit number of the Mersenne Twister mt19937. */
export function mersenneTwister(seed) {
  const state = new Uint32Array(N);
  state[0] = Number(BigInt.asUintN(32, BigInt(seed))); // torch, too, uses the lower half of its 64-bit seeds
  for (let i = 1; i < N; i++) {
    state[i] = Math.imul(1812433253, state[i - 1] ^ (state[i - 1] >>> 30)) + i;
  }
  let next = N;
  const twist = (a, b) => (((a & 0x80000000) | (b & 0x7fffffff)) >>> 1) ^ (b & 1 ? 0x9908b0df : 0);
  return () => {
    if (next === N) {
      for (let i = 0; i < N; i++) state[i] = state[(i + M) % N] ^ twist(state[i], state[(i + 1) % N]);
      next = 0;
    }
    let y = state[next++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  };
}

/** Standard normal noise of `size` numbers, a multiple of 16, as `torch.randn` with this seed. */
export function drawNoise(seed, size) {
  const random = mersenneTwister(seed), fround = Math.fround;
  const noise = Float32Array.from({ length: size }, () => (random() & 0xffffff) / 0x1000000);
  for (let first = 0; first < size; first += 16) {
    for (let j = first; j < first + 8; j++) {
      const radius = fround(Math.sqrt(fround(-2 * fround(Math.log(1 - noise[j])))));
      const angle = fround(fround(2 * Math.PI) * noise[j + 8]);
      noise[j] = radius * fround(Math.cos(angle));
      noise[j + 8] = radius * fround(Math.sin(angle));
    }
  }
  return noise;
}
