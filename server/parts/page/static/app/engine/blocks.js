// The map of the KV cache: each block is a square.
import { ownerColor, palette, prepare } from "../canvas.js";

/**
 * @typedef {{start: number, num_blocks: number, state: "held" | "cached" | "free" | "unused", num_holders: number,
 *   is_cached: boolean, owner: number | null, group: number | null, position: number | null, age: number | null}} Run
 * @typedef {{id: string, prompt: number, index: number, key: string | null}} Owner
 * @typedef {{engine: string, block_size: number, num_blocks: number, num_used: number, num_states: number,
 *   num_states_used: number, num_snapshots: number, has_more: boolean,
 *   groups: {num_layers: number, window: number | null}[], owners: Owner[], data: Run[]}} BlockMap
 */

const LARGEST = 32; // px of a square
const FAINT = 0.55;

/** @param {BlockMap} map */
export function numShown(map) {
  return map.data.reduce((total, run) => total + run.num_blocks, 0);
}

/**
 * How many blocks are in each state.
 * @param {BlockMap} map
 */
export function countStates(map) {
  const counts = { held: 0, shared: 0, cached: 0, free: 0, unused: 0 };
  for (const run of map.data) {
    counts[run.state] += run.num_blocks;
    if (run.num_holders > 1) counts.shared += run.num_blocks;
  }
  return counts;
}

/**
 * The run of a block, and the position of its first token.
 * @param {BlockMap} map
 * @param {number} block its number
 */
export function findBlock(map, block) {
  const run = map.data.find(({ start, num_blocks }) => start <= block && block < start + num_blocks);
  if (!run) return null;
  const position = run.position === null ? null : run.position + (block - run.start) * map.block_size;
  return { run, position, owner: run.owner === null ? null : map.owners[run.owner] };
}

export class BlockGrid {
  /** @param {HTMLCanvasElement} canvas */
  constructor(canvas) {
    this.canvas = canvas;
    /** @type {BlockMap | null} */
    this.map = null;
    this.selected = -1;
    this.highlighted = "";
    this.size = 1;
    this.numColumns = 1;
    this.colors = palette();
  }

  updateTheme() {
    this.colors = palette();
    this.paint();
  }

  /** @param {BlockMap} map */
  show(map) {
    this.map = map;
    this.paint();
  }

  get start() {
    return this.map?.data[0]?.start ?? 0;
  }

  paint() {
    if (!this.map) return;
    const { context, width, height } = prepare(this.canvas);
    this.size = squareSize(numShown(this.map), width, height);
    this.numColumns = Math.max(1, Math.floor(width / this.size));
    for (const run of this.map.data) {
      const id = run.owner === null ? null : this.map.owners[run.owner].id;
      context.globalAlpha = this.highlighted && id !== this.highlighted ? 0.25 : 1;
      for (let block = run.start; block < run.start + run.num_blocks; block += 1) this.paintBlock(context, run, id, block);
    }
    context.globalAlpha = 1;
  }

  /**
   * @param {CanvasRenderingContext2D} context
   * @param {Run} run
   * @param {string | null} id of the request that owns it
   * @param {number} block
   */
  paintBlock(context, run, id, block) {
    const { x, y } = this.place(block);
    const inner = this.size - (this.size > 5 ? 2 : 1);
    if (run.state === "held") {
      context.fillStyle = ownerColor(id, this.colors);
      context.fillRect(x, y, inner, inner);
      if (run.num_holders > 1) this.paintDot(context, x, y, inner);
    } else if (run.state === "cached") {
      context.globalAlpha *= FAINT; // so that what is held stands out
      context.fillStyle = this.colors["strong-line"];
      context.fillRect(x, y + inner / 2, inner, inner / 2);
      this.paintOutline(context, x, y, inner, "strong-line");
      context.globalAlpha /= FAINT;
    } else if (run.state === "free") {
      this.paintOutline(context, x, y, inner, "strong-line");
    } else {
      this.paintOutline(context, x, y, inner, "line");
    }
    if (block === this.selected) this.paintOutline(context, x - 1, y - 1, inner + 2, "text", 2);
  }

  /**
   * @param {CanvasRenderingContext2D} context
   * @param {number} x
   * @param {number} y
   * @param {number} inner
   */
  paintDot(context, x, y, inner) {
    context.fillStyle = this.colors.panel;
    const size = Math.max(1, inner / 3);
    context.fillRect(x + (inner - size) / 2, y + (inner - size) / 2, size, size);
  }

  /**
   * @param {CanvasRenderingContext2D} context
   * @param {number} x
   * @param {number} y
   * @param {number} inner
   * @param {string} color
   */
  paintOutline(context, x, y, inner, color, lineWidth = 1) {
    context.strokeStyle = this.colors[color];
    context.lineWidth = lineWidth;
    context.strokeRect(x + lineWidth / 2, y + lineWidth / 2, inner - lineWidth, inner - lineWidth);
  }

  /** @param {number} block */
  place(block) {
    const index = block - this.start;
    return { x: 1 + (index % this.numColumns) * this.size, y: 1 + Math.floor(index / this.numColumns) * this.size };
  }

  /**
   * The number of the block at a point of the canvas.
   * @param {number} x
   * @param {number} y
   */
  at(x, y) {
    const column = Math.floor((x - 1) / this.size);
    const index = Math.floor((y - 1) / this.size) * this.numColumns + column;
    const isInside = column >= 0 && column < this.numColumns && index >= 0 && this.map !== null && index < numShown(this.map);
    return isInside ? this.start + index : -1;
  }
}

/**
 * The size at which so many squares fill an area.
 * @param {number} num
 * @param {number} width
 * @param {number} height
 */
function squareSize(num, width, height) {
  let size = LARGEST;
  while (size > 1 && Math.floor((width - 2) / size) * Math.floor((height - 2) / size) < num) size -= size > 6 ? 1 : 0.5;
  return size;
}
