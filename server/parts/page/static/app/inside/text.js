// The ends of the model: from text to the first vector, and from the drawn token to the next round.
import { inText, TokenText } from "../candidates.js";
import { Button } from "../components.js";
import { count } from "../format.js";
import { html } from "../lib.js";
import { cursor, lastCursor, moveTo, text } from "./playback.js";

/** All tokens with their ids; the one that is computed is marked. */
export function Ids() {
  const { tokens, numPrompt } = /** @type {import("./playback.js").Text} */ (text.value);
  return html`
    <ol class="ids" aria-label="Tokens and their ids" tabindex="0">
      ${tokens.map(({ token_id, token }, index) => html`
        <li class="id ${index < numPrompt ? "" : "written"} ${index > cursor.value ? "later" : ""}" aria-current=${index === cursor.value ? "step" : undefined}
          onClick=${() => moveTo(index)}>
          <${TokenText} text=${token} /><span>${token_id}</span>
        </li>
      `)}
    </ol>
  `;
}

/** From the id to a vector. */
export function Embedding() {
  const { tokens } = /** @type {import("./playback.js").Text} */ (text.value);
  const { token, token_id } = tokens[cursor.value];
  return html`
    <p class="flow">
      <${TokenText} text=${token} /><span aria-hidden="true">→</span><span class="box">id ${count(token_id)}</span><span aria-hidden="true">→</span>
      <span class="box">row ${count(token_id)} of the table</span><span aria-hidden="true">→</span><span class="box">the residual stream at position ${cursor.value}</span>
    </p>
  `;
}

/** The text so far with the token that was drawn. */
export function FedBack() {
  const { tokens } = /** @type {import("./playback.js").Text} */ (text.value);
  const before = tokens.slice(0, cursor.value + 1).map(({ token }) => inText(token)).join("");
  return html`
    <p class="so-far">${before}<mark>${inText(tokens[cursor.value + 1].token)}</mark></p>
    <${Button} icon="right" disabled=${cursor.value === lastCursor.value} onClick=${() => moveTo(cursor.value + 1)}>Go on with it<//>
  `;
}
