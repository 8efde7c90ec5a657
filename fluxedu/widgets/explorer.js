// One front end for every explorer: controls above, panels side by side, one sentence below.
// The kernel draws; this paints what it sends and tells it of moves, one at a time. Nothing is fetched.

const SVG = "http://www.w3.org/2000/svg";

function html(tag, set = {}, ...children) {
  const el = Object.assign(document.createElement(tag), set);
  el.append(...children);
  return el;
}

function drawn(tag, attributes = {}, ...children) {
  const el = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) el.setAttribute(name, value);
  el.append(...children);
  return el;
}

// ---------------------------------------------------------------- moves

/** Send moves to the kernel: the newest wins, and the next goes when the last has been answered. */
function mover(model, root) {
  let sent = 0, waiting = null, since = null, patience = null;
  const go = () => {
    if (since !== null || waiting === null) return;
    const state = { ...model.get("state"), ...waiting.changes };
    state.moves = sent = Math.max(sent, state.moves) + 1;
    since = waiting.since;
    waiting = null;
    patience = setTimeout(silent, 4000);
    model.set("state", state);
    model.save_changes();
  };
  const silent = () => { // say so, and let the next move try again
    root.classList.add("silent");
    since = null;
  };
  const answered = () => {
    if (model.get("view").moves < sent) return;
    clearTimeout(patience);
    root.classList.remove("silent");
    if (since === null) return;
    const milliseconds = performance.now() - since;
    root.dispatchEvent(new CustomEvent("fluxedu:answered", { detail: { milliseconds } }));
    since = null;
    go();
  };
  const move = (changes) => {
    waiting = { changes: { ...waiting?.changes, ...changes }, since: waiting?.since ?? performance.now() };
    go();
  };
  /** Where everything stands: as the kernel knows it, and what is on its way there. */
  const standing = () => ({ ...model.get("state"), ...waiting?.changes });
  return { move, answered, standing };
}

/** Arrow keys as steps [down, right]; null for any other key. */
function arrow(event) {
  const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  if (steps) event.preventDefault();
  return steps ?? null;
}

const within = (value, count) => Math.min(Math.max(value, 0), count - 1);

// ---------------------------------------------------------------- controls: each gives { el, show(place, shades) }

let count = 0;

function slider({ name, label, labels }, move) {
  const id = `fluxedu-${count++}`;
  const input = html("input", { type: "range", id, min: 0, max: labels.length - 1, step: 1 });
  const said = html("output");
  const say = (place) => {
    said.textContent = labels[place];
    input.setAttribute("aria-valuetext", labels[place]);
  };
  const to = (place) => {
    say((input.value = place));
    move({ [name]: Number(place) });
  };
  input.addEventListener("input", () => to(input.value));
  input.addEventListener("keydown", (e) => { // by hand, since notebooks take the arrow keys away
    const steps = arrow(e);
    if (steps) to(within(Number(input.value) + steps[1] - steps[0], labels.length));
  });
  const show = (place) => {
    if (!input.matches(":active")) input.value = place;
    say(input.value);
  };
  return { el: html("div", { className: "control" }, html("label", { htmlFor: id, textContent: label }), input, said), show };
}

function choice({ name, label, labels }, move) {
  const id = `fluxedu-${count++}`;
  const options = labels.map((text, value) => html("option", { value, textContent: text }));
  const select = html("select", { id }, ...options);
  select.addEventListener("change", () => move({ [name]: Number(select.value) }));
  const show = (place) => (select.value = place);
  return { el: html("div", { className: "control" }, html("label", { htmlFor: id, textContent: label }), select), show };
}

function chips({ name, label, labels }, move) {
  const buttons = labels.map((textContent) => html("button", { type: "button", textContent }));
  const to = (i, focus) => {
    if (focus) buttons[i].focus();
    move({ [name]: i });
  };
  buttons.forEach((button, i) => {
    button.setAttribute("role", "radio");
    button.addEventListener("pointerenter", (e) => e.pointerType === "mouse" && to(i));
    button.addEventListener("click", () => to(i));
    button.addEventListener("keydown", (e) => {
      const steps = arrow(e);
      if (steps) to(within(i + steps[0] + steps[1], labels.length), true);
    });
  });
  const group = html("div", { className: "chips" }, ...buttons);
  group.setAttribute("role", "radiogroup");
  group.setAttribute("aria-label", label);
  const show = (place, shades) => {
    buttons.forEach((button, i) => {
      button.setAttribute("aria-checked", i === place);
      button.tabIndex = i === place ? 0 : -1;
      button.style.setProperty("--shade", `${100 * (shades?.[i] ?? 0)}%`);
    });
  };
  return { el: html("div", { className: "control wide" }, html("span", { textContent: label }), group), show };
}

/** Left, the same, right, by button or arrow key. The state is [which question, the answer]: one answer a question. */
function vote({ name, label, labels }, move) {
  let question = 0, given = true;
  const to = (answer) => {
    if (given) return;
    given = true;
    move({ [name]: [question, answer] });
  };
  const buttons = labels.slice(1).map((text, i) => {
    const button = html("button", { type: "button", textContent: `${text} ${"←↓→"[i]}` });
    button.addEventListener("click", () => to(i + 1));
    return button;
  });
  const group = html("div", { className: "chips" }, ...buttons);
  group.setAttribute("role", "group");
  group.setAttribute("aria-label", label);
  group.addEventListener("keydown", (e) => {
    const steps = arrow(e);
    if (steps && steps[0] >= 0 && !e.repeat) to(2 + steps[1]);
  });
  const show = ([asked]) => {
    question = asked;
    given = false;
  };
  return { el: html("div", { className: "control wide" }, html("span", { textContent: label }), group), show };
}

const CONTROLS = { slider, choice, chips, vote };

// ---------------------------------------------------------------- panels: each gives { el, paint(panel, place) }

/** Names beside the rows or above the columns of a table. */
function names(labels, side) {
  const each = labels.map((label, i) => {
    const el = html("span", { textContent: label });
    el.style[side === "rows" ? "top" : "left"] = `${(100 * (i + 0.5)) / labels.length}%`;
    return el;
  });
  return html("div", { className: `names ${side}` }, ...each);
}

/** A canvas of cells: pointing at one, or the arrow keys, moves; a click holds it, the next lets go. */
function pixels(first, move) {
  const canvas = html("canvas"), mark = html("div", { className: "mark" });
  const stage = html("div", { className: "stage" }, canvas, mark), key = html("div", { className: "key" });
  if (first.rows.length) stage.append(names(first.rows, "rows"));
  if (first.columns.length) stage.append(names(first.columns, "columns"));
  stage.style.marginLeft = first.rows.length ? `${Math.max(...first.rows.map((r) => r.length)) * 0.5 + 0.8}em` : "";
  let panel = first, place = [0, 0], held = false;
  const to = (row, column) => {
    const next = [within(row, panel.cells[0]), within(column, panel.cells[1])];
    if (next[0] === place[0] && next[1] === place[1]) return;
    place = next;
    move({ [panel.pointer]: place });
  };
  if (first.pointer) {
    canvas.tabIndex = 0;
    canvas.setAttribute("role", "application");
    const at = (e) => {
      const box = canvas.getBoundingClientRect();
      const [rows, columns] = panel.cells;
      to(Math.floor(((e.clientY - box.top) / box.height) * rows), Math.floor(((e.clientX - box.left) / box.width) * columns));
    };
    canvas.addEventListener("pointermove", (e) => held || at(e));
    canvas.addEventListener("pointerdown", (e) => {
      held = !held;
      stage.classList.toggle("held", held);
      at(e);
    });
    canvas.addEventListener("keydown", (e) => {
      const steps = arrow(e);
      if (steps) to(place[0] + steps[0], place[1] + steps[1]);
    });
  }
  const paint = (now, told) => {
    panel = now;
    if (told) place = told;
    const { width, height, data } = now, image = new ImageData(width, height), rgba = image.data;
    const rgb = new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
    for (let i = 0, j = 0; i < rgb.length; i += 3, j += 4) {
      rgba[j] = rgb[i], rgba[j + 1] = rgb[i + 1], rgba[j + 2] = rgb[i + 2], rgba[j + 3] = 255;
    }
    canvas.width = width, canvas.height = height;
    stage.style.width = `${Math.round(256 * Math.min(1.5, Math.sqrt(width / height)))}px`;
    stage.style.aspectRatio = `${width} / ${height}`;
    canvas.getContext("2d").putImageData(image, 0, 0);
    canvas.setAttribute("aria-label", now.pointer ? `${now.title}: the arrow keys move, a click holds` : now.title);
    const spot = now.mark && (now.pointer ? place : now.mark); // where the reader is, the answer being on its way
    mark.hidden = !spot;
    if (spot) {
      const [down, across] = [100 / now.cells[0], 100 / now.cells[1]];
      mark.style.cssText = `top:${spot[0] * down}%;left:${spot[1] * across}%;height:${down}%;width:${across}%`;
    }
    key.hidden = !now.key;
    if (now.key) {
      const strip = html("i");
      strip.style.background = `linear-gradient(to right, ${now.stops.join(",")})`;
      key.replaceChildren(now.key[0], strip, now.key[1]);
    }
  };
  return { el: html("div", {}, stage, key), paint };
}

/** Text in a drawing. */
const words = (text, x, y, more = {}) => {
  const el = drawn("text", { x, y, ...more });
  el.textContent = text;
  return el;
};

const short = (x) => String(Number(x.toPrecision(2)));

/** The names of series or groups, with their colours. */
function legend(names, colours) {
  const entries = names.map((name, i) => {
    const dot = html("i");
    dot.style.background = colours[i % colours.length];
    return html("span", {}, dot, name);
  });
  return html("div", { className: "legend" }, ...entries);
}

/** A frame with ticks at its ends: [x of a value, y of a value, the frame's elements]. */
function frame([x0, x1], [y0, y1], across, up) {
  const X = (x) => 46 + ((x - x0) / (x1 - x0 || 1)) * 264, Y = (y) => 190 - ((y - y0) / (y1 - y0 || 1)) * 178;
  const parts = [
    drawn("path", { d: "M46 12V190H310", class: "axis" }),
    words(short(x0), 46, 204, { "text-anchor": "middle" }), words(short(x1), 310, 204, { "text-anchor": "middle" }),
    words(short(y0), 42, 193, { "text-anchor": "end" }), words(short(y1), 42, 16, { "text-anchor": "end" }),
    words(across, 178, 217, { "text-anchor": "middle" }),
    words(up, 12, 100, { "text-anchor": "middle", transform: "rotate(-90 12 100)" }),
  ];
  return [X, Y, parts];
}

function lines() {
  const el = html("div", { className: "drawing" });
  const paint = ({ title, x, series, across, up, mark, colours }) => {
    const all = series.flatMap((s) => s.y);
    const [X, Y, parts] = frame([x[0], x[x.length - 1]], [Math.min(0, ...all), Math.max(...all)], across, up);
    if (mark !== null) parts.push(drawn("path", { d: `M${X(mark)} 12V190`, class: "at" }));
    series.forEach(({ y }, i) => {
      const points = y.map((value, j) => `${X(x[j]).toFixed(1)},${Y(value).toFixed(1)}`).join(" ");
      parts.push(drawn("polyline", { points, fill: "none", stroke: colours[i % colours.length], "stroke-width": 1.8 }));
    });
    const sheet = drawn("svg", { viewBox: "0 0 322 222", role: "img", "aria-label": title }, ...parts);
    el.replaceChildren(sheet, legend(series.map((s) => s.name), colours));
  };
  return { el, paint };
}

/** Points with arrows: the nearest to the pointer is chosen; the arrow keys go to the next and the last. */
function points(first, move) {
  const el = html("div", { className: "drawing" });
  let panel = first, at = [], sheet = null, place = first.mark;
  const to = (i) => i !== place && move({ [panel.pointer]: (place = i) });
  const nearest = (e) => {
    if (!sheet || !panel.pointer) return;
    const p = new DOMPoint(e.clientX, e.clientY).matrixTransform(sheet.getScreenCTM().inverse());
    const far = at.map(([x, y]) => (x - p.x) ** 2 + (y - p.y) ** 2), least = Math.min(...far);
    if (least < 400) to(far.indexOf(least));
  };
  el.addEventListener("pointermove", nearest);
  el.addEventListener("pointerdown", nearest);
  el.tabIndex = 0;
  el.setAttribute("role", "application");
  el.addEventListener("keydown", (e) => {
    const steps = arrow(e);
    if (steps) to(within(place + steps[0] + steps[1], at.length));
  });
  const paint = (now, told) => {
    panel = now;
    place = told ?? now.mark;
    const [a, b] = now.reach, [X, Y, parts] = frame([-a, a], [-b, b], now.across, now.up);
    at = now.group.map((_, i) => [X(now.xy[2 * i]), Y(now.xy[2 * i + 1])]);
    now.group.forEach((g, i) => {
      const stroke = now.colours[g % now.colours.length], [x, y] = at[i];
      const [x2, y2] = [X(now.xy[2 * i] + now.arrows[2 * i]), Y(now.xy[2 * i + 1] + now.arrows[2 * i + 1])];
      parts.push(drawn("line", { x1: x, y1: y, x2, y2, stroke, "stroke-opacity": 0.5 }));
      parts.push(drawn("circle", { cx: x, cy: y, r: 3, fill: stroke }));
      if (i === now.mark) parts.push(drawn("circle", { cx: x, cy: y, r: 7, class: "ring" }));
    });
    el.setAttribute("aria-label", `${now.title}: the arrow keys choose a point`);
    sheet = drawn("svg", { viewBox: "0 0 322 222" }, ...parts);
    el.replaceChildren(sheet, legend(now.groups, now.colours));
  };
  return { el, paint };
}

/** A diagram whose boxes are buttons; built anew only when there are other boxes. */
function boxes(first, move) {
  const el = html("div", { className: "drawing diagram" });
  let panel = null, built = "", buttons = [];
  const to = (i) => {
    buttons[i].focus();
    move({ [panel.pointer]: i });
  };
  const box = ([label, x, y, w, h, colour], i) => {
    const rect = drawn("rect", { x, y, width: w, height: h, rx: 3, fill: colour, "fill-opacity": 0.25, stroke: colour });
    const text = words(label, x + w / 2, y + h / 2, { "text-anchor": "middle", "dominant-baseline": "central" });
    const button = drawn("g", { role: "button", "aria-label": label }, rect, text);
    button.addEventListener("click", () => to(i));
    button.addEventListener("keydown", (e) => {
      const steps = arrow(e);
      if (steps) to(within(i + steps[0] + steps[1], buttons.length));
      else if (e.key === "Enter" || e.key === " ") e.preventDefault(), to(i);
    });
    return button;
  };
  const build = () => {
    const [width, height] = panel.size;
    buttons = panel.boxes.map(box);
    const id = `fluxedu-${count++}`, tip = drawn("path", { d: "M0 0L6 3L0 6Z", class: "tip" });
    const head = drawn("marker", { id, markerWidth: 6, markerHeight: 6, refX: 6, refY: 3, orient: "auto" }, tip);
    const ends = { class: "flow", "marker-end": `url(#${id})` };
    const lines = panel.lines.map((places) => drawn("polyline", { points: places.join(" "), fill: "none", ...ends }));
    const sheet = { viewBox: `0 0 ${width} ${height}` };
    el.replaceChildren(drawn("svg", sheet, drawn("defs", {}, head), ...lines, ...buttons));
  };
  const paint = (now) => {
    panel = now;
    const wanted = JSON.stringify(now.boxes);
    if (wanted !== built) build();
    built = wanted;
    buttons.forEach((button, i) => {
      button.setAttribute("aria-pressed", i === now.mark);
      button.setAttribute("tabindex", i === now.mark ? 0 : -1);
    });
  };
  return { el, paint };
}

const PANELS = { pixels, lines, points, boxes };

// ---------------------------------------------------------------- all of it

function render({ model, el }) {
  const root = html("div", { className: "fluxedu" });
  root.setAttribute("role", "group");
  root.dataset.lmSuppressShortcuts = "true"; // JupyterLab leaves our keys alone
  root.setAttribute("aria-label", model.get("title"));
  const { move, answered, standing } = mover(model, root);

  const controls = model.get("controls").map((c) => [c.name, CONTROLS[c.kind](c, move)]);
  const bar = html("div", { className: "bar" }, ...controls.map(([, c]) => c.el));
  const row = html("div", { className: "row" }), said = html("p", { className: "said" });
  said.setAttribute("aria-live", "polite");
  const silent = html("p", { className: "no-kernel", textContent: "No answer for four seconds: the kernel is busy or gone. This is the last view." });

  let shown = []; // [kind, panel, title element]
  const show = () => {
    const { panels = [], text = "", shades = {} } = model.get("view"), state = standing();
    if (panels.map((p) => p.kind).join() !== shown.map(([kind]) => kind).join()) {
      shown = panels.map((p) => [p.kind, PANELS[p.kind](p, move), html("figcaption")]);
      row.replaceChildren(...shown.map(([, p, title]) => html("figure", {}, title, p.el)));
    }
    panels.forEach((p, i) => {
      shown[i][2].textContent = p.title;
      shown[i][1].paint(p, p.pointer ? state[p.pointer] : null);
    });
    controls.forEach(([name, control]) => control.show(state[name], shades[name]));
    said.textContent = text;
    answered();
  };
  model.on("change:view", show);
  root.append(html("h4", { textContent: model.get("title") }), bar, row, said, silent);
  el.append(root);
  show();
  for (const still of document.getElementsByClassName(model.get("still"))) still.hidden = true;
  return () => model.off("change:view", show);
}

export default { render };
