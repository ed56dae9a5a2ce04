// The table of requests: those that live, and the last ones that have ended.
import { Button, Empty, Problem, Select } from "../components.js";
import { clock, Refused, RequestLink } from "../engine/parts.js";
import { usePolled } from "../engine/stream.js";
import { count, duration, number } from "../format.js";
import { html, useRef } from "../lib.js";
import { go, route } from "../router.js";
import { models } from "../state.js";
import { STAGES, speed, timeToFirst } from "./stages.js";

const INTERVAL = 2000; // ms
const LIMIT = 100;
const MOST = 1024;

/** @typedef {import("./stages.js").Choice} Choice */
/** @typedef {{name: string, label: string, value?: (choice: Choice) => number | null, cell: (choice: Choice) => any, isWide?: boolean}} Column */

/** @type {Column[]} Those with a value can be sorted by it. */
const COLUMNS = [
  { name: "request", label: "Request", cell: (choice) => html`<${RequestLink} id=${choice.id} index=${choice.index} prompt=${choice.prompt} />` },
  { name: "state", label: "State", cell: (choice) => html`<span class="status ${choice.state}">${stateText(choice)}</span>` },
  { name: "model", label: "Model", cell: (choice) => html`<span class="clipped" title=${choice.model}>${choice.model}</span>`, isWide: true },
  { name: "key", label: "Key", cell: (choice) => choice.key ?? "–", isWide: true },
  { name: "arrival", label: "Arrived", value: ({ arrival }) => arrival, cell: ({ arrival }) => clock(arrival), isWide: true },
  { name: "stages", label: "Time by stage", cell: (choice) => html`<${Bar} choice=${choice} />` },
  { name: "wall", label: "In all", value: ({ wall_s: wall }) => wall, cell: ({ wall_s: wall }) => duration(wall) },
  { name: "first", label: "First token", value: timeToFirst, cell: (choice) => orDash(timeToFirst(choice), duration) },
  { name: "prompt", label: "Prompt", value: (choice) => choice.num_prompt_tokens, cell: (choice) => count(choice.num_prompt_tokens), isWide: true },
  { name: "cached", label: "Cached", value: (choice) => choice.num_cached_tokens, cell: (choice) => count(choice.num_cached_tokens), isWide: true },
  { name: "output", label: "Output", value: (choice) => choice.num_output_tokens, cell: (choice) => count(choice.num_output_tokens), isWide: true },
  { name: "speed", label: "Tokens/s", value: speed, cell: (choice) => orDash(speed(choice), number), isWide: true },
];

/**
 * @param {number | null} value
 * @param {(value: number) => string} format
 */
const orDash = (value, format) => (value === null ? "–" : format(value));

/** @param {Choice} choice */
export function stateText({ state, finish_reason: reason }) {
  if (state !== "finished") return state;
  return { stop: "finished", length: "at its limit", abort: "aborted", error: "failed" }[reason ?? ""] ?? reason ?? "finished";
}

/** @param {{choice: Choice}} props */
const Bar = ({ choice }) => html`
  <div class="stages" role="img" aria-label=${STAGES.map(([stage, name]) => `${name} ${duration(choice.seconds[stage])}`).join(", ")}>
    ${STAGES.map(([stage]) => html`<span class="of-${stage}" style=${{ width: `${(100 * choice.seconds[stage]) / choice.wall_s}%` }}></span>`)}
  </div>
`;

export function Table() {
  const { params } = route.value;
  const [state, model, key, sort, limit] = ["state", "model", "key", "sort", "limit"].map((name) => params.get(name) ?? "");
  const query = new URLSearchParams(Object.entries({ state, model, key, limit: limit || String(LIMIT) }).filter(([, value]) => value));
  const { data, error, retry } = usePolled(`lightwell/v1/requests?${query}`, INTERVAL);
  const keys = useRef(/** @type {Set<string>} */ (new Set()));
  /** @type {Choice[]} */
  const choices = data?.data ?? [];
  for (const choice of choices) if (choice.key !== null) keys.current.add(choice.key);
  const change = (/** @type {Record<string, string>} */ changes) =>
    go("requests", { params: Object.fromEntries(Object.entries({ state, model, key, sort, limit, ...changes }).filter(([, value]) => value)) });
  if (error && !data) {
    const text = error.status === 404 ? "Requests are not shown here" : error.status === 403 ? "You may not see requests" : "Requests cannot be read";
    return html`<${Refused} title=${text} error=${error} onRetry=${retry} />`;
  }
  const isUseful = /** @type {Record<string, boolean>} */ ({ key: keys.current.size > 0, model: models.value.length > 1 });
  const columns = COLUMNS.filter(({ name }) => isUseful[name] ?? true);
  return html`
    <div class="filters">
      <${Select} label="State" value=${state} options=${[["", "all"], "running", "waiting", "finished"]} onChange=${(/** @type {string} */ value) => change({ state: value })} />
      ${isUseful.model && html`<${Select} label="Model" value=${model} options=${[["", "all"], ...models.value.map(({ id }) => id)]} onChange=${(/** @type {string} */ value) => change({ model: value })} />`}
      ${isUseful.key && html`<${Select} label="Key" value=${key} options=${[["", "all"], ...keys.current]} onChange=${(/** @type {string} */ value) => change({ key: value })} />`}
      <ul class="legend">${STAGES.map(([stage, name]) => html`<li><span class="mark of-${stage}"></span>${name.toLowerCase()}</li>`)}</ul>
    </div>
    ${error && html`<${Problem} error=${error} onRetry=${retry} />`}
    ${data && choices.length === 0 && html`<${Empty} title="No requests">${state || model || key ? "None is recorded that fits the filters." : html`Send a prompt in <a href="#/chat">Chat</a>, and it appears here.`}<//>`}
    ${choices.length > 0 && html`
      <div class="scroll all" tabindex="0" role="region" aria-label="Requests">
        <table>
          <thead><tr>${columns.map((column) => html`<${Head} column=${column} sort=${sort} onSort=${(/** @type {string} */ value) => change({ sort: value })} />`)}</tr></thead>
          <tbody>
            ${sorted(choices, sort).map((choice) => html`
              <tr key=${`${choice.id}/${choice.prompt}/${choice.index}`}>
                ${columns.map(({ value, cell, isWide }) => html`<td class="${value ? "right" : ""} ${isWide ? "wide" : ""}">${cell(choice)}</td>`)}
              </tr>
            `)}
          </tbody>
        </table>
      </div>
      ${data.has_more && !limit && html`<p><${Button} onClick=${() => change({ limit: String(MOST) })}>Show all that are recorded<//></p>`}
    `}
  `;
}

/**
 * The head of a column: a button that sorts by it, first the largest, then the smallest, then as they came.
 * @param {{column: Column, sort: string, onSort: (sort: string) => void}} props
 */
function Head({ column: { name, label, value, isWide }, sort, onSort }) {
  const wide = isWide ? "wide" : "";
  if (!value) return html`<th class=${wide}>${label}</th>`;
  const order = sort === name ? "descending" : sort === `-${name}` ? "ascending" : undefined;
  const next = order === "descending" ? `-${name}` : order === "ascending" ? "" : name;
  const arrow = order === "descending" ? "↓" : order === "ascending" ? "↑" : "";
  return html`<th class="right ${wide}" aria-sort=${order}><button type="button" onClick=${() => onSort(next)}>${label}<span aria-hidden="true">${arrow}</span></button></th>`;
}

/**
 * @param {Choice[]} choices
 * @param {string} sort the name of a column, with - for the smallest first
 */
function sorted(choices, sort) {
  const value = COLUMNS.find(({ name }) => name === sort.replace("-", ""))?.value;
  if (!value) return choices;
  const sign = sort.startsWith("-") ? 1 : -1;
  return [...choices].sort((one, other) => sign * ((value(one) ?? 0) - (value(other) ?? 0)));
}
