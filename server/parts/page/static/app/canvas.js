// Canvases that are as sharp as the screen, in the colours of the theme, and drawn again when it or their size changes.
import { requestColor, themeColor } from "./format.js";
import { useEffect, useRef, useState } from "./lib.js";

/** @typedef {(context: CanvasRenderingContext2D, width: number, height: number) => void} Draw */

const MAX_RATIO = 2; // pixels of the screen for one of the page; more cost time and are not seen

/**
 * Makes the bitmap of a canvas as large as it is shown, and returns its context and its size in pixels of the page.
 * @param {HTMLCanvasElement} canvas
 */
export function prepare(canvas) {
  const ratio = Math.min(devicePixelRatio, MAX_RATIO);
  const { clientWidth: width, clientHeight: height } = canvas;
  const [columns, rows] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== columns || canvas.height !== rows) [canvas.width, canvas.height] = [columns, rows];
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return { context, width, height };
}

/**
 * The colours of the current theme that marks on a canvas need, and its font.
 * @returns {Record<string, string>}
 */
export function palette() {
  const names = ["text", "soft", "line", "strong-line", "panel", "sunken", "accent"];
  const colors = Object.fromEntries(names.map((name) => [name, themeColor(`--${name}`)]));
  return { ...colors, font: `11px ${getComputedStyle(document.body).fontFamily}` };
}

/**
 * The colour of a request; those of other clients, which have no id, are grey.
 * @param {string | null} id
 * @param {Record<string, string>} colors
 */
export const ownerColor = (id, colors) => (id === null ? colors["strong-line"] : requestColor(id));

/**
 * Stripes in a colour.
 * @param {string} color
 */
export function stripes(color) {
  const tile = new OffscreenCanvas(6, 6);
  const context = /** @type {OffscreenCanvasRenderingContext2D} */ (tile.getContext("2d"));
  context.fillStyle = color;
  context.globalAlpha = 0.3;
  context.fillRect(0, 0, 6, 6);
  context.globalAlpha = 1;
  context.strokeStyle = color;
  context.lineWidth = 1.6;
  for (const x of [-6, 0, 6]) {
    context.moveTo(x - 1, 7);
    context.lineTo(x + 7, -1);
  }
  context.stroke();
  return /** @type {CanvasPattern} */ (context.createPattern(tile, "repeat"));
}

/** A number that changes whenever the theme does. */
export function useTheme() {
  const [version, setVersion] = useState(0);
  useEffect(() => {
    const next = () => setVersion((value) => value + 1);
    const system = matchMedia("(prefers-color-scheme: dark)");
    system.addEventListener("change", next);
    const observer = new MutationObserver(next);
    observer.observe(document.documentElement, { attributeFilter: ["data-theme"] });
    return () => {
      system.removeEventListener("change", next);
      observer.disconnect();
    };
  }, []);
  return version;
}

/**
 * Calls a function when the size of an element changes, until the returned function is called.
 * @param {Element} element
 * @param {() => void} onResize
 */
export function watchSize(element, onResize) {
  const observer = new ResizeObserver(onResize);
  observer.observe(element);
  return () => observer.disconnect();
}

/**
 * Returns the reference of a canvas that `draw` fills; it draws again when `inputs` change.
 * @param {Draw} draw
 * @param {unknown[]} inputs
 */
export function useCanvas(draw, inputs) {
  const canvas = useRef(/** @type {HTMLCanvasElement | null} */ (null));
  const theme = useTheme();
  useEffect(() => {
    const element = canvas.current;
    if (element === null) return undefined;
    return watchSize(element, () => {
      const { context, width, height } = prepare(element);
      context.save();
      if (width > 0) draw(context, width, height);
      context.restore();
    });
  }, [...inputs, theme]);
  return canvas;
}
