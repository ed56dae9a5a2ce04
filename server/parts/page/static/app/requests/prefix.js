// Why as much of a prompt was cached as was, in words.
import { callJson } from "../api.js";
import { count, visible } from "../format.js";
import { html, useEffect, useState } from "../lib.js";
import { RequestLink } from "../engine/parts.js";

/** @param {{prefix: import("./stages.js").Prefix, numPromptTokens: number}} props */
export function PrefixReason({ prefix, numPromptTokens }) {
  const cached = prefix.num_cached_tokens;
  const share = html`
    <div class="share" role="img" aria-label="${cached} of ${numPromptTokens} prompt tokens were cached">
      <span class="cached" style=${{ width: `${(100 * cached) / numPromptTokens}%` }}></span>
      <span class="reusable" style=${{ width: `${(100 * Math.max(0, prefix.num_reusable_tokens - cached)) / numPromptTokens}%` }}></span>
    </div>
  `;
  return html`
    <section class="card" aria-labelledby="prefix-title">
      <header>
        <h2 id="prefix-title">Prefix cache</h2>
        <p class="hint">Keys and values that an earlier prompt with the same beginning left in the cache need not be computed again, in whole blocks.</p>
      </header>
      ${prefix.result !== "pending" && share}
      <p class="lead num">${prefix.result !== "pending" && html`<b>${count(cached)} of ${count(numPromptTokens)} prompt tokens were cached.</b>`} <${Why} prefix=${prefix} /></p>
    </section>
  `;
}

/** @param {{prefix: import("./stages.js").Prefix}} props */
function Why({ prefix }) {
  const similar = prefix.similar_id && html`<${RequestLink} id=${prefix.similar_id} />`;
  switch (prefix.result) {
    case "pending":
      return "The request has not begun.";
    case "found":
      return "That is all that can be reused.";
    case "too_short":
      return "The prompt does not fill a block before its last token, which is always computed.";
    case "caching_off":
      return html`The server was started with <code>--no-enable-prefix-caching</code>.`;
    case "all_rows":
      return "The request needs the outputs of all positions, for log probabilities of its prompt or an embedding, and these are not cached.";
    case "no_snapshot":
      return `Keys and values of ${count(prefix.num_found_tokens)} were, but there is no snapshot of the states after token ${count(prefix.num_cached_tokens)}.`;
    case "evicted":
      return "The next block had been cached, but its place was needed for other tokens since.";
    case "new":
      return "No earlier request begins with the same token.";
    case "diverged":
      return html`The most similar earlier request, ${similar}, has another token at position ${prefix.position}: here it is <${Token} id=${prefix.token_id} />.`;
    case "ended":
      return html`The most similar earlier request, ${similar}, has the same tokens, but ends before they fill the next block.`;
    case "other_salt":
      return html`The next block is cached for another <code>cache_salt</code> only.`;
    case "other_adapter":
      return "The next block is cached for another LoRA adapter only, or for the model without one.";
    case "not_computed":
      return html`${similar} has the same tokens, but had not computed them yet.`;
    case "generated":
      return html`${similar} generated these tokens; on this device, their keys differ from those of a prompt.`;
    default:
      return "The next block was not in the cache. Why is not known: what would tell is not kept.";
  }
}

/**
 * The text of a token, as soon as the server has told it.
 * @param {{id: number | null}} props
 */
function Token({ id }) {
  const [text, setText] = useState("");
  useEffect(() => {
    callJson("detokenize", { json: { tokens: [id] } }).then(({ prompt }) => setText(prompt), () => {});
  }, [id]);
  return html`<code class="token">${text ? visible(text) : ""}</code> (token ${id})`;
}
