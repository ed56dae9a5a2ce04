// Calls of the server's API, with the key that was entered. Paths are relative to the page, which a proxy may prefix.
import { authorization, forgetKey, hasKey } from "../key.js";
import { signal } from "./lib.js";

const FIRST_RETRY = 500; // ms
const LAST_RETRY = 10000; // ms
const READ_TIMEOUT = 30000; // ms
const SILENCE = 45000; // ms without a byte of a stream; the server sends a comment every 15 s

/** Why the server wants a key: it has none yet, or did not accept the one it got. */
export const keyProblem = signal(/** @type {"" | "missing" | "rejected"} */ (""));
/** The model whose engine is asked what it does; empty if there is only one. */
export const askedModel = signal("");
/** How often the server did not know a model. */
export const numUnknownModels = signal(0);

/** An answer of the server that is an error, or status 0 if there was no answer. */
export class ApiError extends Error {
  /**
   * @param {string} message
   * @param {{status?: number, code?: string | null, retryAfter?: number | null}} [details]
   */
  constructor(message, { status = 0, code = null, retryAfter = null } = {}) {
    super(message);
    this.name = "ApiError";
    this.status = status;
    this.code = code;
    this.retryAfter = retryAfter; // seconds
  }
}

/**
 * Sends a request and returns the response; throws an ApiError if it is not a good one.
 * @param {string} path
 * @param {RequestInit} [options]
 * @returns {Promise<Response>}
 */
export async function call(path, options = {}) {
  const response = await fetch(withModel(path), { ...options, headers: { ...options.headers, ...authorization() } }).catch((error) => {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached.");
  });
  if (response.ok) return response;
  if (response.status === 401) {
    keyProblem.value = hasKey() ? "rejected" : "missing";
    forgetKey();
  }
  const error = await errorOf(response);
  if (error.code === "model_not_found") numUnknownModels.value += 1;
  throw error;
}

/**
 * Adds the model to a question about what its engine does.
 * @param {string} path
 */
function withModel(path) {
  if (!path.startsWith("lightwell/v1/") || !askedModel.value || /[?&]model=/.test(path)) return path;
  return `${path}${path.includes("?") ? "&" : "?"}model=${encodeURIComponent(askedModel.value)}`;
}

/**
 * Calls the API to read something, and fails if the server does not answer.
 * @param {string} path
 * @param {RequestInit} [options]
 */
export function callToRead(path, { signal: stopped, ...options } = {}) {
  const timeout = AbortSignal.timeout(READ_TIMEOUT);
  return call(path, { ...options, signal: stopped ? AbortSignal.any([stopped, timeout]) : timeout });
}

/**
 * Returns the JSON of an answer; with a body, sends it as JSON by POST.
 * @param {string} path
 * @param {RequestInit & {json?: unknown}} [options]
 */
export async function callJson(path, { json, ...options } = {}) {
  return (await (json === undefined ? callToRead(path, options) : call(path, { ...options, ...posted(json) }))).json();
}

/**
 * Options of a request that posts JSON.
 * @param {unknown} json
 * @returns {RequestInit}
 */
export const posted = (json) => ({
  method: "POST",
  headers: { "Content-Type": "application/json" },
  body: JSON.stringify(json),
});

/** @param {Response} response */
async function errorOf(response) {
  const body = await response.json().catch(() => null);
  const message = body?.error?.message ?? `The server answered with status ${response.status}.`;
  const retryAfter = Number(response.headers.get("retry-after")) || null;
  return new ApiError(message, { status: response.status, code: body?.error?.code ?? null, retryAfter });
}

/**
 * Yields the server-sent events of a response.
 * @param {ReadableStream<Uint8Array>} body
 * @param {() => void} [onBytes] is called for comments too
 * @returns {AsyncGenerator<{event: string, id: string, data: string}>}
 */
export async function* sse(body, onBytes = () => {}) {
  let buffer = "";
  for await (const text of texts(body)) {
    onBytes();
    const blocks = (buffer + text).replaceAll("\r\n", "\n").split("\n\n");
    buffer = /** @type {string} */ (blocks.pop());
    for (const block of blocks) {
      const event = parseEvent(block);
      if (event.data) yield event;
    }
  }
}

// Safari's streams cannot be iterated.
/** @param {ReadableStream<Uint8Array>} body */
async function* texts(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  try {
    for (let { done, value } = await reader.read(); !done; { done, value } = await reader.read()) {
      yield decoder.decode(value, { stream: true });
    }
  } finally {
    reader.cancel().catch(() => {}); // ends the request if the caller stopped reading
  }
}

/** @param {string} block */
function parseEvent(block) {
  const event = { event: "message", id: "", data: "" };
  const data = [];
  for (const line of block.split("\n")) {
    const [, name, value] = /^([^:]*):? ?(.*)$/s.exec(line) ?? [];
    if (name === "data") data.push(value);
    else if (name === "event" || name === "id") event[name] = value;
  }
  return { ...event, data: data.join("\n") };
}

/**
 * Follows a stream of events with JSON data, and connects again after the last one when it breaks.
 * @param {string} path
 * @param {(message: {event: string, id: string, data: any}) => void} onMessage
 * @param {(state: "connecting" | "open" | "waiting", error: Error | null) => void} [onState]
 * @returns {() => void} stops it
 */
export function follow(path, onMessage, onState = () => {}) {
  const controller = new AbortController();
  run(path, onMessage, onState, controller.signal).catch((error) => {
    if (!controller.signal.aborted) throw error;
  });
  return () => controller.abort();
}

/**
 * @param {string} path
 * @param {(message: {event: string, id: string, data: any}) => void} onMessage
 * @param {(state: "connecting" | "open" | "waiting", error: Error | null) => void} onState
 * @param {AbortSignal} stopped
 */
async function run(path, onMessage, onState, stopped) {
  let lastId = "";
  let delay = FIRST_RETRY;
  while (!stopped.aborted) {
    let problem = null;
    const silence = new Watchdog(SILENCE);
    onState("connecting", null);
    try {
      const headers = lastId ? { "Last-Event-ID": lastId } : undefined;
      const response = await call(path, { headers, signal: AbortSignal.any([stopped, silence.signal]) });
      onState("open", null);
      const onBytes = () => {
        delay = FIRST_RETRY;
        silence.restart();
      };
      for await (const { event, id, data } of sse(/** @type {ReadableStream<Uint8Array>} */ (response.body), onBytes)) {
        lastId = id || lastId;
        if (!stopped.aborted) onMessage({ event, id, data: JSON.parse(data) });
      }
    } catch (error) {
      problem = /** @type {Error} */ (error);
    } finally {
      silence.end();
    }
    if (stopped.aborted) return;
    onState("waiting", problem);
    await sleep(delay, stopped);
    delay = Math.min(2 * delay, LAST_RETRY);
  }
}

/**
 * @param {number} ms
 * @param {AbortSignal} stopped
 */
const sleep = (ms, stopped) =>
  new Promise((resolve) => {
    const end = () => {
      clearTimeout(timer);
      stopped.removeEventListener("abort", end);
      resolve(undefined);
    };
    const timer = setTimeout(end, ms);
    stopped.addEventListener("abort", end);
  });

/** A signal that aborts unless it is restarted in time. */
class Watchdog {
  #controller = new AbortController();
  #timer = 0;
  #ms;

  /** @param {number} ms */
  constructor(ms) {
    this.#ms = ms;
    this.restart();
  }

  get signal() {
    return this.#controller.signal;
  }

  restart() {
    this.end();
    this.#timer = setTimeout(() => this.#controller.abort(new ApiError("The server has fallen silent.")), this.#ms);
  }

  end() {
    clearTimeout(this.#timer);
  }
}
