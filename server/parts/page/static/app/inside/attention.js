// Where attention looks: the heads of a layer, the weights of one of them on the text, and on a map.
import { inText, strength, withBytes } from "../candidates.js";
import { useCanvas } from "../canvas.js";
import { percent, themeColor, visible } from "../format.js";
import { html, useState } from "../lib.js";
import { columns, cursor, head, layer, rowOf, text } from "./playback.js";

/** @typedef {import("../inspect.js").Weight} Weight */
/** @typedef {import("../inspect.js").Token} Token */

const ROW = 16; // px
const LABELS = 76; // px

/**
 * The heads of the chosen layer, each with the token that it looks at most.
 * @param {{heads: Weight[][]}} props
 */
export function Heads({ heads }) {
  const { tokens } = /** @type {import("./playback.js").Text} */ (text.value);
  return html`
    <div class="heads" role="radiogroup" aria-label="Head" onKeyDown=${chooseByKey(heads.length)}>
      ${heads.map(([most], index) => html`
        <button type="button" role="radio" class="head" tabindex=${index === head.value ? 0 : -1} aria-checked=${index === head.value ? "true" : "false"}
          onClick=${() => (head.value = index)}>
          <span class="head-number">${index + 1}</span>
          ${most && html`<code>${readable(tokens[most[0]])}</code><span class="bar-value">${percent(most[1])}</span>`}
        </button>
      `)}
    </div>
  `;
}

/** @param {number} numHeads */
const chooseByKey = (numHeads) => (/** @type {any} */ event) => {
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[/** @type {string} */ (event.key)];
  if (!step) return;
  event.preventDefault();
  head.value = (head.value + step + numHeads) % numHeads;
  event.currentTarget.children[head.value].focus();
};

/** The text, tinted by how much the token takes from each earlier one. */
export function AttentionText() {
  const { tokens } = /** @type {import("./playback.js").Text} */ (text.value);
  const row = rowOf(cursor.value);
  return html`
    <div class="attended" role="group" aria-label="Text, tinted by attention">
      ${tokens.slice(0, cursor.value + 1).map(({ token }, index) => html`
        <span style=${{ background: strength(row?.[index] ?? 0) }} title=${row ? percent(row[index]) : undefined}
          class=${index === cursor.value ? "current" : ""}>${inText(token)}</span>
      `)}
    </div>
  `;
}

/** A map of the head's weights: a row for each token of the table, a column for each token that it can see. */
export function AttentionMap() {
  const [pointed, setPointed] = useState(/** @type {[number, number] | null} */ (null));
  const { tokens } = /** @type {import("./playback.js").Text} */ (text.value);
  const weights = columns.value.map(rowOf);
  const numKeys = (columns.value[columns.value.length - 1] ?? 0) + 1;
  const draw = (/** @type {CanvasRenderingContext2D} */ context, /** @type {number} */ width) => {
    const step = (width - LABELS) / numKeys;
    const gap = step > 6 ? 1 : 0;
    context.font = `11px ${getComputedStyle(document.body).getPropertyValue("--mono")}`;
    context.textBaseline = "middle";
    columns.value.forEach((position, index) => {
      context.globalAlpha = 1;
      context.fillStyle = themeColor(position === cursor.value ? "--accent" : "--soft");
      context.fillText(fitted(context, readable(tokens[position])), 0, index * ROW + ROW / 2);
      context.fillStyle = themeColor("--sunken");
      context.fillRect(LABELS, index * ROW, (position + 1) * step - gap, ROW - 1);
      context.fillStyle = themeColor("--accent");
      weights[index]?.forEach((weight, key) => {
        context.globalAlpha = Math.sqrt(weight);
        context.fillRect(LABELS + key * step, index * ROW, Math.max(step - gap, 0.5), ROW - 1);
      });
    });
  };
  const canvas = useCanvas(draw, [...weights, columns.value, cursor.value]);
  const point = (/** @type {any} */ { offsetX, offsetY, target }) => {
    const row = Math.floor(offsetY / ROW);
    const key = Math.floor(((offsetX - LABELS) / (target.clientWidth - LABELS)) * numKeys);
    setPointed(weights[row]?.[key] === undefined ? null : [row, key]);
  };
  const leave = (/** @type {any} */ { pointerType }) => pointerType === "mouse" && setPointed(null); // a finger leaves at once
  return html`
    <canvas class="map" ref=${canvas} style=${{ height: `${columns.value.length * ROW}px` }} role="img" aria-label=${description(tokens, rowOf(cursor.value))}
      onPointerDown=${point} onPointerMove=${point} onPointerLeave=${leave}></canvas>
    <p class="hint pointed-at">${pointed ? readout(tokens, weights, pointed) : "Rows look at columns: point at a cell to read it."}</p>
  `;
}

/** @param {Token} token */
const readable = ({ token }) => visible(withBytes(token));

/**
 * @param {CanvasRenderingContext2D} context
 * @param {string} label
 */
function fitted(context, label) {
  let fitting = label;
  while (fitting.length > 1 && context.measureText(fitting).width > LABELS - 8) fitting = `${fitting.replace("…", "").slice(0, -1)}…`;
  return fitting;
}

/**
 * @param {Token[]} tokens
 * @param {(number[] | null)[]} weights
 * @param {[number, number]} cell
 */
const readout = (tokens, weights, [row, key]) =>
  `“${readable(tokens[columns.value[row]])}” takes ${percent(weights[row]?.[key] ?? 0)} from “${readable(tokens[key])}” at position ${key}.`;

/**
 * The map in words.
 * @param {Token[]} tokens
 * @param {number[] | null} row
 */
function description(tokens, row) {
  const name = `Attention of layer ${layer.value + 1}, head ${head.value + 1}`;
  if (row === null) return `${name}.`;
  const most = row.map((weight, key) => /** @type {const} */ ([weight, key])).sort((a, b) => b[0] - a[0]).slice(0, 5);
  const parts = most.map(([weight, key]) => `“${readable(tokens[key])}” at position ${key}: ${percent(weight)}`);
  return `${name}. The token at position ${cursor.value} looks most at ${parts.join(", ")}.`;
}
