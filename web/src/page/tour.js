// The guided tour: each step sets the state of the page, points at one thing and says what to look at.
//
// "In 40 of 40 seeds" and the like: `python -m evidence tour`; classifiers: `python -m evidence pooled`.
import { term } from "./glossary.js";
import { DEFAULTS } from "./store.js";

const PROMPT = DEFAULTS.prompt, GREEN = PROMPT.replace("red", "green");

export const TOUR = [
  {
    title: "From words to a picture",
    text: "The model has drawn this picture from the prompt. It is built like FLUX.1, only smaller, and it has learned nothing but coloured shapes and letters.",
    look: "Replace “red” by “green”, or take any of the words that it knows, and press Draw.",
    target: "#draw .write",
  },
  {
    title: "What is a step?",
    text: "In each step the model reads the noisy picture and predicts which way the noise lies, the " + term("velocity", "velocity") + ". From it follows a guess of the finished picture. The noisy picture moves a little towards this guess; then comes the next step.",
    look: "Drag the slider or press play: the first guesses are vague, in form and in colour; they become sharp as the noise goes.",
    target: "#film", state: { step: 9 },
  },
  {
    title: "What happens inside one step?",
    text: "Your prompt enters as one token per word, the picture as one token per " + term("patch", "patch") + ". Eight " + term("block", "blocks") + " let all tokens exchange information. What comes out for the patches is the velocity.",
    look: "The thick bands are the words (purple) and the patches (green). Choose a block to open it; every box shows its live value.",
    target: "#map", state: { step: 9 },
  },
  {
    title: "What does T5 do?",
    text: "T5 gives the model one vector per word, and the picture takes its content from them. Here T5 reads “green” while CLIP still reads “red”: the circle turns green. So it does with 40 of 40 seeds.",
    look: "Compare “before” and “after”. The difference lies in the circle.",
    target: "#change", state: { change: { kind: "prompts", t5: GREEN, clip: PROMPT } },
  },
  {
    title: "And what does CLIP do?",
    text: "CLIP gives one vector for the whole prompt. It is added to the time and the guidance, and the sum sets how strongly each block works (" + term("modulation", "modulation") + "). Here only CLIP reads “green”: the circle stays red, with 40 of 40 seeds.",
    look: "The two pictures are almost the same, although CLIP reads another prompt.",
    target: "#change", state: { change: { kind: "prompts", t5: PROMPT, clip: GREEN } },
  },
  {
    title: "Why can it draw red?",
    text: "T5 has written “red” into the vector of the word “circle”: a simple classifier finds the colour there in 1,000 of 1,000 prompts. A patch inside the circle attends to “circle” more than to any other word (in block single 1 with 40 of 40 seeds) and so takes the colour over.",
    look: "The chosen patch lies in the circle. Point at other patches, and at the words.",
    target: "#attention", state: { step: 9, block: "single.1", head: "mean", at: "patch:34" },
  },
  {
    title: "Why does the circle end up left? First, the words",
    text: "Here the words “left” and “of” are hidden: no token can attend to them. Yet the circle stays left, with 40 of 40 seeds. T5 had already written the relation into the vectors of the other words.",
    look: "“After” is nearly the same as “before”.",
    target: "#change", state: { change: { kind: "hide", tokens: [3, 4] } },
  },
  {
    title: "Why does the circle end up left? Second, the positions",
    text: "Each patch knows its row and column by its " + term("position", "position") + ". Here the columns are mirrored: patches on the right believe that they are on the left, and the circle is drawn there, with 40 of 40 seeds.",
    look: "“After”: the red circle is on the right. It looks torn because each patch itself is not mirrored.",
    target: "#change", state: { change: { kind: "positions", columns: "mirror", dx: 0, dy: 0 } },
  },
];

export function createTour(store) {
  const $ = (selector) => document.querySelector(selector);
  const panel = $("#tour");
  let marked = null, opener = null;

  function render(number, focus) {
    marked?.classList.remove("toured");
    marked = null;
    panel.hidden = !number;
    document.body.classList.toggle("touring", number > 0);
    if (!number) return;
    const { title, text, look, target } = TOUR[number - 1];
    $("#tour-count").textContent = `Step ${number} of ${TOUR.length}`;
    $("#tour-title").textContent = title;
    $("#tour-text").innerHTML = text;
    $("#tour-look").innerHTML = `<b>Look:</b> ${look}`;
    $("#tour-back").disabled = number === 1;
    $("#tour-next").textContent = number === TOUR.length ? "Finish" : "Next";
    const narrow = matchMedia("(max-width: 860px)").matches && target === "#change";
    marked = $(narrow ? "#change .result" : target); // where controls and pictures do not fit together
    marked.classList.add("toured");
    const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
    const fits = marked.offsetHeight < innerHeight - panel.offsetHeight - 120;
    marked.scrollIntoView({ behavior: calm ? "auto" : "smooth", block: fits ? "center" : "start" });
    if (focus) $("#tour-title").focus({ preventScroll: true });
  }

  function go(number) {
    if (!number) { store.set({ tour: 0 }); opener?.focus(); opener = null; return; }
    const { prompt, negative, seed, steps, guidance, shape } = DEFAULTS;
    store.set({ prompt, negative, seed, steps, guidance, shape, step: null, change: null,
      ...TOUR[number - 1].state, tour: number });
  }

  store.on((state, names) => { if (names.has("tour")) render(state.tour, true); });
  $("#tour-start").addEventListener("click", (event) => { opener = event.currentTarget; go(1); });
  $("#tour-back").addEventListener("click", () => go(Math.max(1, store.state.tour - 1)));
  $("#tour-next").addEventListener("click", () => go(store.state.tour === TOUR.length ? 0 : store.state.tour + 1));
  $("#tour-close").addEventListener("click", () => go(0));
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !panel.hidden && $("#definition").hidden) go(0);
  });
  const first = TOUR[store.state.tour - 1]; // a link that names nothing but a step of the tour
  if (!first) store.state.tour = 0;
  else for (const [name, value] of Object.entries(first.state ?? {})) store.state[name] = store.state[name] === DEFAULTS[name] ? value : store.state[name];
  return { open(number, from) { opener = from ?? document.activeElement; go(number); }, show: () => render(store.state.tour, false) };
}
