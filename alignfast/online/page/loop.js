// The loop's state, looked at every few seconds: versions with their figures, and the buttons that change what serves.

import { call } from "./api.js";
import { announce, el, find } from "./dom.js";
import { session, showFailure } from "./session.js";

const EVERY = 5000; // milliseconds
const STATUS = { promoted: "served before", candidate: "candidate", canary: "canary", refused: "refused", rolled_back: "rolled back" };
const COLUMNS = { reward_accuracy: "Reward accuracy", win_rate: "Win rate", kl: "KL, nats a token" };
const SVG = "http://www.w3.org/2000/svg";

let admin = false; // whether this visitor may change what serves
let shown = "";
const opened = new Set(); // versions whose figures are all looked at

const percent = (share) => `${(100 * share).toFixed(1)}\u00a0%`; // on one line
const range = ({ low, high }, told) => (told === percent ? `${(100 * low).toFixed(1)} to ${percent(high)}` : `${told(low)} to ${told(high)}`);
const number = (value) => {
  const size = Math.abs(value);
  const told = Number.isInteger(value) || size >= 1000 ? Math.round(size).toLocaleString("en") : size < 1 ? size.toFixed(3) : size.toPrecision(3);
  return value < 0 && Number(told) !== 0 ? `\u2212${told}` : told;
};
const time = (seconds) => new Date(1000 * seconds).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" });
const isFigure = (value) => typeof value === "number" || (value && typeof value.estimate === "number");
const isShare = (name) => /accuracy|rate|share|satisfaction|preference|wins|cut/.test(name);

/** A figure and its interval, in words. */
function figure(name, value) {
  const told = isShare(name) ? percent : number;
  if (typeof value === "number") return [told(value)];
  const parts = [told(value.estimate)];
  if (typeof value.low === "number") parts.push(el("small", {}, range(value, told)));
  return parts;
}

/** A share from 0 to 1 as a point on its interval; the words beside it say the same. */
function drawing({ estimate, low, high }) {
  const svg = document.createElementNS(SVG, "svg");
  const part = (name, attributes) => {
    const node = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    svg.append(node);
  };
  for (const [key, value] of Object.entries({ viewBox: "0 0 160 16", preserveAspectRatio: "xMinYMid", class: "interval", "aria-hidden": "true" })) svg.setAttribute(key, value);
  part("line", { x1: 0, x2: 160, y1: 8, y2: 8, class: "axis" });
  part("line", { x1: 80, x2: 80, y1: 3, y2: 13, class: "half" });
  part("line", { x1: 160 * low, x2: 160 * high, y1: 8, y2: 8, class: "range" });
  part("circle", { cx: 160 * estimate, cy: 8, r: 4, class: "point" });
  return svg;
}

function satisfaction(told) {
  if (!told) return [el("span", { class: "muted" }, "no thumbs yet")];
  const votes = `${number(told.votes)} ${told.votes === 1 ? "thumb" : "thumbs"}`;
  return [percent(told.estimate), drawing(told), el("small", {}, range(told, percent)), el("small", {}, votes)];
}

function versionRow(version, state, columns) {
  const serves = version.name === state.serving;
  const status = serves ? "serving" : version.status;
  const learned = version.kind === "reward" && status === "promoted"; // the newest one is what the next starts from
  const cell = (name, ...children) => el("td", { "data-name": name }, ...(children.length > 1 ? [el("div", {}, ...children)] : children));
  const others = Object.entries(version.figures ?? {}).filter(([name, value]) => !(name in COLUMNS) && isFigure(value));
  const notes = [
    time(version.created) + (version.parents.length ? `, from ${version.parents.join(" and ")}` : ""),
    ...(version.reasons ?? []),
  ];
  const more = others.map(([name, value]) => el("small", {}, `${name.replaceAll("_", " ")}: ${figure(name, value).map((part) => part.textContent ?? part).join(", ")}`));
  const name = el("td", {}, el("strong", {}, version.name), el("span", { class: `status ${status}` }, learned ? "" : (STATUS[status] ?? status)), ...notes.map((note) => el("small", {}, note)));
  if (more.length) {
    const details = el("details", { open: opened.has(version.name) }, el("summary", {}, "More figures"), el("div", { class: "more" }, ...more));
    details.addEventListener("toggle", () => opened[details.open ? "add" : "delete"](version.name));
    name.append(details);
  }
  const cells = columns.map((column) => {
    if (column === "satisfaction") return cell("Satisfaction", ...satisfaction(version.satisfaction));
    const value = version.figures?.[column];
    return cell(COLUMNS[column], ...(isFigure(value) ? figure(column, value) : ["–"]));
  });
  const row = el("tr", { "data-version": version.name }, name, ...cells);
  if (admin && columns.includes("satisfaction")) {
    const button = el("button", { type: "button", "aria-label": `Promote ${version.name}`, onclick: () => promote(version.name) }, "Promote");
    row.append(el("td", { class: "action" }, ...(serves ? [] : [button])));
  }
  return row;
}

function table(versions, state, columns) {
  const names = ["Version", ...columns.map((column) => COLUMNS[column] ?? "Satisfaction")];
  const head = names.map((name) => el("th", { scope: "col" }, name));
  if (admin && columns.includes("satisfaction")) head.push(el("th", {}, el("span", { class: "unseen" }, "Action")));
  const rows = [...versions].reverse().map((version) => versionRow(version, state, columns));
  return el("table", {}, el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...rows));
}

function facts(state) {
  const run = state.run;
  const fact = (name, value, note, kind) => el("div", { class: kind }, el("dt", {}, name), el("dd", {}, value, note ? el("small", {}, note) : null));
  const found = [
    fact("Serving", state.serving ?? "nothing"),
    fact("Votes", number(state.votes)),
    fact("Queue", number(state.unused), "votes to learn from"),
    fact("Learner", run?.status === "running" ? run.stage : "idle", run ? `${run.status === "running" ? "since" : `last ${run.status}`} ${time(run.updated)}` : "alignfast online begins a round"),
  ];
  if (state.canary) {
    const { version, share, voters, wins } = state.canary;
    const told = voters ? `${number(voters)} ${voters === 1 ? "voter says" : "voters say"}: better in ${percent(wins)}` : "no votes yet";
    found.splice(1, 0, fact("Canary", version, `${told}; meets ${percent(share)} of users`));
  }
  for (const [name, fault] of Object.entries(state.faults ?? {})) found.push(fact("Not loaded", name, fault, "fault"));
  return found;
}

function show(state) {
  const told = JSON.stringify(state);
  if (told === shown) return; // what did not change keeps its focus
  const focused = document.activeElement?.getAttribute("aria-label");
  shown = told;
  find("facts").replaceChildren(...facts(state));
  const policies = state.versions.filter((version) => version.kind !== "reward");
  const rewards = state.versions.filter((version) => version.kind === "reward");
  const columns = Object.keys(COLUMNS).filter((name) => policies.some((version) => isFigure(version.figures?.[name])));
  find("policy-rows").replaceChildren(table(policies, state, ["satisfaction", ...columns]));
  find("reward-rows").replaceChildren(table(rewards, state, ["reward_accuracy"]));
  find("policies").hidden = !policies.length;
  find("rewards").hidden = !rewards.length;
  find("rollback").hidden = !admin || policies.length < 2;
  find("hands-off").hidden = admin;
  if (focused) document.querySelector(`[aria-label="${CSS.escape(focused)}"]`)?.focus();
}

async function refresh() {
  show(await call("/v1/loop"));
}

/** Ask, and do it. */
function ask({ title, text, yes, act }) {
  const dialog = find("ask");
  const failed = find("ask-error");
  find("ask-title").textContent = title;
  find("ask-text").textContent = text;
  find("ask-yes").textContent = yes;
  failed.hidden = true;
  dialog.querySelector("form").onsubmit = async (event) => {
    event.preventDefault();
    find("ask-yes").disabled = true;
    try {
      await act();
      dialog.close();
      announce("Done");
      await refresh();
    } catch (error) {
      failed.textContent = error.message;
      failed.hidden = false;
    } finally {
      find("ask-yes").disabled = false;
    }
  };
  dialog.showModal();
  find("ask-yes").focus();
}

function promote(name) {
  ask({
    title: `Promote ${name}?`,
    text: "New requests are answered by it from the next second on; answers under way end with the version that began them.",
    yes: "Promote",
    act: () => call("/v1/loop/promote", { method: "POST", body: { version: name } }),
  });
}

function rollBack() {
  ask({
    title: "Roll back?",
    text: "What served before this version serves again.",
    yes: "Roll back",
    act: () => call("/v1/loop/rollback", { method: "POST", body: {} }),
  });
}

try {
  const known = await session();
  admin = known.role === "admin";
  find("rollback").addEventListener("click", rollBack);
  find("ask-no").addEventListener("click", () => find("ask").close());
  await refresh();
  setInterval(() => document.hidden || refresh().catch((error) => announce(error.message)), EVERY);
} catch (error) {
  showFailure(error);
}
