// The prompt box: words that the model does not know are underlined, and the words that it knows can be clicked.

const ROWS = { colours: ["colours"], shapes: ["shapes"], letters: ["letters"], "where, size": ["relations", "sizes"],
  background: ["backgrounds"] };
const SHAPES = { // drawings for the chips, 14 x 14
  circle: '<circle cx="7" cy="7" r="5.5"/>', square: '<rect x="2" y="2" width="10" height="10"/>',
  triangle: '<path d="M7 1.5 12.8 12H1.2z"/>',
  star: '<path d="m7 .8 1.8 4.1 4.4.4-3.3 3 1 4.4L7 10.4l-3.9 2.3 1-4.4-3.3-3 4.4-.4z"/>',
  ring: '<circle cx="7" cy="7" r="4.5" fill="none" stroke="currentColor" stroke-width="2.6"/>',
  cross: '<path d="M5 1h4v4h4v4H9v4H5V9H1V5h4z"/>',
};

/** A random prompt from the vocabulary, of the kinds that the model was trained on. */
export function randomPrompt({ colours, shapes, letters, relations, backgrounds }, random = Math.random) {
  const pick = (list) => list[Math.floor(random() * list.length)];
  const article = (text) => (/^[aeiou]/.test(text) ? `an ${text}` : `a ${text}`);
  const first = pick(shapes), second = random() < 0.25 ? `letter ${pick(letters)}` : pick(shapes.filter((s) => s !== first));
  const [a, b] = [...colours].sort(() => random() - 0.5);
  const [left, right] = [article(`${a} ${first}`), article(`${b} ${second}`)];
  const dark = { red: "white", blue: "white", green: "white", purple: "white", yellow: "navy", cyan: "navy", pink: "navy" };
  const background = random() < 0.5 && dark[a] === dark[b] && dark[a] ? ` on a ${dark[a]} background` : "";
  return `${left} ${pick(relations)} ${right}${background}`;
}

export function createPrompt({ vocabulary, colours, tokenize, onPrompt }) {
  const area = document.querySelector("#prompt"), underlay = document.querySelector(".underlay");
  const notice = document.querySelector("#unknown"), chips = document.querySelector(".vocabulary");
  let latest = 0;

  for (const [title, groups] of Object.entries(ROWS)) {
    const row = document.createElement("div");
    row.className = `chips ${groups[0]}`;
    row.setAttribute("role", "group");
    row.setAttribute("aria-label", `${title}: words that the model knows`);
    row.innerHTML = `<span>${title}</span><div></div>`;
    for (const [group, word] of groups.flatMap((name) => vocabulary[name].map((word) => [name, word]))) {
      const button = document.createElement("button");
      button.type = "button";
      const rgb = ["colours", "backgrounds"].includes(group) && colours?.[word];
      if (rgb) button.innerHTML = `<i style="background:rgb(${rgb})"></i>`;
      if (SHAPES[word]) button.innerHTML = `<svg viewBox="0 0 14 14" width="11" height="11" fill="currentColor" aria-hidden="true">${SHAPES[word]}</svg>`;
      button.append(word);
      button.title = `Write “${word}” into the prompt`;
      button.addEventListener("click", () => insert(group, word));
      row.lastChild.append(button);
    }
    chips.append(row);
  }

  /** Replaces the selection or the word at the caret if it is of the same group; inserts the word otherwise. */
  function insert(group, word) {
    const text = area.value;
    let start = area.selectionStart, end = area.selectionEnd;
    if (start === end) {
      const same = vocabulary[group].toSorted((a, b) => b.length - a.length).map(escape).join("|");
      const found = [...text.matchAll(new RegExp(`\\b(?:${same})\\b`, group === "letters" ? "g" : "gi"))];
      const near = found.find((m) => m.index <= start && start <= m.index + m[0].length) ?? (found.length === 1 && found[0]);
      if (near) [start, end] = [near.index, near.index + near[0].length];
    }
    let added = group === "letters" && start === end ? `letter ${word}` : word;
    if (group === "backgrounds" && start === end) added = `on a ${word} background`;
    const before = text.slice(0, start), after = text.slice(end);
    added = `${before && !/\s$/.test(before) ? " " : ""}${added}${after && !/^[\s,.]/.test(after) ? " " : ""}`;
    area.value = before + added + after;
    area.focus();
    area.setSelectionRange(before.length + added.trimEnd().length, before.length + added.trimEnd().length);
    area.dispatchEvent(new Event("input"));
  }
  const escape = (text) => text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");

  async function check() {
    const number = ++latest, text = area.value;
    mark(text, []);
    const { unknown, truncated } = await tokenize(text);
    if (number !== latest) return;
    mark(text, unknown);
    const names = [...new Set(unknown.map((part) => `“${part.word}”`))];
    const list = names.length > 1 ? `${names.slice(0, -1).join(", ")} and ${names.at(-1)}` : names[0];
    if (names.length) notice.textContent = `This model has never seen ${list}. It knows only the words below, so it will ignore ${names.length > 1 ? "these words" : "this word"} or draw something else.`;
    else if (truncated) notice.textContent = "The prompt is too long: the model reads only its first 32 tokens.";
    else notice.textContent = "";
  }

  function mark(text, unknown) {
    underlay.textContent = "";
    let place = 0;
    for (const { start, end } of unknown) {
      const part = document.createElement("mark");
      part.textContent = text.slice(start, end);
      underlay.append(text.slice(place, start), part);
      place = end;
    }
    underlay.append(`${text.slice(place)} `);
    fit();
  }

  function fit() { // as tall as the prompt
    area.style.height = "auto";
    area.style.height = `${area.scrollHeight}px`;
  }

  area.addEventListener("input", check);
  addEventListener("resize", fit);
  area.addEventListener("scroll", () => { underlay.scrollTop = area.scrollTop; });
  area.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); onPrompt(area.value); }
  });
  return {
    get value() { return area.value.trim().replace(/\s+/g, " "); },
    set(text) { if (area.value !== text) { area.value = text; } check(); },
  };
}
