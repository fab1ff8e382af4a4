/** The turns of a conversation on screen: a message of the user and its response. */

import { $, announce, copyButton, make, note, visible } from "./dom.js";
import { MarkdownView } from "./markdown.js";
import { follow } from "./scroll.js";

/** Add an article to the conversation, at its end or before another. */
export function showArticle(className = "", before = null, ...children) {
  const article = make("article", { className }, ...children);
  $("log").insertBefore(article, before);
  return article;
}

/** A message and its response on screen. */
export class Turn {
  constructor(message, before) {
    this.message = message;
    const text = make("div", { className: "text", dir: "auto" }, visible(message));
    const name = (who) => make("h2", { className: "unseen" }, who);
    this.question = showArticle("user", before, name("You"), text);
    this.body = make("div", { className: "text" });
    this.article = showArticle("assistant waiting", before, name("Assistant"), this.body);
    this.markdown = new MarkdownView(this.body);
    this.source = "";
    this.scheduled = false;
    this.cost = 0;
  }

  hide(hidden) {
    this.question.hidden = this.article.hidden = hidden;
  }

  remove() {
    this.question.remove();
    this.article.remove();
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
      const body = make("div", { className: "text" });
      this.body.before(make("details", {}, make("summary", {}, "Reasoning"), body));
      this.reasoning = new MarkdownView(body);
    }
    this.reasoning.append(text);
  }

  draw() {
    // The response has ended since the draw was scheduled.
    if (this.footer) return;
    const start = performance.now();
    this.reasoning?.draw();
    this.markdown.draw();
    this.article.classList.toggle("waiting", !this.body.firstChild);
    follow();
    this.scheduled = false;
    this.cost = performance.now() - start;
  }

  /** Show the rest of the text, and how the response ended. */
  finish(end) {
    const ending = end.status === "stopped" ? "Stopped." : end.error ? "" : describeEnd(end, this);
    this.complete(ending);
    if (!end.error) {
      // Screen readers read a short response aloud. innerText has white space between blocks.
      const words = this.source.trim().split(/\s+/).length;
      const text = words > 50 ? `The response has ${words} words.` : this.body.innerText;
      announce(`${text} ${ending}`);
    }
    follow();
  }

  /** Show a stored response. */
  restore(content, ending) {
    this.source = content;
    this.markdown.append(content);
    this.complete(ending);
  }

  complete(ending) {
    this.reasoning?.end();
    this.markdown.end();
    this.article.classList.remove("waiting");
    this.article.ariaBusy = null;
    this.footer = make("footer", {}, ending ? note(ending) : []);
    const { body: node, source: text } = this;
    if (text) this.footer.append(copyButton("Copy the response", { node, text }));
    this.article.append(this.footer);
  }
}

/** Describe a `done` event in one line. */
function describeEnd({ model, usage, finish_reason: reason }, { source }) {
  return [
    source.trim() ? "" : "The model returned no text",
    model,
    usage?.total_tokens ? `${usage.total_tokens} tokens` : "",
    reason === "length" ? "reached the output limit" : "",
    reason === "content_filter" ? "ended by the provider’s content filter" : "",
    model?.startsWith("mock/") ? "simulated, without a model" : "",
  ].filter(Boolean).join(" · ");
}
