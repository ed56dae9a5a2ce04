// Shows the Markdown of an answer. Its text only ever becomes text of elements that are made here.
import { Copy } from "../components.js";
import { html, useMemo } from "../lib.js";
import { parseBlocks, parseInline } from "./markdown_parser.js";

const MAX_INLINE_DEPTH = 4;

/** @param {{text: string}} props */
export function Markdown({ text }) {
  const blocks = useMemo(() => parseBlocks(text), [text]);
  return html`<div class="markdown">${blocks.map((block, index) => html`<${BlockView} key=${index} block=${block} />`)}</div>`;
}

/** @param {{block: import("./markdown_parser.js").Block}} props */
function BlockView({ block }) {
  const source = JSON.stringify(block);
  return useMemo(() => renderBlock(block), [source]); // while an answer arrives, only its last block changes
}

/** @param {import("./markdown_parser.js").Block[]} blocks */
const renderBlocks = (blocks) => blocks.map(renderBlock);

/**
 * @param {import("./markdown_parser.js").Block} block
 * @returns {any}
 */
function renderBlock(block) {
  switch (block.type) {
    case "code":
      return html`<${Code} language=${block.language} text=${block.text} />`;
    case "heading":
      return html`<p role="heading" aria-level=${Math.min(block.level + 2, 6)} class="heading level-${block.level}">${inline(block.text)}</p>`;
    case "rule":
      return html`<hr />`;
    case "quote":
      return html`<blockquote>${renderBlocks(block.blocks)}</blockquote>`;
    case "list": {
      const items = block.items.map((item) => html`<li>${renderItem(item)}</li>`);
      return block.isOrdered ? html`<ol start=${block.start}>${items}</ol>` : html`<ul>${items}</ul>`;
    }
    case "table":
      return html`<${Table} ...${block} />`;
    default:
      return html`<p>${inline(block.text)}</p>`;
  }
}

/** @param {import("./markdown_parser.js").Block[]} blocks */
function renderItem([first, ...rest]) {
  if (first?.type !== "paragraph") return renderBlocks(first ? [first, ...rest] : rest);
  return [inline(first.text), ...renderBlocks(rest)];
}

/** @param {{alignments: string[], rows: string[][]}} props */
function Table({ alignments, rows: [head, ...rows] }) {
  return html`
    <div class="table" tabindex="0" role="group" aria-label="Table">
      <table>
        <thead><tr>${head.map((cell, i) => html`<th class=${alignments[i]}>${inline(cell)}</th>`)}</tr></thead>
        <tbody>${rows.map((row) => html`<tr>${head.map((_, i) => html`<td class=${alignments[i]}>${inline(row[i] ?? "")}</td>`)}</tr>`)}</tbody>
      </table>
    </div>
  `;
}

/** @param {{language: string, text: string}} props */
export const Code = ({ language, text }) => html`
  <figure class="code">
    <figcaption><span>${language}</span><${Copy} text=${text} label="Copy the code" /></figcaption>
    <pre tabindex="0"><code>${text}</code></pre>
  </figure>
`;

/**
 * @param {string} text
 * @param {number} [depth]
 * @returns {any[]}
 */
function inline(text, depth = 0) {
  const nested = (/** @type {string} */ part) => (depth < MAX_INLINE_DEPTH ? inline(part, depth + 1) : part);
  return parseInline(text).map((part) => {
    switch (part.type) {
      case "code":
        return html`<code>${part.text}</code>`;
      case "strong":
        return html`<strong>${nested(part.text)}</strong>`;
      case "emphasis":
        return html`<em>${nested(part.text)}</em>`;
      case "strike":
        return html`<s>${nested(part.text)}</s>`;
      case "link":
        return html`<a href=${part.url} title=${part.url} target="_blank" rel="noopener noreferrer nofollow">${part.text}</a>`;
      case "break":
        return html`<br />`;
      default:
        return part.text;
    }
  });
}
