// A request as a command or a program.
import { hasKey } from "../../key.js";

const STANDARD = [
  "model", "messages", "temperature", "top_p", "seed", "stop", "max_completion_tokens", "presence_penalty", "frequency_penalty",
  "logit_bias", "tools", "tool_choice", "response_format", "reasoning_effort",
]; // parameters of OpenAI's clients; Python's takes others in extra_body

/** @typedef {Record<string, any>} Body */

/** @type {Record<string, (url: string, body: Body) => string>} */
export const SAMPLES = { curl, Python: python, JavaScript: javascript };

/**
 * @param {string} url
 * @param {Body} body
 */
function curl(url, body) {
  const key = hasKey() ? ` \\\n  -H "Authorization: Bearer $LIGHTWELL_API_KEY"` : "";
  const json = JSON.stringify(body, null, 2).replaceAll("'", "\\u0027");
  return `curl ${url}/chat/completions${key} \\\n  -H "Content-Type: application/json" \\\n  -d '${json}'`;
}

/**
 * @param {string} url
 * @param {Body} body
 */
function python(url, body) {
  const standard = Object.entries(body).filter(([name]) => STANDARD.includes(name));
  const extra = Object.fromEntries(Object.entries(body).filter(([name]) => !STANDARD.includes(name)));
  const lines = standard.map(([name, value]) => `    ${name}=${pythonValue(value, "    ")},`);
  if (Object.keys(extra).length > 0) lines.push(`    extra_body=${pythonValue(extra, "    ")},`);
  const key = hasKey() ? `os.environ["LIGHTWELL_API_KEY"]` : `"none"`;
  return `${hasKey() ? "import os\n\n" : ""}from openai import OpenAI

client = OpenAI(base_url=${JSON.stringify(url)}, api_key=${key})
stream = client.chat.completions.create(
${lines.join("\n")}
    stream=True,
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
`;
}

/**
 * @param {string} url
 * @param {Body} body
 */
function javascript(url, body) {
  const key = hasKey() ? "process.env.LIGHTWELL_API_KEY" : `"none"`;
  return `import OpenAI from "openai";

const client = new OpenAI({ baseURL: ${JSON.stringify(url)}, apiKey: ${key} });
const stream = await client.chat.completions.create(${JSON.stringify({ ...body, stream: true }, null, 2)});
for await (const chunk of stream) process.stdout.write(chunk.choices[0]?.delta?.content ?? "");
`;
}

/**
 * A value of JSON as Python writes it.
 * @param {any} value
 * @param {string} indent
 * @returns {string}
 */
function pythonValue(value, indent) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value !== "object") return JSON.stringify(value); // texts and numbers are written alike
  const inner = `${indent}    `;
  const isArray = Array.isArray(value);
  const parts = isArray
    ? value.map((each) => inner + pythonValue(each, inner))
    : Object.entries(value).map(([name, each]) => `${inner}${JSON.stringify(name)}: ${pythonValue(each, inner)}`);
  const [open, close] = isArray ? "[]" : "{}";
  return parts.length > 0 ? `${open}\n${parts.join(",\n")},\n${indent}${close}` : open + close;
}
