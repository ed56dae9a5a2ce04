// Engine: the schedule as it runs, the KV cache, the queue, and how near the engine is to its limits.
import { callJson } from "../api.js";
import { Button } from "../components.js";
import { BlocksCard } from "../engine/blocks_card.js";
import { Curve, curveData } from "../engine/curves.js";
import { History } from "../engine/history.js";
import { LimitsCard } from "../engine/limits_card.js";
import { Figure, Refused } from "../engine/parts.js";
import { QueueCard } from "../engine/queue_card.js";
import { ScheduleCard } from "../engine/schedule_card.js";
import { useSteps } from "../engine/stream.js";
import { count, duration, number, percent } from "../format.js";
import { html, useEffect, useMemo, useRef, useState } from "../lib.js";
import { go, route } from "../router.js";

export const title = "Engine";
export const about =
  "The engine works in steps. In each it chooses who takes part, runs the model once for all of them together, and samples a token for each.";

const RENDER_INTERVAL = 1000; // ms between two looks at all but the schedule, which is drawn as steps arrive
const SPOKEN_INTERVAL = 10000; // ms between two summaries for screen readers
const NUM_AROUND = 60; // steps that are shown around one of a link

/** @typedef {import("../engine/history.js").DrawnStep} DrawnStep */

export default function Engine() {
  const [isPaused, setPaused] = useState(false);
  const [frozen, setFrozen] = useState(/** @type {DrawnStep[]} */ ([]));
  const [chosen, setChosen] = useState(/** @type {DrawnStep | null} */ (null));
  const [request, setRequest] = useState("");
  const show = useRef((/** @type {DrawnStep[]} */ _steps) => {});
  const paused = useRef(false);
  paused.current = isPaused;
  const { history, state, problem, error, retry } = useSteps((known) => {
    if (!paused.current) show.current(known.steps);
  });
  const tick = useInterval(RENDER_INTERVAL);
  const missing = useLinkedStep((steps, step, id) => {
    setPaused(true);
    setFrozen(steps);
    setChosen(step);
    setRequest(id);
    show.current(steps);
  });
  const pause = () => {
    if (!isPaused) setFrozen([...history.steps]);
    else if (route.value.params.has("step")) go("engine");
    show.current(history.steps);
    setPaused(!isPaused);
  };
  const held = (isPaused && history.lastId > 0) || tick; // what is made with it stays as it is during a pause
  const figures = useMemo(() => html`<${Figures} history=${history} />`, [held]);
  const limits = useMemo(() => html`<${LimitsCard} history=${history} isPaused=${isPaused} />`, [held]);
  const curves = useMemo(() => html`<${Curves} history=${history} />`, [held]);
  if (error) return html`<${Refused} title=${error.status === 404 ? "What the engine does is not shown here" : "You may not see what the engine does"} error=${error} onRetry=${retry} />`;
  const steps = isPaused ? frozen : history.steps;
  return html`
    <div class="engine">
      <div class="toolbar">
        <p class="state ${state === "open" && !isPaused ? "good" : state === "waiting" ? "bad" : ""}" role="status">${stateText(state, isPaused, problem)}</p>
        ${missing && html`<p class="hint" role="alert">${missing}</p>`}
        ${history.numLost > 0 && html`<p class="hint num">${count(history.numLost)} steps passed unseen.</p>`}
        <${Button} icon=${isPaused ? "right" : "stop"} aria-pressed=${isPaused} onClick=${pause}>${isPaused ? "Go on" : "Pause"}<//>
      </div>
      ${figures}
      <${ScheduleCard} register=${(/** @type {any} */ draw) => (show.current = draw)} steps=${steps} chosen=${chosen} request=${request}
        onChoose=${setChosen} onRequest=${setRequest} isEmpty=${state === "open" && steps.length === 0} />
      <div class="pair">
        <${BlocksCard} isPaused=${isPaused} request=${request} />
        <div class="stack">${limits}<${QueueCard} isPaused=${isPaused} /></div>
      </div>
      ${curves}
      ${!isPaused && html`<${Spoken} history=${history} />`}
    </div>
  `;
}

/**
 * @param {string} state
 * @param {boolean} isPaused
 * @param {import("../api.js").ApiError | null} problem
 */
function stateText(state, isPaused, problem) {
  if (isPaused) return "Paused";
  const why = problem?.status ? problem.message : "The connection broke.";
  return { connecting: "Connecting …", open: "Live", waiting: `${why} Trying again …` }[state];
}

/** @param {{history: History}} props */
function Figures({ history }) {
  const recent = history.recent(5);
  const drafted = history.recent(60);
  const last = history.steps.at(-1);
  const used = last && history.numBlocks ? last.num_blocks_used / history.numBlocks : 0;
  return html`
    <dl class="figures">
      <${Figure} name="Generated" value=${number(recent.generated)} note="tokens per second" />
      <${Figure} name="Prompts" value=${number(recent.prompt)} note="tokens per second" />
      <${Figure} name="Between tokens" value=${recent.gap === null ? "–" : duration(recent.gap)} note="median" />
      <${Figure} name="Running" value=${count(last?.num_running ?? 0)} note="${count(last?.num_waiting ?? 0)} waiting" />
      <${Figure} name="KV cache in use" value=${percent(used)} part=${used} />
      <${Figure} name="Time in steps" value=${percent(recent.busy)} part=${recent.busy} />
      <${Figure} name="Drafts accepted" value=${drafted.drafts ? percent(drafted.accepted / drafted.drafts) : "–"}
        note=${drafted.drafts ? `of ${count(drafted.drafts)} in a minute` : "none in a minute"} />
    </dl>
  `;
}

/** @param {{history: History}} props */
function Curves({ history }) {
  const data = curveData(history);
  return html`
    <div class="curves">
      <${Curve} title="Throughput" about="Tokens per second, of all choices together." format=${number} data=${data.throughput}
        series=${[{ label: "generated", color: "accent" }, { label: "prompts", color: "surprise", dash: [5, 4] }]} />
      <${Curve} title="Time between tokens" about="How long a choice waits for its next token." format=${duration} data=${data.latency}
        series=${[{ label: "median", color: "accent" }, { label: "slowest 1 %", color: "surprise", dash: [5, 4] }]} />
      <${Curve} title="Choices" about="Those in the batch, and those that wait for a place in it." format=${count} data=${data.choices}
        series=${[{ label: "running", color: "accent" }, { label: "waiting", color: "surprise", dash: [5, 4] }]} />
      <${Curve} title="KV cache" about="The part of its blocks that running choices hold. When it is full, choices wait or give theirs back." format=${percent}
        max=${1} data=${data.cache} series=${[{ label: "in use", color: "accent" }]} />
    </div>
  `;
}

/**
 * A summary for screen readers, which changes seldom.
 * @param {{history: History}} props
 */
function Spoken({ history }) {
  const [text, setText] = useState("");
  useEffect(() => {
    const speak = () => {
      const last = history.steps.at(-1);
      const { generated } = history.recent(5);
      if (last) setText(`${last.num_running} choices run, ${last.num_waiting} wait, ${number(generated)} tokens per second.`);
    };
    const timer = setInterval(speak, SPOKEN_INTERVAL);
    return () => clearInterval(timer);
  }, []);
  return html`<p class="sr" role="status">${text}</p>`;
}

/**
 * Renders a component again at an interval, while the page can be seen. Returns a number that is another one each time.
 * @param {number} interval in ms
 */
function useInterval(interval) {
  const [tick, setTick] = useState(0);
  useEffect(() => {
    const timer = setInterval(() => document.hidden || setTick((tick) => tick + 1), interval);
    return () => clearInterval(timer);
  }, []);
  return tick;
}

/**
 * Reads the steps around the one that the URL names, such as #/engine?step=40&request=ID. Returns why it cannot be shown.
 * @param {(steps: DrawnStep[], step: DrawnStep, request: string) => void} onRead
 */
function useLinkedStep(onRead) {
  const { params } = route.value;
  const [step, id] = [Number(params.get("step")), params.get("request") ?? ""];
  const [missing, setMissing] = useState("");
  useEffect(() => {
    setMissing("");
    if (!step) return;
    const after = Math.max(0, step - NUM_AROUND);
    callJson(`lightwell/v1/steps?after=${after}&limit=${2 * NUM_AROUND}`).then((list) => {
      const around = new History();
      around.add(list);
      const found = around.steps.find((each) => each.id === step);
      if (found) onRead(around.steps, found, id);
      else setMissing(`Step ${count(step)} is not recorded any more.`);
    }, ({ message }) => setMissing(message));
  }, [step, id]);
  return missing;
}
