// The first page: the server's state, how to connect to it, and a box to try a prompt.
import { authorization, forgetKey, hasKey, isValidKey, keepKey } from "./key.js";

const STATE_INTERVAL = 5000; // ms between two looks at the server's state
const ENDPOINTS = {
  chat: {
    path: "v1/chat/completions",
    body: (prompt) => ({ messages: [{ role: "user", content: prompt }] }),
    text: (choice) => choice.delta.content,
  },
  completion: { path: "v1/completions", body: (prompt) => ({ prompt }), text: (choice) => choice.text },
};
const MAX_TOKENS = 512;

const element = (id) => document.getElementById(id);
const show = (id, isShown) => (element(id).hidden = !isShown);
const baseUrl = new URL("v1", location.href).href;
let models = []; // as the API lists them
let isConnected = false; // the models have been read, or the key is being asked for
let request = null; // AbortController of the answer that is arriving

async function call(path, options = {}) {
  const response = await fetch(path, { ...options, headers: { ...options.headers, ...authorization() } });
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  const error = new Error(body?.error?.message ?? `The server answered with status ${response.status}.`);
  error.status = response.status;
  throw error;
}

// State

async function watchState() {
  try {
    await call("readyz");
    if (!isConnected) await connect();
    showState("Ready", true);
  } catch (error) {
    isConnected = false;
    showState(error.status ? error.message : "The server cannot be reached.", false);
  } finally {
    setTimeout(watchState, STATE_INTERVAL);
  }
}

function showState(text, isGood) {
  element("state").textContent = text;
  element("state").className = `state ${isGood ? "good" : "bad"}`;
}

// Connect

async function connect() {
  isConnected = true;
  try {
    models = (await (await call("v1/models")).json()).data;
  } catch (error) {
    if (error.status !== 401) throw error;
    askForKey();
    return;
  }
  element("model").replaceChildren(...models.map(({ id }) => new Option(id)));
  element("base-url").textContent = baseUrl;
  showModel();
  show("key-form", false);
  show("connect", true);
  show("try", true);
  show("forget", hasKey());
}

// Connects again after the key has changed; the state says if that fails.
function retry() {
  connect().catch((error) => {
    isConnected = false;
    showState(error.message, false);
  });
}

function askForKey() {
  if (hasKey()) element("key-hint").textContent = "The server does not accept this key. Enter another one.";
  forgetKey();
  for (const id of ["connect", "try", "forget"]) show(id, false);
  show("key-form", true);
  element("key").focus();
}

function showModel() {
  const { value } = element("model");
  const { max_model_len: context } = models.find(({ id }) => id === value);
  element("context").textContent = context ? `context of ${context} tokens` : "";
  const key = hasKey() ? ` \\\n  -H "Authorization: Bearer $LIGHTWELL_API_KEY"` : "";
  const body = JSON.stringify({ model: value, messages: [{ role: "user", content: "hello" }] }).replaceAll("'", "\\u0027");
  element("curl").textContent =
    `curl ${baseUrl}/chat/completions${key} \\\n  -H "Content-Type: application/json" \\\n  -d '${body}'`;
}

// Try a prompt

async function send() {
  const endpoint = ENDPOINTS[document.querySelector("[name=endpoint]:checked").value];
  const answer = element("answer");
  answer.textContent = element("usage").textContent = "";
  answer.className = "";
  setSending(new AbortController());
  const start = performance.now();
  let firstToken = null;
  try {
    const body = {
      model: element("model").value,
      max_tokens: MAX_TOKENS,
      stream: true,
      stream_options: { include_usage: true },
      ...endpoint.body(element("prompt").value),
    };
    const response = await call(endpoint.path, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
      signal: request.signal,
    });
    let finishReason = null;
    for await (const chunk of events(response.body)) {
      if (chunk.error) throw new Error(chunk.error.message);
      for (const choice of chunk.choices) {
        firstToken ??= performance.now();
        answer.append(endpoint.text(choice) ?? "");
        finishReason = choice.finish_reason ?? finishReason;
      }
      if (chunk.usage) showUsage(chunk.usage, firstToken - start, performance.now() - firstToken, finishReason);
    }
  } catch (error) {
    if (error.status === 401) askForKey();
    else if (error.name === "AbortError") element("usage").textContent = "Stopped.";
    else {
      answer.append(error.message);
      answer.className = "error";
    }
  } finally {
    setSending(null);
  }
}

function setSending(controller) {
  request = controller;
  element("send").disabled = controller !== null;
  element("stop").disabled = controller === null;
}

function showUsage(usage, wait, duration, finishReason) {
  const { prompt_tokens: input, completion_tokens: output } = usage;
  const rate = output > 1 ? `, ${((output - 1) / (duration / 1000)).toFixed(0)} tokens per second` : "";
  const cut = finishReason === "length" ? ` Cut at ${output} tokens.` : "";
  element("usage").textContent =
    `${input} tokens in, ${output} out; first token after ${wait.toFixed(0)} ms${rate}.${cut}`;
}

// Yields the data of server-sent events, until [DONE].
async function* events(stream) {
  let buffer = "";
  for await (const text of chunks(stream.pipeThrough(new TextDecoderStream()))) {
    const blocks = (buffer + text).split("\n\n");
    buffer = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}

// Safari's streams cannot be iterated.
async function* chunks(stream) {
  const reader = stream.getReader();
  for (let { done, value } = await reader.read(); !done; { done, value } = await reader.read()) yield value;
}

element("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const key = element("key").value.trim();
  element("key").value = "";
  if (!isValidKey(key)) {
    element("key-hint").textContent = "A key has only letters, digits and punctuation of ASCII. Enter another one.";
    return;
  }
  keepKey(key);
  retry();
});
element("prompt-form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!request) send();
});
element("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) element("prompt-form").requestSubmit();
});
element("stop").addEventListener("click", () => request?.abort());
element("forget").addEventListener("click", () => {
  forgetKey();
  retry();
});
element("model").addEventListener("change", showModel);
element("copy").addEventListener("click", async () => {
  await navigator.clipboard.writeText(element("curl").textContent);
  element("copy").textContent = "Copied";
});
show("copy", window.isSecureContext); // elsewhere browsers offer no clipboard
fetch("docs", { method: "HEAD" }).then(({ ok }) => show("docs", ok));
watchState();
