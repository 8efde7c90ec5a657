// The guided tour: each part sets the state of the page, points at one thing and says what to look at.
//
// "In 40 of 40 seeds" and the like: `python -m evidence tour`; classifiers: `python -m evidence pooled`; the two kinds of
// blocks: notebooks 07b and 08b.
import { term, unbroken } from "./glossary.js";
import { DEFAULTS } from "./store.js";

const PROMPT = DEFAULTS.prompt, GREEN = PROMPT.replace("red", "green");

export const TOUR = [
  {
    title: "From words to a picture",
    text: "The model has drawn this picture from the prompt. It is built like FLUX.1, only smaller, and it has learned nothing but coloured shapes and letters.",
    look: "The words that the model knows are below the prompt. After the tour, write a prompt of your own and press Draw.",
    target: "#draw .write",
  },
  {
    name: "step",
    title: "What is a step?",
    text: "In each step the model reads the noisy picture and predicts the " + term("velocity", "velocity") + ": the direction from the finished picture to the noise. So its guess of the finished picture is: noisy picture − <i>t</i> × velocity. The noisy picture moves a little towards this guess; then comes the next step.",
    look: "Drag the slider or press play: the first guesses are vague, in form and in colour; they become sharp as the noise goes.",
    target: "#film", state: { step: 9 },
  },
  {
    title: "What happens inside one step?",
    text: "Your prompt enters as one " + term("token", "token") + " per word (and padding, up to 32 tokens), the picture as one token per " + term("patch", "patch") + ". Eight " + term("block", "blocks") + " let all tokens exchange information. At the end, the tokens of the patches become the velocity.",
    look: "The thick bands are the words (purple) and the patches (green). Choose a box to open it; every box shows its live value.",
    target: "#map", state: { step: 9 },
  },
  {
    name: "kinds",
    title: "Why are there two kinds of blocks?",
    text: "Double-stream: words and patches have their own " + term("weights", "weights") + " and share one attention. Single-stream: they are one sequence with the same weights. Own weights cost memory (here, 2.4 times as many per block). Whether they also make the pictures better, we cannot say: a tiny model with own weights made smaller errors than one without them, but it also had 1.9 times as many weights.",
    look: "The first double-stream block (double 0) is open: two columns with the same parts, and one attention for both.",
    target: "#map", part: "#map-view .map-below .map-view",
    narrow: '#map-view [data-id="double.0.txt_modulated1"]', // from here to the attention there is room above the card
    state: { step: 9, open: "double.0" },
  },
  {
    name: "t5",
    title: "What does T5 do?",
    text: "T5 gives the model one " + term("vector", "vector") + " per word, and the picture takes its content from them. Here T5 reads “green” while CLIP still reads “red”: the circle turns green. This happens with 40 of 40 seeds.",
    look: "Compare “before” and “after”. The difference lies in the circle. Press Next to do the same with CLIP.",
    target: "#change", state: { change: { kind: "prompts", t5: GREEN, clip: PROMPT } },
  },
  {
    title: "And what does CLIP do?",
    text: "CLIP gives one vector for the whole prompt. It is added to the vectors of the time and the guidance. From the sum, each block computes its shifts, scales and gates (" + term("modulation", "modulation") + "). Here only CLIP reads “green”: the circle stays red, with 40 of 40 seeds. Yet without CLIP's vector in the sum, only 3 of 40 pictures are right (37 of 40 with it). Both are true: another colour in CLIP changes the picture little, but a sum without CLIP's vector is one that the blocks have never met in training.",
    look: "The two pictures are almost the same, although CLIP reads another prompt.",
    target: "#change", state: { change: { kind: "prompts", t5: PROMPT, clip: GREEN } },
  },
  {
    title: "Why can it draw red?",
    text: "T5 has written “red” into the vector of the word “circle”: from this vector alone, a linear classifier reads the colour in 1,000 of 1,000 prompts. A patch inside the circle attends to “circle” more than to any other word (in block single 1 with 40 of 40 seeds) and so takes over what the vector says.",
    look: "The outlined patch lies in the circle. Choose other patches, and words.",
    target: "#attention .attend", state: { step: 9, block: "single.1", head: "mean", at: "patch:34" },
  },
  {
    title: "Why does the circle end up left? First, the words",
    text: "Here the words “left” and “of” are hidden: no token can attend to them. Yet the circle stays left, with 40 of 40 seeds. T5 had already written the relation into the vectors of the other words.",
    look: "“After” is nearly the same as “before”. Press Next for the positions.",
    target: "#change", state: { change: { kind: "hide", tokens: [3, 4] } },
  },
  {
    name: "positions",
    title: "Why does the circle end up left? Second, the positions",
    text: "Each patch knows its row and column by its " + term("position", "position") + ", and attention compares patch and word with this position included. Here the columns are mirrored: patches on the right have the column numbers of the left. Now the red shape is drawn there, with 40 of 40 seeds.",
    look: "“After”: the red shape is on the right, the blue one on the left. Both look torn because the inside of each patch is not mirrored.",
    target: "#change", state: { change: { kind: "positions", columns: "mirror", dx: 0, dy: 0 } },
  },
];

const OWN = ["prompt", "negative", "seed", "steps", "guidance", "shape"];

export function createTour(store, onEnd) {
  const $ = (selector) => document.querySelector(selector);
  const panel = $("#tour");
  let marked = null, opener = null, own = null; // own: the reader's request, which comes back at the end

  function render(number, focus) {
    marked?.classList.remove("toured");
    marked = null;
    panel.hidden = !number;
    document.body.classList.toggle("touring", number > 0);
    if (!number) return;
    const { title, text, look, target, part, narrow } = TOUR[number - 1];
    panel.classList.toggle("aside", Boolean(part)); // beside the parts of a block, not over them
    $("#tour-count").textContent = `${number} of ${TOUR.length}${own ? " · your own prompt comes back at the end" : ""}`;
    $("#tour-title").textContent = title;
    $("#tour-text").innerHTML = unbroken(text);
    $("#tour-look").innerHTML = `<b>Look:</b> ${look}`;
    $("#tour-back").disabled = number === 1;
    $("#tour-next").textContent = number === TOUR.length ? "Finish" : "Next";
    const isNarrow = matchMedia("(max-width: 860px)").matches; // where controls and pictures do not fit together
    marked = $(isNarrow && target === "#change" ? "#change .result" : target);
    marked.classList.add("toured");
    const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
    requestAnimationFrame(() => { // when the map has opened its box
      const shown = (isNarrow && narrow && $(narrow)) || (part && $(part)) || marked;
      if (!shown) return; // the tour has ended meanwhile
      const fits = shown.getBoundingClientRect().height < innerHeight - panel.offsetHeight - 120;
      shown.scrollIntoView({ behavior: calm ? "auto" : "smooth", block: fits && !isNarrow ? "center" : "start" });
    });
    if (focus) $("#tour-title").focus({ preventScroll: true });
  }

  const pick = (state) => Object.fromEntries(OWN.map((name) => [name, state[name]]));
  const isOurs = (request) => OWN.every((name) => request[name] === DEFAULTS[name]);

  function go(number) {
    const isFinished = store.state.tour === TOUR.length;
    if (!number) {
      const back = isOurs(store.state) && own ? { ...own, step: null, change: null } : {};
      own = null;
      store.set({ tour: 0, ...back });
      opener?.focus({ preventScroll: true });
      opener = null;
      onEnd(isFinished);
      return;
    }
    if (!store.state.tour && !isOurs(store.state)) own = pick(store.state);
    store.set({ ...pick(DEFAULTS), step: null, change: null, open: "", ...TOUR[number - 1].state, tour: number });
  }

  store.on((state, names) => { if (names.has("tour")) render(state.tour, true); });
  $("#tour-start").addEventListener("click", (event) => { opener = event.currentTarget; go(1); });
  $("#tour-back").addEventListener("click", () => go(Math.max(1, store.state.tour - 1)));
  $("#tour-next").addEventListener("click", () => go(store.state.tour === TOUR.length ? 0 : store.state.tour + 1));
  $("#tour-close").addEventListener("click", () => go(0));
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !panel.hidden && $("#definition").hidden) go(0);
  });
  const first = TOUR[store.state.tour - 1]; // a link that names nothing but a part of the tour
  if (!first) store.state.tour = 0;
  else for (const [name, value] of Object.entries(first.state ?? {})) store.state[name] = store.state[name] === DEFAULTS[name] ? value : store.state[name];
  const numberOf = (name) => TOUR.findIndex((part) => part.name === name) + 1;
  return { open(name) { opener = document.activeElement; go(numberOf(name)); }, show: () => render(store.state.tour, false) };
}
