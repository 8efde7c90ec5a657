// Short definitions of terms: every button.term opens one.

const TERMS = {
  seed: ["Seed", "A number from which the random noise is made that the picture starts as. The same prompt and seed give the same picture."],
  step: ["Step", "One run of the model. It reads the noisy picture and predicts the direction towards the noise; the picture then moves a little the other way. With 20 steps, the noise becomes a picture in 20 small moves."],
  guidance: ["Guidance", "How closely the picture should follow the prompt. It is a number that the model reads, like the time; on this page, it can be from 1 to 10."],
  cfg: ["Classifier-free guidance", "The model answers twice: for the prompt, and for the negative prompt. The step goes further in the direction in which the first answer differs from the second."],
  token: ["Token", "The unit that the model computes with: a vector of 160 numbers. Each word of the prompt is one token, and each patch of the picture is one."],
  vector: ["Vector", "A list of numbers. What the model knows about a word or a patch is written in such a list."],
  weights: ["Weights", "The numbers that the model has learned in training, also called parameters. They stay the same for every prompt and every step."],
  patch: ["Patch", "A square of 16 × 16 pixels of the picture. The model has one token for each patch."],
  latent: ["Latent", "The picture in the model's own, smaller form: 16 numbers for each 8 × 8 pixels. The model works on it, and a decoder turns it into pixels at the end."],
  velocity: ["Velocity", "What the model predicts in each step: the direction from the finished picture to the noise. Noisy picture − t × velocity is therefore a guess of the finished picture, and a small move against the velocity removes a little noise."],
  attention: ["Attention", "How tokens exchange information. A token compares itself with every other token; the more two match, the more it takes from the other one. The shares sum to 100 %."],
  head: ["Head", "One of five attentions that run side by side in a block. Each has learned by itself what to attend to."],
  block: ["Block", "One layer of the model: attention between all tokens, and a small network (MLP) for each token. This model has 8 blocks; FLUX.1 has 57."],
  modulation: ["Modulation", "Numbers that scale and shift what a block reads, and multiply what it adds (the gate; at 0 the block adds nothing). They depend on the time, the guidance and CLIP's vector, so each block can work differently when there is much noise and when there is little."],
  time: ["Time t", "How much noise is in the picture: at t = 1 it is pure noise, at t = 0 no noise is left. In between, the picture has the share 1 − t and the noise the share t; this mixture is called xₜ, and the picture without noise x₀. The steps are not equal: the first ones lower t only a little, the last ones much. So after half of the steps the picture is still mostly noise."],
  preview: ["Quick preview", "The decoder, which turns latents into exact pictures, takes a moment. Until then you see the estimate of a tiny network, with large squares and less exact colours. The decoder was trained on pictures without noise, so it shows noise as coloured spots."],
  size: ["Size", "Width and height of the picture in pixels. The model was trained on these seven sizes."],
  padding: ["End and padding", "The text always has 32 tokens. After those of your prompt come an end token and padding, which stand for no word. Patches can attend to them, too."],
  t5: ["T5", "A language model. It reads the whole prompt and gives one vector for each word; each vector also describes the word's neighbours."],
  clip: ["CLIP", "A second text encoder, trained to match captions with pictures. It gives one vector for the whole prompt."],
  position: ["Position", "The row and column of a patch. They are built into attention by RoPE, which rotates queries and keys by angles that depend on the position."],
};

export const term = (name, text) => `<button type="button" class="term" data-term="${name}">${text}</button>`;

/** No line begins or ends between a term and the bracket, comma or full stop beside it. */
export const unbroken = (text) => text.replace(/\(?<button [^>]*>[^<]*<\/button>[),.:;]*/g, "<span class=\"unbroken\">$&</span>");

export function createGlossary() {
  const box = document.querySelector("#definition");
  let opener = null;
  const close = () => {
    if (!opener) return;
    opener.setAttribute("aria-expanded", "false");
    box.hidden = true;
    opener = null;
  };
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button.term");
    const same = button === opener;
    close();
    if (!button || same || !TERMS[button.dataset.term]) return;
    const [title, text] = TERMS[button.dataset.term];
    box.innerHTML = `<strong></strong><p></p>`;
    box.firstChild.textContent = title;
    box.lastChild.textContent = text;
    box.hidden = false;
    const at = button.getBoundingClientRect(), width = box.offsetWidth;
    box.style.left = `${Math.max(8, Math.min(at.left, innerWidth - width - 8)) + scrollX}px`;
    const above = at.bottom + box.offsetHeight + 12 > innerHeight;
    box.style.top = `${(above ? at.top - box.offsetHeight - 6 : at.bottom + 6) + scrollY}px`;
    button.setAttribute("aria-expanded", "true");
    opener = button;
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || !opener) return;
    const button = opener;
    close();
    button.focus();
  });
}
