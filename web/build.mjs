// Writes the front end's bundles, which are committed: nobody needs node to use fluxedu.
//
//   npm ci && node build.mjs            write all bundles
//   node build.mjs explorer map         write those whose path contains one of these words
//   node build.mjs --check              compare with the committed ones; exit code 1 for a difference
//
// A bundle whose source does not exist is left out.
import { build } from "esbuild";
import { formulas } from "./formulas.mjs";
import { licences, packageOf } from "./licences.mjs";
import { existsSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { dirname, join, relative } from "node:path";
import { fileURLToPath } from "node:url";
import { gunzipSync, gzipSync } from "node:zlib";

const web = dirname(fileURLToPath(import.meta.url));
const WIDGETS = "../fluxedu/widgets/static", PLAY = "../fluxedu/play/static", SITE = "../docs/_static";

// source -> bundle: modules and style sheets are bundled and minified, pages copied, the WASM binary compressed
const BUNDLES = [
  ["../fluxedu/instruments/boxes.json", "../fluxedu/instruments/formulas.json"], // the formulas of the map as MathML
  ["src/map_page.js", "../fluxedu/map.js"], // the map for one file without a server: fluxedu trace, documentation
  ["src/map.css", "../fluxedu/map.css"],
  ["src/explorer.js", `${WIDGETS}/explorer.js`],
  ["src/explorer.css", `${WIDGETS}/explorer.css`],
  ["src/page/main.js", `${PLAY}/page.js`],
  ["src/page/page.css", `${PLAY}/page.css`],
  ["src/page/index.html", `${PLAY}/index.html`],
  ["src/engine/index.js", `${PLAY}/engine.js`], // for a page that has no bundle of its own
  ["src/engine/worker.js", `${PLAY}/worker.js`],
  ["src/engine/sw.js", `${PLAY}/sw.js`],
  ["src/site.js", `${SITE}/explorers.js`, "iife"], // the documentation site; a module could not be opened from a file
  ["src/site.css", `${SITE}/explorers.css`],
  ["node_modules/onnxruntime-web/dist/ort-wasm-simd-threaded.wasm", `${PLAY}/ort.wasm.gz`],
  ["licences", `${PLAY}/licences.txt`], // last: of all packages in the bundles above
];

const packages = ["onnxruntime-web"]; // whose code is in the bundles

async function contents(source, format) {
  const path = join(web, source);
  if (source === "licences") return Buffer.from(licences(web, packages));
  if (source.endsWith(".wasm")) return gzipSync(readFileSync(path), { level: 9 });
  if (source.endsWith("boxes.json")) return Buffer.from(formulas(path));
  if (source.endsWith(".html")) return readFileSync(path);
  const result = await build({
    entryPoints: [path], bundle: true, write: false, minify: true, format, target: "es2022", charset: "utf8",
    legalComments: "eof", logLevel: "warning", absWorkingDir: web, loader: { ".svg": "dataurl", ".woff2": "dataurl" },
    metafile: true,
  });
  packages.push(...Object.keys(result.metafile.inputs).map(packageOf).filter(Boolean));
  return Buffer.from(result.outputFiles[0].contents);
}

// compressed bytes depend on node's version of zlib, so what they hold is compared
const held = (path, bytes) => (path.endsWith(".gz") ? gunzipSync(bytes) : bytes);

const words = process.argv.slice(2).filter((word) => !word.startsWith("--"));
const isCheck = process.argv.includes("--check");
const differing = [];
for (const [source, bundle, format = "esm"] of BUNDLES) {
  if (source === "licences" ? words.length : !existsSync(join(web, source))) continue;
  if (words.length && !words.some((word) => bundle.includes(word))) continue;
  const made = await contents(source, format), path = join(web, bundle);
  const isSame = existsSync(path) && held(path, readFileSync(path)).equals(held(path, made));
  if (isSame) continue;
  const name = relative(join(web, ".."), path);
  if (isCheck) differing.push(name);
  else {
    mkdirSync(dirname(path), { recursive: true });
    writeFileSync(path, made);
    console.log(`${name}  ${(made.length / 1000).toFixed(0)} kB`);
  }
}
if (differing.length) {
  console.error(`differs from its source: ${differing.join(", ")}; run node web/build.mjs`);
  process.exit(1);
}
