// Conversations, kept in the browser. Each is a tree of messages: an edit or another answer begins a branch.
import { computed, signal } from "../lib.js";
import { route } from "../router.js";
import { isConversation } from "./checks.js";
import { startSettings } from "./settings_store.js";

/** @typedef {{id: string, name: string, arguments: string}} ToolCall */
/** @typedef {{message: string, status: number, retryAfter: number | null}} Failure */
/**
 * What is known about an answer: seconds until its first token and until its end, and its numbers of tokens.
 * @typedef {object} Answer
 * @property {string} [id]
 * @property {string | null} finish "stop", "length", "tool_calls", or "stopped" by the user
 * @property {Failure | null} error
 * @property {number | null} first
 * @property {number} seconds
 * @property {number} tokens
 * @property {number} tokensPerSecond
 * @property {number | null} promptTokens
 * @property {number | null} cachedTokens
 * @property {number} thinking seconds
 * @property {string} [seed]
 * @property {string} [warnings]
 */
/**
 * @typedef {object} Message
 * @property {string} id
 * @property {string | null} parent the message before it
 * @property {"user" | "assistant" | "tool"} role
 * @property {string} content
 * @property {string} [reasoning]
 * @property {ToolCall[]} [calls]
 * @property {string} [callId] of a tool's result
 * @property {Answer} [answer]
 */
/**
 * @typedef {object} Conversation
 * @property {string} id
 * @property {string} title
 * @property {number} updated in ms since 1970
 * @property {import("./settings_store.js").Settings} settings
 * @property {Message[]} messages in the order in which they were written
 * @property {string | null} tip the last message of the branch that is shown
 */

const PREFIX = "lightwell-chat:";
const MAX_CONVERSATIONS = 200;
const MAX_CHARACTERS = 4e6; // browsers keep about 5 million for a site
const TITLE_LENGTH = 60;

/** @type {Map<string, number>} */
const sizes = new Map(); // characters that each conversation takes, by id

/** All conversations, the one changed last first. */
export const conversations = signal(readAll());
/** Why conversations are not kept, or "". */
export const storageProblem = signal("");
/** The conversation that the URL names; null for a new one. */
export const current = computed(() => conversations.value.find(({ id }) => id === route.value.id) ?? null);

addEventListener("storage", ({ key, newValue }) => {
  if (key?.startsWith(PREFIX)) merge(key.slice(PREFIX.length), newValue); // another tab has changed this one
});

/** The settings of the conversation that is shown. */
export const settings = computed(() => current.value?.settings ?? startSettings.value);

/** @param {Partial<import("./settings_store.js").Settings>} change */
export function changeSettings(change) {
  const changed = { ...settings.value, ...change };
  if (current.value) update(current.value.id, { settings: changed });
  startSettings.value = changed;
}

/** @param {string} id */
export const find = (id) => conversations.value.find((conversation) => conversation.id === id);

/**
 * Begins a conversation.
 * @param {string} title
 * @returns {Conversation}
 */
export function create(title) {
  const conversation = { id: newId(), title: shorten(title), updated: Date.now(), settings: startSettings.value, messages: [], tip: null };
  put(conversation);
  return conversation;
}

/**
 * Changes a conversation, if it has not been deleted, and keeps it.
 * @param {string} id
 * @param {Partial<Conversation>} change
 */
export function update(id, change) {
  const old = find(id);
  if (old) put({ ...old, ...change, updated: Date.now() });
}

/**
 * Adds a conversation that was exported, as a new one. Throws an error if it is none.
 * @param {string} text JSON
 * @returns {string} its id
 */
export function importConversation(text) {
  const value = JSON.parse(text);
  if (!isConversation(value)) throw new Error("It is no conversation.");
  const { title, settings: own, messages, tip } = value;
  const conversation = { id: newId(), title: shorten(title), updated: Date.now(), settings: own, messages, tip };
  put(conversation);
  return conversation.id;
}

/** @param {string} id */
export function remove(id) {
  conversations.value = conversations.value.filter((conversation) => conversation.id !== id);
  attempt(() => localStorage.removeItem(PREFIX + id));
}

/**
 * Adds a message to a branch, which is shown from now on.
 * @param {string} id of the conversation
 * @param {Omit<Message, "id">} message
 * @returns {string} the id of the message
 */
export function addMessage(id, message) {
  const added = { ...message, id: newId() };
  update(id, { messages: [...(find(id)?.messages ?? []), added], tip: added.id });
  return added.id;
}

/**
 * @param {string} id of the conversation
 * @param {string} messageId
 * @param {Partial<Message>} change
 */
export function updateMessage(id, messageId, change) {
  const messages = find(id)?.messages.map((message) => (message.id === messageId ? { ...message, ...change } : message));
  if (messages) update(id, { messages });
}

/**
 * The messages of a branch, the first one first.
 * @param {Conversation} conversation
 * @param {string | null} [tip] its last message; without it, the branch that is shown
 */
export function branch({ messages, tip: shown }, tip = shown) {
  const byId = new Map(messages.map((message) => [message.id, message]));
  const found = [];
  for (let message = byId.get(tip ?? ""); message; message = byId.get(message.parent ?? "")) found.unshift(message);
  return found;
}

/**
 * The messages in the place of one, on all branches.
 * @param {Conversation} conversation
 * @param {Message} message
 */
export const alternatives = ({ messages }, message) => messages.filter(({ parent }) => parent === message.parent);

/**
 * Shows the newest branch through a message.
 * @param {string} id of the conversation
 * @param {string} messageId
 */
export function showBranch(id, messageId) {
  const messages = find(id)?.messages ?? [];
  let tip = messageId;
  for (const { id: next, parent } of messages) if (parent === tip) tip = newest(messages, tip) ?? next;
  update(id, { tip });
}

/**
 * @param {Message[]} messages
 * @param {string} parent
 */
const newest = (messages, parent) => messages.findLast((message) => message.parent === parent)?.id;

/** @param {string} text */
function shorten(text) {
  const line = text.trim().replace(/\s+/g, " ");
  return line.length > TITLE_LENGTH ? `${line.slice(0, TITLE_LENGTH - 1)}…` : line || "Conversation";
}

const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(9)), (byte) => byte.toString(16).padStart(2, "0")).join("");

/** @param {Conversation} conversation */
function put(conversation) {
  conversations.value = [conversation, ...conversations.value.filter(({ id }) => id !== conversation.id)];
  write(conversation);
}

/**
 * Keeps a conversation, and drops the oldest ones for which there is no room then.
 * @param {Conversation} conversation
 */
function write(conversation) {
  const text = JSON.stringify(conversation);
  const isTooLarge = text.length > MAX_CHARACTERS; // then it is not kept, and no other one is dropped for it
  sizes.set(conversation.id, text.length);
  let room = MAX_CHARACTERS - (isTooLarge ? 0 : text.length);
  for (const [index, { id }] of conversations.value.entries()) {
    if (id === conversation.id) continue;
    room -= sizes.get(id) ?? 0;
    if (room < 0 || index >= MAX_CONVERSATIONS) remove(id);
  }
  const isKept = !isTooLarge && attempt(() => (localStorage.setItem(PREFIX + conversation.id, text), true));
  storageProblem.value = isKept ? "" : "This browser has no room to keep the conversation: it is lost when the page is closed.";
}

/** @returns {Conversation[]} */
function readAll() {
  const names = attempt(() => Object.keys(localStorage).filter((name) => name.startsWith(PREFIX))) ?? [];
  const found = names.map((name) => parse(name.slice(PREFIX.length), attempt(() => localStorage.getItem(name)) ?? null));
  return byTime(found.filter((conversation) => conversation !== null));
}

/**
 * Takes over what another tab has stored, or deleted. Others may be in the memory of this tab only, and stay.
 * @param {string} id
 * @param {string | null} text JSON; null: it was deleted
 */
function merge(id, text) {
  const others = conversations.value.filter((conversation) => conversation.id !== id);
  const changed = parse(id, text);
  if (changed) conversations.value = byTime([changed, ...others]);
  else if (text === null) conversations.value = others;
}

/**
 * @param {string} id
 * @param {string | null} text JSON
 * @returns {Conversation | null}
 */
function parse(id, text) {
  sizes.set(id, text?.length ?? 0);
  const value = attempt(() => JSON.parse(text ?? "null"));
  return isConversation(value) ? { ...value, id } : null;
}

/** @param {Conversation[]} list */
function byTime(list) {
  return list.sort((a, b) => b.updated - a.updated);
}

/**
 * Returns what a function returns, or undefined if it fails: storage may be blocked or full.
 * @template T
 * @param {() => T} use
 * @returns {T | undefined}
 */
function attempt(use) {
  try {
    return use();
  } catch {
    return undefined;
  }
}
