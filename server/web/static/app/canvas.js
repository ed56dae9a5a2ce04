// Canvases that are as sharp as the screen, and drawn again when their size or the theme changes.
import { useEffect, useRef } from "./lib.js";
import { theme } from "./state.js";

/** @typedef {(context: CanvasRenderingContext2D, width: number, height: number) => void} Draw */

/**
 * Returns the reference of a canvas that `draw` fills; it draws again when `inputs` change.
 * @param {Draw} draw
 * @param {unknown[]} inputs
 */
export function useCanvas(draw, inputs) {
  const canvas = useRef(/** @type {HTMLCanvasElement | null} */ (null));
  useEffect(() => {
    const element = canvas.current;
    if (element === null) return;
    const redraw = () => paint(element, draw);
    const observer = new ResizeObserver(redraw);
    const scheme = matchMedia("(prefers-color-scheme: dark)");
    observer.observe(element); // reports the first size, too
    scheme.addEventListener("change", redraw);
    return () => {
      observer.disconnect();
      scheme.removeEventListener("change", redraw);
    };
  }, [...inputs, theme.value]);
  return canvas;
}

/**
 * @param {HTMLCanvasElement} canvas
 * @param {Draw} draw
 */
function paint(canvas, draw) {
  const { clientWidth: width, clientHeight: height } = canvas;
  const context = canvas.getContext("2d");
  if (context === null || width === 0) return;
  canvas.width = Math.round(width * devicePixelRatio);
  canvas.height = Math.round(height * devicePixelRatio);
  context.scale(devicePixelRatio, devicePixelRatio);
  draw(context, width, height);
}
