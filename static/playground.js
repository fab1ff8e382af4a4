/** The playground: conversations with the service, in plain JavaScript. */

import { describe, interruption, readError, readEvents, request } from "./client.js";
import { listConversations, removeConversation, saveConversation } from "./conversations.js";
import { $, announce, button, copyButton, make, note, visible } from "./dom.js";
import { MarkdownView } from "./markdown.js";

// Kept as long as the tab: session, apiKey, model, otherModel, streaming.
let tab = {};
try { tab = sessionStorage; } catch { /* Without storage a reload starts a new conversation. */ }
// The conversation on screen: its id and title, and how the responses begin that the user stopped.
let conversation = {};
// The AbortController of the response that is arriving.
let running = null;
// The error on screen: there is at most one.
let problem = null;

// ---- Controls

$("composer").onsubmit = (event) => {
  event.preventDefault();
  const message = $("message").value.trim();
  if (running || !message) return;
  $("message").value = "";
  $("message").focus();
  send(message);
};
$("message").onkeydown = (event) => {
  // Enter also confirms a word in an input method. On a touch keyboard it is the only new line.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  if (matchMedia("(pointer: coarse)").matches) return;
  event.preventDefault();
  $("composer").requestSubmit();
};
// The composer grows with its text and would cover the end of the conversation.
$("message").oninput = () => follow();
document.onkeydown = (event) => {
  // Escape closes an open panel first. The browser does that.
  if (event.key !== "Escape" || event.isComposing) return;
  if (!document.querySelector(":popover-open")) running?.abort();
};
$("stop").onclick = () => {
  running?.abort();
  $("message").focus();
};
$("new").onclick = () => show({});
$("latest").onclick = () => {
  follow(true);
  $("message").focus();
};
$("access").onsubmit = (event) => {
  event.preventDefault();
  tab.apiKey = $("key").value.trim();
  $("access").hidePopover();
};
$("model").onchange = () => {
  tab.model = $("model").value;
  $("other").hidden = tab.model !== "other";
  if (!$("other").hidden) $("other").focus();
};
$("other").oninput = () => { tab.otherModel = $("other").value; };
// Another tab has changed the list.
addEventListener("storage", showList);

// ---- Conversations

/** Send a message and show the response as it arrives. */
async function send(message) {
  dismissProblem();
  const mine = conversation, controller = running = new AbortController();
  const question = showMessage("user", message), view = new ResponseView();
  const model = $("model").value === "other" ? $("other").value.trim() : $("model").value;
  const body = { message, model_id: model || null, session_id: mine.id ?? null };
  tab.streaming = "yes";
  refresh();
  follow(true);
  let end, response;
  try {
    response = await call("POST", "chat", body, controller.signal);
    if (response.ok) {
      remember(mine, { id: response.headers.get("X-Session-ID"), title: mine.title ?? title(message) });
      for await (const event of readEvents(response)) {
        if (event.status) end = event;
        else view.add(event);
      }
    } else end = await readError(response);
  } catch (exception) {
    end = interruption(exception, response);
  }
  if (end.status === "stopped" && view.source) {
    remember(mine, { stopped: [...(mine.stopped ?? []), beginning(view.source)] });
  }
  // The user may have opened another conversation meanwhile.
  if (mine !== conversation) return;
  running = null;
  delete tab.streaming;
  view.finish(end);
  if (end.history_trimmed && !mine.trimmed) {
    remember(mine, { trimmed: true });
    view.article.append(note("Older messages no longer fit and have left the conversation."));
  }
  const withdraw = () => {
    dismissProblem();
    if (!view.source) [question, view.article].forEach((article) => article.remove());
    $("message").focus();
  };
  const retry = () => { withdraw(); send(message); };
  const edit = () => { withdraw(); $("message").value = message; };
  if (end.error) showProblem(end, view.article, retry, edit);
  refresh();
}

/** Show another conversation: a stored one, or `{}` for a new one. */
function show(chosen) {
  running?.abort();
  running = problem = null;
  conversation = chosen;
  delete tab.streaming;
  delete tab.session;
  if (chosen.id) tab.session = chosen.id;
  $("log").querySelectorAll("article").forEach((article) => article.remove());
  $("conversations").hidePopover();
  $("message").focus();
  refresh();
  showList();
  if (chosen.id) restore();
}

/** Show the messages that the service has stored. */
async function restore() {
  const mine = conversation;
  // A reload has interrupted a response. The service stores it once it notices.
  if (tab.streaming) await new Promise((resolve) => setTimeout(resolve, 500));
  delete tab.streaming;
  if (mine !== conversation) return;
  const end = await callSession("GET", mine.id);
  if (mine !== conversation) return;
  if (end.error?.code === "session_not_found") {
    removeConversation(mine.id);
    show({});
    showArticle("", null, note(describe(end.error), " This is a new one."));
    announce(describe(end.error));
  } else if (end.error) {
    const article = showArticle();
    showProblem(end, article, () => { article.remove(); restore(); });
  } else {
    const next = $("log").querySelector("article");
    for (const { role, content, complete } of end.messages) {
      if (role === "user") showMessage(role, content, next);
      else new ResponseView(next).restore(content, complete);
    }
  }
  refresh();
  follow(true);
}

async function deleteConversation(chosen) {
  if (!confirm(`Delete “${chosen.title}”? The service forgets it for good.`)) return;
  const end = await callSession("DELETE", chosen.id);
  if (end.error && end.error.code !== "session_not_found") {
    const article = showArticle();
    showProblem(end, article, () => { article.remove(); deleteConversation(chosen); });
    $("conversations").hidePopover();
  } else {
    removeConversation(chosen.id);
    if (chosen.id === conversation.id) show({});
    showList();
    $("conversations").focus();
    announce("The conversation is deleted.");
  }
}

/** Note something about a conversation, and put it first in the list. */
function remember(chosen, changes) {
  saveConversation(Object.assign(chosen, changes));
  if (chosen === conversation) tab.session = chosen.id;
  showList();
}

const title = (message) => message.slice(0, 80);
// Enough of a response to recognise it after a reload.
const beginning = (text) => text.slice(0, 200);

function call(method, path, body, signal) {
  return request(method, path, { apiKey: tab.apiKey, body, signal });
}

/** Return the response to GET or DELETE of a session, or an error. */
async function callSession(method, id) {
  try {
    const response = await call(method, `sessions/${id}`);
    if (!response.ok) return await readError(response);
    return response.status === 204 ? {} : await response.json();
  } catch (exception) {
    return interruption(exception);
  }
}

async function loadModels() {
  const found = await call("GET", "models").then((response) => response.json()).catch(() => null);
  if (!found?.models) return;
  // A glob allows models that the service cannot list. The user types their ids.
  const all = new Set([found.default, ...found.models]);
  const ids = [...all].filter((id) => !/[*?[]/.test(id));
  const options = ids.map((id) => make("option", { value: id }, id));
  $("model").replaceChildren(...options, make("option", { value: "other" }, "Other model …"));
  if ([...ids, "other"].includes(tab.model)) $("model").value = tab.model;
  $("other").value = tab.otherModel ?? "";
  $("other").hidden = $("model").value !== "other";
}

// ---- Errors

/** Show an error in `article`: one sentence, one action, and the details for a report. */
function showProblem({ id, error }, article, retry, edit) {
  dismissProblem();
  const sentence = describe(error);
  const details = note([error.code, id && `request ${id}`].filter(Boolean).join(" · "));
  const copy = { label: "Copy the request id", node: details, text: id };
  const action = createAction(error, retry, edit) ?? copyButton(copy.label, copy);
  problem = make("div", { className: "problem" }, make("p", {}, sentence), action, details);
  article.append(problem);
  problem.querySelector("input")?.focus();
  announce(sentence);
  follow();
}

/** Reduce the error on screen to its sentence: what could be done about it is done or outdated. */
function dismissProblem() {
  problem?.replaceWith(note(problem.firstChild.textContent));
  problem = null;
}

function createAction({ code, retryable, retry_after: wait }, retry, edit) {
  if (code === "invalid_api_key") return keyForm(retry);
  if (["session_not_found", "context_too_long"].includes(code)) {
    return button("New conversation", () => {
      edit();
      show({});
    });
  }
  if (retryable) return countDown(button("", retry), Date.now() + 1000 * (wait ?? 0));
  if (["invalid_request", "body_too_large", "content_refused"].includes(code)) {
    return button("Edit the message", edit);
  }
  return null;
}

function keyForm(retry) {
  const input = $("key").cloneNode();
  input.removeAttribute("id");
  input.ariaLabel = "API key";
  input.value = tab.apiKey ?? "";
  const onsubmit = (event) => {
    event.preventDefault();
    tab.apiKey = $("key").value = input.value.trim();
    retry();
  };
  return make("form", { onsubmit }, input, make("button", {}, "Use this key"));
}

/** Show the seconds left on a button. It uses the clock: timers in a hidden tab are slow. */
function countDown(retry, until) {
  const left = Math.ceil((until - Date.now()) / 1000);
  retry.disabled = left > 0;
  retry.textContent = left > 0 ? `Try again in ${left} s` : "Try again";
  if (left > 0) setTimeout(countDown, 250, retry, until);
  return retry;
}

// ---- The screen

function showArticle(className = "", before = null, ...children) {
  const article = make("article", { className }, ...children);
  $("log").insertBefore(article, before);
  return article;
}

function showMessage(role, text, before) {
  const name = make("h2", { className: "unseen" }, role === "user" ? "You" : "Assistant");
  const body = make("div", { className: "text" }, visible(text));
  if (role === "user") body.dir = "auto";
  return showArticle(role, before, name, body);
}

/** A response on screen. */
class ResponseView {
  constructor(before) {
    this.article = showMessage("assistant", "", before);
    this.body = this.article.lastChild;
    this.markdown = new MarkdownView(this.body);
    this.source = "";
    this.scheduled = false;
    this.cost = 0;
    if (!before) this.article.classList.add("waiting");
  }

  add({ chunk = "", reasoning = "" }) {
    if (reasoning) this.addReasoning(reasoning);
    this.source += chunk;
    this.markdown.append(chunk);
    this.article.ariaBusy = "true";
    if (this.scheduled) return;
    this.scheduled = true;
    // Draw at most once a frame, and at most a quarter of the time.
    setTimeout(() => requestAnimationFrame(() => this.draw()), 3 * this.cost);
  }

  addReasoning(text) {
    if (!this.reasoning) {
      this.reasoning = make("div");
      this.body.before(make("details", {}, make("summary", {}, "Reasoning"), this.reasoning));
    }
    this.reasoning.append(visible(text));
  }

  draw() {
    const start = performance.now();
    this.markdown.draw();
    this.article.classList.toggle("waiting", !this.body.firstChild);
    follow();
    this.scheduled = false;
    this.cost = performance.now() - start;
  }

  /** Show the rest of the text, and how the response ended. */
  finish(end) {
    this.markdown.end();
    this.article.classList.remove("waiting");
    this.article.ariaBusy = null;
    if (!end.error) {
      const ending = end.status === "stopped" ? "Stopped." : describeEnd(end, this.source);
      this.addFooter(ending);
      // Screen readers read a short response aloud. innerText has white space between blocks.
      const text = this.body.innerText.trim();
      const long = text.length > 300 && `The response has ${text.split(/\s+/).length} words.`;
      announce(`${long || text} ${ending}`);
    }
    follow();
  }

  /** Show a stored response. */
  restore(content, complete) {
    this.source = content;
    this.markdown.append(content);
    this.markdown.end();
    this.article.classList.remove("waiting");
    const stopped = conversation.stopped?.includes(beginning(content));
    this.addFooter(complete ? "" : stopped ? "Stopped." : "Interrupted.");
  }

  addFooter(ending) {
    const footer = make("footer", {}, note(ending));
    const { body: node, source: text } = this;
    if (text) footer.append(copyButton("Copy the response", { node, text }));
    this.article.append(footer);
  }
}

/** Describe a `done` event in one line. */
function describeEnd({ model, usage, finish_reason: reason }, text) {
  return [
    text.trim() ? "" : "The model returned no text",
    model,
    usage?.total_tokens ? `${usage.total_tokens} tokens` : "",
    reason === "length" ? "reached the output limit" : "",
    reason === "content_filter" ? "ended by the provider’s content filter" : "",
    model.startsWith("mock/") ? "simulated, without a model" : "",
  ].filter(Boolean).join(" · ");
}

function refresh() {
  $("stop").hidden = !running;
  $("send").hidden = Boolean(running);
  $("about").hidden = $("log").querySelector("article") !== null;
}

function showList() {
  const stored = listConversations();
  $("stored").replaceChildren(...stored.map((each) => {
    const open = button(each.title, () => show(each), { title: each.title, dir: "auto" });
    open.ariaCurrent = each.id === conversation.id ? "true" : null;
    const name = `Delete “${each.title}”`;
    const remove = button("×", () => deleteConversation(each), { ariaLabel: name, title: name });
    return make("li", {}, open, remove);
  }));
  $("none").hidden = stored.length > 0;
}

// New text is followed until the user scrolls up, and again once the user is near the end: it may
// have moved on meanwhile.
let following = true, lastTop = 0;
document.onscroll = () => {
  const { scrollHeight, clientHeight, scrollTop } = document.documentElement;
  const below = scrollHeight - clientHeight - scrollTop;
  following = below < (scrollTop < lastTop ? 2 : clientHeight / 4);
  lastTop = scrollTop;
  $("latest").hidden = following;
};

function follow(always = false) {
  following ||= always;
  if (!following) return;
  const page = document.documentElement;
  page.scrollTop = page.scrollHeight;
  lastTop = page.scrollTop;
}

// ---- Start

$("key").value = tab.apiKey ?? "";
loadModels();
if (tab.session) {
  conversation = listConversations().find(({ id }) => id === tab.session) ?? { id: tab.session };
  restore();
}
refresh();
showList();
