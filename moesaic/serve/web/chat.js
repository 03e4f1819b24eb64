// The conversation: what is sent, how the answer arrives, which of its tokens is looked at.

import { ApiError } from "./api.js";
import { formatValue } from "./chart.js";
import { byId, element, plural } from "./dom.js";
import { TokenAligner } from "./tokens.js";

const FINISHED = {
  stop: "",
  length: "cut at the most tokens allowed; raise it in the settings",
  abort: "stopped by the server",
  error: "ended by an error of the server",
};
const FULL = "cut where the conversation is full; Clear begins a new one";
// Spoken in whole sentences: word by word would never stop talking.
const SENTENCE = /^[\s\S]*[.!?:;\n]\s/;

// An answer of fewer tokens says little of how fast they come.
const FEWEST_FOR_RATE = 8;

/** One answer on the page: its text, cut into tokens where they are known. */
class Answer {
  text = "";
  tokens = new WeakMap();
  #aligner = new TokenAligner();
  #tail = document.createTextNode("");
  #hasTokens = false;

  constructor() {
    this.node = element("div", { class: "answer", role: "group", "aria-label": "Answer" }, this.#tail);
  }

  add(text, tokens, isLast = false) {
    this.text += text;
    if (tokens.length && !this.#hasTokens) {
      this.#hasTokens = true;
      this.node.setAttribute("aria-label", "Answer; the arrow keys go from token to token");
    }
    if (!this.#hasTokens) {
      this.#tail.data += text;
      return;
    }
    for (const piece of this.#aligner.push(text, tokens, isLast)) {
      const span = element("span", { class: "token", tabindex: this.last ? -1 : 0 }, piece.text);
      this.tokens.set(span, piece.token);
      this.#tail.before(span);
      this.last = span;
    }
    this.#tail.data = this.#aligner.rest;
  }
}

export class Chat {
  /** Whether the model has a chat template; null where the server does not say. */
  hasTemplate = null;
  #api;
  #settings;
  #askForKey;
  #wantsExperts;
  #showToken;
  #exchanges = [];
  #running = null;
  #isLowered = false; // the running answer has less room than the settings' most tokens
  #pinned = null;
  #hovered = null;
  #list = byId("messages");
  #frame = byId("conversation");
  #isAtEnd = true;
  #scrolling = null;
  #lastTop = 0;
  #composer = byId("composer-text");
  #unspoken = "";

  /**
   * settings() returns what a request takes from the form, or null where a field is wrong (and says so itself);
   * askForKey() lets the user give a key; wantsExperts() says whether to ask for the tokens' experts;
   * showToken(detail, isFollowing) shows them.
   */
  constructor({ api, settings, askForKey, wantsExperts, showToken }) {
    this.#api = api;
    this.#settings = settings;
    this.#askForKey = askForKey;
    this.#wantsExperts = wantsExperts;
    this.#showToken = showToken;
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit();
    });
    this.#composer.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || isOfInputMethod(event)) return;
      event.preventDefault();
      this.#submit();
    });
    byId("stop").addEventListener("click", () => this.stop());
    byId("clear").addEventListener("click", () => this.clear());
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !isOfInputMethod(event)) this.#escape();
    });
    this.#frame.addEventListener("scroll", () => {
      const { scrollHeight, scrollTop, clientHeight } = this.#frame;
      const isAtEnd = scrollHeight - scrollTop - clientHeight < 60;
      // What has been written since the scroll puts the end further away; only who goes up has left it.
      if (isAtEnd || scrollTop < this.#lastTop) this.#isAtEnd = isAtEnd;
      this.#lastTop = scrollTop;
    });
    this.#list.addEventListener("pointerover", (event) => this.#hover(event.target.closest(".token")));
    this.#list.addEventListener("pointerleave", () => this.#hover(null));
    this.#list.addEventListener("focusin", (event) => this.#pin(event.target.closest(".token")));
    this.#list.addEventListener("keydown", (event) => this.#moveToken(event));
    this.#refresh();
  }

  /** Send the last message again if it failed for want of a key. */
  retryAfterKey() {
    const last = this.#exchanges.at(-1);
    if (last?.failure?.status === 401) this.#retry(last);
  }

  stop() {
    this.#running?.abort();
  }

  clear() {
    this.stop();
    this.#running = null;
    this.#exchanges = [];
    this.#pinned = this.#hovered = null;
    this.#unspoken = "";
    this.#list.replaceChildren();
    byId("spoken").replaceChildren();
    this.#showToken(null);
    this.#refresh();
    this.#composer.focus();
  }

  #submit() {
    const text = this.#composer.value;
    if (this.#running || !text.trim()) return;
    const settings = this.#settings();
    if (!settings) return;
    this.#composer.value = "";
    const exchange = { user: text, failure: null };
    exchange.node = element(
      "li",
      {},
      element("div", { class: "user" }, element("span", { class: "unseen" }, "You: "), text),
    );
    this.#exchanges.push(exchange);
    this.#list.append(exchange.node);
    this.#ask(exchange, settings);
  }

  #retry(exchange) {
    const settings = this.#settings();
    if (this.#running || !settings) return;
    this.#composer.focus();
    this.#ask(exchange, settings);
  }

  async #ask(exchange, settings) {
    const controller = new AbortController();
    this.#running = controller;
    exchange.failure = null;
    while (exchange.node.children.length > 1) exchange.node.lastChild.remove();
    const answer = new Answer();
    const foot = element("p", { class: "foot" });
    exchange.node.append(answer.node, foot);
    exchange.answer = answer;
    this.#hovered = null;
    this.#pin(null);
    this.#showToken(null);
    this.#refresh();
    this.#isAtEnd = exchange === this.#exchanges.at(-1);
    if (this.#isAtEnd) this.#scroll();
    else exchange.node.scrollIntoView({ block: "nearest" });
    answer.node.dataset.streaming = "";
    const began = performance.now();
    const figures = { first: null, tokens: 0, seconds: 0, finish: null, by: null };
    this.#isLowered = false;
    try {
      await this.#receive(exchange, settings, controller.signal, figures, began);
    } catch (error) {
      if (error.name === "AbortError") figures.finish = "user";
      else if (error instanceof ApiError) exchange.failure = error;
      else throw error;
    } finally {
      figures.seconds = (performance.now() - began) / 1000;
      delete answer.node.dataset.streaming;
      answer.add("", [], true);
      // After clear() another conversation may run already.
      if (this.#running === controller) this.#running = null;
      if (this.#exchanges.includes(exchange)) this.#finish(exchange, foot, figures);
      this.#refresh();
    }
  }

  async #receive(exchange, settings, signal, figures, began) {
    const { answer } = exchange;
    const before = this.#exchanges.slice(0, this.#exchanges.indexOf(exchange));
    const turns = before.filter((turn) => !turn.failure && turn.answer.text);
    const body = { ...settings, stream_options: { include_usage: true } };
    if (this.#wantsExperts()) body.return_experts = true;
    let events;
    const messages = turns.flatMap((turn) => [
      { role: "user", content: turn.user },
      { role: "assistant", content: turn.answer.text },
    ]);
    messages.push({ role: "user", content: exchange.user });
    const plain = { ...body, prompt: messages.map((message) => message.content).join("\n") };
    if (this.hasTemplate === false) events = this.#fitting("v1/completions", plain, signal);
    else events = this.#chatEvents({ ...body, messages }, plain, signal);
    for await (const event of events) {
      if (event.usage) figures.tokens = event.usage.completion_tokens;
      const choice = event.choices?.[0];
      if (!choice) continue;
      const text = choice.delta?.content ?? choice.text ?? "";
      // A dense model that was not known as one yet: tokens without layers.
      const tokens = (choice.experts ?? []).filter((token) => token.layers.length);
      // Under overload a student answers: its experts are not those of the map.
      const isOthers = event.model && settings.model && event.model !== settings.model;
      if (isOthers) figures.by = event.model;
      for (const token of tokens) token.by = figures.by;
      if (!event.usage) figures.tokens += tokens.length; // the last event counts them; it may never come
      if (text || tokens.length) figures.first ??= (performance.now() - began) / 1000;
      answer.add(text, tokens);
      if (!this.#hovered && !this.#pinned && answer.last) this.#showToken(answer.tokens.get(answer.last), true);
      this.#speak(text);
      this.#scroll();
      if (choice.finish_reason) figures.finish = choice.finish_reason;
    }
  }

  /** The chat's events; where the server says only now that the model has no template, those of a plain completion. */
  async *#chatEvents(body, plain, signal) {
    try {
      yield* this.#fitting("v1/chat/completions", body, signal);
    } catch (error) {
      const isTemplate = error instanceof ApiError && error.status >= 400 && /template/i.test(error.message);
      if (!isTemplate || this.hasTemplate) throw error;
      this.hasTemplate = false;
      this.#refresh();
      yield* this.#fitting("v1/completions", plain, signal);
    }
  }

  /** Stream an answer; where the conversation leaves less room than the settings' most tokens, that much. */
  async *#fitting(path, body, signal) {
    try {
      yield* this.#api.stream(path, body, signal);
    } catch (error) {
      const isTooLong = error instanceof ApiError && error.code === "context_length_exceeded";
      const room = isTooLong && /at most (\d+) fit/.exec(error.message);
      if (!room) throw error;
      this.#isLowered = true;
      yield* this.#api.stream(path, { ...body, max_tokens: Number(room[1]) }, signal);
    }
  }

  #finish(exchange, foot, { first, tokens, seconds, finish, by }) {
    const { answer, failure } = exchange;
    const parts = by ? [`by ${by}`] : [];
    if (tokens) parts.push(plural(tokens, "token"));
    if (tokens >= FEWEST_FOR_RATE && seconds > first) parts.push(`${formatValue((tokens - 1) / (seconds - first), "tokens/s")}`);
    if (first !== null) parts.push(`first after ${first.toFixed(2)} s`);
    if (finish === "user") parts.push("stopped");
    else if (finish === "length" && this.#isLowered) parts.push(FULL);
    else if (FINISHED[finish]) parts.push(FINISHED[finish]);
    foot.textContent = parts.join(" · ");
    if (!answer.text && !failure) foot.prepend(finish === "user" ? "" : "The model ended at once. ");
    this.#scroll();
    this.#speak("", failure ? "" : finish === "user" ? "Stopped." : "End of the answer.");
    if (!failure) return;
    const isKey = failure.status === 401;
    const wait = failure.retryAfter ? ` The server asks to wait ${failure.retryAfter} s.` : "";
    const isFull = failure.code === "context_length_exceeded" && this.#exchanges.length > 1;
    const hint = isFull ? " The conversation counts too: Clear begins a new one." : "";
    exchange.node.append(
      element(
        "div",
        { class: "failure", role: "alert" },
        element("p", {}, isKey ? "It was not sent: the server wants an API key." : failure.message + wait + hint),
        element("button", { type: "button", onclick: () => this.#retry(exchange) }, "Try again"),
      ),
    );
    this.#scroll();
    if (isKey) this.#askForKey();
  }

  #refresh() {
    const isRunning = this.#running !== null;
    const hadFocus = document.activeElement === byId("stop") || document.activeElement === byId("send");
    byId("stop").hidden = !isRunning;
    byId("send").hidden = isRunning;
    if (hadFocus) this.#composer.focus();
    byId("clear").disabled = !this.#exchanges.length;
    byId("welcome").hidden = this.#exchanges.length > 0;
    this.describeModel();
  }

  /** Say on the page what the model does with a message. */
  describeModel() {
    const isPlain = this.hasTemplate === false;
    byId("plain-note").hidden = !isPlain;
    this.#composer.placeholder = isPlain ? "A text to continue" : "A message";
  }

  #speak(text, last = null) {
    this.#unspoken += text;
    const ready = last === null ? (SENTENCE.exec(this.#unspoken)?.[0] ?? "") : this.#unspoken;
    this.#unspoken = this.#unspoken.slice(ready.length);
    for (const part of [ready.trim(), last ?? ""]) if (part) byId("spoken").append(element("p", {}, part));
    while (byId("spoken").children.length > 20) byId("spoken").firstChild.remove();
  }

  /** Keep the end of the conversation in sight, once a picture, unless the reader has scrolled away from it. */
  #scroll() {
    this.#scrolling ??= requestAnimationFrame(() => {
      this.#scrolling = null;
      if (this.#isAtEnd) this.#frame.scrollTop = this.#frame.scrollHeight;
    });
  }

  #escape() {
    if (this.#running) this.stop();
    else if (this.#pinned) {
      this.#pin(null);
      this.#composer.focus();
    }
  }

  #detailOf(span) {
    for (const { answer } of this.#exchanges) {
      if (answer?.tokens.has(span)) return answer.tokens.get(span);
    }
    return null;
  }

  #hover(span) {
    if (span === this.#hovered) return;
    this.#hovered = span;
    this.#look();
  }

  #pin(span) {
    if (span === this.#pinned) return;
    this.#pinned?.removeAttribute("aria-current");
    this.#pinned = span;
    if (span) {
      // One token of an answer is in the tab order: the last that was looked at.
      for (const other of span.parentElement.querySelectorAll(".token[tabindex='0']")) other.tabIndex = -1;
      span.tabIndex = 0;
      span.setAttribute("aria-current", "true");
    }
    this.#look();
  }

  #look() {
    const span = this.#hovered ?? this.#pinned;
    if (span) this.#showToken(this.#detailOf(span));
    else {
      const answer = this.#exchanges.at(-1)?.answer;
      this.#showToken(answer?.last ? answer.tokens.get(answer.last) : null, true);
    }
  }

  #moveToken(event) {
    const span = event.target.closest?.(".token");
    if (!span || event.ctrlKey || event.metaKey || event.altKey) return;
    const all = [...span.parentElement.querySelectorAll(".token")];
    const place = all.indexOf(span);
    const next = {
      ArrowLeft: () => all[place - 1],
      ArrowRight: () => all[place + 1],
      ArrowUp: () => onNextLine(all, place, -1),
      ArrowDown: () => onNextLine(all, place, 1),
      Home: () => all[0],
      End: () => all.at(-1),
    }[event.key];
    if (!next) return;
    event.preventDefault();
    next()?.focus();
  }
}

/**
 * Whether a key is an input method's: while that composes a character, Enter and Escape belong to it. Safari ends the
 * composition before the key that ends it, which it then gives this code.
 */
function isOfInputMethod(event) {
  return event.isComposing || event.keyCode === 229;
}

/** Return the token of the line above (-1) or below (1) that is nearest to the one at `place`. */
function onNextLine(all, place, direction) {
  const from = all[place].getBoundingClientRect();
  let best = null;
  let line = null;
  for (let index = place + direction; index >= 0 && index < all.length; index += direction) {
    const box = all[index].getClientRects()[0];
    if (!box || Math.abs(box.top - from.top) < box.height / 2) continue;
    if (line !== null && Math.abs(box.top - line) > box.height / 2) break;
    line = box.top;
    const gap = Math.abs(box.left - from.left);
    if (best === null || gap < best.gap) best = { gap, span: all[index] };
  }
  return best?.span ?? null;
}
