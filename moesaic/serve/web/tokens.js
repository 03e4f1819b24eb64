// Which token wrote which characters of an answer.

/** More characters than one token or a few bytes of one character may lie between two tokens that are recognised. */
const SEARCH_PER_TOKEN = 12;

/**
 * Divides a growing text among tokens that come before, with or after their characters.
 *
 * The text is the truth; a token's own string only helps to find its place, since it may be a part of a character, miss
 * a leading space, stand for nothing (the end of the text), or be cut off by a stop text.
 */
export class TokenAligner {
  #rest = "";
  #waiting = [];

  /** Characters that no token has claimed yet. */
  get rest() {
    return this.#rest;
  }

  /**
   * Take new characters and tokens; return the pieces that are settled, as {text, token}, in order. A token whose
   * character another one completes has the text "". isLast: nothing comes after this.
   */
  push(text, tokens, isLast = false) {
    this.#rest += text;
    this.#waiting.push(...tokens);
    const pieces = [];
    while (this.#waiting.length && this.#settle(pieces, isLast));
    if (isLast) this.#waiting = [];
    return pieces;
  }

  #settle(pieces, isLast) {
    for (const [index, { token }] of this.#waiting.entries()) {
      if (token === "" || token.includes("\ufffd")) continue;
      // The rest of this token is still held back.
      if (index === 0 && !isLast && this.#rest.length < token.length && token.startsWith(this.#rest)) return false;
      const place = index === 0 && this.#rest.startsWith(token) ? 0 : this.#rest.indexOf(token);
      if (place < 0 || place > index * SEARCH_PER_TOKEN) continue;
      this.#give(pieces, index, place);
      this.#give(pieces, 1, token.length);
      return true;
    }
    if (!isLast || this.#rest === "") return false;
    const isCut = this.#waiting[0].token.startsWith(this.#rest);
    this.#give(pieces, isCut ? 1 : this.#waiting.length, this.#rest.length);
    return true;
  }

  /** The last of `count` waiting tokens gets the next `length` characters, those before it none. */
  #give(pieces, count, length) {
    const tokens = this.#waiting.splice(0, count);
    const text = this.#rest.slice(0, length);
    this.#rest = this.#rest.slice(length);
    for (const [index, token] of tokens.entries()) {
      pieces.push({ text: index === tokens.length - 1 ? text : "", token });
    }
  }
}

/** Characters of a token that a label has room for; a piece may hold several tokens. */
const LABEL_LENGTH = 32;

/** Characters that set the direction of what follows, up to the paragraph's end: of the label's own words too. */
const DIRECTIONS = /[\u202a-\u202e\u2066-\u2069]/g;

/** Return a token's text for a label: with its white space made visible, and cut where it is long. */
export function visible(text) {
  if (text === "") return "(part of a character)";
  const plain = text.replace(DIRECTIONS, (mark) => `U+${mark.codePointAt(0).toString(16).toUpperCase()} `);
  const characters = Array.from(plain.replaceAll("\n", "↵").replaceAll("\t", "⇥").replace(/^ | $/g, "␣"));
  if (characters.length <= LABEL_LENGTH) return characters.join("");
  return `${characters.slice(0, LABEL_LENGTH - 1).join("")}…`;
}
