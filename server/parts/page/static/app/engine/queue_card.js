// The choices that wait, the next one first.
import { Problem } from "../components.js";
import { count, duration } from "../format.js";
import { html } from "../lib.js";
import { RequestLink } from "./parts.js";
import { usePolled } from "./stream.js";

const INTERVAL = 2000; // ms
const LIMIT = 50;

/** @param {{isPaused: boolean}} props */
export function QueueCard({ isPaused }) {
  const { data, error, retry } = usePolled(`lightwell/v1/queue?limit=${LIMIT}`, INTERVAL, { isPaused });
  return html`
    <section class="card queue" aria-labelledby="queue-title">
      <header>
        <h2 id="queue-title">Queue ${data && html`<span class="soft num">${count(data.num_waiting)}</span>`}</h2>
        <p class="hint">Choices that wait for a place in the batch or for blocks; clients take turns.</p>
      </header>
      ${error && html`<${Problem} error=${error} onRetry=${retry} />`}
      <div class="scroll" tabindex="0" role="region" aria-label="Choices in the queue">
        ${data?.data.length === 0 && html`<p class="quiet">Nobody waits.</p>`}
        ${data?.data.length > 0 && html`
          <table>
            <thead><tr><th>Choice</th><th class="right">Waits for</th><th class="right">Tokens</th><th>Why</th></tr></thead>
            <tbody>
              ${data.data.map((/** @type {any} */ choice) => html`
                <tr>
                  <td><${RequestLink} id=${choice.id} index=${choice.index} prompt=${choice.prompt} /></td>
                  <td class="right">${duration(choice.waited)}</td>
                  <td class="right">${count(choice.num_tokens)}</td>
                  <td>${reason(choice)}</td>
                </tr>
              `)}
            </tbody>
          </table>
        `}
      </div>
    </section>
  `;
}

/** @param {{was_preempted: boolean, can_start: boolean, num_ahead: number}} choice */
function reason(choice) {
  if (!choice.can_start) return "its grammar is compiled";
  if (choice.was_preempted) return "had to give its blocks back";
  return choice.num_ahead === 0 ? "is next" : `${count(choice.num_ahead)} ahead`;
}
