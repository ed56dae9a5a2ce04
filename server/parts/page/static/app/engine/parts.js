// Small parts of the views of the engine and of requests.
import { Button, Empty } from "../components.js";
import { requestColor } from "../format.js";
import { html } from "../lib.js";
import { linkTo } from "../router.js";

/**
 * The name of a request, in its colour, with a link to what happened to it.
 * @param {{id: string | null, index?: number | null, prompt?: number | null}} props
 */
export function RequestLink({ id, index = 0, prompt = 0 }) {
  if (id === null) return html`<span class="soft">another client’s</span>`;
  const choice = index || prompt ? ` #${prompt ? `${prompt}.` : ""}${index}` : "";
  const params = /** @type {Record<string, string>} */ (choice ? { choice: `${prompt}.${index}` } : {});
  return html`
    <a class="request" href=${linkTo("requests", { id, params })} title=${id}>
      <span class="dot" style=${{ background: requestColor(id) }}></span><span>${short(id)}${choice}</span>
    </a>
  `;
}

/**
 * An id that fits in a line.
 * @param {string} id
 */
export const short = (id) => (id.length > 18 ? `${id.slice(0, 12)}…${id.slice(-4)}` : id);

/**
 * A time of the day.
 * @param {number} seconds Unix time
 */
export const clock = (seconds) => new Date(1000 * seconds).toLocaleTimeString([], { hourCycle: "h23" });

/**
 * A number with its name, and how much of a limit it is.
 * @param {{name: string, value: any, note?: any, part?: number | null}} props
 */
export const Figure = ({ name, value, note, part = null }) => html`
  <div class="figure">
    <dt>${name}</dt>
    <dd><span class="value num">${value}</span>${note && html` <span class="note num">${note}</span>`}</dd>
    ${part !== null && html`<dd class="bar" aria-hidden="true"><span style=${{ width: `${100 * Math.min(1, part)}%` }}></span></dd>`}
  </div>
`;

/**
 * What is shown in place of a view that cannot be shown.
 * @param {{title: string, error: Error, onRetry: () => void}} props
 */
export const Refused = ({ title, error, onRetry }) => html`
  <div class="refused"><${Empty} title=${title}>${error.message}<//><${Button} icon="refresh" onClick=${onRetry}>Try again<//></div>
`;
