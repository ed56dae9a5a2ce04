// Numbers, times and tokens as text, and the colours of marks.

const COUNT = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

/** @param {number} value */
export const count = (value) => COUNT.format(value);

/**
 * A number with about three digits that count.
 * @param {number} value
 */
export const number = (value) => (Math.abs(value) >= 100 ? COUNT.format(value) : String(Number(value.toPrecision(3))));

/**
 * A duration: 850 µs, 12.3 ms, 4.56 s, 3 min 20 s.
 * @param {number} seconds
 */
export function duration(seconds) {
  if (seconds < 0.001) return `${number(seconds * 1e6)} µs`;
  if (seconds < 1) return `${number(seconds * 1e3)} ms`;
  if (seconds < 120) return `${number(seconds)} s`;
  return `${Math.floor(seconds / 60)} min ${Math.floor(seconds % 60)} s`;
}

/** @param {number} value */
export function bytes(value) {
  const power = value > 0 ? Math.min(Math.floor(Math.log2(value) / 10), UNITS.length - 1) : 0;
  return `${number(value / 1024 ** power)} ${UNITS[power]}`;
}

/** @param {number} value from 0 to 1 */
export const percent = (value) => (value > 0 && value < 0.001 ? "< 0.1 %" : `${number(Number((100 * value).toFixed(1)))} %`);

/**
 * The text of a token with its spaces and line ends marked.
 * @param {string} text
 */
export const visible = (text) =>
  text === "" ? "∅" : text.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll("\r", "␍");

// Okabe and Ito's palette, which people with any colour vision can tell apart, without its black.
const DISTINCT = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b8a800", "#7a6bb5"];

/**
 * The colour of a request, the same for the same id.
 * @param {string} id
 */
export function requestColor(id) {
  let hash = 2166136261;
  for (const character of id) hash = Math.imul(hash ^ /** @type {number} */ (character.codePointAt(0)), 16777619) >>> 0;
  return DISTINCT[hash % DISTINCT.length];
}

/**
 * The tint of a token for its probability: none for what is certain, strong for what is surprising. One hue, so that
 * only the strength counts; text in the colour of the theme stays readable on it.
 * @param {number} probability from 0 to 1
 */
export function probabilityColor(probability) {
  const surprise = Math.min(-Math.log2(Math.max(probability, 1e-9)) / 10, 1); // 10 bits and more look alike
  return `color-mix(in oklab, var(--surprise) ${Math.round(72 * surprise)}%, transparent)`;
}

/**
 * The value that a colour of the stylesheet has in the current theme, for a canvas.
 * @param {string} name of a custom property: --text
 */
export function themeColor(name) {
  const probe = document.createElement("span");
  probe.style.color = `var(${name})`;
  document.body.append(probe);
  const { color } = getComputedStyle(probe);
  probe.remove();
  return color;
}
