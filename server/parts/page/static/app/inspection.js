// The states of an inspection, as components show them.
import { Problem } from "./components.js";
import { inspect, InspectionError, isAbort, sleep } from "./inspect.js";
import { html, useEffect, useRef, useState } from "./lib.js";

/** @typedef {Pick<import("./inspect.js").Inspection, "sampling">} Answer */
/** @typedef {{answer: Answer | null, error: Error | null, isBusy: boolean, retry: () => void}} Inspected */

const MAX_ANSWERS = 50; // that are kept
const DELAY = 150; // ms that a question stays the same before it is asked

/**
 * Asks a question while it is not null, and keeps what the answers to earlier ones say of the sampler.
 * @param {import("./inspect.js").Question | null} question
 * @returns {Inspected}
 */
export function useInspection(question) {
  const answers = useRef(/** @type {Map<string, Answer>} */ (new Map()));
  const [failure, setFailure] = useState(/** @type {{key: string, error: Error} | null} */ (null));
  const [, setVersion] = useState(0);
  const [numTries, setNumTries] = useState(0);
  const key = JSON.stringify(question);
  useEffect(() => {
    if (question === null || answers.current.has(key)) return;
    const controller = new AbortController();
    sleep(DELAY, controller.signal)
      .then(() => inspect(question, controller.signal))
      .then(({ sampling }) => {
        answers.current.set(key, { sampling });
        const [oldest] = answers.current.keys();
        if (answers.current.size > MAX_ANSWERS) answers.current.delete(oldest);
        setVersion((version) => version + 1);
      })
      .catch((error) => isAbort(error) || setFailure({ key, error }));
    return () => controller.abort();
  }, [key, numTries]);
  const answer = answers.current.get(key) ?? null;
  const error = failure?.key === key ? failure.error : null;
  const retry = () => (setFailure(null), setNumTries(numTries + 1));
  return { answer, error, isBusy: question !== null && answer === null && error === null, retry };
}

/**
 * An error, with a button to try again if that may help.
 * @param {{error: Error, onRetry: () => void}} props
 */
export const Refusal = ({ error, onRetry }) => html`
  <${Problem} error=${error} onRetry=${error instanceof InspectionError && !error.mayRetry ? undefined : onRetry} />
`;
