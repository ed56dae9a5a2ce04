// The shell: navigation, the server's state, the form for the key, and the view that the URL names.
import { Problem } from "./components.js";
import { Connection, KeyForm, stateText } from "./connection.js";
import { html, render, useEffect, useErrorBoundary, useState } from "./lib.js";
import { linkBack, linkTo, route, viewNames } from "./router.js";
import { findDocs, needsKey, server, watch } from "./state.js";

/**
 * The views. A module of a view exports its component, its title, and a sentence or two about what it shows.
 * @type {Record<string, {label: string, load: () => Promise<{default: any, title: string, about: string}>}>}
 */
const VIEWS = {
  chat: { label: "Chat", load: () => import("./views/chat.js") },
  tokens: { label: "Tokens", load: () => import("./views/tokens.js") },
  inside: { label: "Inside", load: () => import("./views/inside.js") },
  engine: { label: "Engine", load: () => import("./views/engine.js") },
  requests: { label: "Requests", load: () => import("./views/requests.js") },
};

function Header() {
  const [isOpen, setOpen] = useState(false);
  const isDown = server.value !== "ready" && server.value !== "connecting";
  const isGood = server.value === "ready" && !needsKey.value;
  return html`
    <header class="top">
      <a class="brand" href=${linkTo("chat")}><img src="assets/icon.svg" alt="" width="24" height="24" /> Lightwell</a>
      <nav aria-label="Views">
        ${Object.entries(VIEWS).map(([name, { label }]) => html`
          <a href=${route.value.view === name ? linkTo(name) : linkBack(name)} aria-current=${route.value.view === name ? "page" : undefined}>${label}</a>
        `)}
      </nav>
      <button type="button" class="state-button state ${isGood ? "good" : isDown ? "bad" : ""}" aria-haspopup="dialog"
        title="Connection" onClick=${() => setOpen(true)}>
        <span id="state" role="status">${isDown ? "Not ready" : stateText()}</span>
      </button>
    </header>
    ${isDown && html`<p class="banner" role="alert">${stateText()}</p>`}
    ${isOpen && html`<${Connection} onClose=${() => setOpen(false)} />`}
  `;
}

/** The view of the URL, which is loaded when it is needed. */
function View() {
  const { view } = route.value;
  const [module, setModule] = useState(/** @type {any} */ (null));
  const [error, reset] = useErrorBoundary((/** @type {Error} */ problem) => console.error(problem));
  const [failure, setFailure] = useState(/** @type {string | null} */ (null));
  const load = () => {
    setFailure(null);
    VIEWS[view]?.load().then((loaded) => setModule({ view, ...loaded }), () => setFailure("This view could not be loaded."));
  };
  useEffect(load, [view]);
  useEffect(reset, [route.value]); // what failed for one URL may do for another one
  useEffect(() => {
    if (module) document.title = `${module.title} · Lightwell`;
  }, [module]);
  if (!(view in VIEWS)) return html`<${Problem} error="There is no such view." />`;
  if (failure) return html`<${Problem} error=${failure} onRetry=${load} />`;
  if (error) return html`<${Problem} error=${`This view failed: ${error.message}`} onRetry=${reset} />`;
  if (module?.view !== view) return null;
  return html`
    <div class="view view-${view}">
      <div class="intro"><h1>${module.title}</h1><p>${module.about}</p></div>
      <${module.default} />
    </div>
  `;
}

const skip = (/** @type {any} */ event) => {
  event.preventDefault(); // the fragment of the URL names the view
  document.getElementById("main")?.focus();
};

const App = () => html`
  <a class="skip" href="#main" onClick=${skip}>Skip to the content</a>
  <${Header} />
  <main id="main" tabindex="-1">${needsKey.value ? html`<${KeyForm} />` : html`<${View} key=${route.value.view} />`}</main>
`;

viewNames.value = Object.keys(VIEWS);
render(html`<${App} />`, /** @type {HTMLElement} */ (document.getElementById("app")));
watch();
findDocs();
