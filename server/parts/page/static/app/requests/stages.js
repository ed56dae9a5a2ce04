// The stages of a choice, one after the other. They fill the time from its arrival to its end.

/**
 * @typedef {"tokenizing" | "queue" | "prefill" | "decode" | "preempted"} Stage
 * @typedef {{id: string, other_ids: string[], prompt: number, index: number, key: string | null, model: string,
 *   state: "waiting" | "running" | "finished", finish_reason: string | null, arrival: number, wall_s: number,
 *   seconds: Record<Stage, number>, first_token: number | null, finished: number | null, num_ahead: number,
 *   num_prompt_tokens: number, num_cached_tokens: number, num_output_tokens: number, num_accepted_tokens: number,
 *   num_preemptions: number, num_chunks: number, num_blocks: number}} Choice
 * @typedef {{step: number, position: number, num_tokens: number}} Chunk
 * @typedef {{result: string, num_cached_tokens: number, num_found_tokens: number, num_reusable_tokens: number, position: number | null,
 *   token_id: number | null, similar_id: string | null}} Prefix
 * @typedef {Choice & {chunks: Chunk[], preemptions: {at: number, resumed: number | null}[], prefix: Prefix}} ChoiceDetail
 * @typedef {{stage: Stage, start: number, seconds: number}} Segment `start` is in seconds since the arrival
 */

/** @type {[Stage, string, string][]} */
export const STAGES = [
  ["tokenizing", "Reading", "its text is checked and cut into tokens"],
  ["queue", "Queue", "it waits for a place in the batch"],
  ["prefill", "Prefill", "the tokens of its prompt are computed, many in one step"],
  ["decode", "Decode", "its tokens are generated, step by step"],
  ["preempted", "Preempted", "it gave its blocks back to others, and waits to go on"],
];

/**
 * The stages as they followed one another.
 * @param {ChoiceDetail} choice
 * @returns {Segment[]}
 */
export function segments(choice) {
  const { seconds, arrival, wall_s: wall } = choice;
  const scheduled = seconds.tokenizing + seconds.queue;
  const firstToken = choice.first_token === null ? wall : choice.first_token - arrival;
  const pauses = choice.preemptions.map(({ at, resumed }) => ({ from: at - arrival, to: resumed === null ? wall : resumed - arrival }));
  const cuts = [scheduled, firstToken, wall, ...pauses.flatMap(({ from, to }) => [from, to])].sort((one, other) => one - other);
  /** @type {Segment[]} */
  const found = [
    { stage: "tokenizing", start: 0, seconds: seconds.tokenizing },
    { stage: "queue", start: seconds.tokenizing, seconds: seconds.queue },
  ];
  for (let index = 1; index < cuts.length; index += 1) {
    const [start, end] = [cuts[index - 1], cuts[index]];
    const middle = (start + end) / 2;
    const isPaused = pauses.some(({ from, to }) => from <= middle && middle < to);
    const stage = isPaused ? "preempted" : middle < firstToken ? "prefill" : "decode";
    if (start >= scheduled) found.push({ stage, start, seconds: end - start });
  }
  return found.filter(({ seconds: length }) => length > 0);
}

/**
 * Tokens per second after the first one.
 * @param {Choice} choice
 */
export function speed(choice) {
  const { decode } = choice.seconds;
  return choice.num_output_tokens > 1 && decode > 0 ? (choice.num_output_tokens - 1) / decode : null;
}

/**
 * Seconds from the arrival to the first token.
 * @param {Choice} choice
 */
export const timeToFirst = (choice) => (choice.first_token === null ? null : choice.first_token - choice.arrival);
