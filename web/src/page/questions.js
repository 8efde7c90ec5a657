// Four questions that everybody asks first, and their short answers; each starts the tour at the part that shows it.
//
// 2.4 times as many weights: notebook 08b counts them; what T5's vectors contain: `python -m evidence pooled`.
import { term, unbroken } from "./glossary.js";

export const QUESTIONS = [
  {
    title: "What do T5 and CLIP do?",
    text: "Both read your prompt once, before the first step. " + term("t5", "T5") + " turns it into one " + term("vector", "vector") + " per word, and the picture takes its content from them: objects, colours, places. " + term("clip", "CLIP") + " turns it into one single vector. This is one of three terms, with the time and the guidance, from whose sum each block computes its shifts, scales and gates (" + term("modulation", "modulation") + "). Give T5 another colour and the picture changes; give it to CLIP and the picture stays nearly the same. But without CLIP's vector most pictures are wrong: the blocks have never been trained without it.",
    part: "t5",
  },
  {
    title: "What is a step?",
    text: "One run of the model. It reads the noisy picture, your words and the " + term("time", "time") + ", and predicts the " + term("velocity", "velocity") + ": the direction from the finished picture to the noise. Noisy picture − <i>t</i> × velocity is then its guess of the finished picture, and the noisy picture moves a little towards this guess. After the last step, no noise is left.",
    part: "step", play: true,
  },
  {
    title: "Why does the circle end up left?",
    text: "First, " + term("t5", "T5") + " has written “left” into the vector of the word “circle”. Second, every " + term("patch", "patch") + " knows its own column from its " + term("position", "position") + ". The two meet in " + term("attention", "attention") + ": there each patch is compared with each word, and the column of the patch is part of this comparison. The patches in which the circle appears attend to “circle” more than to any other word (in the middle blocks), and take over what its vector says. Mirror the column numbers, and the circle ends up on the right.",
    part: "positions",
  },
  {
    title: "Why are there two kinds of blocks?",
    text: "In all eight " + term("block", "blocks") + ", words and patches exchange information by attention. In the 2 double-stream blocks, words and patches each have their own " + term("weights", "weights") + " and share only the attention. In the 6 single-stream blocks, they form one sequence and use the same weights. Own weights can fit each kind of data, but they cost memory: a double-stream block has 2.4 times as many weights as a single-stream block.",
    part: "kinds",
  },
];

export function createQuestions(openTour) {
  const cards = document.querySelector("#questions .cards");
  for (const { title, text, part, play } of QUESTIONS) {
    const card = document.createElement("article"), button = document.createElement("button");
    card.innerHTML = `<h3>${title}</h3><p>${unbroken(text)}</p>`;
    button.type = "button";
    button.textContent = "Show me";
    button.setAttribute("aria-label", `Show me: ${title}`);
    button.addEventListener("click", () => openTour(part, play));
    card.append(button);
    cards.append(card);
  }
}
