// What a visitor says of answers: a thumb on one, which of two is better, the order of more, and why.

import { hint, vote } from "./api.js";
import { el, iconButton } from "./dom.js";
import { Ranks } from "./ranks.js";

const LONGEST = 500; // characters of a comment

/** A thumb up or down on one answer, and a button to copy it. */
export class Thumbs {
  constructor(answer) {
    this.answer = answer;
    this.up = iconButton("up", `Answer ${answer.letter} is good`, () => this.#vote(true), { "aria-pressed": "false" });
    this.down = iconButton("down", `Answer ${answer.letter} is bad`, () => this.#vote(false), { "aria-pressed": "false" });
    this.said = el("span", { class: "said", role: "status" });
    this.node = el("div", { class: "thumbs" }, this.up, this.down, this.said);
    if (navigator.clipboard) {
      this.node.append(
        iconButton("copy", `Copy answer ${answer.letter}`, async () => {
          await navigator.clipboard.writeText(answer.content);
          this.said.textContent = "Copied";
          hint(answer.id, "copy");
        }),
      );
    }
  }

  async #vote(value) {
    const before = [this.up, this.down].map((button) => button.getAttribute("aria-pressed"));
    this.#press(value, !value);
    try {
      await vote({ response_id: this.answer.id, kind: "thumb", value });
      this.said.textContent = "Saved";
    } catch (error) {
      this.#press(...before);
      this.said.textContent = error.message;
    }
  }

  #press(up, down) {
    this.up.setAttribute("aria-pressed", String(up));
    this.down.setAttribute("aria-pressed", String(down));
  }
}

/** The comparison of a turn's answers with a comment; the last one that is sent counts. */
export class Judge {
  /** @param answers [{id, letter, content, node}], at least two */
  constructor(answers) {
    this.answers = answers;
    this.best = null;
    this.last = null; // the vote that counts
    this.comment = el("input", { type: "text", maxlength: LONGEST, placeholder: "Why? (optional)", autocomplete: "off" });
    this.said = el("p", { class: "said", role: "status" });
    const pair = answers.length === 2;
    this.save = el("button", { type: "submit", class: pair ? null : "primary", hidden: pair }, pair ? "Save comment" : "Save ranking");
    this.comment.addEventListener("input", () => this.#changed());
    this.node = el(
      "form",
      { class: "judge" },
      pair ? this.#pair() : this.#ranking(),
      el("div", { class: "commenting" }, el("label", {}, el("span", { class: "unseen" }, "Comment"), this.comment), this.save, this.said),
    );
    this.node.addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.ranks) this.#rank();
      else if (this.last) this.#send(this.last);
    });
  }

  #changed() {
    this.save.hidden = !this.ranks && !this.last; // a comment goes with a vote
    this.said.textContent = "";
  }

  #pair() {
    const [left, right] = this.answers;
    // "upper" and "lower" are shown where the answers stand one below the other
    const choice = (wide, narrow, verdict, best) => {
      const words = [el("span", { class: "wide" }, wide), el("span", { class: "narrow" }, narrow)];
      const button = el("button", { type: "button", "aria-pressed": "false", "data-verdict": verdict }, ...words);
      button.addEventListener("click", () => {
        const body = { response_id: left.id, kind: "pair", value: { than: right.id, verdict } };
        this.#send({ body, button, best: best ? [best.id] : [] });
      });
      return button;
    };
    this.buttons = [
      choice("Left is better", "Upper is better", "better", left),
      choice("Tie", "Tie", "tie", null),
      choice("Right is better", "Lower is better", "worse", right),
    ];
    return el("div", { class: "verdicts", role: "group", "aria-label": "Which answer is better?" }, ...this.buttons);
  }

  #ranking() {
    this.buttons = [];
    this.ranks = new Ranks(this.answers.map(({ id, letter, content }) => ({ id, letter, text: content })), () => this.#changed());
    return this.ranks.node;
  }

  #rank() {
    const places = this.ranks.places;
    this.#send({ body: { response_id: this.answers[0].id, kind: "ranking", value: places }, best: [places[0]].flat() });
  }

  async #send(said) {
    const comment = this.comment.value.trim();
    for (const button of this.buttons) button.setAttribute("aria-pressed", String(button === said.button));
    this.said.textContent = "";
    try {
      await vote(comment ? { ...said.body, comment } : said.body);
    } catch (error) {
      for (const button of this.buttons) button.setAttribute("aria-pressed", String(button === this.last?.button));
      this.said.textContent = error.message;
      return;
    }
    this.last = said;
    this.best = said.best[0] ?? null;
    for (const answer of this.answers) answer.node.classList.toggle("best", said.best.includes(answer.id));
    this.save.hidden = true;
    this.said.textContent = "Saved. You can still change it.";
  }
}
