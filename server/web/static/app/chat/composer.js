// Where the next message is written.
import { Button, Icon, useMedia } from "../components.js";
import { html, signal, useLayoutEffect, useRef } from "../lib.js";
import { go } from "../router.js";
import { model, server } from "../state.js";
import { answer, runs, stop } from "./generate.js";
import { settingsSummary } from "./settings_panel.js";
import { LiveStats } from "./stats.js";
import { addMessage, create, current } from "./store.js";

const MAX_CHIPS = 5;

/** What is typed and not sent, by conversation; "" is a new one. */
export const drafts = signal(/** @type {Record<string, string>} */ ({}));

/**
 * Sends a message of the user, in a new conversation if none is shown.
 * @param {string} content
 */
export function send(content) {
  const conversation = current.value ?? create(content);
  answer(conversation.id, addMessage(conversation.id, { parent: conversation.tip, role: "user", content }));
  if (!current.value) go("chat", { id: conversation.id, replace: true });
}

/** @param {{onSettings: () => void}} props */
export function Composer({ onSettings }) {
  const ref = useRef(/** @type {HTMLTextAreaElement | null} */ (null));
  const hasKeyboard = !useMedia("(pointer: coarse)");
  const id = current.value?.id ?? "";
  const text = drafts.value[id] ?? "";
  const isRunning = runs.value.has(id);
  const isReady = model.value !== "" && server.value === "ready" && !isRunning;
  const write = (/** @type {string} */ draft) => (drafts.value = { ...drafts.value, [id]: draft });

  useLayoutEffect(() => {
    const area = /** @type {HTMLTextAreaElement} */ (ref.current);
    area.style.height = "auto";
    area.style.height = `${area.scrollHeight + 2}px`;
  }, [text]);
  useLayoutEffect(() => {
    if (hasKeyboard) ref.current?.focus({ preventScroll: true });
  }, [id]);

  const submit = (/** @type {Event} */ event) => {
    event.preventDefault();
    if (!isReady || !text.trim()) return;
    write("");
    send(text.trim());
  };
  const onKeyDown = (/** @type {KeyboardEvent} */ event) => {
    if (event.key === "Escape") stop(id);
    const isEnter = event.key === "Enter" && !event.isComposing;
    if (isEnter && (event.ctrlKey || event.metaKey || (hasKeyboard && !event.shiftKey))) submit(event);
  };
  return html`
    <form class="composer" onSubmit=${submit}>
      <div class="composer-box">
        <textarea ref=${ref} rows="1" aria-label="Message" placeholder="Write a message"
          value=${text} onInput=${(/** @type {any} */ event) => write(event.target.value)} onKeyDown=${onKeyDown}></textarea>
        ${isRunning
          ? html`<${Button} kind="primary" icon="stop" label="Stop (Escape)" onClick=${() => stop(id)} />`
          : html`<button class="button primary square" aria-label="Send" title="Send (Enter)" disabled=${!isReady || !text.trim()}><${Icon} name="send" /></button>`}
      </div>
      <${Chips} hasKeyboard=${hasKeyboard} onClick=${onSettings} />
    </form>
  `;
}

/**
 * The settings that are not the defaults.
 * @param {{hasKeyboard: boolean, onClick: () => void}} props
 */
function Chips({ hasKeyboard, onClick }) {
  const parts = settingsSummary();
  const run = runs.value.get(current.value?.id ?? "");
  const shown = parts.length > MAX_CHIPS ? [...parts.slice(0, MAX_CHIPS), `${parts.length - MAX_CHIPS} more`] : parts;
  return html`
    <div class="chips">
      <span>${model.value || "No model"}</span>
      ${shown.map((part) => html`<button type="button" key=${part} onClick=${onClick}>${part}</button>`)}
      ${run ? html`<${LiveStats} run=${run} />` : hasKeyboard && html`<span class="key-hint">Enter sends, Shift + Enter begins a line</span>`}
    </div>
  `;
}
