// Chat: a prompt, and the model's answer as it arrives.
import { call, posted, sse } from "../api.js";
import { Button, Problem } from "../components.js";
import { html, useState } from "../lib.js";
import { model } from "../state.js";

export const title = "Chat";
export const about = "The model reads the text so far and chooses the next token, again and again; each is shown as it is chosen.";

export default function Chat() {
  const [answer, setAnswer] = useState("");
  const [error, setError] = useState(/** @type {Error | null} */ (null));
  const [request, setRequest] = useState(/** @type {AbortController | null} */ (null));

  const send = async (/** @type {any} */ event) => {
    event.preventDefault();
    const controller = new AbortController();
    setRequest(controller);
    setAnswer("");
    setError(null);
    try {
      const messages = [{ role: "user", content: new FormData(event.target).get("prompt") }];
      const response = await call("v1/chat/completions", {
        ...posted({ model: model.value, messages, stream: true }),
        signal: controller.signal,
      });
      for await (const { data } of sse(/** @type {ReadableStream<Uint8Array>} */ (response.body))) {
        if (data === "[DONE]") break;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Error(chunk.error.message);
        setAnswer((text) => text + (chunk.choices[0]?.delta.content ?? ""));
      }
    } catch (problem) {
      if (!controller.signal.aborted) setError(/** @type {Error} */ (problem));
    } finally {
      setRequest(null);
    }
  };

  return html`
    <form class="card" onSubmit=${send}>
      <textarea name="prompt" rows="3" aria-label="Message" required>Write one sentence about the sea.</textarea>
      <div class="row">
        <button class="button primary" disabled=${request !== null}>Send</button>
        <${Button} disabled=${request === null} onClick=${() => request?.abort()}>Stop<//>
      </div>
      <p class="answer" aria-live="polite">${answer}</p>
      ${error && html`<${Problem} error=${error} />`}
    </form>
  `;
}
