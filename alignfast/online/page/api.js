// Requests to this server, and to no other.

export class ApiError extends Error {
  constructor(status, message, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

/** 128 random bits; crypto.randomUUID is there on https and localhost alone. */
export function randomId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** A response of this server; what is not a 2xx is an ApiError in the server's words. */
export async function request(path, { method = "GET", body, key, headers = {}, signal } = {}) {
  const sent = { "X-Alignfast-Page": "1", ...headers }; // which no page of another origin can send
  if (body !== undefined) sent["Content-Type"] = "application/json";
  if (key) sent.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, {
      method,
      headers: sent,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
      cache: "no-store",
      credentials: "same-origin",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server can’t be reached.");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

/** The same as JSON; null where there is no content. */
export async function call(path, options) {
  const response = await request(path, options);
  return response.status === 204 ? null : response.json();
}

async function refusal(response) {
  const told = await response.json().catch(() => null);
  const message = told?.error?.message ?? `The server answered ${response.status}.`;
  return new ApiError(response.status, message, response.headers.get("retry-after"));
}

/** Vote. A key that a request is known by lets it be sent again, after errors that pass: it counts once. */
export async function vote(body, passing = [0, 503]) {
  const headers = { "Idempotency-Key": randomId() };
  for (let wait = 300; ; wait *= 3) {
    try {
      return await call("/v1/feedback", { method: "POST", body, headers });
    } catch (error) {
      if (!passing.includes(error.status) || wait > 3000) throw error;
      await new Promise((done) => setTimeout(done, wait));
    }
  }
}

/** Tell what a visitor did with an answer (copy, stop, regenerate). It is no vote of theirs: a failure is not shown. */
export function hint(id, value) {
  // one that was stopped is stored once the server has seen that its reader left
  vote({ response_id: id, kind: "implicit", value }, [0, 404, 503]).catch(() => {});
}

/** The objects of a stream of server-sent events, up to its [DONE]. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new ApiError(0, "The answer broke off.");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: ?/, "");
      if (data === "[DONE]") return;
      const told = JSON.parse(data);
      if (told.error) throw new ApiError(500, told.error.message);
      yield told;
    }
  }
}
