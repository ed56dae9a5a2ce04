// Tokens: a text as the model sees it, with the probability of each token and what else could have been written.
import { Button, Empty, Field, Slider } from "../components.js";
import { probabilityColor } from "../format.js";
import { html, useEffect, useState } from "../lib.js";
import { go, route } from "../router.js";
import { contextLength, model } from "../state.js";
import { BranchColumn } from "../tokens/branch.js";
import { branches, open, openedId, settings, start } from "../tokens/branches.js";
import { Details } from "../tokens/details.js";

export const title = "Tokens";
export const about =
  "A model writes one token at a time, a word or a piece of one. For each it computes how likely every token of its vocabulary is to come next, and a sampler draws one. Here you see these probabilities, and can go on from another token than the one that was drawn.";

const LEVELS = [1, 0.5, 0.25, 0.1, 0.03, 0.001]; // probabilities of the legend

export default function TokensView() {
  const id = route.value.params.get("id") ?? "";
  const hasModel = model.value !== "";
  useEffect(() => {
    if (hasModel && id && id !== openedId.value) open(id);
  }, [id, hasModel]);
  return html`
    <${PromptForm} />
    ${branches.value.length === 0
      ? html`<${Empty} title="No text yet">Write the beginning of a text, and the model goes on with it.<//>`
      : html`
          <${Legend} />
          <div class="tokens-layout">
            <div class="side-by-side">
              ${branches.value.map((branch) => html`<${BranchColumn} key=${branch.number} branch=${branch} isOnly=${branches.value.length === 1} />`)}
            </div>
            <${Details} />
          </div>
        `}
  `;
}

function PromptForm() {
  const [text, setText] = useState("The cat sat on the");
  const [kind, setKind] = useState(/** @type {"completion" | "chat"} */ ("completion"));
  const submit = (/** @type {Event} */ event) => {
    event.preventDefault();
    go("tokens"); // the text is no longer that of a request in the URL
    if (text) start(kind, text);
  };
  const onKeyDown = (/** @type {KeyboardEvent} */ event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) submit(event);
  };
  return html`
    <form class="card prompt-form" onSubmit=${submit}>
      <${Field} label="Prompt">
        ${(/** @type {any} */ attributes) => html`
          <textarea rows="2" ...${attributes} value=${text} onInput=${(/** @type {any} */ event) => setText(event.target.value)} onKeyDown=${onKeyDown}></textarea>
        `}
      <//>
      <div class="row">
        <fieldset class="kinds">
          <legend class="sr">What the prompt is</legend>
          ${[["completion", "Text to go on with"], ["chat", "Message of a chat"]].map(([value, label]) => html`
            <label><input type="radio" name="kind" value=${value} checked=${kind === value} onChange=${() => setKind(/** @type {any} */ (value))} /> ${label}</label>
          `)}
        </fieldset>
        <span class="space"></span>
        <${Button} kind="primary" type="submit" disabled=${model.value === "" || text === ""}>Generate<//>
      </div>
      <details>
        <summary>Settings of the sampler</summary>
        <div class="fields"><${Settings} /></div>
      </details>
    </form>
  `;
}

function Settings() {
  const set = (/** @type {string} */ name) => (/** @type {number | null} */ value) => (settings.value = { ...settings.value, [name]: value });
  const { max_tokens, temperature, top_p, top_k, min_p, seed } = settings.value;
  const limit = Math.min(contextLength.value ?? 512, 512);
  return html`
    <${Slider} label="Tokens to write" value=${max_tokens} min=${1} max=${limit} onInput=${set("max_tokens")} />
    <${Slider} label="Temperature" hint="0 always takes the likeliest token." value=${temperature} min=${0} max=${2} step=${0.05} onInput=${set("temperature")} />
    <${Slider} label="Top-p" hint="The share that the tokens that are kept have together." value=${top_p} min=${0} max=${1} step=${0.01} onInput=${set("top_p")} />
    <${Slider} label="Top-k" hint="How many tokens are kept; 0: all." value=${top_k} min=${0} max=${100} onInput=${set("top_k")} />
    <${Slider} label="Min-p" hint="The fraction of the best probability that a token needs." value=${min_p} min=${0} max=${1} step=${0.01} onInput=${set("min_p")} />
    <${Slider} label="Seed" hint="The same seed draws the same tokens." value=${seed} min=${0} max=${1000} onInput=${set("seed")} />
  `;
}

const Legend = () => html`
  <p class="scale hint" role="img" aria-label="Colours from certain to surprising">
    certain ${LEVELS.map((level) => html`<span style=${{ background: probabilityColor(level) }}></span>`)} surprising
  </p>
`;
