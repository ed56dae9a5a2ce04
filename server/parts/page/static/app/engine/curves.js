// Curves of the last two minutes, a point for each second.
import uPlot from "../../vendor/uPlot.js";
import { themeColor } from "../format.js";
import { html, useEffect, useRef } from "../lib.js";
import { useTheme, watchSize } from "../canvas.js";

export const SPAN = 120; // s
const HEIGHT = 130; // px
const HOLD = 4; // s

/**
 * @typedef {{label: string, color: string, dash?: number[]}} Series its color is the name of a custom property
 */

/**
 * @param {{title: string, about: string, series: Series[], data: (number | null)[][], format: (value: number) => string, max?: number}} props
 *   `data` has the times, and then the values of each series
 */
export function Curve({ title, about, series, data, format, max }) {
  const ref = useRef(/** @type {HTMLDivElement | null} */ (null));
  const plot = useRef(/** @type {uPlot | null} */ (null));
  const theme = useTheme();
  useEffect(() => {
    const element = /** @type {HTMLDivElement} */ (ref.current);
    const made = new uPlot(options(element, series, format, max), /** @type {any} */ (data), element);
    plot.current = made;
    const stop = watchSize(element, () => made.setSize({ width: element.clientWidth, height: HEIGHT }));
    return () => {
      stop();
      made.destroy();
    };
  }, [theme]);
  useEffect(() => plot.current?.setData(/** @type {any} */ (data)), [data]);
  return html`
    <section class="card curve" aria-label=${title}>
      <h3>${title}</h3>
      <dl class="keys">
        ${series.map(({ label, color, dash }, index) => html`
          <div>
            <dt><span class="stroke ${dash ? "dashed" : ""} of-${color}"></span>${label}</dt>
            <dd class="num">${text(data[index + 1].at(-2), format)}</dd>
          </div>
        `)}
      </dl>
      <div class="plot" ref=${ref} role="img" aria-label="${title} over the last two minutes"></div>
      <p class="hint">${about}</p>
    </section>
  `;
}

/**
 * @param {number | null | undefined} value
 * @param {(value: number) => string} format
 */
const text = (value, format) => (value === null || value === undefined ? "–" : format(value));

/**
 * @param {HTMLElement} element
 * @param {Series[]} series
 * @param {(value: number) => string} format
 * @param {number} [max]
 * @returns {any}
 */
function options(element, series, format, max) {
  const axis = { stroke: themeColor("--soft"), font: "11px system-ui, sans-serif", ticks: { show: false } };
  const grid = { stroke: themeColor("--line"), width: 1 };
  return {
    width: element.clientWidth,
    height: HEIGHT,
    legend: { show: false },
    cursor: { show: false },
    scales: { x: { time: false }, y: { range: (/** @type {any} */ _, /** @type {number} */ __, /** @type {number} */ top) => [0, max ?? (top * 1.1 || 1)] } },
    axes: [
      { ...axis, grid: { show: false }, size: 24, gap: 5, splits: () => [-SPAN, -SPAN / 2, 0], values: () => ["−2 min", "−1 min", "now"] },
      { ...axis, grid, size: 54, gap: 6, space: 36, values: (/** @type {any} */ _, /** @type {number[]} */ values) => values.map(format) },
    ],
    series: [
      {},
      ...series.map(({ color, dash }) => ({ stroke: themeColor(`--${color}`), width: 1.75, dash, points: { show: false } })),
    ],
  };
}

/**
 * Values without the short gaps that come from steps of more than a second.
 * @param {(number | null)[]} values
 */
const held = (values) => values.map((value, index) => value ?? values.slice(Math.max(0, index - HOLD), index).findLast((each) => each !== null) ?? null);

/**
 * The data of the curves.
 * @param {import("./history.js").History} history
 */
export function curveData(history) {
  const until = history.now();
  const known = new Map(history.seconds.map((second) => [second.second, second]));
  const times = Array.from({ length: SPAN + 1 }, (_, index) => index - SPAN);
  let last = history.seconds.findLast(({ second }) => second < until - SPAN);
  const seconds = times.map((time) => {
    const second = known.get(until + time);
    last = second ?? last;
    return { second, last };
  });
  const rate = (/** @type {"generated" | "prompt"} */ name) => seconds.map(({ second, last: before }) => second?.[name] ?? (before ? 0 : null));
  const level = (/** @type {"running" | "waiting" | "blocks"} */ name) => seconds.map(({ last: before }) => before?.[name] ?? null);
  const gap = (/** @type {"median" | "slowest"} */ name) => held(seconds.map(({ second }) => second?.[name] ?? null));
  const used = level("blocks").map((blocks) => (blocks === null || !history.numBlocks ? null : blocks / history.numBlocks));
  return {
    throughput: [times, rate("generated"), rate("prompt")],
    latency: [times, gap("median"), gap("slowest")],
    choices: [times, level("running"), level("waiting")],
    cache: [times, used],
  };
}
