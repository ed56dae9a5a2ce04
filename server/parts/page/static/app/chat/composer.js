// Where the next message is written.
import { Button, Icon, OpenFiles, Problem, useMedia } from "../components.js";
import { html, signal, useLayoutEffect, useRef, useState } from "../lib.js";
import { go } from "../router.js";
import { model, server } from "../state.js";
import { answer, runs, stop } from "./generate.js";
import { settingsSummary } from "./settings_panel.js";
import { LiveStats } from "./stats.js";
import { addMessage, create, current } from "./store.js";

const MAX_CHIPS = 5;
const MAX_FILE_BYTES = 1e6;

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
  const [problem, setProblem] = useState("");
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

  const attach = async (/** @type {File[]} */ files) => {
    const parts = await Promise.all(files.map(readFile));
    setProblem(parts.map(({ problem }) => problem).filter(Boolean).join(" "));
    write([drafts.value[id] ?? "", ...parts.map(({ text }) => text)].filter(Boolean).join("\n\n"));
    ref.current?.focus();
  };
  const onDrop = (/** @type {DragEvent} */ event) => {
    const files = [...(event.dataTransfer?.files ?? [])];
    if (files.length === 0) return;
    event.preventDefault();
    attach(files);
  };
  const submit = (/** @type {Event} */ event) => {
    event.preventDefault();
    if (!isReady || !text.trim()) return;
    write("");
    send(text.trim());
  };
  const onKeyDown = (/** @type {KeyboardEvent} */ event) => {
    if (event.key === "Escape") stop(id);
    const isComposing = event.isComposing || event.keyCode === 229; // Safari ends the composition before its Enter
    const isEnter = event.key === "Enter" && !isComposing;
    if (isEnter && (event.ctrlKey || event.metaKey || (hasKeyboard && !event.shiftKey))) submit(event);
  };
  return html`
    <form class="composer" onSubmit=${submit} onDragOver=${(/** @type {Event} */ event) => event.preventDefault()} onDrop=${onDrop}>
      ${problem && html`<${Problem} error=${problem} />`}
      <div class="composer-box">
        <${OpenFiles} icon="attach" label="Add text files" onOpen=${attach} />
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
 * Returns the text of a file as a block of code, or why it has none.
 * @param {File} file
 */
async function readFile(file) {
  if (file.size > MAX_FILE_BYTES) return { text: "", problem: `${file.name} is larger than 1 MB.` };
  const text = await file.text();
  if (/[\0\ufffd]/.test(text)) return { text: "", problem: `${file.name} is not a text in UTF-8.` };
  const fence = "`".repeat(Math.max(3, ...[...text.matchAll(/`+/g)].map(([ticks]) => ticks.length + 1)));
  return { text: `${file.name}\n${fence}\n${text.trimEnd()}\n${fence}`, problem: "" };
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
