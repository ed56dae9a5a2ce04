// The texts of the view, side by side: the first one, and those that go on from an alternative of another.
import { isAbort, tokensOf } from "../inspect.js";
import { batch, signal } from "../lib.js";
import { model } from "../state.js";
import { encode, generate, idOf, score } from "./generation.js";

/** @typedef {import("./generation.js").TextToken} TextToken */
/**
 * @typedef {object} Branch
 * @property {number} number
 * @property {string} model
 * @property {TextToken[]} tokens
 * @property {number} numShared how many of its first tokens are those of its parent
 * @property {number | null} parent number of the branch that it left
 * @property {boolean} isRunning
 * @property {Error | null} error
 * @property {AbortController} controller
 * @property {() => void} retry makes the branch again, after an error
 */
/** @typedef {{branch: number, index: number}} Place of a token */

export const branches = signal(/** @type {Branch[]} */ ([]));
/** The token that was chosen by click or key. */
export const chosen = signal(/** @type {Place | null} */ (null));
/** The token that the pointer is on. */
export const hovered = signal(/** @type {Place | null} */ (null));
/** The request whose tokens are shown, if it was opened by its id. */
export const openedId = signal("");
export const settings = signal(
  /** @type {import("./generation.js").Settings} */ ({ max_tokens: 48, temperature: null, top_p: null, top_k: null, min_p: null, seed: null }),
);

/** @param {number} number */
export const branchOf = (number) => branches.value.find((branch) => branch.number === number) ?? null;

/**
 * Generates after a prompt, in place of all branches.
 * @param {"completion" | "chat"} kind
 * @param {string} text
 */
export function start(kind, text) {
  const branch = replaceAll("", () => start(kind, text));
  return run(branch, async ({ signal }) => {
    const ids = await encode(kind, text, branch.model, signal);
    add(branch, await score(ids, branch.model, signal));
    await follow(branch, signal);
  });
}

/**
 * Shows the tokens of a request, in place of all branches.
 * @param {string} id
 */
export function open(id) {
  const branch = replaceAll(id, () => open(id));
  return run(branch, async ({ signal }) => {
    const { tokens, numPrompt, model: name } = await tokensOf(id, signal);
    update(branch, { model: name });
    const scored = await score(tokens.map(({ token_id }) => token_id), name, signal);
    add(branch, scored.map((token, index) => (index < numPrompt ? token : { ...token, origin: "generated", requestId: id })));
  });
}

/**
 * Goes on from an alternative to a token, in a new branch.
 * @param {Place} place
 * @param {import("./generation.js").Alternative} alternative
 */
export function goOn({ branch: number, index }, alternative) {
  const parent = /** @type {Branch} */ (branchOf(number));
  const replaced = parent.tokens[index];
  const before = parent.tokens.slice(0, index);
  const retry = () => {
    close(branch);
    if (branchOf(number)) goOn({ branch: number, index }, alternative);
  };
  const branch = makeBranch(parent.model, { tokens: before, numShared: index, parent: number, retry });
  batch(() => {
    branches.value = [...branches.value, branch];
    chosen.value = { branch: branch.number, index };
    hovered.value = null;
  });
  return run(branch, async ({ signal }) => {
    const id = await idOf(before.map((token) => token.id), alternative, branch.model, signal);
    add(branch, [{ ...replaced, id, text: alternative.text, logprob: alternative.logprob, origin: "chosen" }]);
    await follow(branch, signal);
  });
}

/** @param {Branch} branch */
export function close({ number, controller }) {
  controller.abort();
  branches.value = branches.value.filter((branch) => branch.number !== number);
  const [first] = branches.value;
  if (chosen.value?.branch === number) chosen.value = first ? { branch: first.number, index: first.tokens.length - 1 } : null;
  hovered.value = null;
}

/**
 * @param {string} id
 * @param {() => void} retry
 */
function replaceAll(id, retry) {
  for (const { controller } of branches.value) controller.abort();
  const branch = { ...makeBranch(model.value, { retry }), number: 1 };
  batch(() => {
    branches.value = [branch];
    chosen.value = hovered.value = null;
    openedId.value = id;
  });
  return branch;
}

/**
 * @param {string} name
 * @param {Partial<Branch>} [fields]
 * @returns {Branch}
 */
const makeBranch = (name, fields = {}) => ({
  number: Math.max(0, ...branches.value.map(({ number }) => number)) + 1,
  model: name,
  tokens: [],
  numShared: 0,
  parent: null,
  isRunning: true,
  error: null,
  controller: new AbortController(),
  retry: () => {},
  ...fields,
});

/**
 * @param {Branch} branch
 * @param {(controller: AbortController) => Promise<void>} work
 */
async function run(branch, work) {
  try {
    await work(branch.controller);
  } catch (error) {
    if (!isAbort(error)) update(branch, { error: /** @type {Error} */ (error) });
  } finally {
    update(branch, { isRunning: false });
  }
}

/**
 * Generates what follows the tokens of a branch.
 * @param {Branch} branch
 * @param {AbortSignal} signal
 */
async function follow(branch, signal) {
  const current = /** @type {Branch} */ (branches.value.find(({ controller }) => controller === branch.controller));
  const ids = current.tokens.map(({ id }) => id);
  for await (const tokens of generate(ids, settings.value, current.model, signal)) add(branch, tokens);
}

/**
 * @param {Branch} branch
 * @param {TextToken[]} tokens
 */
function add({ controller }, tokens) {
  branches.value = branches.value.map((branch) => (branch.controller === controller ? { ...branch, tokens: [...branch.tokens, ...tokens] } : branch));
}

/**
 * @param {Branch} branch
 * @param {Partial<Branch>} fields
 */
function update({ controller }, fields) {
  branches.value = branches.value.map((branch) => (branch.controller === controller ? { ...branch, ...fields } : branch));
}
