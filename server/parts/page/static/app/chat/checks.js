// Whether a value that was stored or imported is a conversation, so that all else may rely on it.
import { areSettings } from "./settings_store.js";

const ROLES = ["user", "assistant", "tool"];
const NUMBERS = ["tokens", "tokensPerSecond", "seconds", "thinking"];
const NUMBERS_IF_KNOWN = ["first", "promptTokens", "cachedTokens"];

/**
 * @param {any} value
 * @returns {value is import("./store.js").Conversation}
 */
export const isConversation = (value) =>
  typeof value?.title === "string" &&
  Array.isArray(value.messages) &&
  value.messages.every(isMessage) &&
  isTree(value) &&
  areSettings(value.settings);

/**
 * Whether each message has an id of its own and follows an earlier one, so that every branch has a beginning.
 * @param {any} value
 */
function isTree({ messages, tip }) {
  const ids = new Set([null]);
  for (const { id, parent } of messages) {
    if (ids.has(id) || !ids.has(parent)) return false;
    ids.add(id);
  }
  return ids.has(tip);
}

/** @param {any} value */
const isMessage = (value) =>
  typeof value?.id === "string" &&
  value.id !== "" &&
  ROLES.includes(value.role) &&
  typeof value.content === "string" &&
  typeof (value.reasoning ?? "") === "string" &&
  areCalls(value.calls ?? []) &&
  isAnswer(value.answer ?? null);

/** @param {any} value */
const areCalls = (value) =>
  Array.isArray(value) && value.every((call) => typeof call?.name === "string" && typeof call.arguments === "string");

/** @param {any} value */
const isAnswer = (value) =>
  value === null ||
  (NUMBERS.every((name) => typeof value[name] === "number") &&
    NUMBERS_IF_KNOWN.every((name) => value[name] === null || typeof value[name] === "number") &&
    isFailure(value.error));

/** @param {any} value */
const isFailure = (value) => value === null || typeof value?.message === "string";
