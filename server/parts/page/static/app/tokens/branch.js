// One branch: its tokens, tinted by probability, and its chart.
import { inText } from "../candidates.js";
import { Button } from "../components.js";
import { number, percent, probabilityColor, visible } from "../format.js";
import { Refusal } from "../inspection.js";
import { html, useMemo, useRef } from "../lib.js";
import { chosen, close, hovered } from "./branches.js";
import { Chart } from "./chart.js";
import { surprise } from "./generation.js";

/** @typedef {import("./branches.js").Branch} Branch */
/** @typedef {import("./generation.js").TextToken} TextToken */

const RUN = 64; // tokens that are drawn again together

/** @param {{branch: Branch, isOnly: boolean}} props */
export function BranchColumn({ branch, isOnly }) {
  const { number: name, tokens, isRunning, error, controller } = branch;
  return html`
    <section class="card branch" aria-label="Branch ${name}">
      <header>
        <h2>${isOnly ? "Text" : `Branch ${name}`}</h2>
        <span class="space"></span>
        ${isRunning && html`<${Button} icon="stop" onClick=${() => controller.abort()}>Stop<//>`}
        ${!isOnly && html`<${Button} kind="quiet" icon="close" label="Close branch ${name}" onClick=${() => close(branch)} />`}
      </header>
      ${!isOnly && html`<p class="hint origin">${originOf(branch)}</p>`}
      ${error && html`<${Refusal} error=${error} onRetry=${branch.retry} />`}
      <${TokenList} branch=${branch} />
      <p class="hint summary" role="status">${isRunning ? "The model is writing …" : summary(tokens)}</p>
      ${tokens.length > 1 && html`<${Chart} branch=${branch} />`}
    </section>
  `;
}

/** @param {Branch} branch */
function originOf({ tokens, numShared, parent }) {
  if (parent === null) return "the first text";
  if (tokens.length <= numShared) return "";
  return `from branch ${parent}, with “${visible(tokens[numShared].text)}” at position ${numShared}`;
}

/** @param {TextToken[]} tokens */
function summary(tokens) {
  const written = tokens.filter(({ origin }) => origin === "generated").map((token) => surprise(token) ?? 0);
  if (written.length === 0) return tokens.length ? `${tokens.length} tokens` : "";
  const mean = written.reduce((sum, bits) => sum + bits, 0) / written.length;
  return `${tokens.length} tokens, ${written.length} of them written: ${number(mean)} bits of surprise each on average`;
}

/**
 * The tokens as a list of which one is chosen: one tab stop, and arrow keys move in it.
 * @param {{branch: Branch}} props
 */
function TokenList({ branch }) {
  const list = useRef(/** @type {HTMLElement | null} */ (null));
  const { number: name, tokens, numShared } = branch;
  const current = chosen.value?.branch === name ? chosen.value.index : -1;
  const reachable = current === -1 ? tokens.length - 1 : current;
  const choose = (/** @type {number} */ index) => {
    chosen.value = { branch: name, index };
    /** @type {HTMLElement | null} */ (list.current?.querySelector(`[data-index="${index}"]`))?.focus();
  };
  const onKeyDown = (/** @type {KeyboardEvent} */ event) => {
    const target = list.current && targetOf(event.key, current, list.current);
    if (event.key === "Enter") /** @type {HTMLElement | null} */ (document.querySelector(".details button.bar-row"))?.focus();
    else if (target === null || target === undefined) return;
    else choose(target);
    event.preventDefault();
  };
  const starts = Array.from({ length: Math.ceil(tokens.length / RUN) }, (_, index) => index * RUN);
  return html`
    <div class="tokens" role="listbox" aria-label="Tokens of branch ${name}" aria-orientation="horizontal" ref=${list} onKeyDown=${onKeyDown}
      onFocusIn=${(/** @type {any} */ event) => choose(indexOf(event) ?? reachable)}
      onClick=${(/** @type {any} */ event) => choose(indexOf(event) ?? reachable)}
      onPointerOver=${(/** @type {any} */ event) => hover(name, indexOf(event))} onPointerLeave=${() => hover(name, null)}>
      ${starts.map((start) => {
        const isIn = (/** @type {number} */ index) => (index >= start && index < start + RUN ? index : -1);
        const end = Math.min(start + RUN, tokens.length);
        return html`<${Run} key=${start} tokens=${tokens} start=${start} end=${end} numShared=${numShared} current=${isIn(current)}
          reachable=${isIn(reachable)} />`;
      })}
    </div>
  `;
}

/**
 * @param {number} name of a branch
 * @param {number | null} index
 */
function hover(name, index) {
  hovered.value = index === null ? null : { branch: name, index };
}

/** @param {{target: HTMLElement}} event */
const indexOf = ({ target }) => (target.dataset.index === undefined ? null : Number(target.dataset.index));

/**
 * Returns the index of the token that a key leads to, or null.
 * @param {string} key
 * @param {number} index
 * @param {HTMLElement} list
 */
function targetOf(key, index, list) {
  const elements = /** @type {HTMLElement[]} */ ([...list.querySelectorAll("[data-index]")]);
  const last = elements.length - 1;
  if (key === "ArrowRight") return Math.min(index + 1, last);
  if (key === "ArrowLeft") return Math.max(index - 1, 0);
  if (key === "Home") return 0;
  if (key === "End") return last;
  if (key === "ArrowDown" || key === "ArrowUp") return onNextLine(elements, index, key === "ArrowDown" ? 1 : -1);
  return null;
}

/**
 * Returns the index of the nearest token on the line below or above.
 * @param {HTMLElement[]} elements
 * @param {number} index
 * @param {1 | -1} direction
 */
function onNextLine(elements, index, direction) {
  const { left, top } = elements[index].getBoundingClientRect();
  let best = index;
  let line = top;
  for (let i = index + direction; i in elements; i += direction) {
    const box = elements[i].getBoundingClientRect();
    if (Math.abs(box.top - line) > 4) {
      if (line !== top) break;
      line = box.top;
      best = i;
    } else if (line !== top && Math.abs(box.left - left) < Math.abs(elements[best].getBoundingClientRect().left - left)) best = i;
  }
  return best;
}

/**
 * Tokens from `start` to `end`, which are drawn again only if one of them changes.
 * @param {{tokens: TextToken[], start: number, end: number, numShared: number, current: number, reachable: number}} props
 */
function Run({ tokens, start, end, numShared, current, reachable }) {
  return useMemo(
    () =>
      tokens.slice(start, end).map((token, offset) => {
        const index = start + offset;
        return html`<${TokenSpan} key=${index} token=${token} index=${index} isShared=${index < numShared} isChosen=${index === current}
          isReachable=${index === reachable} />`;
      }),
    [start, end, tokens[start]?.id, tokens[end - 1], numShared, current, reachable],
  );
}

/** @param {{token: TextToken, index: number, isShared: boolean, isChosen: boolean, isReachable: boolean}} props */
function TokenSpan({ token, index, isShared, isChosen, isReachable }) {
  const { text, logprob, origin } = token;
  const probability = logprob === null ? null : Math.exp(logprob);
  const label = `${visible(text)}, ${probability === null ? "no probability" : percent(probability)}`;
  return html`
    <span class="token-span from-${origin} ${isShared ? "shared" : ""}" role="option" tabindex=${isReachable ? 0 : -1} data-index=${index}
      aria-label=${label} aria-selected=${isChosen ? "true" : "false"}
      style=${{ background: probability === null || isShared ? "none" : probabilityColor(probability) }}>${inText(text)}</span>
  `;
}
