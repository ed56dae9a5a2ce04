// How the engine's memory is divided, and how near it runs to its limits.
import { Problem } from "../components.js";
import { bytes, count } from "../format.js";
import { html } from "../lib.js";
import { usePolled } from "./stream.js";

const INTERVAL = 10000; // ms
const SPAN = 10; // s: how far back the largest step is looked for

/** @param {{history: import("./history.js").History, isPaused: boolean}} props */
export function LimitsCard({ history, isPaused }) {
  const { data: engine, error, retry } = usePolled("lightwell/v1/engine", INTERVAL, { isPaused });
  return html`
    <section class="card limits" aria-labelledby="limits-title">
      <header>
        <h2 id="limits-title">Memory and limits</h2>
        <p class="hint">What the engine took when it started, and how near it runs to what it allows.</p>
      </header>
      ${error && html`<${Problem} error=${error} onRetry=${retry} />`}
      ${engine && html`<${Memory} engine=${engine} /><${Nearness} engine=${engine} history=${history} />`}
    </section>
  `;
}

/** @param {{engine: any}} props */
function Memory({ engine }) {
  const states = engine.num_states * engine.state_bytes;
  const parts = [
    ["weights", "Weights", engine.weight_bytes],
    ["kv", "KV cache", engine.kv_cache_bytes - states],
    ["states", "States", states],
    ["activations", "Activations", engine.activation_bytes],
    ["rest", "Free on the host", engine.device === "cpu" ? engine.available_bytes : 0], // the bar is one memory
  ].filter(([, , size]) => size > 0);
  const whole = parts.reduce((total, [, , size]) => total + size, 0);
  return html`
    <div class="memory" aria-hidden="true">${parts.map(([name, , size]) => html`<span class="of-${name}" style=${{ flexGrow: size / whole }}></span>`)}</div>
    <ul class="legend">${parts.map(([name, label, size]) => html`<li><span class="mark of-${name}"></span>${label} <b class="num">${bytes(size)}</b></li>`)}</ul>
  `;
}

/** @param {{engine: any, history: import("./history.js").History}} props */
function Nearness({ engine, history }) {
  const last = history.steps.at(-1);
  const recent = history.recent(SPAN);
  const rows = [
    ["Choices in the batch", last?.num_running ?? 0, engine.max_num_seqs],
    ["Tokens of the largest step", recent.largest, engine.max_num_batched_tokens],
    ["KV blocks held", last?.num_blocks_used ?? 0, engine.num_blocks],
  ];
  return html`
    <table class="nearness">
      <tbody>
        ${rows.map(([name, used, limit]) => html`
          <tr>
            <th scope="row">${name}</th>
            <td><div class="meter" aria-hidden="true"><span style=${{ width: `${100 * Math.min(1, used / limit)}%` }}></span></div></td>
            <td class="right">${count(used)} of ${count(limit)}</td>
          </tr>
        `)}
        <tr><th scope="row">Weights read</th><td class="soft">at most: experts that no token chose are not read</td><td class="right">${bytes(engine.weight_bytes * recent.steps)}/s</td></tr>
        <tr><th scope="row">Context</th><td class="soft">a prompt and its answer</td><td class="right">${count(engine.max_model_len)} tokens</td></tr>
        <tr><th scope="row">Computes on</th><td class="soft">${engine.deterministic ? "the same answer in any batch" : "answers may depend on the batch"}</td><td class="right">${engine.device}, ${engine.dtype}</td></tr>
      </tbody>
    </table>
  `;
}
