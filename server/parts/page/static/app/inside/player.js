// Plays the making of a text token by token.
import { TokenText } from "../candidates.js";
import { Button } from "../components.js";
import { html, useEffect } from "../lib.js";
import { cursor, isPlaying, lastCursor, moveTo, reading, text } from "./playback.js";

const PAUSE = 1600; // ms that each token is shown

export function Player() {
  const tokens = text.value?.tokens ?? [];
  const isReady = reading.value?.isFull ?? false;
  useEffect(() => {
    if (!isPlaying.value || !isReady) return undefined;
    if (cursor.value === lastCursor.value) {
      isPlaying.value = false;
      return undefined;
    }
    const timer = setTimeout(() => moveTo(cursor.value + 1), PAUSE);
    return () => clearTimeout(timer);
  }, [isPlaying.value, isReady, cursor.value]);
  const toggle = () => {
    if (!isPlaying.value && cursor.value === lastCursor.value) moveTo((text.value?.numPrompt ?? 1) - 1);
    isPlaying.value = !isPlaying.value;
  };
  const step = (/** @type {number} */ by) => {
    isPlaying.value = false;
    moveTo(cursor.value + by);
  };
  const here = `After token ${cursor.value + 1} of ${tokens.length}`;
  return html`
    <div class="player" role="group" aria-label="Player">
      <${Button} icon="left" label="Previous token" disabled=${cursor.value === 0} onClick=${() => step(-1)} />
      <${Button} kind="primary" class="play" onClick=${toggle}>${isPlaying.value ? "Pause" : "Play"}<//>
      <${Button} icon="right" label="Next token" disabled=${cursor.value === lastCursor.value} onClick=${() => step(1)} />
      <input type="range" aria-label="Position" aria-valuetext=${here} min="0" max=${lastCursor.value} value=${cursor.value}
        onInput=${(/** @type {any} */ event) => ((isPlaying.value = false), moveTo(Number(event.target.value)))} />
      <p class="now" aria-live=${isPlaying.value ? "off" : "polite"}>
        <span class="hint">${here}</span> <${TokenText} text=${tokens[cursor.value]?.token ?? ""} /> <span aria-hidden="true">→</span><span class="sr">comes</span>
        <${TokenText} text=${tokens[cursor.value + 1]?.token ?? ""} />
      </p>
    </div>
  `;
}
