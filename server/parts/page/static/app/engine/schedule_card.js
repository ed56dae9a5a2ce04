// The schedule with its legend, and the step that was chosen in it.
import { Button, Empty, Select } from "../components.js";
import { count, duration } from "../format.js";
import { html, useEffect, useRef, useState } from "../lib.js";
import { useTheme, watchSize } from "../canvas.js";
import { clock, RequestLink, short } from "./parts.js";
import { Schedule } from "./schedule.js";

/** @typedef {import("./history.js").DrawnStep} DrawnStep */

const PART_NAMES = /** @type {Record<string, string>} */ ({
  schedule: "Schedule",
  prepare: "Prepare",
  forward: "Forward pass",
  sample: "Sample",
  wait: "Wait",
  update: "Update",
  overlap: "Read the step before",
  overlap_next: "Launch the next step",
});

const WIDTHS = /** @type {[string, string][]} */ ([["24", "24 px"], ["12", "12 px"], ["6", "6 px"], ["3", "3 px"]]);

/**
 * @param {{register: (show: (steps: DrawnStep[]) => void) => void, steps: DrawnStep[], chosen: DrawnStep | null, request: string,
 *   onChoose: (step: DrawnStep | null) => void, onRequest: (id: string) => void, isEmpty: boolean}} props
 *   `register` is called with a function that draws steps, so that they need not be drawn by rendering the page
 */
export function ScheduleCard({ register, steps, chosen, request, onChoose, onRequest, isEmpty }) {
  const ref = useRef(/** @type {HTMLCanvasElement | null} */ (null));
  const schedule = useRef(/** @type {Schedule | null} */ (null));
  const [width, setWidth] = useState("12");
  const [hover, setHover] = useState("");
  const theme = useTheme();
  useEffect(() => {
    const canvas = /** @type {HTMLCanvasElement} */ (ref.current);
    const made = new Schedule(canvas);
    schedule.current = made;
    register((shown) => made.show(shown));
    made.show(steps);
    const stop = watchSize(canvas, () => made.redraw());
    return () => {
      stop();
      made.stop();
    };
  }, []);
  useEffect(() => schedule.current?.updateTheme(), [theme]);
  useEffect(() => {
    const made = /** @type {Schedule} */ (schedule.current);
    Object.assign(made, { columnWidth: Number(width), selected: chosen?.id ?? 0, highlighted: request });
    made.redraw();
  }, [width, chosen?.id, request]);

  const pointed = (/** @type {any} */ event) => /** @type {Schedule} */ (schedule.current).at(event.offsetX, event.offsetY);
  const onMove = (/** @type {any} */ event) => {
    const { step, cell } = pointed(event);
    setHover(step ? describe(step, cell?.row) : "");
  };
  const onClick = (/** @type {any} */ event) => {
    const { step, cell } = pointed(event);
    onChoose(step ?? null);
    onRequest(cell?.row.id ?? "");
  };
  const onKeyDown = (/** @type {any} */ event) => {
    const step = stepByKey(event.key, steps, chosen);
    if (step === undefined) return;
    event.preventDefault();
    onChoose(step);
  };
  const shown = chosen ?? steps.at(-1);
  return html`
    <section class="card schedule" aria-labelledby="schedule-title">
      <header>
        <h2 id="schedule-title">Schedule</h2>
        <p class="hint">Each column is a step: one pass through the model for all choices at once. Each line is a choice, in the colour of its request.</p>
        <${Select} label="Column" value=${width} options=${WIDTHS} onChange=${setWidth} />
      </header>
      <div class="stage">
        <canvas ref=${ref} tabindex="0" role="slider" aria-label="Steps of the engine" aria-valuemin=${steps[0]?.id ?? 0}
          aria-valuemax=${steps.at(-1)?.id ?? 0} aria-valuenow=${(chosen ?? steps[0])?.id ?? 0} aria-valuetext=${chosen ? describe(chosen) : "none chosen"}
          aria-describedby="schedule-keys" onPointerMove=${onMove} onPointerLeave=${() => setHover("")} onClick=${onClick} onKeyDown=${onKeyDown}></canvas>
        ${isEmpty && html`<${Empty} title="No steps yet">Send a prompt in <a href="#/chat">Chat</a>, and its steps appear here.<//>`}
      </div>
      <p class="readout num">${hover || (shown ? describe(shown) : "\u00a0")}</p>
      <ul class="legend">
        <li><span class="mark striped"></span>prompt tokens, many at once</li>
        <li><span class="mark solid"></span>a generated token</li>
        <li><span class="mark half"></span>drafts: the filled part was accepted</li>
        <li><span class="mark time"></span>above: the step’s time, dark for the forward pass</li>
      </ul>
      <p class="sr" id="schedule-keys">Left and right arrow keys choose a step, Home the oldest, End the latest, Escape none.</p>
      ${chosen && html`<${ChosenStep} step=${chosen} onClose=${() => onChoose(null)} />`}
    </section>
  `;
}

/**
 * The step that a key chooses; null: none, undefined: the key means nothing here.
 * @param {string} key
 * @param {DrawnStep[]} steps
 * @param {DrawnStep | null} chosen
 */
function stepByKey(key, steps, chosen) {
  const index = chosen ? steps.findIndex(({ id }) => id === chosen.id) : steps.length;
  const last = steps.length - 1;
  switch (key) {
    case "ArrowLeft":
      return steps[Math.max(0, index - 1)];
    case "ArrowRight":
      return steps[Math.min(last, index + 1)];
    case "Home":
      return steps[0];
    case "End":
      return steps[last];
    case "Escape":
      return null;
    default:
      return undefined;
  }
}

/**
 * @param {DrawnStep} step
 * @param {import("./history.js").Row} [row]
 */
function describe(step, row) {
  const whole = `Step ${step.id}: ${duration(step.total)}, ${count(step.numTokens)} tokens of ${step.rows.length} choices`;
  if (!row) return whole;
  const what = row.kind === "prompt" ? `${count(row.num_tokens)} tokens of the prompt` : `${row.num_generated} generated`;
  const drafts = row.num_drafts ? `, ${row.num_accepted} of ${row.num_drafts} drafts accepted` : "";
  return `${whole} · ${row.id === null ? "another client’s" : short(row.id)}: ${what}${drafts}`;
}

/** @param {{step: DrawnStep, onClose: () => void}} props */
function ChosenStep({ step, onClose }) {
  const parts = Object.entries(step.seconds).filter(([, seconds]) => seconds > 0);
  return html`
    <div class="chosen">
      <header>
        <h3>Step ${step.id} <span class="soft num">${clock(step.started)} · ${duration(step.total)}</span></h3>
        <${Button} kind="quiet" icon="close" label="Close the step" onClick=${onClose} />
      </header>
      <dl class="parts num">
        ${parts.map(([name, seconds]) => html`<div><dt>${PART_NAMES[name] ?? name}</dt><dd>${duration(seconds)}</dd></div>`)}
        <div><dt>Running, waiting after it</dt><dd>${step.num_running}, ${step.num_waiting}</dd></div>
      </dl>
      <div class="scroll" tabindex="0" role="region" aria-label="Choices of step ${step.id}">
        <table>
          <thead><tr><th>Choice</th><th>Computes</th><th class="right">Tokens</th><th class="right">From position</th><th class="right">Generated</th><th class="right">Drafts accepted</th></tr></thead>
          <tbody>
            ${step.rows.map((row) => html`
              <tr>
                <td><${RequestLink} id=${row.id} index=${row.index} prompt=${row.prompt} /></td>
                <td>${row.kind === "prompt" ? "prompt" : "next token"}</td>
                <td class="right">${count(row.num_tokens)}</td>
                <td class="right">${row.position === null ? "–" : count(row.position)}</td>
                <td class="right">${row.num_generated}</td>
                <td class="right">${row.num_drafts ? `${row.num_accepted} of ${row.num_drafts}` : "–"}</td>
              </tr>
            `)}
          </tbody>
        </table>
      </div>
    </div>
  `;
}
