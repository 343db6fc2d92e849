// Who the visitor is: a cookie that the server signed for a key, or, on its own machine without keys, for a browser.

import { call, request } from "./api.js";
import { el, find } from "./dom.js";

/** The session {user, role}, once there is one; until then the page shows nothing but the question for a key. */
export async function session() {
  let known = await look();
  if (known?.by === "loopback") {
    await call("/v1/session", { method: "POST", body: {} });
    known = await look();
  }
  while (!known) {
    await signIn();
    known = await look();
  }
  showWho(known);
  return known;
}

async function look() {
  try {
    return await call("/v1/session");
  } catch (error) {
    if (error.status === 401) return null;
    throw error;
  }
}

function signIn() {
  return new Promise((done) => {
    const input = el("input", { id: "api-key", type: "password", autocomplete: "current-password", spellcheck: "false", required: true });
    const failed = el("p", { class: "error", role: "alert", hidden: true });
    const form = el(
      "form",
      { class: "sign-in" },
      el("h1", {}, "Your key"),
      el("p", { class: "muted" }, "This server answers people whom its operator gave a key."),
      el("label", { for: "api-key" }, "API key"),
      input,
      failed,
      el("button", { type: "submit", class: "primary" }, "Sign in"),
    );
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      try {
        await call("/v1/session", { method: "POST", body: {}, key: input.value.trim() });
      } catch (error) {
        failed.textContent = error.status === 401 ? "This key is not good." : error.message;
        failed.hidden = false;
        input.select();
        return;
      }
      form.remove();
      document.body.classList.remove("signing-in");
      done();
    });
    document.body.classList.add("signing-in");
    find("main").prepend(form);
    input.focus();
  });
}

function showWho(known) {
  const leave = el("button", { type: "button", class: "quiet" }, "Sign out");
  leave.addEventListener("click", async () => {
    await request("/v1/session", { method: "DELETE" });
    location.reload();
  });
  const local = known.user.startsWith("browser-");
  find("who").replaceChildren(...(local ? [] : [el("span", { class: "muted name" }, known.user), leave]));
}

/** Say what went wrong where nothing else can be shown. */
export function showFailure(error) {
  const notice = el("p", { class: "notice error", role: "alert" }, error.message);
  find("main").prepend(notice);
}
