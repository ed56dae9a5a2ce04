// Chat: conversations with the model.
import { CodeDialog } from "../chat/code_dialog.js";
import { Composer, drafts } from "../chat/composer.js";
import { ConversationList } from "../chat/conversation_list.js";
import { runs } from "../chat/generate.js";
import { Messages } from "../chat/message.js";
import { SettingsPanel } from "../chat/settings_panel.js";
import { current } from "../chat/store.js";
import { Button, Dialog, useMedia } from "../components.js";
import { html, useEffect, useLayoutEffect, useRef, useState } from "../lib.js";
import { go } from "../router.js";

export const title = "Chat";
export const about =
  "The model reads the conversation and chooses one token after the other; each is shown as soon as it is chosen.";

const EXAMPLES = [
  "Explain in three sentences why the sky is blue.",
  "Write a short poem about the first snow.",
  "What are prime numbers? Give five examples in a list.",
  "Write a Python function that reverses a string.",
];
const NEAR_END = 120; // pixels

export default function Chat() {
  const hasRoomForList = useMedia("(min-width: 60rem)");
  const hasRoomForSettings = useMedia("(min-width: 84rem)");
  const startsWithSettings = useMedia("(min-width: 100rem)");
  const [isSettingsOpen, setSettingsOpen] = useState(startsWithSettings);
  const [open, setOpen] = useState(/** @type {"" | "list" | "code"} */ (""));
  const close = () => setOpen("");
  const toggleSettings = () => setSettingsOpen(!isSettingsOpen);
  return html`
    ${hasRoomForList && html`<aside class="chat-list"><${ConversationList} /></aside>`}
    <section class="thread" aria-label="Conversation">
      <header class="thread-head">
        ${!hasRoomForList && html`<${Button} icon="menu" label="Conversations" onClick=${() => setOpen("list")} />`}
        <h2>${current.value?.title ?? "New chat"}</h2>
        <${Button} kind="quiet" icon="code" label="Use it from a program" onClick=${() => setOpen("code")} />
        <${Button} kind="quiet" icon="settings" label="Settings" aria-expanded=${isSettingsOpen} onClick=${toggleSettings} />
      </header>
      <${Thread} />
      <${Composer} onSettings=${() => setSettingsOpen(true)} />
    </section>
    ${isSettingsOpen && (hasRoomForSettings
      ? html`<aside class="chat-settings" aria-label="Settings"><${SettingsPanel} /></aside>`
      : html`<${Dialog} title="Settings" class="sheet" onClose=${() => setSettingsOpen(false)}><${SettingsPanel} /><//>`)}
    ${open === "list" && html`<${Dialog} title="Conversations" class="sheet" onClose=${close}><${ConversationList} onChoose=${close} /><//>`}
    ${open === "code" && html`<${CodeDialog} onClose=${close} />`}
  `;
}

function Thread() {
  const conversation = current.value;
  if (!conversation) return html`<${Start} />`;
  return html`
    <div class="messages" role="log" aria-busy=${runs.value.has(conversation.id)}><${Messages} conversation=${conversation} /></div>
    <${End} conversation=${conversation} />
  `;
}

/**
 * Follows the end of the conversation while it is in sight.
 * @param {{conversation: import("../chat/store.js").Conversation}} props
 */
function End({ conversation }) {
  const isAtEnd = useRef(true);
  const [isEndShown, setEndShown] = useState(true);
  const progress = runs.value.get(conversation.id)?.progress.value; // each token may move the end

  useEffect(() => {
    const look = () => {
      isAtEnd.current = distanceToEnd() < NEAR_END;
      setEndShown(isAtEnd.current);
    };
    addEventListener("scroll", look, { passive: true });
    return () => removeEventListener("scroll", look);
  }, []);
  useLayoutEffect(() => {
    isAtEnd.current = true;
  }, [conversation.id, conversation.messages.length]);
  useLayoutEffect(() => {
    if (isAtEnd.current) toEnd();
  }, [progress, conversation]);
  return !isEndShown && html`<${Button} class="to-end" onClick=${toEnd}>Go to the end<//>`;
}

const distanceToEnd = () => document.documentElement.scrollHeight - innerHeight - scrollY;
const toEnd = () => scrollTo({ top: document.documentElement.scrollHeight });

function Start() {
  const use = (/** @type {string} */ text) => () => {
    drafts.value = { ...drafts.value, "": text };
    go("chat");
    document.querySelector("textarea")?.focus();
  };
  return html`
    <div class="start">
      <p class="start-title">What do you want to ask?</p>
      <div class="examples">${EXAMPLES.map((text) => html`<button type="button" key=${text} onClick=${use(text)}>${text}</button>`)}</div>
    </div>
  `;
}
