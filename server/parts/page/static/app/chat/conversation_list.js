// The conversations that the browser keeps.
import { Button, Dialog, download, OpenFiles } from "../components.js";
import { html, useState } from "../lib.js";
import { go, linkTo, route } from "../router.js";
import { runs, stop } from "./generate.js";
import { conversations, importConversation, remove, storageProblem, update } from "./store.js";

/** @typedef {import("./store.js").Conversation} Conversation */

/** @param {{onChoose?: () => void}} props */
export function ConversationList({ onChoose }) {
  const [dialog, setDialog] = useState(/** @type {{kind: "rename" | "delete", conversation: Conversation} | null} */ (null));
  const [problem, setProblem] = useState("");
  const close = () => setDialog(null);
  const importFiles = async (/** @type {File[]} */ files) => {
    setProblem("");
    for (const file of files) {
      try {
        go("chat", { id: importConversation(await file.text()) });
      } catch {
        setProblem(`${file.name} is no conversation that was exported here.`);
      }
    }
  };
  return html`
    <nav class="conversations" aria-label="Conversations">
      <div class="row">
        <a class="button" href=${linkTo("chat")} onClick=${onChoose}>New chat</a>
        <${OpenFiles} icon="upload" label="Import conversations" accept=".json,application/json" onOpen=${importFiles} />
      </div>
      ${problem && html`<p class="hint error" role="alert">${problem}</p>`}
      ${storageProblem.value && html`<p class="hint error" role="alert">${storageProblem.value}</p>`}
      ${conversations.value.length === 0 && html`<p class="hint">Conversations are kept in this browser, and nowhere else.</p>`}
      <ul>
        ${conversations.value.map((conversation) => html`
          <${Row} key=${conversation.id} conversation=${conversation} onChoose=${onChoose}
            onRename=${() => setDialog({ kind: "rename", conversation })} onDelete=${() => setDialog({ kind: "delete", conversation })} />
        `)}
      </ul>
      ${dialog?.kind === "rename" && html`<${Rename} conversation=${dialog.conversation} onClose=${close} />`}
      ${dialog?.kind === "delete" && html`<${Delete} conversation=${dialog.conversation} onClose=${close} />`}
    </nav>
  `;
}

/** @param {{conversation: Conversation, onChoose?: () => void, onRename: () => void, onDelete: () => void}} props */
const Row = ({ conversation, onChoose, onRename, onDelete }) => html`
  <li>
    <a href=${linkTo("chat", { id: conversation.id })} aria-current=${route.value.id === conversation.id ? "page" : undefined} title=${conversation.title} onClick=${onChoose}>
      ${runs.value.has(conversation.id) && html`<span class="answering" aria-label="Answering"></span>`}${conversation.title}
    </a>
    <span class="row-actions">
      <${Button} kind="quiet" icon="edit" label="Rename" onClick=${onRename} />
      <${Button} kind="quiet" icon="download" label="Export as JSON" onClick=${() => exportIt(conversation)} />
      <${Button} kind="quiet" icon="trash" label="Delete" onClick=${onDelete} />
    </span>
  </li>
`;

/** @param {{conversation: Conversation, onClose: () => void}} props */
function Rename({ conversation, onClose }) {
  const save = (/** @type {any} */ event) => {
    event.preventDefault();
    const title = String(new FormData(event.target).get("title")).trim();
    if (title) update(conversation.id, { title });
    onClose();
  };
  return html`
    <${Dialog} title="Rename the conversation" onClose=${onClose}>
      <form class="row" onSubmit=${save}>
        <input name="title" aria-label="Title" defaultValue=${conversation.title} maxlength="100" required autofocus />
        <button class="button primary">Rename</button>
      </form>
    <//>
  `;
}

/** @param {{conversation: Conversation, onClose: () => void}} props */
function Delete({ conversation, onClose }) {
  const confirm = () => {
    stop(conversation.id);
    remove(conversation.id);
    onClose();
    if (route.value.id === conversation.id) go("chat", { replace: true });
  };
  return html`
    <${Dialog} title="Delete the conversation?" onClose=${onClose}>
      <p>“${conversation.title}” is deleted from this browser. It is kept nowhere else.</p>
      <div class="row"><${Button} kind="danger" onClick=${confirm}>Delete<//><${Button} onClick=${onClose}>Cancel<//></div>
    <//>
  `;
}

/** @param {Conversation} conversation */
function exportIt(conversation) {
  const name = conversation.title.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60) || "conversation";
  download(new Blob([JSON.stringify(conversation, null, 2)], { type: "application/json" }), `${name}.json`);
}
