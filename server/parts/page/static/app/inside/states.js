// What layers have in place of attention: how much of its state one keeps at each token, and writes to it.
import { strength, withBytes } from "../candidates.js";
import { percent, visible } from "../format.js";
import { html } from "../lib.js";
import { columns, cursor, layer, readings, text } from "./playback.js";

/** @type {["kept" | "written", string][]} */
const ROWS = [["kept", "Kept"], ["written", "Written"]];

/** The shares at the tokens of the table of layers. */
export function StateRows() {
  const { tokens } = /** @type {import("./playback.js").Text} */ (text.value);
  const states = columns.value.map((position) => readings.value.get(position)?.layers[layer.value].state);
  const [known] = readings.value.values();
  if (known && !known.layers[layer.value].state) return html`<p class="hint">This layer has a short convolution in place of attention: it sees the last few tokens.</p>`;
  return html`
    <p class="hint">This layer has a state in place of attention. Each token lets a part of it fade, and is written to it.</p>
    <div class="scroller" tabindex="0" role="region" aria-label="State">
      <table class="lens states" style=${{ minWidth: `${4 + 3.5 * columns.value.length}rem` }}>
        <thead><tr><th scope="col"></th>${columns.value.map((position) => html`
          <th scope="col" class=${position === cursor.value ? "current" : ""}><code>${visible(withBytes(tokens[position].token))}</code></th>
        `)}</tr></thead>
        <tbody>${ROWS.map(([name, label]) => html`
          <tr><th scope="row">${label}</th>${states.map((state) => html`<td style=${{ background: strength(state?.[name] ?? 0) }}>${state && percent(state[name])}</td>`)}</tr>
        `)}</tbody>
      </table>
    </div>
  `;
}
