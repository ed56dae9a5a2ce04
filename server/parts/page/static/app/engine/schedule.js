// The schedule: each step is a column, each choice a line. The last step is at the right.
import { duration } from "../format.js";
import { ownerColor, palette, prepare, stripes } from "../canvas.js";

/** @typedef {import("./history.js").DrawnStep} DrawnStep */
/** @typedef {import("./history.js").Cell} Cell */

const TIMES = 44; // px: the strip that shows how long steps took
const AXIS = 20; // px: the numbers of the steps
const MIN_LANES = 8; // lines for which there is always room
const MAX_LANE = 24; // px
const LABEL = 84; // px between two numbers of steps
const DIMMED = 0.18;

/** Parts of a step that are drawn alike, from the bottom up. On a GPU, two steps overlap. */
const PARTS = [
  { names: ["forward"], color: "accent", alpha: 1 },
  { names: ["sample"], color: "accent", alpha: 0.45 },
  { names: ["schedule", "prepare", "wait", "update", "overlap", "overlap_next"], color: "strong-line", alpha: 0.7 },
];

export class Schedule {
  /** @param {HTMLCanvasElement} canvas */
  constructor(canvas) {
    this.canvas = canvas;
    /** @type {DrawnStep[]} */
    this.steps = [];
    this.columnWidth = 12;
    this.selected = 0;
    this.highlighted = "";
    this.frame = 0;
    this.colors = palette();
    /** @type {Map<string, CanvasPattern>} */
    this.patterns = new Map();
  }

  updateTheme() {
    this.colors = palette();
    this.patterns.clear();
    this.redraw();
  }

  /**
   * Shows steps. They are copied, because the history goes on to change its list.
   * @param {DrawnStep[]} steps
   */
  show(steps) {
    this.steps = [...steps];
    this.redraw();
  }

  redraw() {
    if (this.frame === 0) this.frame = requestAnimationFrame(() => this.paint());
  }

  stop() {
    cancelAnimationFrame(this.frame);
    this.frame = -1; // nothing is drawn any more
  }

  paint() {
    this.frame = 0;
    const { context, width, height } = prepare(this.canvas);
    const visible = this.steps.slice(-Math.ceil(width / this.columnWidth) - 1);
    const columns = visible.map((step, index) => ({ step, x: width - (visible.length - index) * this.columnWidth }));
    this.paintTimes(context, columns, width);
    this.paintLanes(context, columns, height);
    this.paintAxis(context, columns, width, height);
    this.paintSelection(context, columns, height);
  }

  /**
   * @param {CanvasRenderingContext2D} context
   * @param {{step: DrawnStep, x: number}[]} columns
   * @param {number} width
   */
  paintTimes(context, columns, width) {
    if (columns.length === 0) return;
    const longest = Math.max(...columns.map(({ step }) => step.total), 1e-3);
    const scale = (TIMES - 14) / longest;
    const tops = new Map();
    for (const { names, color, alpha } of PARTS) {
      context.fillStyle = this.colors[color];
      context.globalAlpha = alpha;
      for (const { step, x } of columns) {
        const seconds = names.reduce((sum, name) => sum + (step.seconds[name] ?? 0), 0);
        const bottom = tops.get(step) ?? TIMES;
        context.fillRect(x + 1, bottom - seconds * scale, this.columnWidth - 1, seconds * scale);
        tops.set(step, bottom - seconds * scale);
      }
    }
    context.globalAlpha = 1;
    this.label(context, `longest step ${duration(longest)}`, width - 4, 10, "right");
    context.fillStyle = this.colors.line;
    context.fillRect(0, TIMES, width, 1);
  }

  /**
   * @param {CanvasRenderingContext2D} context
   * @param {{step: DrawnStep, x: number}[]} columns
   * @param {number} height
   */
  paintLanes(context, columns, height) {
    const laneHeight = this.laneHeight(height);
    for (const [style, marks] of this.marks(columns)) {
      for (const { cell, x } of marks) {
        context.globalAlpha = this.highlighted && cell.row.id !== this.highlighted ? DIMMED : 1;
        this.paintCell(context, style, cell.row, x + 1, TIMES + 3 + cell.lane * laneHeight, laneHeight);
      }
    }
    context.globalAlpha = 1;
  }

  /**
   * Cells by colour, so that it is seldom changed.
   * @param {{step: DrawnStep, x: number}[]} columns
   */
  marks(columns) {
    /** @type {Map<string, {cell: Cell, x: number}[]>} */
    const marks = new Map();
    for (const { step, x } of columns) {
      for (const cell of step.cells) {
        const color = ownerColor(cell.row.id, this.colors);
        const known = marks.get(color);
        if (known) known.push({ cell, x });
        else marks.set(color, [{ cell, x }]);
      }
    }
    return marks;
  }

  /**
   * Tokens of a prompt are striped, generated ones solid. With drafts, the part of a cell that was rejected is hollow.
   * @param {CanvasRenderingContext2D} context
   * @param {string} color
   * @param {import("./history.js").Row} row
   * @param {number} x
   * @param {number} y
   * @param {number} laneHeight
   */
  paintCell(context, color, row, x, y, laneHeight) {
    const [width, height] = [this.columnWidth - 1, Math.max(2, laneHeight - (laneHeight > 5 ? 2 : 1))];
    if (row.kind === "prompt") {
      context.fillStyle = this.pattern(color);
      context.fillRect(x, y, width, height);
      return;
    }
    context.fillStyle = color;
    if (row.num_drafts === 0) {
      context.fillRect(x, y, width, height);
      return;
    }
    const kept = (height * row.num_generated) / row.num_tokens;
    context.fillRect(x, y + height - kept, width, kept);
    context.strokeStyle = color;
    context.lineWidth = 1;
    context.strokeRect(x + 0.5, y + 0.5, width - 1, height - 1);
  }

  /** @param {string} color */
  pattern(color) {
    const known = this.patterns.get(color) ?? stripes(color);
    this.patterns.set(color, known);
    return known;
  }

  /**
   * @param {CanvasRenderingContext2D} context
   * @param {{step: DrawnStep, x: number}[]} columns
   * @param {number} width
   * @param {number} height
   */
  paintAxis(context, columns, width, height) {
    const every = niceInterval(LABEL / this.columnWidth);
    for (const { step, x } of columns) {
      if (step.id % every !== 0 || x > width - LABEL / 3) continue;
      context.fillStyle = this.colors.line;
      context.fillRect(x + this.columnWidth / 2, height - AXIS, 1, 4);
      this.label(context, String(step.id), x + this.columnWidth / 2, height - 5, "center");
    }
  }

  /**
   * @param {CanvasRenderingContext2D} context
   * @param {{step: DrawnStep, x: number}[]} columns
   * @param {number} height
   */
  paintSelection(context, columns, height) {
    const found = columns.find(({ step }) => step.id === this.selected);
    if (!found) return;
    context.strokeStyle = this.colors.text;
    context.lineWidth = 1.5;
    context.strokeRect(found.x, 0.75, this.columnWidth + 1, height - AXIS - 0.75);
  }

  /**
   * @param {CanvasRenderingContext2D} context
   * @param {string} text
   * @param {number} x
   * @param {number} y
   * @param {CanvasTextAlign} align
   */
  label(context, text, x, y, align) {
    context.font = this.colors.font;
    context.textAlign = align;
    context.fillStyle = this.colors.soft;
    context.fillText(text, x, y);
  }

  /** @param {number} height */
  laneHeight(height) {
    const visible = this.steps.slice(-Math.ceil(this.canvas.clientWidth / this.columnWidth));
    const numLanes = Math.max(MIN_LANES, ...visible.map(({ numLanes }) => numLanes));
    return Math.min(MAX_LANE, (height - TIMES - AXIS - 4) / numLanes);
  }

  /**
   * The step, and the cell if there is one, at a point of the canvas.
   * @param {number} x
   * @param {number} y
   */
  at(x, y) {
    const column = Math.floor((this.canvas.clientWidth - x) / this.columnWidth);
    const step = this.steps.at(-1 - column);
    const lane = Math.floor((y - TIMES - 3) / this.laneHeight(this.canvas.clientHeight));
    return { step, cell: step?.cells.find((cell) => cell.lane === lane) };
  }
}

/**
 * The first of 1, 2, 5, 10, 20, ... that is not less.
 * @param {number} least
 */
function niceInterval(least) {
  const power = 10 ** Math.floor(Math.log10(least));
  return Math.ceil(([1, 2, 5, 10].find((factor) => factor * power >= least) ?? 10) * power);
}
