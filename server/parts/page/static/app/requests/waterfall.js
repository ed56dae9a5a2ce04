// The waterfall: on which stage a choice spent its time, on one axis. The stages add up to its wall time.
import { callJson } from "../api.js";
import { count, duration, percent } from "../format.js";
import { html, useEffect, useState } from "../lib.js";
import { linkTo } from "../router.js";
import { STAGES, segments } from "./stages.js";

const MAX_STEPS = 1024; // that are asked for at a time

/** @typedef {import("./stages.js").ChoiceDetail} ChoiceDetail */

/** @param {{choice: ChoiceDetail}} props */
export function Waterfall({ choice }) {
  const parts = segments(choice);
  const wall = choice.wall_s;
  const times = useChunkTimes(choice);
  const place = (/** @type {number} */ start, /** @type {number} */ seconds) => ({ left: `${(100 * start) / wall}%`, width: `${(100 * seconds) / wall}%` });
  return html`
    <section class="card" aria-labelledby="waterfall-title">
      <header>
        <h2 id="waterfall-title">Where its time went</h2>
        <p class="hint">Every moment from its arrival ${choice.finished === null ? "until now" : "to its end"} belongs to one stage. Narrow bars in the prefill are chunks, each computed by one step.</p>
      </header>
      <table class="waterfall">
        <colgroup><col class="names" /><col /><col class="times" /><col class="shares" /></colgroup>
        <thead class="sr"><tr><th>Stage</th><th>When</th><th>Time</th><th>Part</th></tr></thead>
        <tbody>
          ${STAGES.map(([stage, name, meaning]) => (stage === "preempted" && choice.num_preemptions === 0 ? null : html`
            <tr>
              <th scope="row">${name}<span>${meaning}</span></th>
              <td class="track">
                <div>
                  ${parts.filter((part) => part.stage === stage).map(({ start, seconds }) => html`<span class="segment of-${stage}" style=${place(start, seconds)}></span>`)}
                  ${stage === "prefill" && times.map(({ start, seconds }) => html`<span class="chunk" style=${place(start, seconds)}></span>`)}
                </div>
              </td>
              <td class="right">${duration(choice.seconds[stage])}</td>
              <td class="right soft">${percent(choice.seconds[stage] / wall)}</td>
            </tr>
          `))}
        </tbody>
        <tfoot>
          <tr><th scope="row">Wall time</th><td class="axis"><div><span>0</span><span>${duration(wall / 2)}</span><span>${duration(wall)}</span></div></td>
            <td class="right">${duration(wall)}</td><td class="right soft">100 %</td></tr>
        </tfoot>
      </table>
    </section>
  `;
}

/**
 * When the chunks of a prompt were computed, in seconds since the arrival. Empty if their steps are no longer recorded.
 * @param {ChoiceDetail} choice
 */
function useChunkTimes({ chunks, arrival, id }) {
  const [times, setTimes] = useState(/** @type {{start: number, seconds: number}[]} */ ([]));
  useEffect(() => {
    if (chunks.length === 0) return;
    const [first, last] = [chunks[0].step, chunks[chunks.length - 1].step];
    const own = new Set(chunks.map(({ step }) => step));
    callJson(`lightwell/v1/steps?after=${first - 1}&limit=${Math.min(MAX_STEPS, last - first + 1)}`).then(({ data }) => {
      const steps = /** @type {import("../engine/history.js").Step[]} */ (data).filter((step) => own.has(step.id) && step.rows.some((row) => row.id === id));
      setTimes(steps.map(({ started, seconds }) => ({
        start: started - arrival,
        seconds: Object.values(seconds).reduce((total, each) => total + each, 0),
      })));
    }, () => {});
  }, [id, chunks.length]);
  return times;
}

/** @param {{choice: ChoiceDetail}} props */
export function Chunks({ choice }) {
  const { chunks, id } = choice;
  const link = (/** @type {number} */ step) => linkTo("engine", { params: { step, request: id } });
  return html`
    <section class="card" aria-labelledby="chunks-title">
      <header>
        <h2 id="chunks-title">Chunks</h2>
        <p class="hint">A long prompt is computed in chunks, so that others get their tokens in between. What a preemption lost is computed again in the same way.</p>
      </header>
      ${chunks.length === 0 && html`<p class="quiet">No step has computed tokens of its prompt yet.</p>`}
      ${chunks.length > 0 && html`
        <div class="scroll" tabindex="0" role="region" aria-label="Chunks">
          <table>
            <thead><tr><th>Step</th><th class="right">From position</th><th class="right">Tokens</th></tr></thead>
            <tbody>
              ${chunks.map(({ step, position, num_tokens: numTokens }) => html`
                <tr><td><a href=${link(step)}>${step}</a></td><td class="right">${count(position)}</td><td class="right">${count(numTokens)}</td></tr>
              `)}
            </tbody>
          </table>
        </div>
        <p><a href=${link(chunks[0].step)}>See it in the schedule</a></p>
      `}
    </section>
  `;
}
