// A message of a conversation, with what can be done with it.
import { Button, Copy, Icon, Problem } from "../components.js";
import { count, duration } from "../format.js";
import { html, useEffect, useRef, useState } from "../lib.js";
import { linkTo, viewNames } from "../router.js";
import { answer, goOn, runs } from "./generate.js";
import { Code, Markdown } from "./markdown.js";
import { statsText } from "./stats.js";
import { addMessage, alternatives, branch, showBranch, updateMessage } from "./store.js";

/** @typedef {import("./store.js").Conversation} Conversation */
/** @typedef {import("./store.js").Message} Message */
/** @typedef {{conversation: Conversation, message: Message, isLast: boolean}} Props */

const EDIT = "Edit, in a new branch";

/**
 * Moves the focus to a message that has taken the place of the one that had it, or to a button of it.
 * @param {string | null} id
 * @param {string} [label] of the button
 */
const focusMessage = (id, label = "") =>
  requestAnimationFrame(() => {
    const article = document.getElementById(`message-${id}`);
    const button = /** @type {HTMLElement | null | undefined} */ (article?.querySelector(`[aria-label="${label}"]:enabled`));
    (button ?? article)?.focus({ preventScroll: true });
  });

/** @param {Props} props */
export function MessageView(props) {
  const [isEditing, setEditing] = useState(false);
  const { role } = props.message;
  const cancel = () => {
    setEditing(false);
    focusMessage(props.message.id, EDIT);
  };
  if (isEditing) return html`<${Editor} ...${props} onEnd=${() => setEditing(false)} onCancel=${cancel} />`;
  const View = role === "user" ? UserMessage : role === "tool" ? ToolResult : AssistantMessage;
  return html`<${View} ...${props} onEdit=${() => setEditing(true)} />`;
}

/** @param {Props & {onEdit: () => void}} props */
const UserMessage = ({ conversation, message, onEdit }) => html`
  <article class="message user" id="message-${message.id}" tabindex="-1" aria-label="You">
    <div class="bubble">${message.content}</div>
    <div class="actions">
      <${Branches} conversation=${conversation} message=${message} />
      <${Copy} text=${message.content} label="Copy the message" />
      <${Button} kind="quiet" icon="edit" label=${EDIT} disabled=${runs.value.has(conversation.id)} onClick=${onEdit} />
    </div>
  </article>
`;

/** @param {Props} props */
const ToolResult = ({ message }) => html`
  <article class="message tool" aria-label="Result of a tool">
    <p class="part-title">Result</p>
    <${Code} language="" text=${message.content} />
  </article>
`;

/** @param {Props & {onEdit: () => void}} props */
function AssistantMessage({ conversation, message, isLast, onEdit }) {
  const run = runs.value.get(conversation.id);
  const isRunning = run?.messageId === message.id;
  return html`
    <article class="message assistant" id="message-${message.id}" tabindex="-1" aria-label="The model" aria-busy=${isRunning}>
      ${isRunning
        ? html`<${Arriving} run=${run} />`
        : html`<${Body} content=${message.content} reasoning=${message.reasoning ?? ""} calls=${message.calls ?? []} seconds=${message.answer?.thinking} />`}
      ${!isRunning && isLast && (message.calls ?? []).length > 0 && html`<${ToolForm} conversation=${conversation} message=${message} />`}
      ${isRunning
        ? html`<div class="actions"><${Branches} conversation=${conversation} message=${message} /></div>`
        : html`<${Ended} conversation=${conversation} message=${message} isLast=${isLast} isBusy=${run !== undefined} onEdit=${onEdit} />`}
    </article>
  `;
}

/** @param {{run: import("./generate.js").Run}} props */
function Arriving({ run }) {
  const { content, reasoning, calls, first } = run.progress.value;
  if (first === null && !content) return html`<p class="first-token"><span class="sr">Waiting for the first token</span></p>`;
  return html`<${Body} content=${content} reasoning=${reasoning} calls=${calls} isThinking=${!content && calls.length === 0} />`;
}

/** @param {{content: string, reasoning: string, calls: import("./store.js").ToolCall[], seconds?: number, isThinking?: boolean}} props */
const Body = ({ content, reasoning, calls, seconds, isThinking = false }) => html`
  ${reasoning && html`
    <details class="thinking">
      <summary><${Icon} name="right" />${isThinking ? "Thinking …" : `Thought${seconds ? ` for ${duration(seconds)}` : ""}`}</summary>
      <div class="thoughts">${reasoning.trim()}</div>
    </details>
  `}
  ${content && html`<${Markdown} text=${content} />`}
  ${calls.map((call) => html`
    <div class="call">
      <p class="part-title">Call of <code>${call.name}</code></p>
      <${Code} language="arguments" text=${indented(call.arguments)} />
    </div>
  `)}
`;

/** @param {string} json */
function indented(json) {
  try {
    return JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    return json; // it is still arriving
  }
}

/** @param {Props & {isBusy: boolean, onEdit: () => void}} props */
function Ended({ conversation, message, isLast, isBusy, onEdit }) {
  const { answer: report } = message;
  const again = () => focusMessage(answer(conversation.id, message.parent));
  const continueIt = () => {
    goOn(conversation.id, message.id);
    focusMessage(message.id);
  };
  const canContinue = isLast && message.content && report?.finish !== "stop" && !message.calls?.length;
  return html`
    ${report?.error && html`<${Problem} error=${problemText(report.error)} onRetry=${isBusy ? undefined : again} />`}
    ${report?.warnings && html`<p class="hint">The server says: ${report.warnings}</p>`}
    <div class="actions">
      <${Branches} conversation=${conversation} message=${message} />
      ${message.content && html`<${Copy} text=${message.content} label="Copy the answer" />`}
      <${Button} kind="quiet" icon="refresh" label="Answer again, in a new branch" disabled=${isBusy} onClick=${again} />
      ${message.content && html`<${Button} kind="quiet" icon="edit" label=${EDIT} disabled=${isBusy} onClick=${onEdit} />`}
      ${canContinue && html`<${Button} disabled=${isBusy} onClick=${continueIt}>Continue<//>`}
      <p class="stats num">${report ? endedText(report) : "Interrupted"}</p>
      ${report?.id && html`<${OtherViews} id=${report.id} />`}
    </div>
  `;
}

/**
 * Links to what other views show of an answer.
 * @param {{id: string}} props
 */
function OtherViews({ id }) {
  const links = [
    { view: "tokens", text: "Tokens", link: linkTo("tokens", { params: { id } }) },
    { view: "inside", text: "Inside", link: linkTo("inside", { params: { id } }) },
    { view: "requests", text: "Request", link: linkTo("requests", { id }) },
  ].filter(({ view }) => viewNames.value.includes(view));
  if (links.length === 0) return null;
  return html`<span class="other-views">Look closer: ${links.map(({ text, link }) => html`<a href=${link}>${text}</a>`)}</span>`;
}

/** @param {import("./store.js").Answer} report */
function endedText(report) {
  const { tokens, tokensPerSecond: rate, first, finish, promptTokens, cachedTokens, seconds } = report;
  const parts = tokens > 0 ? [statsText(tokens, rate, first), duration(seconds)] : [];
  if (promptTokens !== null) parts.push(`${count(promptTokens)} in the prompt${cachedTokens ? `, ${count(cachedTokens)} cached` : ""}`);
  if (finish === "length") parts.push("cut at the maximum");
  if (finish === "stopped") parts.push("stopped");
  return parts.join(" · ");
}

/** @param {import("./store.js").Failure} failure */
function problemText({ message, status, retryAfter }) {
  const wait = retryAfter ? ` Try again in ${duration(retryAfter)}.` : "";
  if (status === 429) return `The server is busy. ${message}${wait}`;
  return message + wait;
}

/** @param {{conversation: Conversation, message: Message}} props */
function Branches({ conversation, message }) {
  const all = alternatives(conversation, message);
  const index = all.findIndex(({ id }) => id === message.id);
  if (all.length < 2) return null;
  const isBusy = runs.value.has(conversation.id);
  const show = (/** @type {number} */ step) => (/** @type {any} */ event) => {
    const { id } = all[index + step];
    showBranch(conversation.id, id);
    focusMessage(id, event.currentTarget.ariaLabel);
  };
  return html`
    <span class="branch-switch" role="group" aria-label="Branches">
      <${Button} kind="quiet" icon="left" label="Branch before" disabled=${isBusy || index === 0} onClick=${show(-1)} />
      <span class="num">${index + 1}/${all.length}</span>
      <${Button} kind="quiet" icon="right" label="Next branch" disabled=${isBusy || index === all.length - 1} onClick=${show(1)} />
    </span>
  `;
}

/** @param {Props & {onEnd: () => void, onCancel: () => void}} props */
function Editor({ conversation, message, onEnd, onCancel }) {
  const ref = useRef(/** @type {HTMLTextAreaElement | null} */ (null));
  const isUser = message.role === "user";
  useEffect(() => ref.current?.focus(), []);
  const save = (/** @type {any} */ event) => {
    event.preventDefault();
    const content = ref.current?.value.trim() ?? "";
    if (!content) return onCancel();
    onEnd();
    const { parent, role } = message;
    const id = addMessage(conversation.id, { parent, role, content });
    if (isUser) answer(conversation.id, id);
    else updateMessage(conversation.id, id, { answer: message.answer && { ...message.answer, id: undefined, error: null, finish: "edited", tokens: 0, promptTokens: null } });
    focusMessage(id);
  };
  const cancelOnEscape = (/** @type {KeyboardEvent} */ event) => event.key === "Escape" && onCancel();
  return html`
    <form class="message editor" onSubmit=${save} onKeyDown=${cancelOnEscape}>
      <textarea ref=${ref} aria-label="Edit the message" rows=${Math.min(message.content.split("\n").length + 2, 16)} defaultValue=${message.content}></textarea>
      <div class="row">
        <button class="button primary">${isUser ? "Send" : "Save"}</button>
        <${Button} onClick=${onCancel}>Cancel<//>
        <span class="hint">What is there now stays, as another branch.</span>
      </div>
    </form>
  `;
}

/**
 * Asks for the results of the tools that the model has called.
 * @param {{conversation: Conversation, message: Message}} props
 */
function ToolForm({ conversation, message }) {
  const send = (/** @type {any} */ event) => {
    event.preventDefault();
    const results = new FormData(event.target).getAll("result").map(String);
    let parent = message.id;
    for (const [index, { id }] of (message.calls ?? []).entries()) {
      parent = addMessage(conversation.id, { parent, role: "tool", content: results[index], callId: id });
    }
    focusMessage(answer(conversation.id, parent));
  };
  return html`
    <form class="tool-form" onSubmit=${send}>
      ${(message.calls ?? []).map(({ name }) => html`
        <label><span>Result of <code>${name}</code></span><textarea name="result" rows="2" required></textarea></label>
      `)}
      <button class="button primary">Send the results</button>
    </form>
  `;
}

/**
 * All messages of the branch that is shown.
 * @param {{conversation: Conversation}} props
 */
export function Messages({ conversation }) {
  const messages = branch(conversation);
  return messages.map((message, index) => html`
    <${MessageView} key=${message.id} conversation=${conversation} message=${message} isLast=${index === messages.length - 1} />
  `);
}
