// The queue of an invited annotator: a fixed prompt, its answers, their order.

import { call, vote } from "./api.js";
import { announce, el, find, LETTERS } from "./dom.js";
import { Ranks } from "./ranks.js";
import { session, showFailure } from "./session.js";

const LONGEST = 500; // characters of a comment
const percent = (share) => `${(100 * share).toFixed(0)} %`;

async function next() {
  const told = await call("/v1/label/next");
  if (told) {
    find("left").textContent = told.left === 1 ? "the last one" : `${told.left} left for you`;
    show(told);
    return;
  }
  find("left").textContent = "";
  find("item").replaceChildren(el("p", { class: "done muted" }, "Nothing waits for you. Thank you."));
  announce("Nothing waits for you.");
}

function promptOf(prompt) {
  if (typeof prompt === "string") return [el("p", { class: "prompt" }, prompt)];
  if (prompt.length === 1) return [el("p", { class: "prompt" }, prompt[0].content)];
  return prompt.map((turn) => el("p", { class: "prompt" }, el("small", { class: "muted" }, `${turn.role} `), turn.content));
}

function show(told) {
  const answers = told.answers.map((answer, index) => ({ ...answer, letter: LETTERS[index] }));
  const cards = answers.map(({ letter, text }) =>
    el(
      "section",
      { class: "answer", "aria-label": `Answer ${letter}` },
      el("header", {}, el("span", { class: "letter", "aria-hidden": "true" }, letter)),
      el("div", { class: "text" }, text || el("em", { class: "muted" }, "An empty answer.")),
    ),
  );
  const ranks = new Ranks(answers);
  const comment = el("input", { type: "text", maxlength: LONGEST, placeholder: "Why? (optional)", autocomplete: "off" });
  const said = el("p", { class: "said error", role: "alert" });
  const buttons = [
    el("button", { type: "submit", class: "primary" }, "Save and go on"),
    el("button", { type: "button", class: "quiet" }, "Skip"),
  ];
  const form = el(
    "form",
    { class: "judge" },
    ranks.node,
    el("div", { class: "commenting" }, el("label", {}, el("span", { class: "unseen" }, "Comment"), comment)),
    el("div", { class: "actions" }, ...buttons, said),
  );
  const go = async (work) => {
    for (const button of buttons) button.disabled = true;
    said.textContent = "";
    try {
      await work();
      await next();
      find("main").focus();
      window.scrollTo(0, 0);
      await showAgreement();
    } catch (error) {
      said.textContent = error.message;
      for (const button of buttons) button.disabled = false;
    }
  };
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const body = { response_id: answers[0].id, kind: "ranking", value: ranks.places };
    const words = comment.value.trim();
    go(() => vote(words ? { ...body, comment: words } : body));
  });
  buttons[1].addEventListener("click", () => go(() => call("/v1/label/skip", { method: "POST", body: { item: told.item } })));
  find("item").replaceChildren(
    ...promptOf(told.prompt),
    el("div", { class: "answers", "data-count": answers.length }, ...cards),
    form,
  );
  announce(`${answers.length} answers to rank`);
}

/** For who may see it: the operator. */
async function showAgreement() {
  if (find("agreement").hidden) return;
  const told = await call("/v1/label/agreement");
  const { estimate, low, high } = told.agreement ?? {};
  const words = told.agreement
    ? `Two annotators put two answers in the same order in ${percent(estimate)} of ${told.compared} comparisons (95 % interval ${percent(low)} to ${percent(high)}; chance is 50 %).`
    : "No two annotators have ranked the same answers yet.";
  const rows = told.annotators.map((one) =>
    el(
      "tr",
      {},
      el("td", {}, el("strong", {}, one.user), one.flagged ? el("span", { class: "status refused" }, "differs from the others") : null),
      el("td", { "data-name": "Ranked" }, String(one.ranked)),
      el("td", { "data-name": "As the others" }, one.compared ? `${one.agreed} of ${one.compared}` : "–"),
    ),
  );
  const head = ["Annotator", "Ranked", "As the majority of the others"].map((name) => el("th", { scope: "col" }, name));
  find("agreed").replaceChildren(
    el("p", {}, `${told.done} of ${told.items} prompts are ranked by ${told.overlap} annotators each. `, words),
    ...(rows.length ? [el("table", {}, el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...rows))] : []),
  );
}

try {
  const known = await session();
  find("agreement").hidden = known.role !== "admin";
  await next();
  await showAgreement();
} catch (error) {
  if (error.status === 404) find("item").replaceChildren(el("p", { class: "done muted" }, "This server has no queue: its operator gives one with --label."));
  else showFailure(error);
}
