// Send a message and print the response as it arrives. Needs Node 18 or newer and no packages.

import { setTimeout as sleep } from "node:timers/promises";

const { CHAT_URL = "http://127.0.0.1:8000", CHAT_MESSAGE = "Hello", CHAT_MODEL } = process.env;
// Without a model id, the service uses its default model.
const body = JSON.stringify({ message: CHAT_MESSAGE, model_id: CHAT_MODEL ?? null });
// Aborting closes the connection, and the service cancels the request to the model.
const abort = new AbortController();
process.once("SIGINT", () => abort.abort("Stopped"));
// A heartbeat arrives every 15 s, so a connection that is silent for a minute is dead.
const silence = Number(process.env.CHAT_SILENCE_SECONDS ?? 60) * 1000;
let failure;

async function* readEvents(response, timer) {
  let rest = "";
  for await (const text of response.body.pipeThrough(new TextDecoderStream())) {
    timer.refresh();
    const lines = (rest + text).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data: ")) yield JSON.parse(line.slice(6));
  }
}

// Return the terminal event, or the body of an error response. Both can have an `error`.
async function chat() {
  failure = "Cannot connect to the service";
  const timer = setTimeout(() => abort.abort("The connection was lost: silence"), silence);
  try {
    const headers = { "Content-Type": "application/json" };
    const options = { method: "POST", headers, body, signal: abort.signal };
    const response = await fetch(`${CHAT_URL}/api/v1/chat`, options);
    failure = "The connection was lost";
    if (!response.ok) return await response.json();
    for await (const event of readEvents(response, timer)) {
      if (event.status) return event;
      process.stdout.write(event.chunk);
    }
    throw new Error("no terminal event");
  } finally {
    clearTimeout(timer);
  }
}

try {
  let end = await chat();
  // Only an error response is retried: after text, a retry would store a second turn.
  for (let retries = 2; retries && !end.status && end.error.retryable; retries--) {
    await sleep((end.error.retry_after ?? 1) * 1000, null, abort);
    end = await chat();
  }
  if (end.error) console.error(`\n${end.error.code}: ${end.error.message}`);
  process.exitCode = end.error ? 1 : 0;
} catch (error) {
  console.error(`\n${abort.signal.reason ?? `${failure}: ${error.cause?.message || error.message}`}`);
  process.exitCode = 1;
}
