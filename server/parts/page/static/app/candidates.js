// Tokens that the model weighs, and what each stage of the sampler did to them.
import { count, percent, visible } from "./format.js";
import { html } from "./lib.js";

/** @typedef {import("./inspect.js").Candidate} Candidate */
/** @typedef {import("./inspect.js").Stage} Stage */
/** @typedef {import("./inspect.js").Sampling} Sampling */

const MAX_ROWS = 12;

/** What the stages of a sampler do, in the order of the settings. */
export const STAGES = new Map([
  ["logits", ["Model", "The model's own probabilities, before any setting."]],
  ["grammar", ["Grammar", "Removes the tokens that the required format does not allow here."]],
  ["logit_bias", ["Bias", "Adds what the request asks for to the scores of some tokens."]],
  ["banned_tokens", ["Banned", "Removes tokens that must not come here, such as the end before the least length."]],
  ["allowed_token_ids", ["Allowed", "Keeps the tokens that the request allows."]],
  ["penalties", ["Penalties", "Make tokens less likely that are in the text already."]],
  ["dry", ["DRY", "Makes tokens less likely that would extend a repetition."]],
  ["top_n_sigma", ["Top-nσ", "Keeps the tokens whose scores are near the best one."]],
  ["temperature", ["Temperature", "Below 1 makes likely tokens likelier, above 1 evens them out."]],
  ["top_k", ["Top-k", "Keeps a fixed number of the likeliest tokens."]],
  ["typ_p", ["Typical", "Keeps the tokens whose surprise is near the expected one."]],
  ["top_p", ["Top-p", "Keeps the likeliest tokens that have a given share together."]],
  ["min_p", ["Min-p", "Keeps the tokens that have a given fraction of the best one's probability."]],
  ["xtc", ["XTC", "Now and then removes all likely tokens but the least likely of them."]],
  ["mirostat", ["Mirostat", "Keeps the tokens that hold the surprise of the text near a target."]],
]);

/** @param {string} name */
export const stageLabel = (name) => STAGES.get(name)?.[0] ?? name.replaceAll("_", " ");

/**
 * The tint of a cell: the stronger, the likelier.
 * @param {number} probability
 */
export const strength = (probability) => `color-mix(in oklab, var(--accent) ${Math.round(46 * probability ** 0.7)}%, transparent)`;

/**
 * Returns a token as the API writes it, but with bytes that are only a part of a character in a short form: ⟨e2 80⟩.
 * @param {string} text
 */
export const withBytes = (text) => text.replace(/^bytes: ?((?:\\x[0-9a-f]{2})+)$/, (_, bytes) => `⟨${bytes.slice(2).replaceAll("\\x", " ")}⟩`);

/**
 * Returns a token as a part of running text, in which line ends and tabs are marked.
 * @param {string} text
 */
export const inText = (text) => (text === "" ? "∅" : withBytes(text).replaceAll("\n", "⏎\n").replaceAll("\t", "⇥\t"));

/**
 * A token of the vocabulary, with its white space marked.
 * @param {{text: string}} props
 */
export const TokenText = ({ text }) => html`<code class="token-text">${visible(withBytes(text))}</code>`;

/**
 * Candidates as a list of bars. With `onChoose`, each can be chosen.
 * @param {{candidates: {text: string, logprob: number, note?: string}[], label: string, action?: (text: string) => string,
 *   onChoose?: (index: number) => void}} props
 */
export const CandidateBars = ({ candidates, label, action, onChoose }) => html`
  <ol class="bars" aria-label=${label}>
    ${candidates.map(({ text, logprob, note }, index) => {
      const probability = Math.exp(logprob);
      const content = html`
        <${TokenText} text=${text} />
        <span class="meter" aria-hidden="true"><span style=${{ width: `${100 * probability}%` }}></span></span>
        <span class="bar-value">${percent(probability)}</span>
        ${note && html`<span class="bar-note">${note}</span>`}
      `;
      return html`
        <li>
          ${onChoose && !note
            ? html`<button type="button" class="bar-row" title=${action?.(text)} onClick=${() => onChoose(index)}>${content}</button>`
            : html`<span class="bar-row">${content}</span>`}
        </li>
      `;
    })}
  </ol>
`;

/**
 * What the sampler did at a position: its stages one after the other, and the noise that decided.
 * @param {{sampling: Sampling}} props
 */
export const SamplerStages = ({ sampling }) => html`
  <div class="sampler">
    <div><${StageTable} ...${sampling} /><${StageNotes} ...${sampling} /></div>
    <div><${Noise} ...${sampling} /><${Proof} ...${sampling} /></div>
  </div>
`;

/** @param {Sampling} props */
function StageTable({ stages, recomputed }) {
  const rows = candidatesOf(stages, recomputed?.token_id);
  return html`
    <div class="scroller" tabindex="0" role="region" aria-label="Stages of the sampler">
      <table class="sampler-stages">
        <thead>
          <tr>
            <th scope="col">Token</th>
            ${stages.map(({ name }) => html`<th scope="col" title=${STAGES.get(name)?.[1]}>${stageLabel(name)}</th>`)}
          </tr>
        </thead>
        <tbody>
          ${rows.map((token) => html`
            <tr class=${token.token_id === recomputed?.token_id ? "winner" : ""}>
              <th scope="row"><${TokenText} text=${token.token} /></th>
              ${stages.map((stage, index) => html`<${StageCell} stages=${stages} index=${index} id=${token.token_id} />`)}
            </tr>
          `)}
        </tbody>
        <tfoot>
          <tr>
            <th scope="row">Possible</th>
            ${stages.map(({ num_tokens }) => html`<td>${count(num_tokens)}</td>`)}
          </tr>
          <tr>
            <th scope="row">Removed</th>
            ${stages.map(({ num_removed }) => html`<td>${num_removed ? `−${count(num_removed)}` : "–"}</td>`)}
          </tr>
        </tfoot>
      </table>
    </div>
  `;
}

/** @param {Sampling} props */
const StageNotes = ({ stages }) => html`
  <details class="stage-notes">
    <summary>What the stages do</summary>
    <dl>${stages.map(({ name }) => html`<dt>${stageLabel(name)}</dt><dd>${STAGES.get(name)?.[1]}</dd>`)}</dl>
  </details>
`;

/**
 * Returns the tokens to show: the likeliest of each stage, and the likeliest that each removed.
 * @param {Stage[]} stages
 * @param {number | undefined} chosenId
 */
function candidatesOf(stages, chosenId) {
  const found = new Map(stages.flatMap(({ top, removed }) => [...top, ...removed]).map((token) => [token.token_id, token]));
  const first = new Map(stages[0]?.top.map(({ token_id, logprob }) => [token_id, logprob]));
  const rank = (/** @type {Candidate} */ token) => (token.token_id === chosenId ? Infinity : (first.get(token.token_id) ?? token.logprob - 100));
  const kept = [...found.values()].sort((a, b) => rank(b) - rank(a)).slice(0, MAX_ROWS);
  return kept.sort((a, b) => (first.get(b.token_id) ?? -Infinity) - (first.get(a.token_id) ?? -Infinity) || a.token_id - b.token_id);
}

/** @param {{stages: Stage[], index: number, id: number}} props */
function StageCell({ stages, index, id }) {
  const isIt = (/** @type {Candidate} */ { token_id }) => token_id === id;
  const removedAt = stages.findIndex(({ removed }) => removed.some(isIt));
  if (removedAt === index) return html`<td class="removed">removed</td>`;
  if (removedAt !== -1 && removedAt < index) return html`<td class="gone"><span class="sr">no longer possible</span></td>`;
  const found = stages[index].top.find(isIt);
  if (!found) return html`<td title="Not among the likeliest here">·</td>`;
  const probability = Math.exp(found.logprob);
  return html`<td style=${{ background: strength(probability) }}>${percent(probability)}</td>`;
}

/** @param {Sampling} props */
function Noise({ noise, recomputed }) {
  if (noise.length === 0) return html`<p class="hint">No noise: the temperature is 0, so the likeliest token is taken.</p>`;
  return html`
    <p class="hint">Chance enters as noise: each token that is left gets a random number, and the largest sum wins. Likely tokens win often.</p>
    <div class="scroller" tabindex="0" role="region" aria-label="Noise">
      <table class="noise">
        <thead><tr><th scope="col">Token</th><th scope="col">Score</th><th scope="col">Noise</th><th scope="col">Sum</th></tr></thead>
        <tbody>
          ${noise.map(({ token_id, token, logit, noise: added }) => html`
            <tr class=${token_id === recomputed?.token_id ? "winner" : ""}>
              <th scope="row"><${TokenText} text=${token} /></th>
              <td>${fixed(logit)}</td><td>${signed(added)}</td>
              <td>${fixed(logit + added)}${token_id === recomputed?.token_id ? html` <span class="badge">wins</span>` : ""}</td>
            </tr>
          `)}
        </tbody>
      </table>
    </div>
  `;
}

/** @param {Sampling} props */
function Proof({ recomputed, sent }) {
  if (recomputed === null || sent === null) return null;
  const isEqual = recomputed.token_id === sent.token_id;
  return html`
    <p class="proof ${isEqual ? "good" : "bad"}">
      ${isEqual
        ? html`Computed again just now: <${TokenText} text=${recomputed.token} />, the token that was sent.`
        : html`Computed again just now: <${TokenText} text=${recomputed.token} />, but <${TokenText} text=${sent.token} /> was sent.`}
    </p>
  `;
}

/** @param {number} value */
const fixed = (value) => value.toFixed(2).replace("-", "−");
/** @param {number} value */
const signed = (value) => (value < 0 ? fixed(value) : `+${fixed(value)}`);

