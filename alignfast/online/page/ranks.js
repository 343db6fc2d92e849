// A list of answers that is put in order by drag, by keys, or by its buttons; neighbours may be level.

import { announce, el, icon, iconButton } from "./dom.js";

let lists = 0;

export class Ranks {
  /**
   * @param answers [{id, letter, text}], in the order in which they stand at first
   * @param changed called after each change
   */
  constructor(answers, changed = () => {}) {
    this.changed = changed;
    this.rows = answers.map((answer) => this.#row(answer));
    this.help = el(
      "p",
      { class: "hint", id: `ranks-${++lists}` },
      "Drag the best answer to the top, or focus a handle and press ↑ ↓, or a place’s number; = makes it level with the one above.",
    );
    this.list = el("ol", { class: "ranks", "aria-label": "Answers, best first" }, ...this.rows.map((row) => row.node));
    for (const row of this.rows) row.grip.setAttribute("aria-describedby", this.help.id);
    this.node = el("div", {}, this.help, this.list);
    this.#number();
  }

  /** Ids best first; those of level answers in one list. */
  get places() {
    const places = [];
    for (const row of this.rows) {
      if (row.level) places.at(-1).push(row.answer.id);
      else places.push([row.answer.id]);
    }
    return places.map((ids) => (ids.length === 1 ? ids[0] : ids));
  }

  set disabled(value) {
    for (const button of this.node.querySelectorAll("button")) button.disabled = value;
    if (!value) this.#number();
  }

  #row(answer) {
    const row = { answer, level: false, place: el("span", { class: "place" }) };
    const called = `Answer ${answer.letter}`;
    row.grip = el("button", { type: "button", class: "grip", "aria-label": `${called}, move` }, icon("grip"));
    row.grip.addEventListener("keydown", (event) => this.#key(event, row));
    row.grip.addEventListener("pointerdown", (event) => this.#drag(event, row));
    row.even = iconButton("level", `${called}: level with the one above`, () => this.#level(row), { "aria-pressed": "false" });
    row.higher = iconButton("higher", `${called}: higher`, () => this.#move(row, this.rows.indexOf(row) - 1, row.higher));
    row.lower = iconButton("lower", `${called}: lower`, () => this.#move(row, this.rows.indexOf(row) + 1, row.lower));
    row.node = el(
      "li",
      { class: "rank", "data-id": answer.id },
      row.grip,
      row.place,
      el("span", { class: "letter" }, answer.letter),
      el("span", { class: "snippet" }, answer.text.replace(/\s+/g, " ").slice(0, 160) || "an empty answer"),
      el("span", { class: "rank-buttons" }, row.even, row.higher, row.lower),
    );
    return row;
  }

  #key(event, row) {
    const at = this.rows.indexOf(row);
    const to = { ArrowUp: at - 1, ArrowDown: at + 1, Home: 0, End: this.rows.length - 1 }[event.key];
    const digit = /^[1-9]$/.test(event.key) ? Number(event.key) - 1 : undefined;
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "=") this.#level(row);
    else if ((to ?? digit) !== undefined) this.#move(row, to ?? digit, row.grip);
    else return;
    event.preventDefault();
  }

  #move(row, to, focus) {
    if (to < 0 || to >= this.rows.length) return;
    const from = this.rows.indexOf(row);
    if (to !== from) this.#put(row, to);
    focus.focus(); // an element that is moved in the page loses it
    if (focus.disabled) row.grip.focus();
    announce(`Answer ${row.answer.letter}: place ${row.place.textContent} of ${this.rows.length}`);
  }

  #put(row, to) {
    const from = this.rows.indexOf(row);
    const after = this.rows[from + 1];
    if (after?.level && !row.level) after.level = false; // the first of a level few leaves the others behind it
    this.rows.splice(from, 1);
    row.level = this.rows[to]?.level ?? false; // who comes among level ones is level with them
    this.rows.splice(to, 0, row);
    this.list.insertBefore(row.node, this.rows[to + 1]?.node ?? null);
    this.#number();
    this.changed();
  }

  #level(row) {
    if (this.rows.indexOf(row) === 0) return;
    row.level = !row.level;
    this.#number();
    announce(`Answer ${row.answer.letter}: place ${row.place.textContent}${row.level ? ", level with the one above" : ""}`);
    this.changed();
  }

  #number() {
    this.rows[0].level = false;
    let place = 0;
    for (const [index, row] of this.rows.entries()) {
      if (!row.level) place = index + 1;
      row.place.textContent = place;
      row.node.classList.toggle("level", row.level);
      row.even.setAttribute("aria-pressed", String(row.level));
      row.even.disabled = row.higher.disabled = index === 0;
      row.lower.disabled = index === this.rows.length - 1;
    }
  }

  #drag(event, row) {
    if (event.button !== 0) return;
    event.preventDefault();
    row.grip.focus();
    let grabbed = event.clientY;
    const follow = (moved) => {
      const at = this.rows.indexOf(row);
      const above = this.rows[at - 1]?.node;
      const below = this.rows[at + 1]?.node;
      const before = row.node.offsetTop;
      // a third into the neighbour: at its edge the two would change places at every tremor
      if (above && moved.clientY < inside(above, 2 / 3)) this.#put(row, at - 1);
      else if (below && moved.clientY > inside(below, 1 / 3)) this.#put(row, at + 1);
      grabbed += row.node.offsetTop - before;
      row.node.style.transform = `translateY(${moved.clientY - grabbed}px)`;
    };
    const leave = () => {
      row.node.classList.remove("dragged");
      row.node.style.transform = "";
      for (const [name, listener] of listeners) document.removeEventListener(name, listener);
      row.grip.focus();
      announce(`Answer ${row.answer.letter}: place ${row.place.textContent} of ${this.rows.length}`);
    };
    const listeners = [["pointermove", follow], ["pointerup", leave], ["pointercancel", leave]];
    // on the document: a captured element that is moved in the page loses its capture
    for (const [name, listener] of listeners) document.addEventListener(name, listener);
    row.node.classList.add("dragged");
  }
}

function inside(node, share) {
  const { top, height } = node.getBoundingClientRect();
  return top + share * height;
}
