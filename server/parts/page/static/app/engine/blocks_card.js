// The map of the KV cache with its legend, and the block that was chosen in it.
import { Button, Problem } from "../components.js";
import { count } from "../format.js";
import { html, useEffect, useRef, useState } from "../lib.js";
import { BlockGrid, countStates, findBlock, numShown } from "./blocks.js";
import { useTheme, watchSize } from "../canvas.js";
import { short } from "./parts.js";
import { usePolled } from "./stream.js";

const INTERVAL = 1000; // ms
const AT_ONCE = 4096; // blocks
const PLAIN_KEYS = /** @type {Record<string, number>} */ ({ ArrowLeft: -1, ArrowRight: 1 });

/** @param {{isPaused: boolean, request: string}} props */
export function BlocksCard({ isPaused, request }) {
  const [start, setStart] = useState(0);
  const [block, setBlock] = useState(-1);
  const { data: map, error, retry } = usePolled(`lightwell/v1/blocks?start=${start}&limit=${AT_ONCE}`, INTERVAL, { isPaused });
  const ref = useRef(/** @type {HTMLCanvasElement | null} */ (null));
  const grid = useRef(/** @type {BlockGrid | null} */ (null));
  const theme = useTheme();
  useEffect(() => {
    const canvas = /** @type {HTMLCanvasElement} */ (ref.current);
    const made = new BlockGrid(canvas);
    grid.current = made;
    return watchSize(canvas, () => made.paint());
  }, []);
  useEffect(() => grid.current?.updateTheme(), [theme]);
  useEffect(() => {
    if (map) grid.current?.show(map);
  }, [map]);
  useEffect(() => {
    Object.assign(/** @type {BlockGrid} */ (grid.current), { selected: block, highlighted: request });
    grid.current?.paint();
  }, [block, request]);

  const last = map ? start + numShown(map) - 1 : 0;
  const point = (/** @type {any} */ event) => setBlock(/** @type {BlockGrid} */ (grid.current).at(event.offsetX, event.offsetY));
  const leave = (/** @type {any} */ { pointerType }) => pointerType === "mouse" && setBlock(-1); // a finger leaves at once
  const onKeyDown = (/** @type {any} */ event) => {
    const rows = /** @type {Record<string, number>} */ ({ ArrowUp: -1, ArrowDown: 1 });
    const move = PLAIN_KEYS[event.key] ?? (rows[event.key] ?? 0) * (grid.current?.numColumns ?? 1);
    if (!map || (move === 0 && event.key !== "Home" && event.key !== "End")) return;
    event.preventDefault();
    const target = event.key === "Home" ? start : event.key === "End" ? last : block < 0 ? start : block + move;
    setBlock(Math.max(start, Math.min(last, target)));
  };
  const counts = map && countStates(map);
  return html`
    <section class="card blocks" aria-labelledby="blocks-title">
      <header>
        <h2 id="blocks-title">KV cache</h2>
        <p class="hint">Keys and values of the tokens so far, in blocks${map ? ` of ${map.block_size} tokens` : ""}. Choices with the same beginning share blocks, and what has ended stays cached until its place is needed.</p>
      </header>
      ${error && html`<${Problem} error=${error} onRetry=${retry} />`}
      <canvas ref=${ref} tabindex="0" role="slider" aria-label="Blocks of the KV cache" aria-valuemin=${start} aria-valuemax=${last}
        aria-valuenow=${Math.max(start, block)} aria-valuetext=${map && block >= 0 ? describe(map, block) : "none chosen"}
        onPointerDown=${point} onPointerMove=${point} onPointerLeave=${leave} onBlur=${() => setBlock(-1)} onKeyDown=${onKeyDown}></canvas>
      <p class="readout num">${map && block >= 0 ? `${describe(map, block)}${ageOf(map, block)}` : map ? `${count(map.num_used)} of ${count(map.num_blocks)} blocks are held by choices that run.` : "\u00a0"}</p>
      <ul class="legend">
        <li><span class="mark solid"></span>held${counts ? ` ${count(counts.held - counts.shared)}` : ""}</li>
        <li><span class="mark dotted"></span>shared${counts ? ` ${count(counts.shared)}` : ""}</li>
        <li><span class="mark half grey"></span>cached${counts ? ` ${count(counts.cached)}` : ""}</li>
        <li><span class="mark hollow"></span>free${counts ? ` ${count(counts.free)}` : ""}</li>
        <li><span class="mark faint"></span>never used${counts ? ` ${count(counts.unused)}` : ""}</li>
      </ul>
      ${map && map.num_states > 0 && html`
        <p class="hint num">Some layers keep a state in place of keys and values: ${count(map.num_states_used)} of ${count(map.num_states)} states are held by choices that run, and later prompts find ${count(map.num_snapshots)} snapshots.</p>
      `}
      ${(start > 0 || map?.has_more) && html`
        <div class="row">
          <${Button} icon="left" label="Earlier blocks" disabled=${start === 0} onClick=${() => setStart(Math.max(0, start - AT_ONCE))} />
          <span class="hint num">Blocks ${count(start)} to ${count(last)} of ${count(map?.num_blocks ?? 0)}</span>
          <${Button} icon="right" label="Later blocks" disabled=${!map?.has_more} onClick=${() => setStart(start + AT_ONCE)} />
        </div>
      `}
    </section>
  `;
}

/**
 * @param {import("./blocks.js").BlockMap} map
 * @param {number} block
 */
function describe(map, block) {
  const found = findBlock(map, block);
  if (!found) return `Block ${block}`;
  const { run, position, owner } = found;
  if (run.state === "unused") return `Block ${block}: never used`;
  if (run.state === "cached") return `Block ${block}: cached, free for others`;
  if (run.state === "free") return `Block ${block}: free`;
  const who = owner ? short(owner.id) : "another client";
  const shared = run.num_holders > 1 ? `, shared by ${run.num_holders} choices` : "";
  const tokens = position === null ? "" : `, tokens from position ${count(position)}`;
  const layers = map.groups.length > 1 && run.group !== null ? `, ${map.groups[run.group].num_layers} layers` : "";
  return `Block ${block}: held by ${who}${shared}${tokens}${layers}`;
}

/**
 * How long ago a block was handed out: with each step another text, which no screen reader should read again and again.
 * @param {import("./blocks.js").BlockMap} map
 * @param {number} block
 */
function ageOf(map, block) {
  const age = findBlock(map, block)?.run.age ?? null;
  return age === null ? "" : `, handed out ${count(age)} steps ago`;
}
