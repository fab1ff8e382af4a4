"use strict";

// Relative, so that a proxy may put the whole service under a prefix.
const API = "api/v1/";
const $ = (id) => document.getElementById(id);
// What lives as long as the tab: session, apiKey, model, other, answering. Some browsers refuse to
// keep it.
let tab = {};
try { tab = sessionStorage; } catch { /* then a reload begins anew */ }
// The AbortController of the answer that is arriving.
let running = null;

// ---- what a person can do

$("composer").onsubmit = (event) => {
  event.preventDefault();
  const message = $("message").value.trim();
  if (running || !message) return;
  $("message").value = "";
  $("message").focus();
  ask(message);
};
$("message").onkeydown = (event) => {
  // Enter also ends a word in an input method, and is a touch keyboard's only way to a new line.
  const types = event.isComposing || event.shiftKey || matchMedia("(pointer: coarse)").matches;
  if (event.key !== "Enter" || types) return;
  event.preventDefault();
  $("composer").requestSubmit();
};
document.onkeydown = (event) => {
  if (event.key !== "Escape" || event.isComposing) return;
  if ($("access").open) {
    $("access").open = false;
    $("message").focus();
  } else running?.abort();
};
// Growing, the composer would cover the end of the conversation.
$("message").oninput = () => follow();
$("stop").onclick = () => {
  running?.abort();
  $("message").focus();
};
$("new").onclick = startAnew;
$("delete").onclick = forget;
$("key").oninput = () => { tab.apiKey = $("key").value.trim(); };
$("model").onchange = () => {
  tab.model = $("model").value;
  $("other").hidden = tab.model !== "other";
  if (!$("other").hidden) $("other").focus();
};
$("other").oninput = () => { tab.other = $("other").value; };

/** Ask, and show the answer as it arrives. */
async function ask(message) {
  const asked = showMessage("user", message);
  const answer = new Answer();
  const model = $("model").value === "other" ? $("other").value.trim() : $("model").value;
  const body = { message, model_id: model || null, session_id: tab.session ?? null };
  const mine = running = new AbortController();
  tab.answering = "yes";
  refresh();
  follow(true);
  let end, response;
  try {
    response = await call("POST", "chat", body, mine.signal);
    if (response.ok && mine === running) tab.session = response.headers.get("X-Session-ID");
    end = response.ok ? await receive(response.body, answer) : await classify_error(response);
  } catch (error) {
    end = failure(error, response);
  }
  // A new conversation was begun meanwhile.
  if (mine !== running) return;
  running = null;
  delete tab.answering;
  const said = answer.close(end);
  if (end.error) {
    showProblem(end, answer.article, said ? [] : [asked, answer.article], () => ask(message));
    // What can't be sent again as it is can be changed.
    if (!said && !end.error.retryable) $("message").value ||= message;
  }
  refresh();
}

/** Read the events of an answer to its terminal event. Throws where the connection was cut. */
async function receive(body, answer) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "", end = null;
  while (!end) {
    const { value, done } = await reader.read();
    if (done) throw new TypeError("no terminal event");
    const events = (buffer + value).split("\n\n");
    buffer = events.pop();
    // What begins with a colon is a heartbeat.
    for (const event of events.filter((each) => each.startsWith("data: "))) {
      const told = JSON.parse(event.slice(6));
      if (told.status) end = told;
      else answer.add(told.chunk);
    }
  }
  return end;
}

/** Show what the assistant remembers of this tab's conversation. */
async function restore() {
  const shown = tab.session;
  // A reload cuts the answer that was arriving; the service stores it as soon as it notices.
  if (tab.answering) await new Promise((resolve) => setTimeout(resolve, 500));
  delete tab.answering;
  // A new conversation may have been begun meanwhile.
  if (tab.session !== shown) return;
  const end = await session("GET");
  if (tab.session !== shown) return;
  if (end.error?.code === "session_not_found") {
    delete tab.session;
    showNote("Your earlier conversation here has ended. This is a new one.");
  } else if (end.error) {
    const place = showNote("");
    showProblem(end, place, [place], restore);
  } else {
    const before = $("log").querySelector("article");
    for (const { role, content, complete } of end.messages) {
      const article = showMessage(role, content, before);
      if (!complete) article.append(note("This answer was cut off."));
    }
  }
  refresh();
  follow(true);
}

async function forget() {
  if (!confirm("Delete this conversation? The service forgets it for good.")) return;
  const end = await session("DELETE");
  if (end.error && end.error.code !== "session_not_found") {
    const place = showNote("");
    showProblem(end, place, [place], forget);
  } else {
    startAnew();
    announce("The conversation is deleted.");
  }
}

function startAnew() {
  running?.abort();
  running = null;
  delete tab.session;
  delete tab.answering;
  $("log").querySelectorAll("article").forEach((article) => article.remove());
  $("message").focus();
  refresh();
}

async function loadModels() {
  const found = await call("GET", "models").then((response) => response.json()).catch(() => null);
  if (!found?.models) return;
  // A glob stands for models that only the provider could name: they are typed.
  const all = new Set([found.default, ...found.models]);
  const names = [...all].filter((name) => !/[*?[]/.test(name));
  const options = names.map((name) => make("option", { value: name }, name));
  $("model").replaceChildren(...options, make("option", { value: "other" }, "another model …"));
  if ([...names, "other"].includes(tab.model)) $("model").value = tab.model;
  $("other").value = tab.other ?? "";
  $("other").hidden = $("model").value !== "other";
}

/** What the service says of this tab's session to GET or DELETE, or an error. */
async function session(method) {
  try {
    const response = await call(method, `sessions/${tab.session}`);
    if (!response.ok) return await classify_error(response);
    return response.status === 204 ? {} : await response.json();
  } catch (error) {
    return failure(error);
  }
}

function call(method, path, body, signal) {
  const headers = body ? { "Content-Type": "application/json" } : {};
  if (tab.apiKey) headers.Authorization = `Bearer ${tab.apiKey}`;
  return fetch(API + path, { method, headers, signal, body: body && JSON.stringify(body) });
}

// ---- what can go wrong: each error's sentence, which says what to do

const MISFIT = "This page and the service do not fit together. Reload the page.";
const SENTENCES = {
  invalid_api_key: "The API key is missing or unknown. Enter the right one above.",
  session_not_found: "This conversation has ended, or is not yours. Start a new one.",
  session_busy: "An answer is still being written in this conversation. Wait until it has ended.",
  request_timeout: "Your message took too long to arrive. Send it again.",
  body_too_large: "Your message is too long. Send a shorter one.",
  invalid_request: "The service can’t take this as it is. Change what it names and send it again.",
  context_too_long: "This conversation has become too long for the model. Start a new one.",
  content_refused: "The provider’s policy refuses this text. Change your message.",
  rate_limited: "You have asked as often as you may for now. Wait a little, then go on.",
  too_many_streams: "Too many of your answers are open at once. Close one, or wait for its end.",
  upstream_error: "The model’s provider failed. Try again, or choose another model.",
  upstream_incomplete: "The model’s provider broke off the answer. Ask again.",
  upstream_unavailable: "The model’s provider can’t answer now. Try later, or another model.",
  upstream_timeout: "The model was too slow. Try again, or choose another model.",
  internal_error: "The service failed. Report the request id to its operator.",
  overloaded: "The service has its hands full. Try again shortly.",
  shutting_down: "The service is being restarted. Try again shortly.",
  state_unavailable: "The service can’t reach its memory at the moment. Try again shortly.",
  unreachable: "The service can’t be reached. See that it runs and that you are online.",
  cut: "The connection was cut before the answer ended, so it may be incomplete. "
    + "Reload the page to see what the assistant remembers, or ask again.",
  invalid_json: MISFIT, unsupported_media_type: MISFIT, method_not_allowed: MISFIT,
  not_found: MISFIT,
};

/** The end of a request that was answered with a status of its own. */
async function classify_error(response) {
  const told = await response.json().catch(() => null);
  if (told?.error?.code) return told;
  const message = `Something between this page and the service answered ${response.status}.`;
  return { error: { code: "unreachable", message, retryable: true } };
}

/** The end of a request that threw: stopped by hand, or the connection failed. */
function failure(error, response) {
  if (error.name === "AbortError") return { stopped: true };
  const code = response ? "cut" : "unreachable";
  return { id: response?.headers.get("X-Request-ID"), error: { code, retryable: true } };
}

/** Show in `article` what went wrong and what can be done; `retry` then replaces `stale`. */
function showProblem({ id, error }, article, stale, retry) {
  const sentence = SENTENCES[error.code] ?? error.message;
  const box = make("div", { className: "problem" }, make("p", {}, sentence));
  if (error.message) box.append(note(error.message));
  if (id) {
    const shown = make("code", {}, id);
    box.append(note("Request ", shown, copyButton("Copy the request id", shown)));
  }
  const button = make("button", { type: "button" });
  if (["session_not_found", "context_too_long"].includes(error.code)) {
    button.textContent = "Start a new one";
    button.onclick = startAnew;
    box.append(button);
  } else if (error.retryable) {
    button.onclick = () => {
      if (running) return;
      [button, ...stale].forEach((each) => each.remove());
      $("message").focus();
      retry();
    };
    box.append(button);
    countDown(button, Date.now() + 1000 * (error.retry_after ?? 0));
  }
  article.append(box);
  if (error.code === "invalid_api_key") {
    $("access").open = true;
    $("key").focus();
  }
  announce(sentence);
  follow();
}

/** Say on the button how long to wait, by the clock: timers of a hidden tab are slow. */
function countDown(button, until) {
  const left = Math.ceil((until - Date.now()) / 1000);
  button.disabled = left > 0;
  button.textContent = left > 0 ? `Try again in ${left} s` : "Try again";
  if (left > 0) setTimeout(countDown, 250, button, until);
}

// ---- what is shown

function showMessage(role, text, before = null) {
  const name = make("h2", { className: "unseen" }, role === "user" ? "You" : "Assistant");
  const shown = role === "user" ? visible(text) : elements(lines(text));
  const body = make("div", { className: "text" }, shown);
  if (role === "user") body.dir = "auto";
  const article = make("article", { className: role }, name, body);
  $("log").insertBefore(article, before);
  return article;
}

function showNote(text) {
  const article = make("article", {}, note(text));
  $("log").append(article);
  announce(text);
  return article;
}

/** An answer while it arrives. Blocks of Markdown that are finished stay as they are; the open one
 * is drawn anew, at most once a frame and for at most a fourth of the time. */
class Answer {
  constructor() {
    this.article = showMessage("assistant", "");
    this.article.classList.add("waiting");
    this.article.ariaBusy = "true";
    this.text = this.article.lastChild;
    // The text of the open block, its element, and the milliseconds that drawing it took.
    this.source = "";
    this.open = null;
    this.cost = 0;
    this.due = false;
  }

  add(piece) {
    this.source += piece;
    if (this.due) return;
    this.due = true;
    setTimeout(() => requestAnimationFrame(() => this.draw()), 3 * this.cost);
  }

  draw() {
    const began = performance.now();
    const rows = lines(this.source);
    const found = blocks(rows);
    if (found.length) {
      const [first, ...more] = found.map(({ node }) => node);
      if (this.open) this.open = update(this.open, first);
      else this.text.append(this.open = first);
      this.text.append(...more);
      this.open = more.at(-1) ?? this.open;
      this.source = rows.slice(found.at(-1).start).join("\n");
      this.article.classList.remove("waiting");
      follow();
    }
    this.due = false;
    this.cost = performance.now() - began;
  }

  /** Draw what is left and say how it ended; true if there was any text. */
  close(end) {
    this.draw();
    this.article.classList.remove("waiting");
    this.article.ariaBusy = null;
    // With white space between the blocks.
    const said = this.text.innerText.trim();
    if (!end.error) {
      const told = note(end.stopped ? stopped(said) : ending(end, said));
      this.article.append(told);
      // Short answers are read out; a long one is announced, to be read at leisure.
      const long = said.length > 300 && `The answer has ${said.split(/\s+/).length} words.`;
      announce(`${long || said} ${told.textContent}`);
      follow();
    }
    return said !== "";
  }
}

/** Make `old` what `fresh` is and touch only what differs: a scroll, a selection, a click outlive
 * it. What then stands there. */
function update(old, fresh) {
  // A button that says "Copied" goes on doing so.
  if (old.localName === "button" && fresh.localName === "button") return old;
  if (old instanceof Text && fresh instanceof Text) {
    const was = old.data, now = fresh.data;
    let same = 0;
    while (same < was.length && was[same] === now[same]) same++;
    if (was !== now) old.replaceData(same, was.length, now.slice(same));
    return old;
  }
  if (!old.cloneNode().isEqualNode(fresh.cloneNode())) {
    old.replaceWith(fresh);
    return fresh;
  }
  const before = [...old.childNodes], after = [...fresh.childNodes];
  after.forEach((node, i) => before[i] ? update(before[i], node) : old.append(node));
  before.slice(after.length).forEach((node) => node.remove());
  return old;
}

function stopped(said) {
  return said ? "Stopped. The assistant remembers what it said." : "Stopped before the first word.";
}

/** What a `done` event tells a person. */
function ending({ model, usage, finish_reason: reason }, said) {
  return [
    said ? "" : "The model ended without a word",
    model,
    usage?.total_tokens ? `${usage.total_tokens} tokens` : "",
    reason === "length" ? "cut at the length that is allowed" : "",
    reason === "content_filter" ? "cut by the provider’s filter" : "",
    model.startsWith("mock/") ? "a mock: no model is behind it" : "",
  ].filter(Boolean).join(" · ");
}

function refresh() {
  $("stop").hidden = !running;
  $("send").disabled = Boolean(running);
  $("delete").disabled = Boolean(running) || !tab.session;
  $("about").hidden = $("log").querySelector("article") !== null;
}

// New text is followed until the reader scrolls up, by however little, and again from near the end:
// it may have moved on while the reader went there.
let following = true, wasAt = 0;
document.onscroll = () => {
  const { scrollHeight, clientHeight, scrollTop } = document.documentElement;
  const left = scrollHeight - clientHeight - scrollTop;
  following = left < (scrollTop < wasAt ? 2 : clientHeight / 4);
  wasAt = scrollTop;
};
function follow(anyway = false) {
  following ||= anyway;
  if (!following) return;
  const page = document.documentElement;
  page.scrollTop = page.scrollHeight;
  wasAt = page.scrollTop;
}

/** Have a screen reader say it. */
function announce(text) {
  $("status").textContent = text;
}

// ---- Markdown, as models write it: built from elements and text nodes, never from HTML

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^\s`]*)/;
const HEADING = /^ {0,3}(#{1,6}) +(.*)/;
const RULE = /^ {0,3}([-*_])(?: *\1){2,} *$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)]) +(?=\S)/;
const COLUMN = /^:?-+:?$/;
const ALIGNED = { ":-": "left", "-:": "right", ":-:": "center" };
const BEGINS = [FENCE, HEADING, RULE, QUOTE, ITEM];
// Deeper than anybody writes: a hostile answer must not exhaust the stack.
const MAX_DEPTH = 8;
// Longer than any paragraph: there no markup is looked for, which may take more than linear time.
const MAX_PARAGRAPH = 20000;
// More than in any honest table: so many cells beyond its letters, and what follows is text. Else a
// thousand columns would make a thousand cells of each letter.
const MAX_EMPTY = 2000;

/** Without what reverses the order of letters or hides among them: no honest answer needs it. */
const visible = (text) => text.replace(/[\u202a-\u202e\u2066-\u2069\u{e0000}-\u{e007f}]/gu, "");
const lines = (text) => visible(text).split("\n");
const elements = (rows, depth) => blocks(rows, depth).map(({ node }) => node);
const begins = (row) => BEGINS.some((pattern) => pattern.test(row));

/** The blocks of some lines: the element of each, and the line where it starts. */
function blocks(rows, depth = 0) {
  const found = [];
  for (let i = 0; i < rows.length;) {
    const start = i, row = rows[i++];
    if (!row.trim()) continue;
    let node, match;
    if ((match = row.match(FENCE))) {
      const closes = (each) => /^\s*(`+|~+)\s*$/.test(each) && each.trim().startsWith(match[1]);
      while (i < rows.length && !closes(rows[i])) i++;
      node = codeBlock(rows.slice(start + 1, i++).join("\n"), match[2] || "code");
    } else if ((match = row.match(HEADING))) {
      // h1 is the page's, h2 says who speaks.
      node = make(`h${Math.min(match[1].length + 2, 6)}`, {}, inline(match[2]));
    } else if (RULE.test(row)) {
      node = make("hr");
    } else if (depth < MAX_DEPTH && QUOTE.test(row)) {
      while (i < rows.length && QUOTE.test(rows[i])) i++;
      const inner = rows.slice(start, i).map((each) => each.replace(QUOTE, ""));
      node = make("blockquote", {}, elements(inner, depth + 1));
    } else if (depth < MAX_DEPTH && ITEM.test(row)) {
      [node, i] = list(rows, start, depth);
    } else if ((match = columns(rows, start))) {
      let room = MAX_EMPTY;
      const fits = (row) => (room -= Math.max(match.length - row.length, 0)) >= 0;
      while (rows[i]?.trim() && !begins(rows[i]) && fits(rows[i])) i++;
      node = table(rows.slice(start, i), match);
    } else {
      while (rows[i]?.trim() && !begins(rows[i]) && !columns(rows, i)) i++;
      node = make("p", {}, inline(rows.slice(start, i).join("\n")));
    }
    // The direction of a block is that of its first letter, Arabic or Latin.
    if (!depth) node.dir = "auto";
    found.push({ start, node });
  }
  return found;
}

/** The list that starts at line `i`, and the line behind it. */
function list(rows, i, depth) {
  const [, { length: base }, first] = rows[i].match(ITEM);
  const ordered = first.length > 1;
  const items = [];
  let width = 0;
  const continues = (row) => row.search(/\S/) >= base + 2 || begun(row);
  const begun = (row) => {
    const match = row.match(ITEM);
    return match && match[1].length < base + 2 && match[2].length > 1 === ordered ? match : null;
  };
  for (; i < rows.length; i++) {
    const row = rows[i], match = begun(row);
    if (match) {
      width = match[0].length;
      items.push([row.slice(width)]);
    } else if (row.trim() ? continues(row) || (rows[i - 1].trim() && !begins(row))
      : continues(rows[i + 1] ?? "")) {
      items.at(-1).push(row.slice(Math.min(width, Math.max(row.search(/\S/), 0))));
    } else break;
  }
  const shown = items.map((item) => make("li", {}, elements(item, depth + 1)));
  return [ordered ? make("ol", { start: parseInt(first, 10) }, shown) : make("ul", {}, shown), i];
}

/** The cells of a row. A bar behind a backslash parts none, not even in code. */
function cells(row) {
  const inner = row.trim().replace(/^\||(?<!\\)\|$/g, "");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

/** Where a table starts at line `i`: what its second line says of each column. Else null. */
function columns(rows, i) {
  const row = rows[i + 1] ?? "";
  if (!/^[\s|:-]+$/.test(row) || !/[|:]/.test(row) || begins(row)) return null;
  const found = cells(row);
  const fits = found.length === cells(rows[i]).length && found.every((cell) => COLUMN.test(cell));
  return fits ? found : null;
}

/** A table; as on GitHub each row gets as many cells as the first, and what is more is left out. */
function table([head, , ...body], marks) {
  const aligned = marks.map((mark) => ALIGNED[mark.replace(/-+/, "-")] ?? "");
  const line = (row, name, properties) => {
    const found = cells(row);
    return make("tr", {}, aligned.map((side, column) => {
      // An empty cell is no header: it would name nothing.
      const cell = found[column] ? make(name, properties, inline(found[column])) : make("td");
      cell.style.textAlign = side;
      return cell;
    }));
  };
  const shown = make("table", {}, make("thead", {}, line(head, "th", { scope: "col" })),
    make("tbody", {}, body.map((row) => line(row, "td", {}))));
  // Focusable, as code is.
  return make("div", { className: "table", tabIndex: 0, role: "group", ariaLabel: "Table" }, shown);
}

function codeBlock(text, language) {
  const code = make("code", {}, text);
  // Focusable, so that the keyboard can scroll it.
  const pre = make("pre", { dir: "ltr", tabIndex: 0, role: "group", ariaLabel: language }, code);
  const copy = copyButton("Copy the code", code);
  // Named as well, so that `update` never leaves the button with code that was replaced.
  return make("figure", { ariaLabel: language }, make("figcaption", {}, language, copy), pre);
}

const INLINE = new RegExp([
  /\\(?<plain>[!-\/:-@[-`{-~])/,
  /(?<!`)``(?!`)(?<ticks>(?:[^`]|`(?!`))+)``(?!`)/,
  /(?<!`)`(?<code>[^`]+)`(?!`)/,
  /\*\*(?!\s)(?<bold>(?:[^*]|\*[^*]+\*)+)\*\*/,
  /\*(?![\s*])(?<italic>[^*]*[^*\s])\*/,
  /(?<!\w)_(?![\s_])(?<leaning>[^_]*[^_\s])_(?!\w)/,
  /!?\[(?<label>[^\[\]]*)\]\(<?(?<target>(?:[^()\s<>]|\([^()\s]*\))+)>?[^()]*\)/,
  /(?<wrap><br *\/?>)/,
  /(?<url>https?:\/\/[^\s<>`*]*[^\s<>`*.,;:!?)"'\]])/,
].map((part) => part.source).join("|"), "g");

/** Strings and elements for one run of text. Inside a link there are no links. */
function inline(text, links = true) {
  if (text.length > MAX_PARAGRAPH) return [text];
  const parts = [];
  let from = 0;
  for (const match of text.matchAll(INLINE)) {
    const { plain, ticks, code, bold, italic, leaning, label, target, wrap, url } =
      match.groups;
    parts.push(text.slice(from, match.index));
    from = match.index + match[0].length;
    if (plain) parts.push(plain);
    // The one piece of HTML that models write: there is no other way to a new line in a cell.
    else if (wrap) parts.push(make("br"));
    else if (ticks ?? code) parts.push(make("code", {}, (ticks ?? code).trim()));
    else if (bold) parts.push(make("strong", {}, inline(bold, links)));
    else if (italic ?? leaning) parts.push(make("em", {}, inline(italic ?? leaning, links)));
    else parts.push((links && link(label, target ?? url)) || match[0]);
  }
  parts.push(text.slice(from));
  return parts;
}

/** A link, also to an image: nothing is loaded unasked. Null where it leads to what could run. */
function link(label, target) {
  const url = URL.parse(target);
  if (!["http:", "https:", "mailto:"].includes(url?.protocol)) return null;
  const where = { href: url.href, title: url.href, target: "_blank", rel: "noopener noreferrer" };
  return make("a", where, label ? inline(label, false) : target);
}

// ---- small things

function make(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  // One by one: a call takes fewer arguments than an answer may have lines.
  for (const child of children.flat()) element.append(child);
  return element;
}

function note(...children) {
  return make("p", { className: "note" }, ...children);
}

/** Copies the text of `node`; where the browser refuses, as it does over plain HTTP, selects it. */
function copyButton(label, node) {
  const button = make("button", { type: "button", ariaLabel: label }, "Copy");
  button.onclick = async () => {
    try {
      await navigator.clipboard.writeText(node.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(node);
      button.textContent = "Selected";
    }
    announce(button.textContent);
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  };
  return button;
}

// ---- and go

$("key").value = tab.apiKey ?? "";
loadModels();
if (tab.session) restore();
refresh();
