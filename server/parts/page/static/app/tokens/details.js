// One token: how likely it was, what could have stood in its place, and what the sampler did.
import { CandidateBars, SamplerStages, TokenText } from "../candidates.js";
import { Empty } from "../components.js";
import { count, number, percent, visible } from "../format.js";
import { Refusal, useInspection } from "../inspection.js";
import { html } from "../lib.js";
import { linkTo } from "../router.js";
import { branchOf, chosen, goOn, hovered } from "./branches.js";
import { entropy, surprise } from "./generation.js";

/** @typedef {import("./generation.js").TextToken} TextToken */
/** @typedef {import("./branches.js").Place} Place */

export function Details() {
  const place = hovered.value ?? chosen.value;
  const token = place && branchOf(place.branch)?.tokens[place.index];
  const leave = (/** @type {KeyboardEvent} */ event) => {
    if (event.key !== "Escape") return;
    /** @type {HTMLElement | null} */ (document.querySelector('.token-span[aria-selected="true"]'))?.focus();
  };
  return html`
    <aside class="card details" aria-label="The token" onKeyDown=${leave}>
      ${token
        ? html`<${TokenDetails} token=${token} place=${place} />`
        : html`<${Empty} title="Point at a token">Or reach it with the arrow keys, and its alternatives with Enter.<//>`}
    </aside>
  `;
}

/** @param {{token: TextToken, place: Place}} props */
function TokenDetails({ token, place }) {
  const { id, text, origin, requestId } = token;
  return html`
    <header>
      <h2><${TokenText} text=${text} /></h2>
      <p class="hint">id ${count(id)}, position ${place.index}, ${ORIGINS[origin]}</p>
    </header>
    <${Figures} token=${token} />
    <${Alternatives} token=${token} place=${place} />
    ${requestId && html`<${Sampler} requestId=${requestId} position=${place.index - 1} origin=${origin} />`}
  `;
}

const ORIGINS = { prompt: "from the prompt", generated: "written by the model", chosen: "chosen by you" };

/** @param {{token: TextToken}} props */
function Figures({ token }) {
  const bits = surprise(token);
  if (bits === null) return html`<p>Nothing comes before the first token, so the model gave it no probability.</p>`;
  const rank = token.alternatives.findIndex(({ logprob }) => logprob <= /** @type {number} */ (token.logprob));
  return html`
    <dl class="measures">
      <div><dt>Probability</dt><dd>${percent(2 ** -bits)}</dd></div>
      <div><dt>Surprise</dt><dd>${number(Math.max(0, bits))} bits</dd></div>
      <div><dt>Entropy, at least</dt><dd>${number(entropy(token) ?? 0)} bits</dd></div>
      <div><dt>Rank</dt><dd>${rank === -1 || rank === 10 ? "> 10" : rank + 1}</dd></div>
    </dl>
  `;
}

/** @param {{token: TextToken, place: Place}} props */
function Alternatives({ token, place }) {
  if (token.alternatives.length === 0) return null;
  const isIt = (/** @type {import("./generation.js").Alternative} */ { id, text }) => (id === null ? text === token.text : id === token.id);
  const candidates = token.alternatives.map((each) => ({ ...each, note: isIt(each) ? "here" : undefined }));
  return html`
    <h3>What could stand here</h3>
    <p class="hint">Choose one to go on from there in a branch of its own. What comes before it is cached.</p>
    <${CandidateBars} candidates=${candidates} label="Alternatives" action=${(/** @type {string} */ text) => `Go on with “${visible(text)}”`}
      onChoose=${(/** @type {number} */ index) => goOn(place, token.alternatives[index])} />
  `;
}

/** @param {{requestId: string, position: number, origin: string}} props */
function Sampler({ requestId, position, origin }) {
  const { answer, error, isBusy, retry } = useInspection({ id: requestId, start: position, end: position + 1, top: 8 });
  return html`
    <h3>What the sampler did</h3>
    ${origin === "chosen" && html`<p class="hint">When the text was written that this branch left.</p>`}
    ${isBusy && html`<p class="hint" role="status">The engine computes it again …</p>`}
    ${error && html`<${Refusal} error=${error} onRetry=${retry} />`}
    ${answer?.sampling && html`<${SamplerStages} sampling=${answer.sampling} />`}
    ${answer && html`<p><a href=${linkTo("inside", { params: { id: requestId, position } })}>See the whole model at this position</a></p>`}
  `;
}
