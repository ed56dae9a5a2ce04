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
  const [problem, setProblem] = useState(/** @type {import("../api.js").ApiError | null} */ (null));
  const [error, setError] = useState(/** @type {import("../api.js").ApiError | null} */ (null));
  const [attempt, setAttempt] = useState(0);
  const onState = (/** @type {typeof state} */ next, /** @type {typeof problem} */ why) => {
    setState(next);
    setProblem(why);
  };
  const history = useRef(new History());
  const listener = useRef(onSteps);
  listener.current = onSteps;
  useEffect(() => {
    if (!isVisible) return undefined;
    setError(null);
    return followSteps(history.current, (known) => listener.current(known), onState, setError);
  }, [isVisible, attempt]);
  return { history: history.current, state, problem, error, retry: () => setAttempt((value) => value + 1) };
}

/**
 * Reads the latest steps, and then those that follow. Events that arrive before the latest steps are kept until then.
 * @param {History} history
 * @param {(history: History) => void} onSteps
 * @param {(state: "connecting" | "open" | "waiting", problem: import("../api.js").ApiError | null) => void} onState
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
    const response = await call(`lightwell/v1/steps?limit=${NUM_EARLIER}`, { signal: controller.signal });
    const time = Date.parse(response.headers.get("date") ?? "") / 1000;
    if (time) history.setClock(time);
    history.add({ ...(await response.json()), num_lost: 0 }, false);
  };
  const begin = async () => {
    await readEarlier().catch(() => {}); // then only those that follow are shown
    if (controller.signal.aborted) return;
    for (const each of early ?? []) history.add(each);
    early = null;
    onSteps(history);
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
      onState(state, error);
      if (state === "open" && early) begin();
    },
  );
  return () => {
    controller.abort();
    stop();
  };
}

/**
 * Reads something again and again while the page can be seen. Returns the latest answer, and why there is none.
 * @param {string} path
 * @param {number} interval in ms
 * @param {{isPaused?: boolean, isFinal?: (data: any) => boolean}} [options] during a pause, it is read once at most;
 *   `isFinal` says whether an answer will not change any more
 */
export function usePolled(path, interval, { isPaused = false, isFinal = () => false } = {}) {
  const isVisible = useVisible();
  const [data, setData] = useState(/** @type {any} */ (null));
  const [error, setError] = useState(/** @type {import("../api.js").ApiError | null} */ (null));
  const [attempt, setAttempt] = useState(0);
  const known = useRef(""); // the path of the answer
  useEffect(() => {
    if (!isVisible || (isPaused && known.current === path)) return undefined;
    const controller = new AbortController();
    let timer = 0;
    const read = async () => {
      try {
        const answer = await callJson(path, { signal: controller.signal });
        known.current = path;
        setData(answer);
        setError(null);
        if (isPaused || isFinal(answer)) return;
      } catch (problem) {
        if (controller.signal.aborted) return;
        setError(/** @type {any} */ (problem));
        if ([403, 404].includes(/** @type {any} */ (problem).status)) return;
      }
      timer = setTimeout(read, interval);
    };
    read();
    return () => {
      controller.abort();
      clearTimeout(timer);
    };
  }, [path, interval, isVisible, isPaused, attempt]);
  return { data, error, retry: () => setAttempt((value) => value + 1) };
}
