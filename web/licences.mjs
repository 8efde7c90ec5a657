// The licences of the packages whose code is in the bundles, as one text.
import { existsSync, readFileSync, readdirSync } from "node:fs";
import { join } from "node:path";

const MIT = `Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.`;
// packages that come without a file of their licence
const HOLDERS = { "onnxruntime-web": "Copyright (c) Microsoft Corporation" };

/** The package of a bundled file: "d3-zoom" of node_modules/d3-zoom/src/zoom.js; null for our own files. */
export function packageOf(file) {
  return /node_modules\/((?:@[^/]+\/)?[^/]+)\//.exec(file)?.[1] ?? null;
}

/** `packages`: names, in any order. */
export function licences(web, packages) {
  return [...new Set(packages)].sort().map((name) => {
    const folder = join(web, "node_modules", name);
    const { version, license, homepage = "" } = JSON.parse(readFileSync(join(folder, "package.json"), "utf8"));
    const file = readdirSync(folder).find((entry) => /^licen[cs]e/i.test(entry));
    if (!file && !(license === "MIT" && HOLDERS[name])) throw new Error(`${name} has no file with its licence`);
    const text = file ? readFileSync(join(folder, file), "utf8").trim() : `${HOLDERS[name]}\n\n${MIT}`;
    return `${name} ${version}, ${license}, ${homepage}\n\n${text}\n`;
  }).join(`\n${"-".repeat(80)}\n\n`);
}
