// Whether a value that was stored or imported is a conversation, so that all else may rely on it.
import { NO_SETTINGS } from "./settings_store.js";

const ROLES = ["user", "assistant", "tool"];
const NUMBERS = ["tokens", "tokensPerSecond", "seconds", "thinking"];

/**
 * @param {any} value
 * @returns {value is import("./store.js").Conversation}
 */
export const isConversation = (value) =>
  typeof value?.title === "string" && Array.isArray(value.messages) && value.messages.every(isMessage) && areSettings(value.settings);

/** @param {any} value */
const isMessage = (value) =>
  typeof value?.id === "string" &&
  ROLES.includes(value.role) &&
  typeof value.content === "string" &&
  typeof (value.reasoning ?? "") === "string" &&
  areCalls(value.calls ?? []) &&
  isAnswer(value.answer ?? null);

/** @param {any} value */
const areCalls = (value) =>
  Array.isArray(value) && value.every((call) => typeof call?.name === "string" && typeof call.arguments === "string");

/** @param {any} value */
const isAnswer = (value) => value === null || (NUMBERS.every((name) => typeof value[name] === "number") && isFailure(value.error));

/** @param {any} value */
const isFailure = (value) => value === null || typeof value?.message === "string";

/** @param {any} value */
const areSettings = (value) => Object.entries(NO_SETTINGS).every(([name, example]) => typeof value?.[name] === typeof example && value[name] !== null);
