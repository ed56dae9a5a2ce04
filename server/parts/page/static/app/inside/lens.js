// The logit lens: what the model would say after each layer, as a table of positions and layers.
import { strength, withBytes } from "../candidates.js";
import { percent, visible } from "../format.js";
import { html, useEffect, useMemo, useRef } from "../lib.js";
import { chooseLayer, columns, cursor, layer, moveTo, readings, text } from "./playback.js";

/** @typedef {import("./playback.js").Reading} Reading */

const STEPS = /** @type {Record<string, [number, number]>} */ ({ ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] });

export function Lens() {
  const table = useRef(/** @type {HTMLElement | null} */ (null));
  const { tokens, num_layers: numLayers } = /** @type {import("./playback.js").Text} */ (text.value);
  const choose = (/** @type {number} */ row, /** @type {number} */ position) => {
    chooseLayer(Math.min(Math.max(row, 0), numLayers - 1));
    moveTo(position);
  };
  const onKeyDown = (/** @type {KeyboardEvent} */ event) => {
    const step = STEPS[event.key];
    if (!step) return;
    event.preventDefault();
    choose(layer.value + step[0], cursor.value + step[1]);
  };
  useEffect(() => {
    const cell = /** @type {HTMLElement | null | undefined} */ (table.current?.querySelector('[aria-selected="true"]'));
    const scroll = table.current?.parentElement;
    if (!cell || !scroll) return;
    if (scroll.contains(document.activeElement)) cell.focus();
    scroll.scrollLeft = cell.offsetLeft + cell.offsetWidth / 2 - scroll.clientWidth / 2;
  }, [layer.value, cursor.value, text.value]);
  return html`
    <div class="scroller">
      <table class="lens" role="grid" aria-label="Likeliest token after each layer" ref=${table}
        style=${{ minWidth: `${3 + 4.25 * columns.value.length}rem` }} onKeyDown=${onKeyDown}>
        <thead>
          <tr>
            <th scope="col">Layer</th>
            ${columns.value.map((position) => html`
              <th scope="col" class=${position === cursor.value ? "current" : ""}><code>${readable(tokens[position].token)}</code></th>
            `)}
          </tr>
        </thead>
        <tbody>
          ${Array.from({ length: numLayers }, (_, row) => html`
            <${LensRow} key=${row} row=${row} isCurrent=${row === layer.value} column=${cursor.value} columns=${columns.value}
              readings=${readings.value} onChoose=${choose} />
          `)}
        </tbody>
      </table>
    </div>
  `;
}

/** @param {string} token */
const readable = (token) => visible(withBytes(token));

/**
 * @param {{row: number, isCurrent: boolean, column: number, columns: number[], readings: Map<number, Reading>,
 *   onChoose: (row: number, position: number) => void}} props
 */
function LensRow({ row, isCurrent, column, columns: positions, readings: known, onChoose }) {
  return useMemo(
    () => html`
      <tr class=${isCurrent ? "current" : ""}>
        <th scope="row">${row + 1}</th>
        ${positions.map((position) => html`
          <${LensCell} best=${known.get(position)?.layers[row]?.lens[0]} isSelected=${isCurrent && position === column}
            isCurrent=${position === column} onClick=${() => onChoose(row, position)} />
        `)}
      </tr>
    `,
    [isCurrent, column, positions, known],
  );
}

/** @param {{best?: import("../inspect.js").Candidate, isSelected: boolean, isCurrent: boolean, onClick: () => void}} props */
function LensCell({ best, isSelected, isCurrent, onClick }) {
  const probability = best ? Math.exp(best.logprob) : 0;
  return html`
    <td role="gridcell" tabindex=${isSelected ? 0 : -1} aria-selected=${isSelected ? "true" : "false"} class=${isCurrent ? "current" : ""}
      style=${{ background: strength(probability) }} title=${best ? `${readable(best.token)} ${percent(probability)}` : undefined} onClick=${onClick}>
      ${best && html`<code>${readable(best.token)}</code><span class="sr"> ${percent(probability)}</span>`}
    </td>
  `;
}
