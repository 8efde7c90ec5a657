// Prompts to token ids, as fluxedu/sampling/prompts.py, and the words that the miniature does not know.
import { Tokenizer } from "@huggingface/tokenizers";

// as in fluxedu/nano/vocabulary.py
const PUNCTUATION = String.raw`\s.,;:!?()"“”‘’'\-`;
const WORD = new RegExp(`[^${PUNCTUATION}]+(?:['’][^${PUNCTUATION}]+)*`, "gu");

/** Words of the prompt that no caption contains: [{ word, start, end }], positions in the string. */
export function unknownWords(prompt, known) {
  return [...prompt.matchAll(WORD)]
    .map((match) => ({ word: match[0], start: match.index, end: match.index + match[0].length }))
    .filter(({ word }) => !known.has(word));
}

/** A tokenizer with padding and truncation to a fixed length. */
export class FixedLengthTokenizer {
  constructor(tokenizer, config, { length, end, pad }) {
    this.fast = new Tokenizer(tokenizer, config);
    Object.assign(this, { length, end, pad });
  }

  /** { ids: padded to the fixed length, pieces: the tokens as text without padding, truncated } */
  encode(prompt) {
    const { ids, tokens } = this.fast.encode(prompt);
    const isTruncated = ids.length > this.length;
    const kept = isTruncated ? [...ids.slice(0, this.length - 1), this.end] : ids;
    const pieces = isTruncated ? [...tokens.slice(0, this.length - 1), tokens.at(-1)] : tokens;
    const padding = Array(this.length - kept.length).fill(this.pad);
    return { ids: [...kept, ...padding], pieces, truncated: isTruncated };
  }
}
