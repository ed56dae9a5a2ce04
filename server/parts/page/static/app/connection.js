// The form for the key, and the dialog that says how to connect to the server.
import { forgetKey, hasKey, isValidKey } from "../key.js";
import { keyProblem } from "./api.js";
import { Button, Copy, Dialog, Select } from "./components.js";
import { count } from "./format.js";
import { html, useEffect, useState } from "./lib.js";
import { baseUrl, contextLength, hasDocs, model, modelOptions, models, needsKey, readModels, server, theme, useKey } from "./state.js";

const HINTS = {
  "": "",
  missing: "This server needs one. It stays in this tab and is sent to this server only.",
  rejected: "The server does not accept this key. Enter another one.",
  invalid: "A key has only letters, digits and punctuation of ASCII. Enter another one.",
};
const THEMES = /** @type {[string, string][]} */ ([["auto", "As the system"], ["light", "Light"], ["dark", "Dark"]]);

export function KeyForm() {
  const [isValid, setValid] = useState(true);
  const submit = (/** @type {any} */ event) => {
    event.preventDefault();
    const key = new FormData(event.target).get("key")?.toString().trim() ?? "";
    setValid(isValidKey(key));
    if (isValidKey(key)) useKey(key);
    else event.target.reset();
  };
  return html`
    <form id="key-form" class="card key-form" onSubmit=${submit}>
      <label for="key">API key</label>
      <p class="hint ${isValid && keyProblem.value !== "rejected" ? "" : "error"}" id="key-hint" role="status">${HINTS[isValid ? keyProblem.value : "invalid"]}</p>
      <div class="row">
        <input id="key" name="key" type="password" autocomplete="off" required aria-describedby="key-hint" ref=${focus} />
        <button class="button primary">Use key</button>
      </div>
    </form>
  `;
}

/** @param {HTMLElement | null} element */
const focus = (element) => element?.focus();

/** The server's state in words. */
export function stateText() {
  if (server.value === "connecting") return "Connecting …";
  if (server.value === "ready") return needsKey.value ? "Needs a key" : "Ready";
  return server.value === "unreachable" ? "The server cannot be reached." : server.value;
}

/** A command that asks the server something. */
function curl() {
  const key = hasKey() ? ` \\\n  -H "Authorization: Bearer $LIGHTWELL_API_KEY"` : "";
  const body = JSON.stringify({ model: model.value, messages: [{ role: "user", content: "hello" }] }).replaceAll("'", "\\u0027");
  return `curl ${baseUrl}/chat/completions${key} \\\n  -H "Content-Type: application/json" \\\n  -d '${body}'`;
}

/** @param {{onClose: () => void}} props */
export function Connection({ onClose }) {
  useEffect(() => {
    if (!needsKey.value) readModels().catch(() => {}); // those that are known stay
  }, []);
  const forget = () => {
    forgetKey();
    location.reload(); // drops all that was read with it
  };
  return html`
    <${Dialog} title="Connection" onClose=${onClose}>
      <p class="state ${server.value === "ready" ? "good" : "bad"}">${stateText()}</p>
      <dl class="facts">
        <dt>Base URL</dt><dd><code id="base-url">${baseUrl}</code> <${Copy} text=${baseUrl} label="Copy the base URL" /></dd>
        <dt>Context</dt><dd>${contextLength.value === null ? "unknown" : `${count(contextLength.value)} tokens`}</dd>
      </dl>
      ${models.value.length > 0 && html`
        <${Select} label="Model" value=${model.value} options=${modelOptions.value} onChange=${(/** @type {string} */ id) => (model.value = id)} />
        <div class="command"><pre><code id="curl">${curl()}</code></pre><${Copy} text=${curl} label="Copy the command" /></div>
      `}
      <${Select} label="Theme" value=${theme.value} options=${THEMES} onChange=${(/** @type {string} */ name) => (theme.value = name)} />
      <nav class="row links" aria-label="Server">
        ${hasDocs.value && html`<a id="docs" href="docs">API documentation</a>`}
        <a href="readyz">Readiness</a>
        ${hasKey() && html`<${Button} id="forget" onClick=${forget}>Forget API key<//>`}
      </nav>
    <//>
  `;
}
