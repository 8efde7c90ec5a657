// The three questions that everybody asks first, and their short answers; each starts the tour at the step that shows it.
import { term } from "./glossary.js";

export const QUESTIONS = [
  {
    title: "What do T5 and CLIP do?",
    text: "Both read your prompt before the first step. " + term("t5", "T5") + " turns it into one vector per word, and the picture takes its content from them: objects, colours, places. " + term("clip", "CLIP") + " turns it into a single vector, which only sets, together with the time and the guidance, how strongly each block works. Give T5 another colour and the picture changes; give it to CLIP and the picture stays nearly the same.",
    step: 4,
  },
  {
    title: "What is a step?",
    text: "One run of the model. It sees the noisy picture, your words and the time, and predicts a direction, the " + term("velocity", "velocity") + ": which way the noise lies. The picture then moves a little in the opposite direction. After 20 such steps, no noise is left.",
    step: 2,
  },
  {
    title: "Why does the circle end up left?",
    text: "Two things work together. " + term("t5", "T5") + " has already written “left” into the vector of the word “circle”. And every " + term("patch", "patch") + " knows its own column from its " + term("position", "position") + ", so patches on the left become the circle. Mirror the column numbers, and the circle ends up on the right.",
    step: 7,
  },
];

export function createQuestions(openTour) {
  const cards = document.querySelector("#questions .cards");
  for (const { title, text, step } of QUESTIONS) {
    const card = document.createElement("article"), button = document.createElement("button");
    card.innerHTML = `<h3>${title}</h3><p>${text}</p>`;
    button.type = "button";
    button.textContent = "Show me";
    button.setAttribute("aria-label", `Show me: ${title}`);
    button.addEventListener("click", () => openTour(step));
    card.append(button);
    cards.append(card);
  }
}
