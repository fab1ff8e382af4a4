/** The playground: conversations with the service, in plain JavaScript. */

import { connectionError, describe, readError, readEvents, request } from "./client.js";
import { listConversations, removeConversation, saveConversation } from "./conversations.js";
import { $, announce, button, copyButton, make, note } from "./dom.js";
import { follow } from "./scroll.js";
import { showArticle, Turn } from "./turn.js";

// Kept as long as the tab: session, apiKey, model, otherModel, and, while its response arrives, the
// message (streaming).
let tab = {};
try { tab = sessionStorage; } catch { /* Without storage a reload starts a new conversation. */ }
// The conversation on screen: its id and title, and how the responses begin that the user stopped.
let conversation = {};
// The turn on screen that a new one can replace, and whether the message in the composer does that.
let lastTurn = null, editing = false;
// The AbortController of the response that is arriving.
let running = null;
// The error on screen: there is at most one.
let problem = null;

// ---- Controls

$("composer").onsubmit = (event) => {
  event.preventDefault();
  const message = $("message").value.trim();
  if (running || !message) return;
  compose("");
  send(message, editing);
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
  if (!document.querySelector(":popover-open")) stop();
};
$("stop").onclick = () => {
  stop();
  $("message").focus();
};
$("cancel").onclick = () => {
  editing = false;
  compose("");
  refresh();
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

function compose(text) {
  $("message").value = text;
  $("message").focus();
}

// ---- Requests

const call = (method, path, body, key) =>
  request(method, path, { apiKey: tab.apiKey, body, key });

/** Return the response to GET or DELETE of a session or its stream, or an error. */
async function callSession(method, path) {
  try {
    const response = await call(method, `sessions/${path}`);
    if (!response.ok) return await readError(response);
    return response.status === 204 ? {} : await response.json();
  } catch {
    return connectionError();
  }
}

/** Send a message and show the response. With `replace`, the new turn replaces the last one. */
async function send(message, replace = false) {
  dismissProblem();
  const mine = conversation, turn = new Turn(message), replaced = replace ? lastTurn : null;
  replaced?.hide(true);
  editing = false;
  lastTurn = null;
  tab.streaming = message;
  const model = $("model").value === "other" ? $("other").value.trim() : $("model").value;
  const body = {
    message, model_id: model || null, session_id: mine.id ?? null,
    include_reasoning: true, replace_last_turn: replace,
  };
  const key = crypto.getRandomValues(new Uint8Array(16)).join("-");
  const end = await receive(turn, call("POST", "chat", body, key));
  // Meanwhile the user may have opened another conversation.
  if (mine !== conversation) return;
  // The service stores a turn that has text. Only a complete or stopped one replaces another.
  const stored = turn.source.trim() !== "" && !(replace && end.error);
  if (stored) replaced?.remove();
  else replaced?.hide(false);
  lastTurn = stored ? turn : replaced;
  if (end.error) {
    const again = (next) => () => {
      dismissProblem();
      if (!stored) turn.remove();
      next();
    };
    showProblem(end, turn.article, {
      retry: again(() => send(message, replace || stored)),
      edit: again(() => {
        editing = replace;
        compose(message);
        refresh();
      }),
      resume: () => show(mine, message),
    });
  }
  refresh();
}

/** Show the events of a stream as they arrive. Return the terminal one. */
async function receive(turn, opening) {
  const mine = conversation, controller = running = new AbortController();
  const aborted = new Promise((_, reject) => { controller.signal.onabort = reject; });
  refresh();
  follow(true);
  let end, response;
  try {
    response = await Promise.race([opening, aborted]);
    if (response.ok) {
      const id = response.headers.get("X-Session-ID");
      remember(mine, { id, title: mine.title ?? turn.message.slice(0, 80) });
      for await (const event of readEvents(response, controller.signal)) {
        if (event.status) end = event;
        else turn.add(event);
      }
    } else end = await readError(response);
  } catch {
    end = controller.signal.aborted ? { status: "stopped" } : connectionError(response);
    // The id of a new session is not known before the response begins.
    if (!response && !mine.id) {
      opening.then((late) => stopStream(late.headers.get("X-Session-ID"))).catch(() => {});
    }
  }
  if (end.status === "stopped" && turn.source) {
    remember(mine, { stopped: [...(mine.stopped ?? []), beginning(turn.source)] });
  }
  if (mine !== conversation) return end;
  running = null;
  if (end.error?.code !== "connection_lost") delete tab.streaming;
  turn.finish(end);
  if (end.history_trimmed && !mine.trimmed) {
    remember(mine, { trimmed: true });
    turn.article.append(note("Older messages no longer fit and have left the conversation."));
  }
  return end;
}

async function stop() {
  const stopped = running;
  // After the response to DELETE, the text is stored and the session is free.
  if (stopped && conversation.id) await stopStream(conversation.id);
  stopped?.abort();
}

const stopStream = (id) => callSession("DELETE", `${id}/stream`);

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

// ---- Conversations

/** Show a conversation: a stored one, or `{}` for a new one. */
function show(chosen, streaming) {
  stop();
  running = problem = lastTurn = null;
  editing = false;
  conversation = chosen;
  delete tab.streaming;
  delete tab.session;
  if (streaming) tab.streaming = streaming;
  if (chosen.id) tab.session = chosen.id;
  $("log").querySelectorAll("article").forEach((article) => article.remove());
  $("conversations").hidePopover();
  $("message").focus();
  refresh();
  showList();
  if (chosen.id) restore();
}

/** Show the turns that the service has stored, and the response that was arriving. */
async function restore() {
  const mine = conversation, message = tab.streaming;
  const stream = message && await call("GET", `sessions/${mine.id}/stream`).catch(() => null);
  const resumes = stream?.status === 200;
  // Without resumable streams the service stores the text when it notices the disconnect.
  if (message && !resumes) await new Promise((resolve) => setTimeout(resolve, 500));
  const end = await callSession("GET", mine.id);
  if (mine !== conversation) return;
  if (end.messages) {
    const next = $("log").querySelector("article");
    let turn = null;
    for (const { role, content, complete } of end.messages) {
      const stopped = mine.stopped?.includes(beginning(content));
      if (role === "user") turn = new Turn(content, next);
      else turn.restore(content, complete ? "" : stopped ? "Stopped." : "Interrupted.");
    }
    if (!next) lastTurn = turn;
  }
  if (resumes && !running) {
    // The first response of a session is running: the session is not stored yet.
    await receive(new Turn(message), Promise.resolve(stream));
    if (mine === conversation) show(mine, tab.streaming);
  } else if (end.error?.code === "session_not_found") {
    removeConversation(mine.id);
    show({});
    showArticle("", null, note(describe(end.error), " This is a new one."));
    announce(describe(end.error));
  } else if (end.error) {
    showProblem(end, showArticle(), { retry: () => show(mine, message) });
  } else delete tab.streaming;
  refresh();
  follow(true);
}

async function deleteConversation(chosen) {
  if (!confirm(`Delete “${chosen.title}”? The service forgets it for good.`)) return;
  const end = await callSession("DELETE", chosen.id);
  if (end.error && end.error.code !== "session_not_found") {
    $("conversations").hidePopover();
    const article = showArticle();
    showProblem(end, article, { retry: () => { article.remove(); deleteConversation(chosen); } });
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

// Enough of a response to recognise it after a reload.
const beginning = (text) => text.slice(0, 200);

// ---- Errors

/** Show an error in `article`: one sentence, one action, and the details for a report. */
function showProblem({ id, error }, article, actions) {
  dismissProblem();
  const sentence = describe(error);
  const details = note([error.code, id && `request ${id}`].filter(Boolean).join(" · "));
  const copy = { label: "Copy the request id", node: details, text: id };
  const action = createAction(error, actions) ?? copyButton(copy.label, copy);
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

function createAction({ code, retryable, retry_after: wait }, { retry, edit, resume }) {
  if (code === "invalid_api_key") return keyForm(retry);
  if (code === "connection_lost") return button("Resume", resume);
  if (code === "session_not_found") {
    return button("New conversation", () => {
      edit();
      show({});
    });
  }
  if (retryable) return countDown(button("", retry), Date.now() + 1000 * (wait ?? 0));
  const editable = ["invalid_request", "body_too_large", "content_refused", "context_too_long"];
  return edit && editable.includes(code) ? button("Edit the message", edit) : null;
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

/** Show the controls that fit the state: running or not, editing or not. */
function refresh() {
  $("stop").hidden = !running;
  $("send").hidden = Boolean(running);
  $("editing").hidden = !editing;
  $("about").hidden = $("log").querySelector("article") !== null;
  document.querySelectorAll(".redo").forEach((each) => each.remove());
  if (!lastTurn || running || problem) return;
  const { message, footer } = lastTurn;
  const edit = () => {
    editing = true;
    compose(message);
    refresh();
  };
  const regenerate = () => send(message, true);
  footer.append(button("Edit", edit, { className: "redo", title: "Edit your message" }));
  footer.append(button("Regenerate", regenerate, { className: "redo" }));
}

function showList() {
  const stored = listConversations();
  $("stored").replaceChildren(...stored.map((each) => {
    const isShown = each.id === conversation.id;
    const choose = () => (isShown ? $("conversations").hidePopover() : show(each));
    const open = button(each.title, choose, { title: each.title, dir: "auto" });
    open.ariaCurrent = isShown ? "true" : null;
    const name = `Delete “${each.title}”`;
    const remove = button("×", () => deleteConversation(each), { ariaLabel: name, title: name });
    return make("li", {}, open, remove);
  }));
  $("none").hidden = stored.length > 0;
}

// ---- Start

$("key").value = tab.apiKey ?? "";
loadModels();
showList();
if (tab.session) {
  conversation = listConversations().find(({ id }) => id === tab.session) ?? { id: tab.session };
  restore();
}
refresh();
