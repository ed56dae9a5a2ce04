// Surprise and entropy along a text.
import { useCanvas } from "../canvas.js";
import { number, themeColor, visible } from "../format.js";
import { html } from "../lib.js";
import { chosen, hovered } from "./branches.js";
import { entropy, NUM_ALTERNATIVES, surprise } from "./generation.js";

const MIN_BITS = 4; // of the axis, so that small differences do not look large
const MAX_BITS = 12; // so that rare words of the prompt do not make all others look alike

/** @param {{branch: import("./branches.js").Branch}} props */
export function Chart({ branch: { number: name, tokens } }) {
  const surprises = tokens.map((token) => surprise(token) ?? 0);
  const entropies = tokens.map((token) => entropy(token) ?? 0);
  const top = Math.min(MAX_BITS, Math.max(MIN_BITS, Math.ceil(Math.max(...surprises, ...entropies))));
  const place = hovered.value ?? chosen.value;
  const marked = place?.branch === name ? place.index : -1;
  const draw = (/** @type {CanvasRenderingContext2D} */ context, /** @type {number} */ width, /** @type {number} */ height) => {
    const step = width / tokens.length;
    const y = (/** @type {number} */ bits) => height - 1 - Math.min(bits / top, 1) * (height - 2);
    if (marked >= 0) {
      context.fillStyle = themeColor("--line");
      context.fillRect(marked * step, 0, Math.max(step, 2), height);
    }
    context.fillStyle = themeColor("--surprise");
    surprises.forEach((bits, index) => context.fillRect(index * step, y(bits), Math.max(step - (step > 4 ? 1 : 0), 1), height - y(bits)));
    context.strokeStyle = themeColor("--text");
    context.lineWidth = 1.5;
    context.lineJoin = "round";
    context.beginPath();
    entropies.slice(1).forEach((bits, index) => context.lineTo((index + 1.5) * step, y(bits)));
    context.stroke();
  };
  const canvas = useCanvas(draw, [tokens, marked, top]);
  const indexAt = (/** @type {any} */ { offsetX, target }) =>
    Math.min(tokens.length - 1, Math.max(0, Math.floor((offsetX / target.clientWidth) * tokens.length)));
  const hover = (/** @type {any} */ event) => (hovered.value = { branch: name, index: indexAt(event) });
  const choose = (/** @type {any} */ event) => (chosen.value = { branch: name, index: indexAt(event) });
  return html`
    <figure class="chart">
      <figcaption>
        <span class="key surprise">Surprise</span><span class="key entropy">Entropy ≥</span>
        <span class="space"></span><span>${top === MAX_BITS ? "≥ " : ""}${top} bits</span>
      </figcaption>
      <canvas ref=${canvas} role="img" aria-label=${description(tokens, surprises, entropies)} onPointerMove=${hover}
        onPointerLeave=${() => (hovered.value = null)} onClick=${choose}></canvas>
      <p class="hint">
        Surprise is −log₂ of the token's probability. Entropy is how uncertain the model was before it: computed from the
        ${` ${NUM_ALTERNATIVES} `}likeliest tokens, with all others as one, so the true value may be larger.
      </p>
    </figure>
  `;
}

/**
 * The chart in words.
 * @param {import("./generation.js").TextToken[]} tokens
 * @param {number[]} surprises
 * @param {number[]} entropies
 */
function description(tokens, surprises, entropies) {
  const mean = (/** @type {number[]} */ values) => number(values.slice(1).reduce((sum, value) => sum + value, 0) / (values.length - 1));
  const largest = surprises.indexOf(Math.max(...surprises));
  return (
    `Surprise and entropy of ${tokens.length} tokens. Surprise: ${mean(surprises)} bits on average, at most ` +
    `${number(surprises[largest])} at position ${largest}, “${visible(tokens[largest].text)}”. Entropy: ${mean(entropies)} bits on average.`
  );
}
