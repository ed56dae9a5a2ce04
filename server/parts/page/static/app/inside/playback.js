// The text whose making is shown, the position that is shown, and what the engine said about it so far.
import { inspect, isAbort, sleep, tokensOf } from "../inspect.js";
import { batch, computed, signal } from "../lib.js";
import { model } from "../state.js";
import { encode, generate } from "../tokens/generation.js";

/** @typedef {import("../inspect.js").Token} Token */
/** @typedef {import("../inspect.js").Position & {isFull: boolean, sampling: import("../inspect.js").Sampling | null}} Reading */
/** @typedef {{id: string, tokens: Token[], numPrompt: number, numHeads: number[], num_layers: number, num_heads: number, num_experts: number}} Text */

export const NUM_COLUMNS = 12; // positions in the table of layers
const NUM_CANDIDATES = 8;
const MAX_ROWS = 512; // of attention weights that are kept
const DELAY = 60; // ms that a position is shown before the engine is asked about it

export const text = signal(/** @type {Text | null} */ (null));
/** The token that is computed; the one after it is what comes out. */
export const cursor = signal(0);
export const layer = signal(0);
export const head = signal(0);
export const isPlaying = signal(false);
export const isWriting = signal(false);
export const problem = signal(/** @type {Error | null} */ (null));
/** By position. */
export const readings = signal(/** @type {Map<number, Reading>} */ (new Map()));
/** Rows of attention weights, by `rowKey`. */
export const rows = signal(/** @type {Map<string, number[]>} */ (new Map()));
const firstColumn = signal(0);
/** Whether the chosen layer has attention, and not something else in its place. */
export const hasAttention = computed(() => text.value?.numHeads[layer.value] !== 0);

/** The last position after which a token came. */
export const lastCursor = computed(() => Math.max(0, (text.value?.tokens.length ?? 0) - 2));
/** The positions in the table of layers. */
export const columns = computed(() => {
  const end = Math.min(firstColumn.value + NUM_COLUMNS, lastCursor.value + 1);
  return Array.from({ length: Math.max(0, end - firstColumn.value) }, (_, index) => firstColumn.value + index);
});
/** What the engine said about the position that is shown. */
export const reading = computed(() => readings.value.get(cursor.value) ?? null);

/**
 * @param {{layer: number, head: number}} place
 * @param {number} position
 */
const rowKey = (place, position) => `${place.layer}.${place.head}.${position}`;
/** @param {number} position */
export const rowOf = (position) => rows.value.get(rowKey({ layer: layer.value, head: head.value }, position)) ?? null;

/**
 * Chooses a layer. It may have fewer heads than the last one.
 * @param {number} index
 */
export function chooseLayer(index) {
  batch(() => {
    layer.value = index;
    head.value = Math.min(head.value, Math.max(0, (text.value?.numHeads[index] ?? 1) - 1));
  });
}

/** @param {number} position which is clamped, since it may come from a URL */
export function moveTo(position) {
  batch(() => {
    cursor.value = Math.min(Math.max(Math.trunc(position) || 0, 0), lastCursor.value);
    if (cursor.value < firstColumn.value) firstColumn.value = cursor.value;
    firstColumn.value = Math.max(firstColumn.value, cursor.value - NUM_COLUMNS + 1);
  });
}

let work = new AbortController(); // writes or opens the text
let task = async (/** @type {AbortSignal} */ _signal) => {};
/** How often the reader asked to try again. */
export const numTries = signal(0);

/** Tries again what failed. */
export const retry = () => (text.value === null ? begin(task) : void numTries.value++);

/**
 * Lets the model write, and shows the first token that it wrote.
 * @param {"completion" | "chat"} kind
 * @param {string} prompt
 * @param {import("../tokens/generation.js").Settings} settings
 */
export const write = (kind, prompt, settings) =>
  begin(async (signal) => {
    const ids = await encode(kind, prompt, model.value, signal);
    let id = "";
    for await (const tokens of generate(ids, settings, model.value, signal)) id = tokens[0]?.requestId ?? id;
    await show(id, null, signal);
  });

/**
 * Shows a request.
 * @param {string} id
 * @param {number | null} position
 */
export const open = (id, position) => begin((signal) => show(id, position, signal));

/** @param {(signal: AbortSignal) => Promise<void>} newTask */
async function begin(newTask) {
  work.abort();
  work = new AbortController();
  task = newTask;
  const { signal } = work;
  batch(() => {
    text.value = problem.value = null;
    isPlaying.value = false;
    isWriting.value = true;
  });
  try {
    await task(signal);
  } catch (error) {
    if (!isAbort(error)) problem.value = /** @type {Error} */ (error);
  } finally {
    if (!signal.aborted) isWriting.value = false;
  }
}

/**
 * @param {string} id
 * @param {number | null} position
 * @param {AbortSignal} signal
 */
async function show(id, position, signal) {
  const found = await tokensOf(id, signal);
  batch(() => {
    text.value = { ...found, id };
    readings.value = new Map();
    rows.value = new Map();
    layer.value = Math.min(layer.value || Math.floor(found.num_layers / 2), found.num_layers - 1);
    head.value = Math.min(head.value, found.num_heads - 1);
    firstColumn.value = 0;
    moveTo(position ?? found.numPrompt - 1);
  });
}

/**
 * Asks about all that is shown and not known yet: first about the position, then about the others of the table.
 * @param {AbortSignal} signal
 */
export async function readShown(signal) {
  try {
    await sleep(DELAY, signal);
    problem.value = null;
    if (!reading.value?.isFull) await ask(cursor.value, cursor.value + 1, NUM_CANDIDATES, signal);
    const missing = columns.value.filter((position) => !readings.value.has(position) || (hasAttention.value && rowOf(position) === null));
    if (missing.length > 0) await ask(missing[0], missing[missing.length - 1] + 1, 1, signal);
  } catch (error) {
    if (isAbort(error)) return;
    problem.value = /** @type {Error} */ (error);
    isPlaying.value = false;
  }
}

/**
 * @param {number} start
 * @param {number} end
 * @param {number} top
 * @param {AbortSignal} signal
 */
async function ask(start, end, top, signal) {
  const { id } = /** @type {Text} */ (text.value);
  const place = { layer: layer.value, head: head.value }; // others may be chosen before the answer comes
  const answer = await inspect({ id, start, end, top, ...(hasAttention.value && place) }, signal);
  const isFull = top === NUM_CANDIDATES;
  const known = new Map(readings.value);
  for (const each of answer.positions) {
    if (isFull || !known.has(each.position)) known.set(each.position, { ...each, isFull, sampling: isFull ? answer.sampling : null });
  }
  const weights = answer.attention?.rows.map((row, index) => /** @type {const} */ ([rowKey(place, start + index), row])) ?? [];
  batch(() => {
    readings.value = known;
    rows.value = new Map([...rows.value, ...weights].slice(-MAX_ROWS));
  });
}
