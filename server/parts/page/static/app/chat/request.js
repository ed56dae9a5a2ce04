// The request that a branch of a conversation makes.

/** @typedef {import("./store.js").Message} Message */
/** @typedef {import("./settings_store.js").Settings} Settings */

/**
 * Returns the body of the request for the next answer. Throws an error if JSON in the settings cannot be read.
 * @param {Settings} settings
 * @param {Message[]} messages
 * @param {string} model
 * @returns {Record<string, any>}
 */
export function requestBody(settings, messages, model) {
  const system = settings.system.trim() ? [{ role: "system", content: settings.system }] : [];
  const last = messages.at(-1);
  return {
    model,
    messages: [...system, ...messages.map(apiMessage)],
    ...settings.parameters,
    ...tools(settings),
    ...format(settings),
    ...(last?.role === "assistant" ? { continue_final_message: true, add_generation_prompt: false } : {}),
    ...(settings.other.trim() ? parse("Other parameters", settings.other) : {}),
  };
}

/** @param {Message} message */
function apiMessage({ role, content, calls, callId }) {
  if (role === "tool") return { role, tool_call_id: callId, content };
  if (!calls?.length) return { role, content };
  const toolCalls = calls.map(({ id, name, arguments: text }) => ({ id, type: "function", function: { name, arguments: text } }));
  return { role, content, tool_calls: toolCalls };
}

/** @param {Settings} settings */
function tools({ tools: text, toolChoice }) {
  return text.trim() ? { tools: parse("Tools", text), ...(toolChoice === "auto" ? {} : { tool_choice: toolChoice }) } : {};
}

/** @param {Settings} settings */
function format({ format: type, schema }) {
  if (type === "text") return {};
  if (type === "json_object") return { response_format: { type } };
  return { response_format: { type, json_schema: { name: "answer", schema: parse("The JSON schema", schema) } } };
}

/**
 * @param {string} noun
 * @param {string} text
 */
function parse(noun, text) {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new Error(`${noun} cannot be read as JSON: ${/** @type {Error} */ (error).message}`);
  }
}

/**
 * What a text of the settings has that is no JSON, or "".
 * @param {string} noun
 * @param {string} text
 */
export function jsonProblem(noun, text) {
  try {
    if (text.trim()) parse(noun, text);
    return "";
  } catch (error) {
    return /** @type {Error} */ (error).message;
  }
}
