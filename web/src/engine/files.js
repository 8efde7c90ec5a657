// Fetching the page's files: all from its own folder, compressed ones expanded, with progress.

/** A function that fetches the file with this name as bytes. `onProgress({ loaded, total, what })` counts bytes. */
export async function openFolder(base, names, onProgress) {
  const listing = await (await checked(await fetch(new URL("files.json", base)), "files.json")).json();
  const size = (name) => listing.files[name]?.bytes ?? 0;
  const total = names.reduce((sum, name) => sum + size(name), 0);
  let loaded = 0;
  return async (name, what) => {
    const entry = listing.files[name];
    if (!entry) throw new Error(`files.json does not list ${name}.`);
    const response = await checked(await fetch(new URL(entry.url ?? name, base)), name);
    const counting = new TransformStream({
      transform(chunk, controller) {
        loaded += chunk.length;
        onProgress({ loaded: Math.min(loaded, total), total, what });
        controller.enqueue(chunk);
      },
    });
    return expanded(new Uint8Array(await new Response(response.body.pipeThrough(counting)).arrayBuffer()));
  };
}

async function checked(response, name) {
  if (!response.ok) throw new Error(`${name} could not be loaded: ${response.status} ${response.statusText}`);
  return response;
}

/** Bytes that gzip compressed are expanded; a server may have done that already. */
export async function expanded(bytes) {
  if (bytes[0] !== 0x1f || bytes[1] !== 0x8b) return bytes;
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** The numbers of some segments of bfloat16 files as float32, one after another. `files`: name -> bytes. */
export function weightsOf({ bytes, segments }, files) {
  const bits = new Uint32Array(bytes / 4);
  let position = 0;
  for (const [file, first, end] of segments) {
    const data = files.get(file);
    const upper = new Uint16Array(data.buffer.slice(data.byteOffset + first, data.byteOffset + end));
    for (let i = 0; i < upper.length; i++) bits[position++] = upper[i] << 16; // bfloat16 is float32's upper half
  }
  return new Uint8Array(bits.buffer);
}
