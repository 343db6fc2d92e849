// Elements without markup: whatever text comes from a model or a person becomes a text node, never HTML.

const SVG = "http://www.w3.org/2000/svg";
const PATHS = {
  up: "M7 10v11H4V10zM7 10l4-8a2.5 2.5 0 0 1 2.5 2.5V9H20l-2 12H7",
  down: "M7 14V3H4v11zM7 14l4 8a2.5 2.5 0 0 0 2.5-2.5V15H20L18 3H7",
  copy: "M9 9h11v12H9zM5 15H4V3h11v2",
  higher: "M12 19V5M6 11l6-6 6 6",
  lower: "M12 5v14M6 13l6 6 6-6",
  level: "M5 9h14M5 15h14",
  grip: "M9 6h.01M15 6h.01M9 12h.01M15 12h.01M9 18h.01M15 18h.01",
};

export const find = (id) => document.getElementById(id);

/** An element; `on...` are listeners, true and false set and leave out an attribute. */
export function el(name, properties = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value != null) node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child != null));
  return node;
}

/** A drawing beside a name that is read out elsewhere. */
export function icon(name) {
  const drawing = document.createElementNS(SVG, "svg");
  const path = document.createElementNS(SVG, "path");
  drawing.setAttribute("viewBox", "0 0 24 24");
  drawing.setAttribute("aria-hidden", "true");
  drawing.setAttribute("class", "icon");
  path.setAttribute("d", PATHS[name]);
  drawing.append(path);
  return drawing;
}

/** A button that shows an icon and is called by its label. */
export function iconButton(name, label, onclick, more = {}) {
  return el("button", { type: "button", class: "icon-button", "aria-label": label, title: label, onclick, ...more }, icon(name));
}

/** Have a screen reader say something. */
export function announce(text) {
  const status = find("status");
  status.textContent = "";
  requestAnimationFrame(() => (status.textContent = text)); // the same words twice are said twice
}

export const LETTERS = "ABCDEFGH";
