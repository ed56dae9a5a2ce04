// One request: what happened to it, and why it took as long as it did.
import { call } from "../api.js";
import { Button, Copy, Problem, Select } from "../components.js";
import { clock, Figure, Refused } from "../engine/parts.js";
import { usePolled } from "../engine/stream.js";
import { count, duration, number } from "../format.js";
import { html, useState } from "../lib.js";
import { go, linkTo, route } from "../router.js";
import { PrefixReason } from "./prefix.js";
import { Replay } from "./replay.js";
import { speed, timeToFirst } from "./stages.js";
import { stateText } from "./table.js";
import { Chunks, Waterfall } from "./waterfall.js";

const INTERVAL = 1000; // ms, until the request has ended

/** @typedef {import("./stages.js").ChoiceDetail} ChoiceDetail */

const hasEnded = (/** @type {{choices: ChoiceDetail[]}} */ { choices }) => choices.every(({ state }) => state === "finished");
const nameOf = (/** @type {ChoiceDetail} */ choice) => `${choice.prompt}.${choice.index}`;

/** @param {{id: string}} props */
export function Detail({ id }) {
  const path = `lightwell/v1/requests/${encodeURIComponent(id)}`;
  const { data, error, retry } = usePolled(path, INTERVAL, { isFinal: hasEnded });
  const back = html`<p><a href=${linkTo("requests")}>All requests</a></p>`;
  if (error && !data) return html`${back}<${Refused} title=${error.status === 404 ? "This request is not recorded" : "It cannot be shown"} error=${error} onRetry=${retry} />`;
  if (!data) return back;
  const chosen = route.value.params.get("choice") ?? nameOf(data.choices[0]);
  const choice = data.choices.find((/** @type {ChoiceDetail} */ each) => nameOf(each) === chosen) ?? data.choices[0];
  const options = data.choices.map((/** @type {ChoiceDetail} */ each) => [nameOf(each), `${each.prompt ? `prompt ${each.prompt}, ` : ""}choice ${each.index}`]);
  return html`
    ${back}
    <div class="title">
      <h2><code>${data.id}</code></h2><${Copy} text=${data.id} label="Copy the id" />
      ${options.length > 1 && html`<${Select} label="Choice" value=${nameOf(choice)} options=${options} onChange=${(/** @type {string} */ value) => go("requests", { id, params: { choice: value } })} />`}
      <${Download} path="${path}/trace" name="${data.id.replace(/[^\w.-]/g, "_")}.trace.json" />
    </div>
    ${choice.other_ids.length > 0 && html`<p class="hint">Also named ${choice.other_ids.map((/** @type {string} */ other, /** @type {number} */ index) => html`${index ? ", " : ""}<code>${other}</code>`)}</p>`}
    ${error && html`<${Problem} error=${error} onRetry=${retry} />`}
    <${Figures} choice=${choice} />
    <${Waterfall} key=${nameOf(choice)} choice=${choice} />
    <${PrefixReason} prefix=${choice.prefix} numPromptTokens=${choice.num_prompt_tokens} />
    <div class="pair">
      <${Chunks} choice=${choice} />
      <${Replay} id=${data.id} isFinished=${hasEnded(data)} />
    </div>
  `;
}

/** @param {{choice: ChoiceDetail}} props */
function Figures({ choice }) {
  const first = timeToFirst(choice);
  const rate = speed(choice);
  return html`
    <dl class="figures">
      <${Figure} name="State" value=${stateText(choice)} note=${choice.model} />
      <${Figure} name="Arrived" value=${clock(choice.arrival)} note="${count(choice.num_ahead)} ahead of it" />
      <${Figure} name="First token after" value=${first === null ? "–" : duration(first)} />
      <${Figure} name="In all" value=${duration(choice.wall_s)} note=${choice.finished === null ? "so far" : ""} />
      <${Figure} name="Prompt" value=${count(choice.num_prompt_tokens)} note="tokens, ${count(choice.num_cached_tokens)} cached" />
      <${Figure} name="Output" value=${count(choice.num_output_tokens)} note="tokens, ${count(choice.num_accepted_tokens)} drafted" />
      <${Figure} name="Speed" value=${rate === null ? "–" : number(rate)} note="tokens per second" />
      <${Figure} name="Preemptions" value=${count(choice.num_preemptions)} note=${choice.num_blocks ? `holds ${count(choice.num_blocks)} blocks` : ""} />
    </dl>
  `;
}

/** @param {{path: string, name: string}} props */
function Download({ path, name }) {
  const [error, setError] = useState("");
  const save = async () => {
    setError("");
    try {
      const link = document.createElement("a");
      link.href = URL.createObjectURL(await (await call(path)).blob());
      link.download = name;
      link.click();
      URL.revokeObjectURL(link.href);
    } catch (problem) {
      setError(/** @type {Error} */ (problem).message);
    }
  };
  return html`
    <span class="row download">
      <${Button} icon="download" title="A trace that ui.perfetto.dev and chrome://tracing open" onClick=${save}>Trace for Perfetto<//>
      ${error && html`<span class="hint" role="alert">${error}</span>`}
    </span>
  `;
}
