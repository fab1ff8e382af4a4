/**
 * Renders Markdown while it streams in.
 *
 * `MarkdownView` reads each line once, and finished blocks do not change. Only the open paragraph
 * is parsed again at each `draw()`, and its length is limited. So the time is proportional to the
 * length of the text. HTML in the text stays text.
 */

import { copyButton, make, visible } from "./dom.js";

// Patterns of block starts. None can match the same characters in two ways, so they take linear
// time. Indented code does not exist here: models write fences.
const FENCE = /^ *(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6}) +(.*)/;
const RULE = /^ {0,3}([-*_])(?: *\1){2,} *$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)]) +(?=\S)/;
const COLUMN = /^:?-+:?$/;
const ALIGNS = { ":-": "left", "-:": "right", ":-:": "center" };
// The start of a line whose block is not known yet; the same while a code block is open.
const AMBIGUOUS = /^[\s>*+\-#_\d.)|:`~]*$|^[\s>*+\-\d.)]*(?:`{3}|~{3})/;
const AMBIGUOUS_IN_CODE = /^[\s`~]*$/;
// Quotes and lists nest this deep, emphasis and links that deep. A very deep document overflows the
// browser's stack.
const MAX_DEPTH = 8;
const MAX_OPEN = 16;
// Longer paragraphs are parsed in parts: a part is the text that each draw() parses again.
const MAX_PARAGRAPH = 10_000;
// Empty cells a table may get. Otherwise, below a header of a thousand columns, each letter would
// become a thousand cells.
const MAX_EMPTY_CELLS = 2000;

class Paragraph {
  constructor(name = "p") {
    this.element = make(name);
    this.isHeading = name !== "p";
    // The element of the text that is not finished, and that text.
    this.part = this.element;
    this.text = "";
    this.drawn = "";
  }

  draw() {
    while (this.text.length > MAX_PARAGRAPH) this.split();
    if (this.text !== this.drawn) replaceEnd(this.part, inline(this.text));
    this.drawn = this.text;
  }

  split() {
    const end = this.text.lastIndexOf(" ", MAX_PARAGRAPH - 1) + 1 || MAX_PARAGRAPH;
    const finished = make("span", {}, inline(this.text.slice(0, end)));
    const rest = make("span");
    if (this.part === this.element) this.part.replaceChildren(finished, rest);
    else this.part.replaceWith(finished, rest);
    this.part = rest;
    this.drawn = "";
    this.text = this.text.slice(end);
  }
}

class CodeBlock {
  constructor([, fence, info]) {
    this.fence = fence;
    // Text is only ever appended, so that selections and scroll positions stay.
    this.text = "";
    this.isEmpty = true;
    this.node = document.createTextNode("");
    const language = info.trim().split(" ")[0] || "code";
    const code = make("code", {}, this.node);
    const caption = make("figcaption", {}, language, copyButton("Copy the code", { node: code }));
    this.element = make("figure", {}, caption, scrollable("pre", language, code));
    code.parentElement.dir = "ltr";
  }

  isClosedBy(line) {
    return /^\s*(`+|~+)\s*$/.test(line) && line.trim().startsWith(this.fence);
  }

  addLine(line) {
    this.text += this.isEmpty ? line : `\n${line}`;
    this.isEmpty = false;
  }

  draw() {
    this.node.appendData(this.text);
    this.text = "";
  }
}

/** A table as on GitHub: the header decides how many cells a row has. Rows are added whole. */
class Table {
  constructor(header, columns) {
    this.text = header;
    this.aligns = columns.map((mark) => ALIGNS[mark.replace(/-+/, "-")] ?? "");
    this.emptyCells = 0;
    this.body = make("tbody");
    const head = make("thead", {}, this.row("th", header));
    this.element = scrollable("div", "Table", make("table", {}, head, this.body));
    this.element.className = "table";
  }

  /** Add a row, unless the table gets too many empty cells. */
  addLine(line) {
    this.emptyCells += Math.max(this.aligns.length - line.length, 0);
    if (this.emptyCells > MAX_EMPTY_CELLS) return false;
    this.body.append(this.row("td", line));
    return true;
  }

  row(name, line) {
    const texts = cells(line);
    return make("tr", {}, this.aligns.map((align, i) => {
      // An empty header names nothing: it is a plain cell.
      const cell = make(texts[i] ? name : "td", {}, inline(texts[i] ?? ""));
      if (cell.localName === "th") cell.scope = "col";
      cell.style.textAlign = align;
      return cell;
    }));
  }

  draw() {}
}

export class MarkdownView {
  #root;
  // The open quotes and list items, outermost first, and the open block inside them.
  #containers = [];
  #block = null;
  // The unfinished line, until its block is known. From then on text is added to the block.
  #line = "";
  #started = false;

  constructor(root) {
    this.#root = root;
  }

  append(text) {
    visible(text).split("\n").forEach((part, i) => {
      if (i > 0) this.#endLine();
      this.#extendLine(part);
    });
  }

  /** Show the text so far, including the unfinished line if its block is known. */
  draw() {
    if (!this.#started && !this.#isAmbiguous()) this.#startLine();
    this.#drawBlock();
  }

  /** Show everything. */
  end() {
    if (!this.#started && this.#line) this.#startLine();
    this.#close();
  }

  #isAmbiguous() {
    if (this.#block instanceof Table) return true;
    if (!(this.#block instanceof CodeBlock)) return AMBIGUOUS.test(this.#line);
    // Code in a quote ends with the quote.
    return this.#containers.some((each) => each.isQuote) || AMBIGUOUS_IN_CODE.test(this.#line);
  }

  #extendLine(text) {
    if (this.#started) this.#block.text += text;
    else this.#line += text;
  }

  #endLine() {
    if (!this.#started) this.#startLine();
    if (this.#block?.isHeading) this.#close();
    this.#line = "";
    this.#started = false;
  }

  /** Find the block of the line: after the open containers that it continues, and new ones. */
  #startLine() {
    this.#started = true;
    let rest = this.#line, depth = 0;
    for (const container of this.#containers) {
      const inner = this.#continue(container, rest);
      if (inner === null) break;
      rest = inner;
      depth++;
    }
    const inside = depth === this.#containers.length;
    if (inside && this.#block instanceof CodeBlock) {
      if (this.#block.isClosedBy(rest)) this.#close();
      else this.#block.addLine(rest);
      return;
    }
    for (let match; depth < MAX_DEPTH && (match = matchContainer(rest)); depth++) {
      this.#openContainer(depth, match);
      rest = rest.slice(match[0].length);
    }
    this.#addLine(rest, depth, inside);
  }

  /** Return the line without the container's marker, or null if the line is not part of it. */
  #continue(container, line) {
    if (container.isQuote) return QUOTE.test(line) ? line.replace(QUOTE, "") : null;
    const indent = line.search(/\S/);
    if (indent < 0) return "";
    // Models indent lists inside "1." by two columns only, and code in lists sometimes not at all.
    const inside = indent >= container.indent + 2 || this.#block instanceof CodeBlock;
    return inside ? line.slice(Math.min(indent, container.width)) : null;
  }

  #openContainer(depth, [text, indent, marker]) {
    const sibling = this.#containers[depth];
    this.#close(depth);
    const container = { isQuote: !marker, indent: indent?.length, width: text.length };
    if (marker) {
      const name = marker.length > 1 ? "ol" : "ul";
      container.list = sibling?.list?.localName === name ? sibling.list : this.#append(make(name));
      if (name === "ol" && !container.list.firstChild) container.list.start = parseInt(marker, 10);
      container.element = make("li");
      container.list.append(container.element);
    } else container.element = this.#append(make("blockquote"));
    this.#containers.push(container);
  }

  /** Add the rest of a line, whose containers are known, to the open block or to a new one. */
  #addLine(line, depth, inside) {
    const heading = line.match(HEADING), fence = line.match(FENCE);
    if (!line.trim()) {
      this.#close(depth);
    } else if (fence) {
      this.#open(new CodeBlock(fence), depth);
    } else if (heading) {
      // The playground's name is the h1; each message has an h2.
      this.#open(new Paragraph(`h${Math.min(heading[1].length + 2, 6)}`), depth);
      this.#extendLine(heading[2]);
    } else if (RULE.test(line)) {
      this.#close(depth);
      this.#append(make("hr"));
    } else if (this.#block instanceof Paragraph) {
      // Even without the markers of its containers, a line continues a paragraph.
      if (!inside || !this.#startTable(line)) this.#extendLine(`\n${line}`);
    } else if (!inside || !(this.#block instanceof Table) || !this.#block.addLine(line)) {
      this.#open(new Paragraph(), depth);
      this.#extendLine(line);
    }
  }

  /** If this is the second line of a table, make the last line of the paragraph its header. */
  #startTable(line) {
    if (!/^[\s|:-]+$/.test(line) || !/[|:]/.test(line)) return false;
    // What remains of the paragraph must not depend on how often it was drawn.
    this.#block.draw();
    const { text, element, part } = this.#block;
    const start = text.lastIndexOf("\n") + 1;
    const header = text.slice(start), columns = cells(line);
    if (columns.length !== cells(header).length) return false;
    if (!columns.every((cell) => COLUMN.test(cell))) return false;
    this.#block.text = text.slice(0, Math.max(start - 1, 0));
    this.#open(new Table(header, columns));
    if (!start && part === element) element.remove();
    return true;
  }

  /** Finish the open block, and all containers but the outermost `depth`. */
  #close(depth = this.#containers.length) {
    this.#drawBlock();
    this.#block = null;
    this.#containers.length = depth;
  }

  #drawBlock() {
    this.#block?.draw();
    if (this.#block) this.#setDirection();
  }

  /** Give the newest block the direction of its first letter. "auto" costs time at each change. */
  #setDirection() {
    const newest = this.#root.lastElementChild;
    if (newest.dir || !/\p{L}/u.test(this.#block.text)) return;
    newest.dir = "auto";
    newest.dir = newest.matches(":dir(rtl)") ? "rtl" : "ltr";
  }

  #open(block, depth) {
    this.#close(depth);
    this.#append(block.element);
    this.#block = block;
  }

  #append(element) {
    (this.#containers.at(-1)?.element ?? this.#root).append(element);
    return element;
  }
}

function matchContainer(line) {
  return line.match(QUOTE) ?? (RULE.test(line) ? null : line.match(ITEM));
}

/** Create an element with its own scroll bar. With the focus, the keyboard scrolls it. */
function scrollable(name, ariaLabel, child) {
  return make(name, { tabIndex: 0, role: "group", ariaLabel }, child);
}

/** Return the cells of a table's row. A bar behind a backslash is text. */
function cells(row) {
  const inner = row.trim().replace(/^\||(?<!\\)\|$/g, "");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

/** Give `element` these children. The ones that stay the same, and their selection, are kept. */
function replaceEnd(element, fragment) {
  const before = [...element.childNodes], after = [...fragment.childNodes];
  let same = 0;
  while (same < before.length && after[same]?.isEqualNode(before[same])) same++;
  const text = before[same], longer = after[same];
  if (text instanceof Text && longer instanceof Text && longer.data.startsWith(text.data)) {
    text.appendData(longer.data.slice(text.length));
    same++;
  }
  before.slice(same).forEach((node) => node.remove());
  element.append(...after.slice(same));
}

// ---- Inside a paragraph

const TOKEN = new RegExp([
  /\\[!-\/:-@[-`{-~]/,
  /`+/,
  /\*+|_+|~~/,
  /!?\[|\]/,
  // The only HTML that models need: a table cell has no other line break.
  /<br *\/?>/,
  /https?:\/\/(?:[^\s<>()[\]`*"]|\([^\s<>()[\]`*"]*\))+/,
].map((part) => part.source).join("|"), "g");
const TARGET = /\( *<?((?:[^()\s<>]|\([^()\s]*\))+)>?(?:\s[^()]*)?\)/y;
const LETTER = /[\p{L}\p{N}_]/u;

/** Return the elements and text of a paragraph as a DocumentFragment. */
function inline(text) {
  return new InlineParser(text).parse();
}

class InlineParser {
  constructor(text) {
    this.text = text;
    this.root = document.createDocumentFragment();
    // Text that is not in `root` yet.
    this.plain = "";
    // Delimiters that a later one may close. They are few: the search takes constant time.
    this.open = [];
  }

  parse() {
    const { text } = this, nextTicks = findTicks(text);
    let from = 0;
    TOKEN.lastIndex = 0;
    for (let match; (match = TOKEN.exec(text)); TOKEN.lastIndex = from) {
      const [token] = match, start = match.index;
      this.plain += text.slice(from, start);
      from = start + token.length;
      if (token[0] === "\\") {
        this.plain += token[1];
      } else if (token[0] === "`") {
        const close = nextTicks(token.length, from);
        if (close < 0) this.plain += token;
        else this.add(make("code", {}, text.slice(from, close).trim()));
        if (close >= 0) from = close + token.length;
      } else if (token[0] === "<") {
        this.add(make("br"));
      } else if (token[0] === "h") {
        const url = withoutPunctuation(token);
        this.add(createLink(url, url) ?? url);
        from = start + url.length;
      } else if (token === "]") {
        from = this.closeLink(from);
      } else if (token.endsWith("[")) {
        this.openDelimiter("[", token);
      } else {
        this.emphasize(token, text[start - 1] ?? " ", text[from] ?? " ");
      }
    }
    this.plain += text.slice(from);
    this.add("");
    return this.root;
  }

  add(child) {
    if (this.plain) this.root.append(this.plain);
    this.plain = "";
    if (child) this.root.append(child);
  }

  openDelimiter(kind, text) {
    if (this.open.length < MAX_OPEN) {
      const node = document.createTextNode(text);
      this.add(node);
      this.open.push({ kind, node });
    } else this.plain += text;
  }

  /** Put all that follows an open delimiter into `element`. */
  wrap({ node }, element) {
    this.add(element);
    while (node.nextSibling !== element) element.append(node.nextSibling);
  }

  /** Add a run of `*`, `_` or `~`: it closes delimiters, and what is left of it opens one. */
  emphasize(run, before, after) {
    const { open } = this;
    // An underscore inside a word is part of it.
    const inWord = (letter) => run[0] === "_" && LETTER.test(letter);
    const opens = /\S/.test(after) && !inWord(before), closes = /\S/.test(before) && !inWord(after);
    let left = run;
    while (closes && left && run.length <= 3) {
      const index = open.findLastIndex(({ kind }) => kind === run[0]);
      const size = open[index]?.node.length;
      // In a*b**c*d each run may open or close: it closes one of the same length.
      if (!size || (opens && size !== left.length)) break;
      const length = Math.min(size, left.length, 2);
      this.wrap(open[index], make(run[0] === "~" ? "del" : ["em", "strong"][length - 1]));
      open[index].node.deleteData(0, length);
      open.length = size > length ? index + 1 : index;
      left = left.slice(length);
    }
    if (opens && left && run.length <= 3) this.openDelimiter(run[0], left);
    else this.plain += left;
  }

  /** Close a link at the `]` before `from`. Return where the text goes on. */
  closeLink(from) {
    const index = this.open.findLastIndex(({ kind }) => kind === "[");
    TARGET.lastIndex = from;
    const match = index >= 0 && TARGET.exec(this.text);
    const element = match && createLink(match[1]);
    if (!element) {
      if (index >= 0) this.open.splice(index, 1);
      this.plain += "]";
      return from;
    }
    this.wrap(this.open[index], element);
    this.open[index].node.remove();
    // A link contains no link, neither this one nor those that are still open.
    for (const inner of element.querySelectorAll("a")) inner.replaceWith(inner.textContent);
    if (!element.textContent) element.append(match[1]);
    this.open = this.open.slice(0, index).filter(({ kind }) => kind !== "[");
    return from + match[0].length;
  }
}

/** Return a function that finds the next run of exactly `length` backticks from `from` on. */
function findTicks(text) {
  const starts = {};
  for (const { 0: run, index } of [...text.matchAll(/`+/g)].reverse()) {
    (starts[run.length] ??= []).push(index);
  }
  return (length, from) => {
    const left = starts[length] ?? [];
    while (left.at(-1) < from) left.pop();
    return left.at(-1) ?? -1;
  };
}

/** Return the URL without the punctuation of the sentence around it. */
function withoutPunctuation(url) {
  let end = url.length;
  while (".,;:!?'".includes(url[end - 1])) end--;
  return url.slice(0, end);
}

/** Create a link, also for an image: nothing is loaded. Return null if the URL could run code. */
function createLink(target, label = "") {
  const url = URL.parse(target);
  if (!["http:", "https:", "mailto:"].includes(url?.protocol)) return null;
  const properties = { href: url.href, title: url.href };
  return make("a", { ...properties, target: "_blank", rel: "noopener noreferrer" }, label);
}
