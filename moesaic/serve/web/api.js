// Talking to the server: requests with the API key, errors with what they mean, streams of events, and polling.

/** What a server answered instead of a result. status 0: no answer at all. */
export class ApiError extends Error {
  constructor(message, { status = 0, code = null, param = null, retryAfter = null } = {}) {
    super(message);
    this.name = "ApiError";
    this.status = status;
    this.code = code;
    this.param = param;
    this.retryAfter = retryAfter;
  }
}

/** Yield the data of each server-sent event from text that comes in pieces of any size. */
export async function* eventsOf(pieces) {
  let buffer = "";
  let data = [];
  let afterReturn = false;
  for await (let piece of pieces) {
    // \r\n, \r and \n all end a line, and \r\n may be cut in two.
    if (afterReturn && piece.startsWith("\n")) piece = piece.slice(1);
    if (piece === "") continue;
    afterReturn = piece.endsWith("\r");
    const lines = (buffer + piece.replace(/\r\n?/g, "\n")).split("\n");
    buffer = lines.pop();
    for (const line of lines) {
      if (line === "") {
        if (data.length) yield data.join("\n");
        data = [];
      } else if (line.startsWith("data:")) {
        data.push(line.slice(line[5] === " " ? 6 : 5));
      }
    }
  }
  if (data.length) yield data.join("\n");
}

async function* textOf(response) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      yield decoder.decode(value, { stream: true });
    }
    yield decoder.decode();
  } finally {
    // Also when the reader of the events stops early: the server then ends the request.
    await reader.cancel().catch(() => {});
  }
}

function errorFrom(body, status, headers) {
  const error = body && typeof body.error === "object" && body.error ? body.error : {};
  const fallback = status ? `The server answered ${status} without saying why.` : "The server reported an error.";
  return new ApiError(typeof error.message === "string" && error.message ? error.message : fallback, {
    status,
    code: error.code ?? error.type ?? null,
    param: error.param ?? null,
    retryAfter: headers?.get("Retry-After") ?? null,
  });
}

/** A server at the page's own address. */
export class Api {
  key = "";

  async #fetch(path, options) {
    const headers = { ...options.headers };
    if (this.key) headers.Authorization = `Bearer ${this.key}`;
    let response;
    try {
      // Relative to the page, so that it also works behind a proxy that adds a path.
      response = await fetch(new URL(path, document.baseURI), { ...options, headers, cache: "no-store" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError("The server does not answer. Is it still running?");
    }
    if (response.ok) return response;
    const body = await response.json().catch(() => null);
    throw errorFrom(body, response.status, response.headers);
  }

  /** Return the JSON at a path. Raises: ApiError. */
  async get(path, { signal } = {}) {
    const response = await this.#fetch(path, { signal });
    try {
      return await response.json();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError(`The answer of ${path} is not JSON.`, { status: response.status });
    }
  }

  /** Yield the parsed events of a streamed request. Raises: ApiError; AbortError when the signal says so. */
  async *stream(path, body, signal) {
    const response = await this.#fetch(path, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ ...body, stream: true }),
      signal,
    });
    try {
      for await (const data of eventsOf(textOf(response))) {
        if (data === "[DONE]") return;
        let event;
        try {
          event = JSON.parse(data);
        } catch {
          throw new ApiError("The server sent an event that is not JSON.");
        }
        if (event.error) throw errorFrom(event, 0, null);
        yield event;
      }
    } catch (error) {
      if (error.name === "AbortError" || error instanceof ApiError) throw error;
      throw new ApiError("The connection was lost before the answer ended.");
    }
    throw new ApiError("The connection ended before the answer did.");
  }
}

/**
 * Call `task` about once per `seconds` while the tab is visible, never twice at once; less often while it fails (it
 * returns false). Return a function that calls it now and settles when it is done.
 */
export function poll(task, seconds) {
  let timer = null;
  let failures = 0;
  let running = null;
  async function turn() {
    try {
      failures = (await task()) ? 0 : failures + 1;
    } finally {
      running = null;
      if (!document.hidden) timer = setTimeout(start, 1000 * seconds * Math.min(2 ** failures, 8));
    }
  }
  function start() {
    clearTimeout(timer);
    running ??= turn();
    return running;
  }
  document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(timer) : start()));
  start();
  return async () => {
    // What runs already may have begun before whatever the caller changed.
    await running;
    await start();
  };
}
