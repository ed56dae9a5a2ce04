// Runs a recorded request again: the proof that its answer does not depend on what else ran.
import { callJson } from "../api.js";
import { Button, Problem } from "../components.js";
import { count, percent, visible } from "../format.js";
import { html, useState } from "../lib.js";

/**
 * @typedef {{token_id: number, token: string, logprob: number, rank: number, top: {token_id: number, token: string, logprob: number}[]}} Distribution
 * @typedef {{part: "prompt" | "output", position: number, recorded: Distribution, replayed: Distribution | null}} Difference
 * @typedef {{bit_equal: boolean, choices: {index: number, num_tokens: number, bit_equal: boolean, difference: Difference | null}[]}} Answer
 */

/** @param {{id: string, isFinished: boolean}} props */
export function Replay({ id, isFinished }) {
  const [answer, setAnswer] = useState(/** @type {Answer | null} */ (null));
  const [error, setError] = useState(/** @type {Error | null} */ (null));
  const [isRunning, setRunning] = useState(false);
  const run = async () => {
    setRunning(true);
    setAnswer(null);
    setError(null);
    try {
      setAnswer(await callJson(`v1/requests/${encodeURIComponent(id)}/replay`, { method: "POST" }));
    } catch (problem) {
      setError(/** @type {Error} */ (problem));
    }
    setRunning(false);
  };
  return html`
    <section class="card" aria-labelledby="replay-title">
      <header>
        <h2 id="replay-title">Replay</h2>
        <p class="hint">Where the engine’s answers do not depend on the batch, the same request with the same seed gets the same answer, whatever else runs beside it. Run it again, and compare every token and every bit of its log probabilities.</p>
      </header>
      <div class="row">
        <${Button} icon="refresh" disabled=${!isFinished || isRunning} onClick=${run}>${isRunning ? "Running …" : "Run again and compare"}<//>
        ${!isFinished && html`<span class="hint">It has not ended yet.</span>`}
      </div>
      <div role="status">${answer && html`<${Verdict} answer=${answer} />`}</div>
      ${error && html`<${Problem} error=${error} />`}
    </section>
  `;
}

/** @param {{answer: Answer}} props */
function Verdict({ answer }) {
  const numTokens = answer.choices.reduce((total, choice) => total + choice.num_tokens, 0);
  if (answer.bit_equal) return html`<p class="verdict good"><b>Bit-equal.</b> All ${count(numTokens)} tokens and their log probabilities are the same in every bit.</p>`;
  return answer.choices.filter(({ difference }) => difference).map(({ index, difference }) => html`
    <p class="verdict bad"><b>Not the same.</b> Choice ${index} differs first at position ${difference?.position} of the ${difference?.part}.</p>
    <div class="pair">
      <${Tokens} name="Recorded" distribution=${difference?.recorded} />
      <${Tokens} name="Replayed" distribution=${difference?.replayed} />
    </div>
  `);
}

/** @param {{name: string, distribution: Distribution | null | undefined}} props */
function Tokens({ name, distribution }) {
  if (!distribution) return html`<p>${name}: the answer has ended before.</p>`;
  return html`
    <table>
      <caption>${name}: <code class="token">${visible(distribution.token)}</code></caption>
      <thead><tr><th>Token</th><th class="right">Probability</th><th class="right">Log probability</th></tr></thead>
      <tbody>
        ${distribution.top.map(({ token, logprob }) => html`
          <tr><td><code class="token">${visible(token)}</code></td><td class="right">${percent(Math.exp(logprob))}</td><td class="right">${logprob}</td></tr>
        `)}
      </tbody>
    </table>
  `;
}
