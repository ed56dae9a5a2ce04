// The part of Markdown that models write, as blocks. What is not understood stays text.

/**
 * @typedef {{type: "code", language: string, text: string}
 *   | {type: "heading", level: number, text: string}
 *   | {type: "rule"}
 *   | {type: "quote", blocks: Block[]}
 *   | {type: "list", isOrdered: boolean, start: number, items: Block[][]}
 *   | {type: "table", alignments: string[], rows: string[][]}
 *   | {type: "paragraph", text: string}} Block
 */

const MAX_DEPTH = 6; // of quotes and lists in one another
// None of these can match a part of a line in two ways, so that their time is linear.
const FENCE = /^ {0,3}(`{3,}|~{3,}(?!~))([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})\s([^]*)$/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])(\s+)([^]*)$/;
const DELIMITER = /^:?-+:?$/;

/**
 * @param {string} text
 * @param {number} [depth]
 * @returns {Block[]}
 */
export function parseBlocks(text, depth = 0) {
  const lines = text.replaceAll("\r\n", "\n").split("\n");
  /** @type {Block[]} */
  const blocks = [];
  for (let i = 0; i < lines.length; ) {
    const reader = readers.find(({ begins }) => begins(lines, i, depth)) ?? paragraphs;
    const [block, next] = reader.read(lines, i, depth);
    if (block) blocks.push(block);
    i = next;
  }
  return blocks;
}

/** @typedef {{begins: (lines: string[], i: number, depth: number) => boolean, read: (lines: string[], i: number, depth: number) => [Block | null, number]}} Reader */

/** @type {Reader} */
const empty = { begins: (lines, i) => isEmpty(lines[i]), read: (_, i) => [null, i + 1] };

/** @type {Reader} */
const code = {
  begins: (lines, i) => FENCE.test(lines[i]),
  read(lines, i) {
    const [, fence, rest] = /** @type {RegExpExecArray} */ (FENCE.exec(lines[i]));
    const [language] = rest.trim().split(/\s/, 1);
    const isEnd = (/** @type {string} */ line) => line.startsWith(fence) && line === fence[0].repeat(line.length);
    const end = endOf(lines, i + 1, (line) => isEnd(line.trim())); // without one, the code is still arriving
    return [{ type: "code", language, text: lines.slice(i + 1, end).join("\n") }, end + 1];
  },
};

/** @type {Reader} */
const heading = {
  begins: (lines, i) => HEADING.test(lines[i]),
  read(lines, i) {
    const [, marks, text] = /** @type {RegExpExecArray} */ (HEADING.exec(lines[i]));
    return [{ type: "heading", level: marks.length, text: withoutMarks(text.trim()) }, i + 1];
  },
};

/**
 * The text of a heading without the marks that may close it.
 * @param {string} text
 */
function withoutMarks(text) {
  let end = text.length;
  while (text[end - 1] === "#") end -= 1;
  return end === 0 || /\s/.test(text[end - 1]) ? text.slice(0, end).trim() : text;
}

/** @type {Reader} */
const rule = { begins: (lines, i) => RULE.test(lines[i]), read: (_, i) => [{ type: "rule" }, i + 1] };

/** @type {Reader} */
const quote = {
  begins: (lines, i, depth) => depth < MAX_DEPTH && QUOTE.test(lines[i]),
  read(lines, i, depth) {
    const end = endOf(lines, i, (line) => !QUOTE.test(line));
    const text = lines.slice(i, end).map((line) => line.replace(QUOTE, ""));
    return [{ type: "quote", blocks: parseBlocks(text.join("\n"), depth + 1) }, end];
  },
};

/** @type {Reader} */
const table = {
  begins: (lines, i) => lines[i].includes("|") && (lines[i + 1] ?? "").includes("-") && cells(lines[i + 1]).every((cell) => DELIMITER.test(cell)),
  read(lines, i) {
    const end = endOf(lines, i + 2, (line) => !line.includes("|"));
    const alignments = cells(lines[i + 1]).map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : "left"));
    return [{ type: "table", alignments, rows: [lines[i], ...lines.slice(i + 2, end)].map(cells) }, end];
  },
};

/** @type {Reader} */
const list = {
  begins: (lines, i, depth) => depth < MAX_DEPTH && ITEM.test(lines[i]),
  read(lines, i, depth) {
    const [, , marker] = /** @type {RegExpExecArray} */ (ITEM.exec(lines[i]));
    const isOrdered = /\d/.test(marker);
    const items = [];
    let next = i;
    for (let item = ITEM.exec(lines[next]); item && /\d/.test(item[2]) === isOrdered; item = ITEM.exec(lines[next] ?? "")) {
      const end = endOfItem(lines, next, item);
      const own = lines.slice(next + 1, end).map((line) => line.slice(Math.min(indent(line), contentIndent(item))));
      items.push(parseBlocks([item[4], ...own].join("\n"), depth + 1));
      next = endOf(lines, end, (line) => !isEmpty(line));
    }
    return [{ type: "list", isOrdered, start: isOrdered ? parseInt(marker, 10) : 1, items }, next];
  },
};

/** @type {Reader} */
const paragraphs = {
  begins: () => true,
  read(lines, i, depth) {
    const end = endOf(lines, i + 1, (_, index) => readers.some(({ begins }) => begins(lines, index, depth)));
    return [{ type: "paragraph", text: lines.slice(i, end).join("\n").trim() }, end];
  },
};

const readers = [empty, code, heading, rule, quote, table, list];

/** @param {string} line */
const isEmpty = (line) => line.trim() === "";

/** @param {string} line */
const indent = (line) => line.length - line.trimStart().length;

/**
 * From which column on lines belong to an item of a list.
 * @param {RegExpExecArray} item
 */
const contentIndent = ([, space, marker]) => space.length + Math.min(marker.length + 1, 4);

/**
 * The first line after an item: another item, or a line after an empty one that is not indented.
 * @param {string[]} lines
 * @param {number} i
 * @param {RegExpExecArray} item
 */
function endOfItem(lines, i, item) {
  const column = Math.min(contentIndent(item), item[1].length + 2);
  return endOf(lines, i + 1, (line, index) => {
    if (isEmpty(line)) return indent(lines[index + 1] ?? "") < column || isEmpty(lines[index + 1] ?? "");
    return indent(line) < column && (ITEM.test(line) || isEmpty(lines[index - 1]) || FENCE.test(line) || HEADING.test(line));
  });
}

/**
 * The first line from `start` on that a condition holds for, or the end.
 * @param {string[]} lines
 * @param {number} start
 * @param {(line: string, index: number) => boolean} condition
 */
function endOf(lines, start, condition) {
  let end = start;
  while (end < lines.length && !condition(lines[end], end)) end += 1;
  return end;
}

/** @param {string} line */
const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());

/**
 * @typedef {{type: "text", text: string} | {type: "code", text: string} | {type: "break"}
 *   | {type: "strong" | "emphasis" | "strike", text: string} | {type: "link", text: string, url: string}} Inline
 */

// Bounds keep the time linear for texts that are made to be slow.
const INLINE = new RegExp(
  [
    /\\(?<escaped>[\\`*_{}[\]()#+\-.!~>|])/,
    /(?<ticks>`{1,20})(?<code>[^`](?:[^]{0,2000}?[^`])??)\k<ticks>(?!`)/,
    /\*\*(?=\S)(?<strong>[^]{0,1000}?\S)\*\*(?!\*)/,
    /(?<![\w_])__(?=\S)(?<strong2>[^]{0,1000}?\S)__(?![\w_])/,
    /\*(?=[^\s*])(?<emphasis>[^*]{0,1000}?[^\s*])\*(?!\*)/,
    /(?<![\w_])_(?=[^\s_])(?<emphasis2>[^_]{0,1000}?[^\s_])_(?![\w_])/,
    /~~(?=\S)(?<strike>[^]{0,1000}?\S)~~/,
    /\[(?<label>[^[\]\n]{1,500})\]\((?<target>[^\s()]{1,2000}(?:\([^\s()]{0,200}\))?)\)/,
    /(?<url>https?:\/\/[^\s<>"'`)\]]{1,2000}[^\s<>"'`)\].,;:!?*_])/,
    /(?<break>(?:(?<! ) {2,}|\\)\n)/,
  ]
    .map(({ source }) => source)
    .join("|"),
  "g",
);

/**
 * @param {string} text
 * @returns {Inline[]}
 */
export function parseInline(text) {
  /** @type {Inline[]} */
  const parts = [];
  let end = 0;
  for (const match of text.matchAll(INLINE)) {
    const part = inlineOf(match);
    if (match.index > end) parts.push({ type: "text", text: text.slice(end, match.index) });
    parts.push(part);
    end = match.index + match[0].length;
  }
  if (end < text.length) parts.push({ type: "text", text: text.slice(end) });
  return parts;
}

/**
 * @param {RegExpExecArray} match
 * @returns {Inline}
 */
function inlineOf(match) {
  const found = /** @type {Record<string, string | undefined>} */ (match.groups);
  if (found.escaped !== undefined) return { type: "text", text: found.escaped };
  if (found.code !== undefined) return { type: "code", text: found.code.replace(/^ (.*) $/s, "$1") };
  const strong = found.strong ?? found.strong2;
  if (strong !== undefined) return { type: "strong", text: strong };
  const emphasis = found.emphasis ?? found.emphasis2;
  if (emphasis !== undefined) return { type: "emphasis", text: emphasis };
  if (found.strike !== undefined) return { type: "strike", text: found.strike };
  if (found.url !== undefined) return { type: "link", text: found.url, url: found.url };
  if (found.break !== undefined) return { type: "break" };
  const { label = "", target = "" } = found;
  return /^(?:https?:\/\/|mailto:)/i.test(target) ? { type: "link", text: label, url: target } : { type: "text", text: match[0] };
}
