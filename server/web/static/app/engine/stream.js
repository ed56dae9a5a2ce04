// What the engine does, as it is read: steps as they happen, and at a modest rate the map of its blocks and its queue.
import { call, callJson, follow } from "../api.js";
import { useEffect, useRef, useState } from "../lib.js";
import { History } from "./history.js";

const NUM_EARLIER = 200; // steps before the page was opened
const REFUSED = [401, 403, 404]; // trying again does not help

/** Whether the page can be seen. */
export function useVisible() {
  const [isVisible, setVisible] = useState(!document.hidden);
  useEffect(() => {
    const read = () => setVisible(!document.hidden);
    read(); // it may have changed since the first rendering
    document.addEventListener("visibilitychange", read);
    return () => document.removeEventListener("visibilitychange", read);
  }, []);
  return isVisible;
}

/**
 * Follows the steps while the page can be seen. `onSteps` is called with what is known of them when there are new ones.
 * @param {(history: History) => void} onSteps
 */
export function useSteps(onSteps) {
  const isVisible = useVisible();
  const [state, setState] = useState(/** @type {"connecting" | "open" | "waiting"} */ ("connecting"));
  const [error, setError] = useState(/** @type {import("../api.js").ApiError | null} */ (null));
  const [attempt, setAttempt] = useState(0);
  const history = useRef(new History());
  const listener = useRef(onSteps);
  listener.current = onSteps;
  useEffect(() => {
    if (!isVisible) return undefined;
    setError(null);
    return followSteps(history.current, (known) => listener.current(known), setState, setError);
  }, [isVisible, attempt]);
  return { history: history.current, state, error, retry: () => setAttempt((value) => value + 1) };
}

/**
 * Reads the latest steps, and then those that follow. Events that arrive before the latest steps are kept until then.
 * @param {History} history
 * @param {(history: History) => void} onSteps
 * @param {(state: "connecting" | "open" | "waiting") => void} onState
 * @param {(error: import("../api.js").ApiError) => void} onRefused
 */
function followSteps(history, onSteps, onState, onRefused) {
  const controller = new AbortController();
  /** @type {any[] | null} */
  let early = [];
  const add = (/** @type {any} */ list) => {
    history.add(list);
    onSteps(history);
  };
  const readEarlier = async () => {
    const list = await callJson(`lightwell/v1/steps?limit=${NUM_EARLIER}`, { signal: controller.signal });
    for (const each of [{ ...list, num_lost: 0 }, .../** @type {any[]} */ (early)]) add(each);
    early = null;
  };
  const stop = follow(
    "lightwell/v1/events",
    ({ data }) => {
      if (data.error) return; // the stream ends, and is opened again
      if (early) early.push(data);
      else add(data);
    },
    (state, problem) => {
      const error = /** @type {import("../api.js").ApiError | null} */ (problem);
      if (error && REFUSED.includes(error.status)) {
        stop();
        onRefused(error);
      }
      onState(state);
      if (state === "open" && early) readEarlier().catch(() => (early = null));
    },
  );
  return () => {
    controller.abort();
    stop();
  };
}

/**
 * Reads something again and again while the page can be seen. Returns the latest answer, and why there is none.
 * @param {string} path "": nothing is read
 * @param {number} interval in ms
 * @param {(data: any) => boolean} [isFinal] whether an answer will not change any more
 */
export function usePolled(path, interval, isFinal = () => false) {
  const isVisible = useVisible();
  const [data, setData] = useState(/** @type {any} */ (null));
  const [error, setError] = useState(/** @type {import("../api.js").ApiError | null} */ (null));
  const [attempt, setAttempt] = useState(0);
  useEffect(() => {
    if (!isVisible || !path) return undefined;
    const controller = new AbortController();
    let timer = 0;
    const read = async () => {
      try {
        const answer = await callJson(path, { signal: controller.signal });
        setData(answer);
        setError(null);
        if (isFinal(answer)) return;
      } catch (problem) {
        if (controller.signal.aborted) return;
        setError(/** @type {any} */ (problem));
      }
      timer = setTimeout(read, interval);
    };
    read();
    return () => {
      controller.abort();
      clearTimeout(timer);
    };
  }, [path, interval, isVisible, attempt]);
  return { data, error, retry: () => setAttempt((value) => value + 1) };
}
