// Turns the formulas of the map's boxes (LaTeX) into MathML, which browsers show without a script.
import katex from "katex";
import { readFileSync } from "node:fs";

/** { key: LaTeX } of boxes.json -> { key: MathML }; throws an error for a formula that cannot be read. */
export function formulas(path) {
  const boxes = JSON.parse(readFileSync(path, "utf8")), found = {};
  for (const [key, { formula }] of Object.entries(boxes)) {
    const html = katex.renderToString(formula, { output: "mathml", displayMode: true, throwOnError: true, strict: "error" });
    found[key] = html.match(/<math[^]*<\/math>/)[0].replace(/<annotation[^]*?<\/annotation>/g, "")
      .replace(/ xmlns="[^"]*"/g, "") // HTML knows the element;
  }
  return JSON.stringify(found, null, 0) + "\n";
}
