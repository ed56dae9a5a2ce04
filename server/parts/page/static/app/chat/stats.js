// How fast answers come.
import { count, duration } from "../format.js";
import { html, useEffect, useState } from "../lib.js";
import { tokensPerSecond } from "./generate.js";

/** @param {{run: import("./generate.js").Run}} props */
export function LiveStats({ run }) {
  const state = run.progress.value;
  const [now, setNow] = useState(performance.now());
  const isWaiting = state.first === null;
  useEffect(() => {
    if (!isWaiting) return undefined;
    const timer = setInterval(() => setNow(performance.now()), 100);
    return () => clearInterval(timer);
  }, [isWaiting]);
  if (state.first === null) return html`<p class="stats live num">Waiting ${(Math.max(now - state.start, 0) / 1000).toFixed(1)} s …</p>`;
  return html`<p class="stats live num">${statsText(state.tokens, tokensPerSecond(state), (state.first - state.start) / 1000)}</p>`;
}

/**
 * @param {number} tokens
 * @param {number} rate
 * @param {number | null} first
 */
export function statsText(tokens, rate, first) {
  const parts = [`${count(tokens)} ${tokens === 1 ? "token" : "tokens"}`];
  if (rate > 0) parts.push(`${rate.toFixed(1)} tokens/s`);
  if (first !== null) parts.push(`first after ${duration(first)}`);
  return parts.join(" · ");
}
