// Answers that are arriving: one at a time for each conversation, while other views are shown too.
import { ApiError, call, posted, sse } from "../api.js";
import { signal } from "../lib.js";
import { model } from "../state.js";
import { requestBody } from "./request.js";
import { addMessage, branch, find, updateMessage } from "./store.js";

const SAVE_INTERVAL = 2000; // ms
const MIN_SPAN = 20; // ms, for a rate that means something

/**
 * An answer so far. Times are in ms.
 * @typedef {object} Progress
 * @property {string} content
 * @property {string} reasoning
 * @property {import("./store.js").ToolCall[]} calls
 * @property {number} start
 * @property {number | null} first when the first token came
 * @property {number} last when the latest came
 * @property {number} thought until when it was thinking
 * @property {number} tokens
 * @property {number} tokensAtFirst that came with the first chunk
 * @property {number | null} promptTokens
 * @property {number | null} cachedTokens
 * @property {string} id
 * @property {string} seed
 * @property {string} warnings
 * @property {string | null} finish
 */
/** @typedef {{messageId: string, controller: AbortController, progress: import("../../vendor/signals.js").Signal<Progress>}} Run */

/** What is being generated, by conversation. */
export const runs = signal(/** @type {ReadonlyMap<string, Run>} */ (new Map()));

/**
 * Generates an answer to the message `parent`, and returns its id; null while another one arrives.
 * @param {string} id of the conversation
 * @param {string | null} parent
 */
export function answer(id, parent) {
  if (runs.value.has(id)) return null;
  const messageId = addMessage(id, { parent, role: "assistant", content: "" });
  run(id, messageId);
  return messageId;
}

/**
 * Goes on with an answer that was stopped, cut or interrupted.
 * @param {string} id of the conversation
 * @param {string} messageId
 */
export function goOn(id, messageId) {
  if (!runs.value.has(id)) run(id, messageId);
}

/** @param {string} id of the conversation */
export const stop = (id) => runs.value.get(id)?.controller.abort();

/**
 * @param {string} id
 * @param {string} messageId
 */
async function run(id, messageId) {
  const old = branch(/** @type {import("./store.js").Conversation} */ (find(id)), messageId).at(-1);
  const progress = signal(newProgress(old));
  const controller = new AbortController();
  setRun(id, { messageId, controller, progress });
  const state = { ...progress.value }; // changed at once, and shown once a frame
  const show = onceAFrame(() => (progress.value = { ...state }));
  const save = setInterval(() => updateMessage(id, messageId, saved(state)), SAVE_INTERVAL);
  let failure = null;
  try {
    await receive(id, messageId, controller.signal, state, show);
  } catch (error) {
    if (controller.signal.aborted) state.finish = "stopped";
    else failure = failureOf(error);
  } finally {
    clearInterval(save);
    updateMessage(id, messageId, { ...saved(state), answer: report(state, failure) });
    setRun(id, null);
  }
}

/**
 * @param {string} id
 * @param {string} messageId
 * @param {AbortSignal} aborted
 * @param {Progress} state
 * @param {() => void} show
 */
async function receive(id, messageId, aborted, state, show) {
  const conversation = /** @type {import("./store.js").Conversation} */ (find(id));
  const messages = branch(conversation, messageId);
  if (!state.content) messages.pop(); // otherwise the server continues it
  const body = {
    ...requestBody(conversation.settings, messages, model.value),
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
  };
  const response = await call("v1/chat/completions", { ...posted(body), signal: aborted });
  state.seed = response.headers.get("x-lightwell-seed") ?? "";
  state.warnings = response.headers.get("x-lightwell-warnings") ?? "";
  for await (const { data } of sse(/** @type {ReadableStream<Uint8Array>} */ (response.body))) {
    if (data === "[DONE]") return;
    take(state, JSON.parse(data));
    show();
  }
  throw new ApiError("The answer ended before it was complete: the server may have stopped.");
}

/**
 * Adds a chunk of a stream to an answer.
 * @param {Progress} state
 * @param {any} chunk
 */
function take(state, chunk) {
  if (chunk.error) throw new ApiError(chunk.error.message, { status: chunk.error.status ?? 0, code: chunk.error.code });
  const now = performance.now();
  const choice = chunk.choices.find((/** @type {{index: number}} */ { index }) => index === 0); // one answer is shown
  const { delta = {}, finish_reason: finish = null } = choice ?? {};
  const { content = "", reasoning_content: reasoning = "", tool_calls: calls = [] } = delta;
  state.id = chunk.id;
  state.finish = finish ?? state.finish;
  if (chunk.usage) {
    state.tokens = chunk.usage.completion_tokens;
    state.promptTokens = chunk.usage.prompt_tokens;
    state.cachedTokens = chunk.usage.prompt_tokens_details?.cached_tokens ?? null;
  }
  if (!content && !reasoning && calls.length === 0) return;
  state.content += content ?? "";
  state.reasoning += reasoning ?? "";
  for (const call of calls) state.calls = withCall(state.calls, call);
  if (state.first === null) [state.first, state.tokensAtFirst] = [now, state.tokens];
  if (reasoning) state.thought = now;
  state.last = now;
}

/**
 * @param {import("./store.js").ToolCall[]} calls
 * @param {{index: number, id?: string, function?: {name?: string, arguments?: string}}} part
 */
function withCall(calls, { index, id = "", function: part = {} }) {
  const old = calls[index] ?? { id: "", name: "", arguments: "" };
  const call = { id: old.id || id, name: old.name + (part.name ?? ""), arguments: old.arguments + (part.arguments ?? "") };
  return calls.toSpliced(index, 1, call);
}

/**
 * @param {import("./store.js").Message | undefined} old
 * @returns {Progress}
 */
function newProgress(old) {
  const start = performance.now();
  return {
    content: old?.content ?? "",
    reasoning: old?.content ? (old.reasoning ?? "") : "",
    calls: [],
    start,
    first: null,
    last: start,
    thought: start,
    tokens: 0,
    tokensAtFirst: 0,
    promptTokens: null,
    cachedTokens: null,
    id: "",
    seed: "",
    warnings: "",
    finish: null,
  };
}

/** @param {Progress} state */
const saved = ({ content, reasoning, calls }) => ({ content, reasoning, calls });

/**
 * How fast tokens come after the first one, in tokens per second; 0 while it is not known.
 * @param {Progress} state
 */
export function tokensPerSecond({ first, last, tokens, tokensAtFirst }) {
  return first !== null && last > first + MIN_SPAN ? (1000 * (tokens - tokensAtFirst)) / (last - first) : 0;
}

/**
 * @param {Progress} state
 * @param {import("./store.js").Failure | null} error
 * @returns {import("./store.js").Answer}
 */
function report(state, error) {
  const { id, seed, warnings, finish, tokens, promptTokens, cachedTokens, start, first, last, thought } = state;
  return {
    id,
    seed,
    warnings,
    finish,
    error,
    tokens,
    promptTokens,
    cachedTokens,
    first: first === null ? null : (first - start) / 1000,
    seconds: (last - start) / 1000,
    tokensPerSecond: tokensPerSecond(state),
    thinking: state.reasoning && first !== null ? (thought - first) / 1000 : 0,
  };
}

/**
 * @param {unknown} error
 * @returns {import("./store.js").Failure}
 */
function failureOf(error) {
  if (error instanceof ApiError) return { message: error.message, status: error.status, retryAfter: error.retryAfter };
  const isBroken = error instanceof TypeError; // how browsers report a connection that breaks in a stream
  return { message: isBroken ? "The connection to the server broke." : /** @type {Error} */ (error).message, status: 0, retryAfter: null };
}

/**
 * @param {string} id
 * @param {Run | null} run
 */
function setRun(id, run) {
  const changed = new Map(runs.value);
  if (run) changed.set(id, run);
  else changed.delete(id);
  runs.value = changed;
}

/** @param {() => void} action */
function onceAFrame(action) {
  let isPlanned = false;
  return () => {
    if (isPlanned) return;
    isPlanned = true;
    requestAnimationFrame(() => {
      isPlanned = false;
      action();
    });
  };
}
