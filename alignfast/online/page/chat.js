// The chat: a message, two to four answers side by side as they are written, and what the visitor says of them.

import { ApiError, call, events, hint, request } from "./api.js";
import { announce, el, find, LETTERS } from "./dom.js";
import { Judge, Thumbs } from "./judge.js";
import { session, showFailure } from "./session.js";

const STORED = "What you write, the answers, your votes, and what you copy, stop or ask again are stored to improve this model.";
const PRIVATE = "Nothing is stored from here on, so these answers can’t be voted on.";
const CANCELLED = "Stopped.";

/** One answer of a turn. */
class Answer {
  constructor(index, turn) {
    this.letter = LETTERS[index];
    this.content = "";
    this.ended = false;
    this.id = null;
    this.text = el("div", { class: "text", "aria-live": "polite", "aria-busy": "true" });
    this.note = el("span", { class: "note" }, "writing");
    this.foot = el("footer", {});
    const title = `answer-${turn}-${this.letter}`;
    this.node = el(
      "section",
      { class: "answer writing", "aria-labelledby": title },
      el("header", {}, el("h3", { id: title }, el("span", { class: "unseen" }, "Answer "), el("span", { class: "letter" }, this.letter)), this.note),
      this.text,
      this.foot,
    );
  }

  add(piece) {
    this.content += piece;
    this.text.textContent = this.content; // text, whatever it looks like
  }

  end(reason, kept = true) {
    this.ended = true;
    this.kept = kept;
    this.broken = reason === "stopped";
    this.node.classList.remove("writing");
    this.text.setAttribute("aria-busy", "false"); // read out whole, not by the token
    this.note.textContent = { length: "cut at the limit", stopped: CANCELLED }[reason] ?? "";
    if (!this.content) this.text.append(el("em", { class: "muted" }, "An empty answer."));
  }
}

/** A message with its answers; `again` asks it anew. */
class Turn {
  constructor(number, message, count, stored, again) {
    this.message = message;
    this.again = again;
    this.stored = stored;
    this.answers = Array.from({ length: count }, (_, index) => new Answer(index, number));
    this.grid = el("div", { class: "answers", "data-count": count }, ...this.answers.map((answer) => answer.node));
    this.node = el(
      "article",
      { class: "turn" },
      el("h2", { class: "unseen" }, `Message ${number}`),
      el("p", { class: "prompt" }, message),
      this.grid,
    );
  }

  /** The answer that the chat goes on with: the one chosen as best, or the first. */
  get continuing() {
    const whole = this.answers.filter((answer) => answer.ended && answer.content);
    return whole.find((answer) => answer.id && answer.id === this.judge?.best) ?? whole[0] ?? null;
  }

  take(told) {
    const ours = told.alignfast;
    for (const { index, response_id } of ours?.answers ?? []) this.answers[index].id = response_id;
    if (ours?.version) this.version = { name: ours.version, weights: ours.weights };
    for (const choice of told.choices) {
      const answer = this.answers[choice.index];
      if (choice.delta.content) answer.add(choice.delta.content);
      if (choice.finish_reason) answer.end(choice.finish_reason);
    }
  }

  /** @param byVisitor whether it was the visitor who stopped it */
  finish(reason, byVisitor = false) {
    // of an answer that broke off, what was shown is stored, if that was anything
    for (const answer of this.answers) if (!answer.ended) answer.end(reason, answer.content !== "");
    const votable = this.stored ? this.answers.filter((answer) => answer.id && answer.kept) : [];
    for (const answer of votable) answer.foot.append(new Thumbs(answer).node);
    if (votable.length > 1) {
      this.judge = new Judge(votable);
      this.node.append(this.judge.node);
    }
    if (byVisitor) for (const answer of votable.filter((one) => one.broken)) hint(answer.id, "stop");
    const again = el("button", { type: "button", class: "quiet again" }, "Ask again");
    again.addEventListener("click", () => {
      for (const answer of votable) hint(answer.id, "regenerate");
      this.again(this);
    });
    // of a blind comparison no version is told
    const version = this.version && `Version ${this.version.name} · ${this.version.weights.slice(0, 8)}`;
    this.node.append(el("footer", { class: "turn-foot" }, version && el("p", { class: "version" }, version), again));
  }

  fail(error) {
    const wait = error.retryAfter ? ` Try again in ${error.retryAfter} s.` : "";
    this.node.lastElementChild.before(el("p", { class: "error", role: "alert" }, error.message + wait)); // above "Ask again"
  }
}

class Chat {
  constructor(model) {
    this.model = model;
    this.turns = [];
    this.running = null;
  }

  get messages() {
    return this.turns.flatMap((turn) => {
      const answer = turn.continuing;
      return answer ? [{ role: "user", content: turn.message }, { role: "assistant", content: answer.content }] : [];
    });
  }

  async ask(message, count, stored, again) {
    const turn = new Turn(this.turns.length + 1, message, count, stored, again);
    const messages = [...this.messages, { role: "user", content: message }];
    for (const before of this.turns) before.continuing?.node.classList.add("continued");
    this.turns.push(turn);
    find("turns").append(turn.node);
    turn.node.scrollIntoView({ block: "start" });
    this.running = new AbortController();
    this.stopped = false;
    const ours = stored ? {} : { store: false };
    if (count === 2) ours.pair = true;
    const body = { model: this.model, messages, n: count, stream: true, alignfast: ours };
    try {
      const response = await request("/v1/chat/completions", { method: "POST", body, signal: this.running.signal });
      for await (const told of events(response)) turn.take(told);
      turn.finish("stop");
      announce(stored ? "The answers are written. Say which is better." : "The answers are written.");
    } catch (error) {
      turn.finish("stopped", this.stopped);
      if (error.name !== "AbortError") turn.fail(error instanceof ApiError ? error : new ApiError(0, String(error)));
    } finally {
      this.running = null;
    }
  }

  stop() {
    this.stopped = true;
    this.running?.abort();
  }

  remove(turn) {
    this.turns = this.turns.filter((one) => one !== turn);
    turn.node.remove();
  }

  clear() {
    this.running?.abort();
    this.turns = [];
    find("turns").replaceChildren();
  }
}

function setUp(chat) {
  const form = find("composer");
  const message = find("message");
  const secret = find("private");
  const show = () => {
    const busy = chat.running !== null;
    find("send").hidden = busy;
    find("stop").hidden = !busy;
    find("fresh").hidden = !chat.turns.length;
    find("welcome").hidden = chat.turns.length > 0;
    find("consent").textContent = secret.checked ? PRIVATE : STORED;
    document.body.classList.toggle("private", secret.checked);
  };
  const ask = async (text, count, stored) => {
    const answering = chat.ask(text, count, stored, again);
    show();
    await answering;
    show();
  };
  const again = (turn) => {
    if (chat.running) return;
    chat.remove(turn);
    ask(turn.message, turn.answers.length, turn.stored);
  };
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const text = message.value.trim();
    if (!text || chat.running) return;
    message.value = "";
    ask(text, Number(find("count").value), !secret.checked);
  });
  message.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    form.requestSubmit();
  });
  find("stop").addEventListener("click", () => {
    chat.stop();
    message.focus();
  });
  const fresh = () => {
    chat.clear();
    show();
    message.focus();
  };
  find("fresh").addEventListener("click", fresh);
  // Either way a new chat begins: a stored prompt would hold the turns before it, those that were not to be stored too.
  secret.addEventListener("change", () => {
    if (chat.turns.length) fresh();
    show();
    announce(find("consent").textContent);
  });
  form.hidden = false;
  show();
  if (matchMedia("(pointer: fine)").matches) message.focus(); // on a phone it would open the keyboard
}

try {
  await session();
  const models = await call("/v1/models");
  setUp(new Chat(models.data[0].id));
} catch (error) {
  showFailure(error);
}
