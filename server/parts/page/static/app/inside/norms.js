// How long the vectors are: the residual stream after each layer, and what attention and MLP added to it.
import { number } from "../format.js";
import { html } from "../lib.js";
import { layer } from "./playback.js";

/** @typedef {import("../inspect.js").Layer} Layer */
/** @type {[string, string, (layer: Layer) => number][]} */
const SERIES = [
  ["residual", "Residual stream", ({ residual_norm }) => residual_norm],
  ["attention", "Attention adds", ({ attention_norm }) => attention_norm],
  ["mlp", "MLP adds", ({ mlp_norm }) => mlp_norm],
];
const WIDTH = 400;
const HEIGHT = 120;

/** @param {{layers: Layer[]}} props */
export function Norms({ layers }) {
  const logs = SERIES.map(([, , read]) => layers.map((each) => Math.log10(Math.max(read(each), 1e-6))));
  const low = Math.floor(Math.min(...logs.flat()));
  const high = Math.max(low + 1, Math.ceil(Math.max(...logs.flat())));
  const x = (/** @type {number} */ index) => (layers.length < 2 ? WIDTH / 2 : (index / (layers.length - 1)) * WIDTH);
  const y = (/** @type {number} */ log) => HEIGHT - ((log - low) / (high - low)) * HEIGHT;
  const ticks = Array.from({ length: high - low + 1 }, (_, index) => low + index);
  return html`
    <div class="norms">
      <svg viewBox="0 0 ${WIDTH} ${HEIGHT}" preserveAspectRatio="none" role="img" aria-label=${description(layers)}>
        ${ticks.map((tick) => html`<line class="tick" x1="0" x2=${WIDTH} y1=${y(tick)} y2=${y(tick)} />`)}
        <line class="here" x1=${x(layer.value)} x2=${x(layer.value)} y1="0" y2=${HEIGHT} />
        ${SERIES.map(([name], index) => html`<polyline class=${name} points=${logs[index].map((log, at) => `${x(at)},${y(log)}`).join(" ")} />`)}
      </svg>
      <p class="norm-axis"><span>layer 1</span><span>logarithmic, ${10 ** low} to ${10 ** high}</span><span>layer ${layers.length}</span></p>
      <dl class="measures">
        ${SERIES.map(([name, label, read]) => html`<div class=${name}><dt>${label}</dt><dd>${number(read(layers[layer.value]))}</dd></div>`)}
      </dl>
    </div>
  `;
}

/** @param {Layer[]} layers */
function description(layers) {
  const parts = SERIES.map(([, label, read]) => `${label}: ${number(read(layers[0]))} in the first layer, ${number(read(layers[layers.length - 1]))} in the last`);
  return `Lengths of vectors by layer. ${parts.join(". ")}.`;
}
