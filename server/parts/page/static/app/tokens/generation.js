// Texts as tokens with their log probabilities: scored as a whole, or as they are generated.
import { call, callJson, posted, sse } from "../api.js";

export const NUM_ALTERNATIVES = 10;

/** @typedef {{id: number | null, text: string, logprob: number}} Alternative */
/**
 * @typedef {object} TextToken
 * @property {number} id
 * @property {string} text
 * @property {number | null} logprob of the model itself, before any setting; null for the first token
 * @property {Alternative[]} alternatives the likeliest tokens at its place, the likeliest first
 * @property {"prompt" | "generated" | "chosen"} origin
 * @property {string | null} requestId of the request that computed what follows the token before it
 */
/** @typedef {Record<string, number | null>} Settings fields of a request; null means the default of the server */

/**
 * Returns the token ids of a prompt, or of a conversation with one message.
 * @param {"completion" | "chat"} kind
 * @param {string} text
 * @param {string} model
 * @param {AbortSignal} signal
 * @returns {Promise<number[]>}
 */
export async function encode(kind, text, model, signal) {
  const [path, body] =
    kind === "chat"
      ? ["v1/chat/completions/render", { messages: [{ role: "user", content: text }] }]
      : ["v1/completions/render", { prompt: text }];
  const answer = await callJson(path, { json: { model, ...body }, signal });
  return (Array.isArray(answer) ? answer[0] : answer).token_ids;
}

/**
 * Returns a text that is given: what the model thinks of each of its tokens.
 * @param {number[]} ids
 * @param {string} model
 * @param {AbortSignal} signal
 * @param {number} numAlternatives
 * @returns {Promise<TextToken[]>}
 */
export async function score(ids, model, signal, numAlternatives = NUM_ALTERNATIVES) {
  const fields = { max_tokens: 0, echo: true, logprobs: 0, prompt_logprobs: numAlternatives };
  const { choices } = await callJson("v1/completions", { json: { model, prompt: ids, ...fields }, signal });
  const [{ prompt_logprobs: entries, logprobs }] = choices;
  return ids.map((id, index) => {
    const entry = entries[index];
    return {
      id,
      text: logprobs.tokens[index],
      logprob: entry?.[id].logprob ?? null,
      alternatives: entry ? ranked(entry) : [],
      origin: "prompt",
      requestId: null,
    };
  });
}

/**
 * @param {Record<string, {logprob: number, rank: number, decoded_token: string}>} entry
 * @returns {Alternative[]}
 */
const ranked = (entry) =>
  Object.entries(entry)
    .map(([id, { logprob, decoded_token }]) => ({ id: Number(id), text: decoded_token, logprob }))
    .sort((a, b) => b.logprob - a.logprob);

/**
 * Yields the tokens that follow `ids`, as they are generated.
 * @param {number[]} ids
 * @param {Settings} settings
 * @param {string} model
 * @param {AbortSignal} signal
 * @returns {AsyncGenerator<TextToken[]>}
 */
export async function* generate(ids, settings, model, signal) {
  const fields = { stream: true, logprobs: NUM_ALTERNATIVES, return_token_ids: true, skip_special_tokens: false };
  const response = await call("v1/completions", { ...posted({ model, prompt: ids, ...fields, ...settings }), signal });
  for await (const { data } of sse(/** @type {ReadableStream<Uint8Array>} */ (response.body))) {
    if (data === "[DONE]") return;
    const { id, choices, error } = JSON.parse(data);
    if (error) throw new Error(error.message);
    for (const { token_ids, logprobs } of choices) if (logprobs) yield generated(id, token_ids, logprobs);
  }
  throw new Error("The answer broke off: the server ended it before its end.");
}

/**
 * @param {string} requestId
 * @param {number[]} ids
 * @param {{tokens: string[], token_logprobs: number[], top_logprobs: Record<string, number>[]}} logprobs
 * @returns {TextToken[]}
 */
const generated = (requestId, ids, { tokens, token_logprobs, top_logprobs }) =>
  ids.map((id, index) => ({
    id,
    text: tokens[index],
    logprob: token_logprobs[index],
    alternatives: Object.entries(top_logprobs[index])
      .map(([text, logprob]) => ({ id: text === tokens[index] ? id : null, text, logprob }))
      .sort((a, b) => b.logprob - a.logprob),
    origin: "generated",
    requestId,
  }));

/**
 * Returns the id of an alternative, which a stream names by its text only. Several tokens may have the same text, and
 * the model may give a prompt slightly other probabilities than what it writes.
 * @param {number[]} ids before it
 * @param {Alternative} alternative
 * @param {string} model
 * @param {AbortSignal} signal
 * @returns {Promise<number>}
 */
export async function idOf(ids, alternative, model, signal) {
  if (alternative.id !== null) return alternative.id;
  const [{ alternatives }] = (await score([...ids, ids[0]], model, signal, 2 * NUM_ALTERNATIVES)).slice(-1);
  const namesakes = alternatives.filter(({ text }) => text === alternative.text);
  const distance = (/** @type {Alternative} */ { logprob }) => Math.abs(logprob - alternative.logprob);
  const candidates = namesakes.length ? namesakes : alternatives;
  return /** @type {number} */ (candidates.reduce((best, entry) => (distance(entry) < distance(best) ? entry : best)).id);
}

/**
 * How surprising a token was, in bits.
 * @param {TextToken} token
 */
export const surprise = ({ logprob }) => (logprob === null ? null : -logprob / Math.LN2);

/**
 * How uncertain the model was about a token, in bits, as far as it is known: all tokens but the alternatives count as one.
 * @param {TextToken} token
 */
export function entropy({ alternatives }) {
  if (alternatives.length === 0) return null;
  const known = alternatives.map(({ logprob }) => Math.exp(logprob));
  const rest = 1 - known.reduce((sum, probability) => sum + probability, 0);
  return [...known, rest].reduce((sum, p) => (p > 0 ? sum - p * Math.log2(p) : sum), 0);
}
