// One front end for every explorer: controls above, panels side by side, one sentence below.
// The kernel computes the view; this script shows it and sends moves to the kernel, one at a time. Nothing is loaded
// from the network.

const SVG = "http://www.w3.org/2000/svg";

function html(tag, set = {}, ...children) {
  const el = Object.assign(document.createElement(tag), set);
  el.append(...children);
  return el;
}

function svg(tag, attributes = {}, ...children) {
  const el = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) el.setAttribute(name, value);
  el.append(...children);
  return el;
}

// ---------------------------------------------------------------- moves

/** Sends moves to the kernel. The next one goes when the last has been answered; newer moves replace older ones. */
function mover(model, root) {
  let sent = 0, waiting = null, since = null, timer = null;
  const go = () => {
    if (since !== null || waiting === null) return;
    const state = { ...model.get("state"), ...waiting.changes };
    state.moves = sent = Math.max(sent, state.moves) + 1;
    since = waiting.since;
    waiting = null;
    timer = setTimeout(giveUp, 4000);
    model.set("state", state);
    model.save_changes();
  };
  const giveUp = () => { // show a message, and let the next move try again
    root.classList.add("no-answer");
    since = null;
  };
  const answered = () => {
    if (model.get("view").moves < sent) return;
    clearTimeout(timer);
    root.classList.remove("no-answer");
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
  /** The state as the kernel knows it, with the moves that are still on their way to it. */
  const currentState = () => ({ ...model.get("state"), ...waiting?.changes });
  return { move, answered, currentState };
}

/** An arrow key as a step [down, right]; null for any other key. */
function arrow(event) {
  const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  if (steps) event.preventDefault();
  return steps ?? null;
}

const clamp = (value, count) => Math.min(Math.max(value, 0), count - 1);

// ---------------------------------------------------------------- controls: each returns { el, show(index, shades) }

let count = 0;

function slider({ name, label, labels }, move) {
  const id = `fluxedu-${count++}`;
  const input = html("input", { type: "range", id, min: 0, max: labels.length - 1, step: 1 });
  const output = html("output");
  const showLabel = (index) => {
    output.textContent = labels[index];
    input.setAttribute("aria-valuetext", labels[index]);
  };
  const to = (index) => {
    showLabel((input.value = index));
    move({ [name]: Number(index) });
  };
  input.addEventListener("input", () => to(input.value));
  input.addEventListener("keydown", (e) => { // handled here, since notebooks use the arrow keys themselves
    const steps = arrow(e);
    if (steps) to(clamp(Number(input.value) + steps[1] - steps[0], labels.length));
  });
  const show = (index) => {
    if (!input.matches(":active")) input.value = index;
    showLabel(input.value);
  };
  return { el: html("div", { className: "control" }, html("label", { htmlFor: id, textContent: label }), input, output), show };
}

function choice({ name, label, labels }, move) {
  const id = `fluxedu-${count++}`;
  const options = labels.map((text, value) => html("option", { value, textContent: text }));
  const select = html("select", { id }, ...options);
  select.addEventListener("change", () => move({ [name]: Number(select.value) }));
  const show = (index) => (select.value = index);
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
      if (steps) to(clamp(i + steps[0] + steps[1], labels.length), true);
    });
  });
  const group = html("div", { className: "chips" }, ...buttons);
  group.setAttribute("role", "radiogroup");
  group.setAttribute("aria-label", label);
  const show = (index, shades) => {
    buttons.forEach((button, i) => {
      button.setAttribute("aria-checked", i === index);
      button.tabIndex = i === index ? 0 : -1;
      button.style.setProperty("--shade", `${100 * (shades?.[i] ?? 0)}%`);
    });
  };
  return { el: html("div", { className: "control wide" }, html("span", { textContent: label }), group), show };
}

/** Left, the same or right, by button or arrow key. The state is [question, answer], with one answer per question. */
function vote({ name, label, labels }, move) {
  let question = 0, answered = true;
  const to = (answer) => {
    if (answered) return;
    answered = true;
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
  const show = ([current]) => {
    question = current;
    answered = false;
  };
  return { el: html("div", { className: "control wide" }, html("span", { textContent: label }), group), show };
}

const CONTROLS = { slider, choice, chips, vote };

// ---------------------------------------------------------------- panels: each returns { el, paint(panel, pointer) }

/** Labels to the left of a table's rows or above its columns. */
function names(labels, side) {
  const each = labels.map((label, i) => {
    const el = html("span", { textContent: label });
    el.style[side === "rows" ? "top" : "left"] = `${(100 * (i + 0.5)) / labels.length}%`;
    return el;
  });
  return html("div", { className: `names ${side}` }, ...each);
}

/** A canvas of cells. Pointing at a cell or an arrow key moves the pointer; a click pins it, the next one releases it. */
function pixels(first, move) {
  const canvas = html("canvas"), mark = html("div", { className: "mark" });
  const stage = html("div", { className: "stage" }, canvas, mark), key = html("div", { className: "key" });
  if (first.rows.length) stage.append(names(first.rows, "rows"));
  if (first.columns.length) stage.append(names(first.columns, "columns"));
  stage.style.marginLeft = first.rows.length ? `${Math.max(...first.rows.map((r) => r.length)) * 0.5 + 0.8}em` : "";
  let panel = first, pointer = [0, 0], pinned = false;
  const to = (row, column) => {
    const next = [clamp(row, panel.cells[0]), clamp(column, panel.cells[1])];
    if (next[0] === pointer[0] && next[1] === pointer[1]) return;
    pointer = next;
    move({ [panel.pointer]: pointer });
  };
  if (first.pointer) {
    canvas.tabIndex = 0;
    canvas.setAttribute("role", "application");
    const at = (e) => {
      const box = canvas.getBoundingClientRect();
      const [rows, columns] = panel.cells;
      to(Math.floor(((e.clientY - box.top) / box.height) * rows), Math.floor(((e.clientX - box.left) / box.width) * columns));
    };
    canvas.addEventListener("pointermove", (e) => pinned || at(e));
    canvas.addEventListener("pointerdown", (e) => {
      pinned = !pinned;
      stage.classList.toggle("pinned", pinned);
      at(e);
    });
    canvas.addEventListener("keydown", (e) => {
      const steps = arrow(e);
      if (steps) to(pointer[0] + steps[0], pointer[1] + steps[1]);
    });
  }
  const paint = (now, newPointer) => {
    panel = now;
    if (newPointer) pointer = newPointer;
    const { width, height, data } = now, image = new ImageData(width, height), rgba = image.data;
    const rgb = new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
    for (let i = 0, j = 0; i < rgb.length; i += 3, j += 4) {
      rgba[j] = rgb[i], rgba[j + 1] = rgb[i + 1], rgba[j + 2] = rgb[i + 2], rgba[j + 3] = 255;
    }
    canvas.width = width, canvas.height = height;
    stage.style.width = `${Math.round(256 * Math.min(1.5, Math.sqrt(width / height)))}px`;
    stage.style.aspectRatio = `${width} / ${height}`;
    canvas.getContext("2d").putImageData(image, 0, 0);
    canvas.setAttribute("aria-label", now.pointer ? `${now.title}: arrow keys move the pointer, a click pins it` : now.title);
    const spot = now.mark && (now.pointer ? pointer : now.mark); // the pointer moves at once, before the kernel's answer
    mark.hidden = !spot;
    if (spot) {
      const [down, across] = [100 / now.cells[0], 100 / now.cells[1]];
      mark.style.cssText = `top:${spot[0] * down}%;left:${spot[1] * across}%;height:${down}%;width:${across}%`;
    }
    key.hidden = !now.key;
    if (now.key) {
      const strip = html("i");
      strip.style.background = `linear-gradient(to right, ${now.colours.join(",")})`;
      key.replaceChildren(now.key[0], strip, now.key[1]);
    }
  };
  return { el: html("div", {}, stage, key), paint };
}

/** Text in a drawing. */
const words = (text, x, y, more = {}) => {
  const el = svg("text", { x, y, ...more });
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

/** Axes with ticks at their ends: [pixel x of a value, pixel y of a value, SVG elements]. */
function frame([x0, x1], [y0, y1], xLabel, yLabel) {
  const X = (x) => 46 + ((x - x0) / (x1 - x0 || 1)) * 264, Y = (y) => 190 - ((y - y0) / (y1 - y0 || 1)) * 178;
  const parts = [
    svg("path", { d: "M46 12V190H310", class: "axis" }),
    words(short(x0), 46, 204, { "text-anchor": "middle" }), words(short(x1), 310, 204, { "text-anchor": "middle" }),
    words(short(y0), 42, 193, { "text-anchor": "end" }), words(short(y1), 42, 16, { "text-anchor": "end" }),
    words(xLabel, 178, 217, { "text-anchor": "middle" }),
    words(yLabel, 12, 100, { "text-anchor": "middle", transform: "rotate(-90 12 100)" }),
  ];
  return [X, Y, parts];
}

function lines() {
  const el = html("div", { className: "drawing" });
  const paint = ({ title, x, series, x_label, y_label, mark, colours }) => {
    const all = series.flatMap((s) => s.y);
    const [X, Y, parts] = frame([x[0], x[x.length - 1]], [Math.min(0, ...all), Math.max(...all)], x_label, y_label);
    if (mark !== null) parts.push(svg("path", { d: `M${X(mark)} 12V190`, class: "at" }));
    series.forEach(({ y }, i) => {
      const points = y.map((value, j) => `${X(x[j]).toFixed(1)},${Y(value).toFixed(1)}`).join(" ");
      parts.push(svg("polyline", { points, fill: "none", stroke: colours[i % colours.length], "stroke-width": 1.8 }));
    });
    const sheet = svg("svg", { viewBox: "0 0 322 222", role: "img", "aria-label": title }, ...parts);
    el.replaceChildren(sheet, legend(series.map((s) => s.name), colours));
  };
  return { el, paint };
}

/** Points with arrows. The one nearest to the mouse is chosen; arrow keys choose the next or the previous one. */
function points(first, move) {
  const el = html("div", { className: "drawing" });
  let panel = first, at = [], sheet = null, chosen = first.mark;
  const to = (i) => i !== chosen && move({ [panel.pointer]: (chosen = i) });
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
    if (steps) to(clamp(chosen + steps[0] + steps[1], at.length));
  });
  const paint = (now, pointer) => {
    panel = now;
    chosen = pointer ?? now.mark;
    const [a, b] = now.limits, [X, Y, parts] = frame([-a, a], [-b, b], now.x_label, now.y_label);
    at = now.group.map((_, i) => [X(now.xy[2 * i]), Y(now.xy[2 * i + 1])]);
    now.group.forEach((g, i) => {
      const stroke = now.colours[g % now.colours.length], [x, y] = at[i];
      const [x2, y2] = [X(now.xy[2 * i] + now.arrows[2 * i]), Y(now.xy[2 * i + 1] + now.arrows[2 * i + 1])];
      parts.push(svg("line", { x1: x, y1: y, x2, y2, stroke, "stroke-opacity": 0.5 }));
      parts.push(svg("circle", { cx: x, cy: y, r: 3, fill: stroke }));
      if (i === now.mark) parts.push(svg("circle", { cx: x, cy: y, r: 7, class: "ring" }));
    });
    el.setAttribute("aria-label", `${now.title}: arrow keys choose a point`);
    sheet = svg("svg", { viewBox: "0 0 322 222" }, ...parts);
    el.replaceChildren(sheet, legend(now.groups, now.colours));
  };
  return { el, paint };
}

/** A diagram whose boxes are buttons. It is rebuilt only if the boxes change. */
function boxes(first, move) {
  const el = html("div", { className: "drawing diagram" });
  let panel = null, built = "", buttons = [];
  const to = (i) => {
    buttons[i].focus();
    move({ [panel.pointer]: i });
  };
  const box = ([label, x, y, w, h, colour], i) => {
    const rect = svg("rect", { x, y, width: w, height: h, rx: 3, fill: colour, "fill-opacity": 0.25, stroke: colour });
    const text = words(label, x + w / 2, y + h / 2, { "text-anchor": "middle", "dominant-baseline": "central" });
    const button = svg("g", { role: "button", "aria-label": label }, rect, text);
    button.addEventListener("click", () => to(i));
    button.addEventListener("keydown", (e) => {
      const steps = arrow(e);
      if (steps) to(clamp(i + steps[0] + steps[1], buttons.length));
      else if (e.key === "Enter" || e.key === " ") e.preventDefault(), to(i);
    });
    return button;
  };
  const build = () => {
    const [width, height] = panel.size;
    buttons = panel.boxes.map(box);
    const id = `fluxedu-${count++}`, tip = svg("path", { d: "M0 0L6 3L0 6Z", class: "tip" });
    const head = svg("marker", { id, markerWidth: 6, markerHeight: 6, refX: 6, refY: 3, orient: "auto" }, tip);
    const ends = { class: "flow", "marker-end": `url(#${id})` };
    const arrows = panel.arrows.map((path) => svg("polyline", { points: path.join(" "), fill: "none", ...ends }));
    const sheet = { viewBox: `0 0 ${width} ${height}` };
    el.replaceChildren(svg("svg", sheet, svg("defs", {}, head), ...arrows, ...buttons));
  };
  const paint = (now) => {
    panel = now;
    const current = JSON.stringify(now.boxes);
    if (current !== built) build();
    built = current;
    buttons.forEach((button, i) => {
      button.setAttribute("aria-pressed", i === now.mark);
      button.setAttribute("tabindex", i === now.mark ? 0 : -1);
    });
  };
  return { el, paint };
}

const PANELS = { pixels, lines, points, boxes };

// ---------------------------------------------------------------- the explorer

function render({ model, el }) {
  const root = html("div", { className: "fluxedu" });
  root.setAttribute("role", "group");
  root.dataset.lmSuppressShortcuts = "true"; // keeps JupyterLab from using our keys
  root.setAttribute("aria-label", model.get("title"));
  const { move, answered, currentState } = mover(model, root);

  const controls = model.get("controls").map((c) => [c.name, CONTROLS[c.kind](c, move)]);
  const bar = html("div", { className: "bar" }, ...controls.map(([, c]) => c.el));
  const row = html("div", { className: "row" }), caption = html("p", { className: "caption" });
  caption.setAttribute("aria-live", "polite");
  const noKernel = "The kernel has not answered for four seconds: it is busy or not running. This is the last view.";
  const warning = html("p", { className: "no-kernel", textContent: noKernel });

  let shown = []; // [kind, panel, title element]
  const show = () => {
    const { panels = [], text = "", shades = {} } = model.get("view"), state = currentState();
    if (panels.map((p) => p.kind).join() !== shown.map(([kind]) => kind).join()) {
      shown = panels.map((p) => [p.kind, PANELS[p.kind](p, move), html("figcaption")]);
      row.replaceChildren(...shown.map(([, p, title]) => html("figure", {}, title, p.el)));
    }
    panels.forEach((p, i) => {
      shown[i][2].textContent = p.title;
      shown[i][1].paint(p, p.pointer ? state[p.pointer] : null);
    });
    controls.forEach(([name, control]) => control.show(state[name], shades[name]));
    caption.textContent = text;
    answered();
  };
  model.on("change:view", show);
  root.append(html("h4", { textContent: model.get("title") }), bar, row, caption, warning);
  el.append(root);
  show();
  for (const still of document.getElementsByClassName(model.get("still"))) still.hidden = true;
  return () => model.off("change:view", show);
}

export default { render };
