// The settings of a conversation. A new one begins with those that were changed last.
import { effect, signal } from "../lib.js";

/**
 * What a conversation asks for. Texts with JSON are kept as they are typed.
 * @typedef {object} Settings
 * @property {string} system the system prompt
 * @property {Record<string, any>} parameters those of the API that differ from the server's defaults
 * @property {string} tools JSON
 * @property {string} toolChoice
 * @property {"text" | "json_object" | "json_schema"} format
 * @property {string} schema JSON
 * @property {string} other JSON: parameters that have no control of their own
 */

const NAME = "lightwell-chat-settings";

/** @type {Settings} */
export const NO_SETTINGS = { system: "", parameters: {}, tools: "", toolChoice: "auto", format: "text", schema: "", other: "" };

/** Those that a new conversation begins with. */
export const startSettings = signal(read());

effect(() => {
  const text = JSON.stringify(startSettings.value);
  try {
    localStorage.setItem(NAME, text);
  } catch {
    // They last until the page is closed.
  }
});

/** @returns {Settings} */
function read() {
  try {
    const kept = { ...NO_SETTINGS, ...JSON.parse(localStorage.getItem(NAME) ?? "{}") };
    return areSettings(kept) ? kept : NO_SETTINGS;
  } catch {
    return NO_SETTINGS;
  }
}

/**
 * Whether a value that was stored or imported is settings.
 * @param {any} value
 */
export function areSettings(value) {
  const haveTypes = Object.entries(NO_SETTINGS).every(([name, example]) => typeof value?.[name] === typeof example);
  return haveTypes && value.parameters !== null && !Array.isArray(value.parameters);
}
