// The states of an inspection, as components show them.
import { Problem } from "./components.js";
import { isAbort, inspect, meaning, sleep } from "./inspect.js";
import { html, useEffect, useRef, useState } from "./lib.js";

/** @typedef {import("./inspect.js").Inspection} Inspection */
/** @typedef {{answer: Inspection | null, error: Error | null, isBusy: boolean, retry: () => void}} Inspected */

const DELAY = 150; // ms that a question stays the same before it is asked

/**
 * Asks a question while it is not null, and keeps the answers to earlier ones.
 * @param {import("./inspect.js").Question | null} question
 * @returns {Inspected}
 */
export function useInspection(question) {
  const answers = useRef(/** @type {Map<string, Inspection>} */ (new Map()));
  const [failure, setFailure] = useState(/** @type {{key: string, error: Error} | null} */ (null));
  const [, setNumAnswers] = useState(0);
  const [numTries, setNumTries] = useState(0);
  const key = JSON.stringify(question);
  useEffect(() => {
    if (question === null || answers.current.has(key)) return;
    const controller = new AbortController();
    sleep(DELAY, controller.signal)
      .then(() => inspect(question, controller.signal))
      .then((answer) => setNumAnswers(answers.current.set(key, answer).size))
      .catch((error) => isAbort(error) || setFailure({ key, error }));
    return () => controller.abort();
  }, [key, numTries]);
  const answer = answers.current.get(key) ?? null;
  const error = failure?.key === key ? failure.error : null;
  const retry = () => (setFailure(null), setNumTries(numTries + 1));
  return { answer, error, isBusy: question !== null && answer === null && error === null, retry };
}

/**
 * Says what a refusal means.
 * @param {{error: Error, onRetry: () => void}} props
 */
export function InspectionProblem({ error, onRetry }) {
  const { title, mayRetry } = meaning(error);
  return html`<${Problem} error=${`${title}. ${error.message}`} onRetry=${mayRetry ? onRetry : undefined} />`;
}
