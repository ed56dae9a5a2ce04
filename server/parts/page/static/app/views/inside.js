// Inside: how the model makes one token after the other, in the order of a textbook chapter.
import { CandidateBars, SamplerStages } from "../candidates.js";
import { Button, Empty, Field, Select, Slider } from "../components.js";
import { percent } from "../format.js";
import { AttentionMap, AttentionText, Heads } from "../inside/attention.js";
import { Lens } from "../inside/lens.js";
import { Norms } from "../inside/norms.js";
import { StateRows } from "../inside/states.js";
import { cursor, hasAttention, head, isPlaying, isWriting, layer, moveTo, numTries, open, problem, reading, readShown, retry, text, write } from "../inside/playback.js";
import { Player } from "../inside/player.js";
import { Embedding, FedBack, Ids } from "../inside/text.js";
import { Refusal } from "../inspection.js";
import { html, useEffect, useRef, useState } from "../lib.js";
import { go, route } from "../router.js";
import { model } from "../state.js";

export const title = "Inside";
export const about =
  "How a model makes a token: text becomes ids, ids become vectors, layers work on them, and the last vector says what may come next. Everything here is computed again by the engine for your text, from the weights that it serves.";

const PULSES = ["pulse-even", "pulse-odd"]; // animations begin again when their name changes

export default function InsideView() {
  useOpened();
  useEffect(() => {
    if (text.value === null) return undefined;
    const controller = new AbortController();
    readShown(controller.signal);
    return () => controller.abort();
  }, [text.value, cursor.value, layer.value, head.value, numTries.value]);
  return html`
    <${PromptForm} />
    ${problem.value && html`<${Refusal} error=${problem.value} onRetry=${retry} />`}
    ${text.value
      ? html`<${Player} /><${Chapter} key=${text.value.id} />`
      : !problem.value && html`<${Empty} title=${isWriting.value ? "The model is writing …" : "Nothing computed yet"}>
          ${isWriting.value ? "Then you can look at how it did." : "Let the model write a few words, and see how it makes each of them."}
        <//>`}
  `;
}

/** Shows the request that the URL names. */
function useOpened() {
  const { params } = route.value;
  const id = params.get("id") ?? "";
  const position = params.has("position") ? Number(params.get("position")) : null;
  useEffect(() => {
    if (id === "" || model.value === "") return;
    if (id !== text.value?.id) open(id, position);
    else if (position !== null) moveTo(position);
  }, [id, position, model.value !== ""]);
}

function PromptForm() {
  const [prompt, setPrompt] = useState("The capital of France is");
  const [kind, setKind] = useState(/** @type {"completion" | "chat"} */ ("completion"));
  const [maxTokens, setMaxTokens] = useState(/** @type {number | null} */ (16));
  const [temperature, setTemperature] = useState(/** @type {number | null} */ (0.8));
  const submit = (/** @type {Event} */ event) => {
    event.preventDefault();
    go("inside"); // the text is no longer that of a request in the URL
    write(kind, prompt, { max_tokens: maxTokens, temperature });
  };
  return html`
    <form class="card prompt-form" onSubmit=${submit}>
      <${Field} label="Prompt">
        ${(/** @type {any} */ attributes) => html`
          <textarea rows="2" required ...${attributes} value=${prompt} onInput=${(/** @type {any} */ event) => setPrompt(event.target.value)}></textarea>
        `}
      <//>
      <div class="fields">
        <${Select} label="The prompt is" value=${kind} options=${[["completion", "a text to go on with"], ["chat", "a message of a chat"]]} onChange=${setKind} />
        <${Slider} label="Tokens to write" value=${maxTokens} min=${1} max=${64} onInput=${setMaxTokens} />
        <${Slider} label="Temperature" value=${temperature} min=${0} max=${2} step=${0.05} onInput=${setTemperature} />
        <${Button} kind="primary" type="submit" disabled=${model.value === "" || isWriting.value}>Look inside<//>
      </div>
    </form>
  `;
}

function Chapter() {
  const last = useRef(/** @type {import("../inside/playback.js").Reading | null} */ (null)); // shown until the next one is there
  const isKnown = reading.value?.isFull ?? false;
  if (isKnown) last.current = reading.value;
  const shown = last.current;
  return html`
    <div class="chapter ${isPlaying.value ? PULSES[cursor.value % 2] : ""} ${isKnown ? "" : "stale"}" aria-busy=${isKnown ? "false" : "true"}>
      <${Step} name="ids" number=${1} title="Text to ids" text="The tokenizer cuts the text into pieces of its vocabulary. The model never sees letters, only the numbers of these pieces.">
        <${Ids} />
      <//>
      <${Step} name="embedding" number=${2} title="Embedding" text="The id picks a row of a table that was learned. This vector begins the residual stream of its position: from here on, each layer adds to it.">
        <${Embedding} />
      <//>
      <${Step} name="layers" number=${3} title="Layers" text="Each layer adds two things to the residual stream: attention brings in what earlier positions hold, and an MLP works on this position alone.">
        <${Layers} shown=${shown} />
      <//>
      <${Step} name="head" number=${4} title="LM head" text="The last state is compared with a vector for each token of the vocabulary. That gives a score for each, and softmax makes probabilities of them.">
        ${shown && html`<${CandidateBars} candidates=${bars(shown.layers[shown.layers.length - 1].lens)} label="Likeliest next tokens" />`}
      <//>
      <${Step} name="sampling" number=${5} title="Sampling" text="One token is drawn. The settings of the request change the probabilities and remove tokens, one stage after the other; then noise decides.">
        ${shown && (shown.sampling ? html`<${SamplerStages} sampling=${shown.sampling} />` : html`<p class="hint">Nothing is drawn here: the next token is part of the prompt.</p>`)}
      <//>
      <${Step} name="back" number=${6} title="Fed back" text="The token joins the text, and all begins again with it. The keys and values of earlier positions are kept in the KV cache, so only the new one is computed.">
        <${FedBack} />
      <//>
    </div>
  `;
}

/** @param {{name: string, number: number, title: string, text: string, children: any}} props */
const Step = ({ name, number, title: heading, text: explanation, children }) => html`
  <section class="card step step-${name}" aria-labelledby="step-${name}">
    <h2 id="step-${name}"><span class="step-number">${number}</span>${heading}</h2>
    <p class="hint explanation">${explanation}</p>
    ${children}
  </section>
`;

/** @param {{shown: import("../inside/playback.js").Reading | null}} props */
function Layers({ shown }) {
  const current = shown?.layers[layer.value];
  const place = html`<span class="hint">layer ${layer.value + 1}</span>`;
  return html`
    <div class="layers">
      <div class="part lens-part">
        <h3>What the model would say after each layer</h3>
        <p class="hint">The logit lens: the final norm and the LM head, applied early. The stronger the tint, the surer. Choose a cell to see its layer and position.</p>
        <${Lens} />
      </div>
      <div class="part">
        <h3>Its guesses here ${place}</h3>
        <div class="guesses">${current && html`<${CandidateBars} candidates=${bars(current.lens)} label="Guesses of this layer" />`}</div>
        <h3>How much is added ${place}</h3>
        <div class="norms-box">${shown && html`<${Norms} layers=${shown.layers} />`}</div>
        ${current?.experts && html`<${Experts} experts=${current.experts} />`}
      </div>
      <div class="part">
        ${hasAttention.value
          ? html`
              <h3>Where attention looks ${place}</h3>
              <p class="hint">Each head takes something from the earlier tokens. Its weights add up to 100 %; often the first token gets what is left over. Choose a head.</p>
              ${current && html`<${Heads} heads=${current.heads} />`}
              <${AttentionText} />
              <${AttentionMap} />
            `
          : html`<h3>What is kept of earlier tokens ${place}</h3><${StateRows} />`}
      </div>
    </div>
  `;
}

/** @param {{experts: import("../inspect.js").Weight[]}} props */
const Experts = ({ experts }) => html`
  <h3>Experts</h3>
  <p class="hint">The MLP of this layer has ${text.value?.num_experts} experts. A router chose these for the token.</p>
  <ul class="experts">${experts.map(([expert, weight]) => html`<li class="box">Expert ${expert} <strong>${percent(weight)}</strong></li>`)}</ul>
`;

/** @param {import("../inspect.js").Candidate[]} candidates */
const bars = (candidates) => candidates.map(({ token, logprob }) => ({ text: token, logprob }));
