// Asks the engine what happened inside the model at some positions of a text: `POST /lightwell/v1/inspect`.
import { ApiError, callJson } from "./api.js";

/** @typedef {{token_id: number, token: string}} Token */
/** @typedef {Token & {logprob: number}} Candidate */
/** @typedef {[number, number]} Weight of a position or an expert */
/**
 * @typedef {object} Layer
 * @property {Candidate[]} lens
 * @property {number} residual_norm
 * @property {number} attention_norm
 * @property {number} mlp_norm
 * @property {Weight[][]} heads
 * @property {Weight[] | null} experts
 * @property {{kept: number, written: number} | null} state
 */
/**
 * @typedef {object} Position
 * @property {number} position
 * @property {Layer[]} layers
 * @property {Token | null} next
 * @property {Token | null} recomputed
 * @property {boolean | null} is_equal
 */
/** @typedef {{name: string, num_tokens: number, num_removed: number, top: Candidate[], removed: Candidate[]}} Stage */
/** @typedef {Token & {logit: number, noise: number}} NoisyToken */
/**
 * @typedef {object} Sampling
 * @property {number} position
 * @property {Stage[]} stages
 * @property {NoisyToken[]} noise
 * @property {Token | null} recomputed
 * @property {Token | null} sent
 */
/**
 * @typedef {object} Inspection
 * @property {string | null} id
 * @property {string} model
 * @property {number} num_layers
 * @property {number} num_heads
 * @property {number} num_experts
 * @property {number} start
 * @property {number} end
 * @property {number} num_prompt_tokens
 * @property {number} num_tokens
 * @property {Token[]} tokens
 * @property {Position[]} positions
 * @property {{layer: number, head: number, rows: number[][]} | null} attention
 * @property {Sampling | null} sampling
 * @property {boolean | null} is_equal
 */
/**
 * @typedef {object} Question
 * @property {string} [id]
 * @property {string | number[]} [prompt]
 * @property {string} [model]
 * @property {number} [start]
 * @property {number} [end]
 * @property {number} [top]
 * @property {number} [layer]
 * @property {number} [head]
 */

const MAX_TRIES = 30; // while the engine inspects something else
const LONGEST = 90; // s that an answer is waited for

/** What the refusals of the engine mean to the reader, by status. */
const MEANINGS = new Map([
  [400, "The engine cannot inspect this."],
  [403, "Looking inside is not allowed from here."],
  [404, "There is nothing left to look at."],
  [429, "The engine is inspecting something else."],
  [503, "The memory is needed for answers just now."],
]);

/** A refusal to inspect, with what it means. */
export class InspectionError extends Error {
  /** @param {ApiError} error */
  constructor({ status, code, message }) {
    super(`${(code === "not_enabled" ? "Inspection is turned off." : MEANINGS.get(status)) ?? ""} ${message}`.trim());
    this.mayRetry = ![400, 403, 404].includes(status);
  }
}

/**
 * Asks the engine; while it inspects for somebody else, asks again.
 * @param {Question} question
 * @param {AbortSignal} signal
 * @returns {Promise<Inspection>}
 */
export async function inspect(question, signal) {
  for (let attempt = 1; ; attempt++) {
    try {
      return await askInTurn(question, signal);
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      if (error.status !== 429 || attempt === MAX_TRIES) throw new InspectionError(error);
      await sleep(1000 * (error.retryAfter ?? 1), signal);
    }
  }
}

/** What the engine works on: it refuses a second question until then. */
let current = Promise.resolve();

/**
 * @param {Question} question
 * @param {AbortSignal} signal
 */
async function askInTurn(question, signal) {
  for (let seen = null; seen !== current; ) await (seen = current);
  signal.throwIfAborted();
  const late = AbortSignal.timeout(1000 * LONGEST);
  const answer = callJson("lightwell/v1/inspect", { json: question, signal: AbortSignal.any([signal, late]) }).catch((error) => {
    throw late.aborted && !signal.aborted ? new ApiError(`The engine did not answer in ${LONGEST} seconds.`) : error;
  });
  current = answer.catch(() => {});
  return answer;
}

/**
 * Returns the tokens of a request, and the model that wrote them.
 * @param {string} id
 * @param {AbortSignal} signal
 */
export async function tokensOf(id, signal) {
  const { tokens, positions, num_prompt_tokens: numPrompt, ...rest } = await inspect({ id, top: 1 }, signal);
  const last = positions.at(-1)?.next;
  const numHeads = positions[0].layers.map(({ heads }) => heads.length); // of each layer
  return { ...rest, tokens: last ? [...tokens, last] : tokens, numPrompt, numHeads };
}

/**
 * Waits; throws an AbortError if the signal says so.
 * @param {number} ms
 * @param {AbortSignal} signal
 * @returns {Promise<void>}
 */
export const sleep = (ms, signal) =>
  new Promise((resolve, reject) => {
    const fail = () => (clearTimeout(timer), reject(new DOMException("Stopped.", "AbortError")));
    const timer = setTimeout(() => (signal.removeEventListener("abort", fail), resolve()), ms);
    if (signal.aborted) fail();
    else signal.addEventListener("abort", fail, { once: true });
  });

/** @param {unknown} error */
export const isAbort = (error) => error instanceof Error && error.name === "AbortError";
