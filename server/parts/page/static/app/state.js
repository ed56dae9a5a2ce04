// What all views know: the server's state, its models, the key and the theme.
import { keepKey } from "../key.js";
import { askedModel, callJson, callToRead, keyProblem, numUnknownModels } from "./api.js";
import { computed, effect, signal } from "./lib.js";

const INTERVAL = 5000; // ms between two looks at the server's state
const MODEL = "lightwell-model";
const THEME = "lightwell-theme";

/** "connecting", "ready", "unreachable", or what the server says why it is not ready. */
export const server = signal("connecting");
/**
 * @typedef {{id: string, root: string, parent: string | null, state?: string, max_model_len?: number | null, reasoning_format?: string | null, tool_format?: string,
 *   default_sampling?: Record<string, any>}} Model
 */
/** The models, as the API lists them. */
export const models = signal(/** @type {Model[]} */ ([]));
/** The name of the chosen model. */
export const model = signal(stored(MODEL) ?? "");
/** The models to choose from: the name of each, with its state unless it is loaded. */
export const modelOptions = computed(() => models.value.map(({ id, state }) => {
  if (state === undefined || state === "loaded") return id;
  return [id, `${id} (${state === "unloaded" ? "not loaded" : state})`];
}));
/** What the API says about the chosen model. */
export const modelInfo = computed(() => models.value.find(({ id }) => id === model.value) ?? null);
/** How many tokens a prompt and its answer may have together; null before it is known. */
export const contextLength = computed(() => modelInfo.value?.max_model_len ?? null);
/** Whether the server wants a key. */
export const needsKey = computed(() => keyProblem.value !== "");
/** Whether the server serves the documentation of its API. */
export const hasDocs = signal(false);
/** "auto", "light" or "dark". */
export const theme = signal(document.documentElement.dataset.theme ?? "auto");
export const baseUrl = new URL("v1", document.baseURI).href;

effect(() => {
  document.documentElement.dataset.theme = theme.value;
  store(THEME, theme.value === "auto" ? null : theme.value);
});
effect(() => {
  if (models.value.length > 0) store(MODEL, model.value);
});
effect(() => {
  const hasSeveral = new Set(models.value.map(({ root, parent }) => parent ?? root)).size > 1; // not only several names
  askedModel.value = hasSeveral ? model.value : "";
});
effect(() => {
  if (numUnknownModels.value > 0) readModels().catch(() => {}); // the next look at the state says why
});

/** Reads the state and, if they are not known, the models of the server. */
export async function refresh() {
  try {
    const response = await callToRead("readyz");
    const { models: states } = await response.json().catch(() => ({})); // of models that are loaded and unloaded
    if ((models.value.length === 0 || states) && !needsKey.value) await readModels();
    server.value = "ready";
  } catch (error) {
    const { status, message } = /** @type {import("./api.js").ApiError} */ (error);
    if (status === 401) server.value = "ready"; // the form for the key says the rest
    else {
      models.value = []; // it may be another server when it is back
      server.value = status ? message : "unreachable";
    }
  }
}

/** Reads which models there are, and chooses another one if the chosen one is gone. */
export async function readModels() {
  const { data } = await callJson("v1/models");
  if (!data.some((/** @type {Model} */ { id }) => id === model.value)) model.value = data[0]?.id ?? "";
  models.value = data;
}

/** Watches the state from now on. */
export async function watch() {
  if (!document.hidden || server.value !== "ready") await refresh();
  setTimeout(watch, INTERVAL);
}

/**
 * Uses a key from now on.
 * @param {string} key
 */
export async function useKey(key) {
  keepKey(key);
  keyProblem.value = "";
  await refresh();
}

/** Looks whether the server serves the documentation. */
export async function findDocs() {
  hasDocs.value = await fetch("docs", { method: "HEAD" }).then(({ ok }) => ok, () => false);
}

/** @param {string} name */
function stored(name) {
  try {
    return localStorage.getItem(name);
  } catch {
    return null; // storage is blocked
  }
}

/**
 * @param {string} name
 * @param {string | null} value
 */
function store(name, value) {
  try {
    if (value === null) localStorage.removeItem(name);
    else localStorage.setItem(name, value);
  } catch {
    // The choice lasts until the page is closed.
  }
}
