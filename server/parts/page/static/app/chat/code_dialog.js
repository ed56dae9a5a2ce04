// The conversation's request as a command or a program.
import { Dialog } from "../components.js";
import { html, useState } from "../lib.js";
import { baseUrl, model } from "../state.js";
import { drafts } from "./composer.js";
import { Code } from "./markdown.js";
import { requestBody } from "./request.js";
import { SAMPLES } from "./samples.js";
import { branch, current, settings } from "./store.js";

/** @param {{onClose: () => void}} props */
export function CodeDialog({ onClose }) {
  const [language, setLanguage] = useState("curl");
  return html`
    <${Dialog} title="Use it from a program" class="wide" onClose=${onClose}>
      <p class="hint">The request for the last answer, with all settings of this conversation.</p>
      <div class="row" role="radiogroup" aria-label="Language">
        ${Object.keys(SAMPLES).map((name) => html`
          <label class="language"><input type="radio" name="language" checked=${name === language} onChange=${() => setLanguage(name)} />${name}</label>
        `)}
      </div>
      <${Code} language=${language} text=${sample(language)} />
    <//>
  `;
}

/** @param {string} language */
function sample(language) {
  const messages = current.value ? branch(current.value) : [];
  if (messages.at(-1)?.role === "assistant") messages.pop();
  if (messages.length === 0) messages.push({ id: "", parent: null, role: "user", content: drafts.value[""]?.trim() || "hello" });
  try {
    return SAMPLES[language](baseUrl, requestBody(settings.value, messages, model.value));
  } catch (error) {
    return /** @type {Error} */ (error).message;
  }
}
