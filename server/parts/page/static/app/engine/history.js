// What the page remembers of the engine's steps: the last ones whole, and of the last minutes a summary of each second.

const MAX_STEPS = 800;
const MAX_ROWS = 131072; // of all these steps together
const MAX_SECONDS = 150;
const MAX_GAP = 10; // s: a longer pause of a choice is no time between two tokens

/**
 * @typedef {{id: string | null, prompt: number | null, index: number | null, key: string | null, position: number | null,
 *   num_tokens: number, kind: "prompt" | "generated", num_generated: number, num_drafts: number, num_accepted: number}} Row
 * @typedef {{id: number, started: number, seconds: Record<string, number>, num_running: number, num_waiting: number,
 *   num_blocks_used: number, rows: Row[]}} Step
 * @typedef {{engine: string, num_blocks: number, num_lost: number, has_more: boolean, data: Step[]}} StepList
 * @typedef {{lane: number, row: Row}} Cell a row of a step, and the line on which it is drawn
 * @typedef {Step & {total: number, numTokens: number, cells: Cell[], numLanes: number}} DrawnStep
 * @typedef {{second: number, generated: number, prompt: number, drafts: number, accepted: number, busy: number,
 *   steps: number, largest: number, gaps: number[], median: number | null, slowest: number | null, running: number, waiting: number, blocks: number}} Second
 *   `gaps` are the times between two tokens of a choice; of those of an earlier second, only quantiles are kept
 */

/** @param {Row} row */
export const choiceName = (row) => (row.id === null ? null : `${row.id}/${row.prompt}/${row.index}`);

/** Gives each choice a line of its own, from its first step to its last. */
class Lanes {
  constructor() {
    /** @type {Map<string, number>} the line of each choice */
    this.owned = new Map();
  }

  /**
   * @param {Row[]} rows
   * @returns {Cell[]}
   */
  place(rows) {
    const names = rows.map(choiceName);
    const lanes = names.map((name) => (name === null ? undefined : this.owned.get(name)));
    const taken = new Set(lanes);
    let next = 0;
    const cells = rows.map((row, index) => {
      const known = lanes[index];
      if (known !== undefined) return { lane: known, row };
      while (taken.has(next)) next += 1;
      return { lane: next++, row };
    });
    this.owned = new Map();
    cells.forEach(({ lane }, index) => {
      const name = names[index];
      if (name !== null) this.owned.set(name, lane);
    });
    return cells;
  }
}

export class History {
  constructor(engine = "") {
    this.engine = engine;
    this.numBlocks = 0;
    this.numLost = 0;
    this.clockOffset = -Infinity; // s: the server's clock minus that of the browser
    /** @type {DrawnStep[]} */
    this.steps = [];
    this.numRows = 0;
    /** @type {Second[]} */
    this.seconds = [];
    this.lanes = new Lanes();
    /** @type {Map<string, number>} when each running choice last got a token */
    this.lastTokens = new Map();
  }

  get lastId() {
    return this.steps.at(-1)?.id ?? 0;
  }

  /**
   * Learns the time of the server. It is raised by steps as they happen, which are known a little later than they end.
   * @param {number} time in seconds
   */
  setClock(time) {
    this.clockOffset = Math.max(this.clockOffset, time - Date.now() / 1000);
  }

  /**
   * Adds steps that are not known yet.
   * @param {StepList} list
   * @param {boolean} [isLive] whether they have happened just now
   */
  add(list, isLive = true) {
    const { clockOffset } = this;
    if (list.engine !== this.engine) Object.assign(this, new History(list.engine), { clockOffset }); // its steps are numbered from 1 again
    this.numBlocks = list.num_blocks;
    this.numLost += list.num_lost;
    const fresh = list.data.filter(({ id }) => id > this.lastId);
    for (const step of fresh) this.addStep(step);
    const last = fresh.at(-1);
    if (last && isLive) this.setClock(last.started + sum(Object.values(last.seconds)));
    while (this.steps.length > MAX_STEPS || this.numRows > MAX_ROWS) this.numRows -= this.steps.shift()?.rows.length ?? 0;
    this.seconds.splice(0, this.seconds.length - MAX_SECONDS);
  }

  /** @param {Step} step */
  addStep(step) {
    const total = sum(Object.values(step.seconds));
    const cells = this.lanes.place(step.rows);
    const numTokens = sum(step.rows.map((row) => row.num_tokens));
    const numLanes = 1 + Math.max(-1, ...cells.map(({ lane }) => lane));
    this.steps.push({ ...step, total, numTokens, cells, numLanes });
    this.numRows += step.rows.length;
    this.summarize(step, total);
  }

  /**
   * @param {Step} step
   * @param {number} total
   */
  summarize(step, total) {
    const end = step.started + total;
    const second = this.secondOf(Math.floor(end));
    second.busy += total;
    second.steps += 1;
    second.largest = Math.max(second.largest, sum(step.rows.map((row) => row.num_tokens)));
    second.running = step.num_running;
    second.waiting = step.num_waiting;
    second.blocks = step.num_blocks_used;
    const times = new Map();
    for (const row of step.rows) {
      second.generated += row.num_generated;
      second.prompt += row.kind === "prompt" ? row.num_tokens : 0;
      second.drafts += row.num_drafts;
      second.accepted += row.num_accepted;
      const name = choiceName(row);
      if (name === null || row.num_generated === 0) continue;
      const last = this.lastTokens.get(name);
      if (last !== undefined && end - last < MAX_GAP) second.gaps.push((end - last) / row.num_generated);
      times.set(name, end);
    }
    this.lastTokens = times; // of choices that have ended, nothing is kept
  }

  /** @param {number} second */
  secondOf(second) {
    const last = this.seconds.at(-1);
    if (last && last.second >= second) return last;
    if (last) {
      last.median = quantile(last.gaps, 0.5);
      last.slowest = quantile(last.gaps, 0.99);
      last.gaps = [];
    }
    const counts = { generated: 0, prompt: 0, drafts: 0, accepted: 0, busy: 0, steps: 0, largest: 0 };
    const fresh = { second, ...counts, gaps: [], median: null, slowest: null, running: 0, waiting: 0, blocks: 0 };
    this.seconds.push(fresh);
    return fresh;
  }

  /** The time of the server, in whole seconds. */
  now() {
    const offset = Number.isFinite(this.clockOffset) ? this.clockOffset : 0;
    return Math.floor(Date.now() / 1000 + offset);
  }

  /**
   * Sums over the last seconds, of which the current one is left out, because it is not over.
   * @param {number} numSeconds
   */
  recent(numSeconds) {
    const until = this.now();
    const seconds = this.seconds.filter(({ second }) => second >= until - numSeconds && second < until);
    const total = (/** @type {"generated" | "prompt" | "drafts" | "accepted" | "busy" | "steps"} */ name) => sum(seconds.map((each) => each[name]));
    return {
      generated: total("generated") / numSeconds,
      prompt: total("prompt") / numSeconds,
      drafts: total("drafts"),
      accepted: total("accepted"),
      steps: total("steps") / numSeconds,
      largest: Math.max(0, ...seconds.map(({ largest }) => largest)),
      busy: Math.min(1, total("busy") / numSeconds),
      gap: seconds.findLast(({ median }) => median !== null)?.median ?? null,
    };
  }
}

/** @param {number[]} values */
const sum = (values) => values.reduce((total, value) => total + value, 0);

/**
 * @param {number[]} values
 * @param {number} part from 0 to 1
 * @returns {number | null}
 */
export function quantile(values, part) {
  if (values.length === 0) return null;
  const sorted = [...values].sort((one, other) => one - other);
  return sorted[Math.min(sorted.length - 1, Math.floor(part * sorted.length))];
}
