// Send a message and print the response, also if the connection is lost on the way. Needs Node 18
// or newer and no packages.

import { randomUUID } from "node:crypto";
import { setTimeout as sleep } from "node:timers/promises";

const { CHAT_URL = "http://127.0.0.1:8000", CHAT_MESSAGE = "Hello", CHAT_MODEL } = process.env;
const body = JSON.stringify({ message: CHAT_MESSAGE, model_id: CHAT_MODEL ?? null });
const headers = { "Content-Type": "application/json", "Idempotency-Key": randomUUID() };
// A heartbeat arrives every 15 s. After a minute without data, retrying is in vain: by default, the
// service cancels a stream without a reader after 60 s.
const silence = Number(process.env.CHAT_SILENCE_SECONDS ?? 60) * 1000;
let sessionId, lostAt = Date.now();

process.once("SIGINT", async () => {
  // The stream would go on without this client.
  const path = `${CHAT_URL}/api/v1/sessions/${sessionId}/stream`;
  if (sessionId) await fetch(path, { method: "DELETE" }).catch(() => {});
  process.exit(130);
});

async function* readEvents(response, timer) {
  let rest = "", id = "";
  for await (const text of response.body.pipeThrough(new TextDecoderStream())) {
    timer.refresh();
    const lines = (rest + text).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("id: ")) id = line.slice(4);
      if (line.startsWith("data: ")) yield [id, JSON.parse(line.slice(6))];
    }
  }
}

// Return the terminal event, or the body of an error response. Both can have an `error`.
async function chat() {
  const abort = new AbortController();
  const timer = setTimeout(() => abort.abort(new Error("silence")), silence);
  try {
    // The same key and body: the service continues the stream, and does not call the model again.
    const options = { method: "POST", headers, body, signal: abort.signal };
    const response = await fetch(`${CHAT_URL}/api/v1/chat`, options);
    if (!response.ok) return await response.json();
    sessionId = response.headers.get("X-Session-ID");
    for await (const [id, event] of readEvents(response, timer)) {
      lostAt = Date.now();
      const last = headers["Last-Event-ID"], [stream, number] = id.split(":");
      if (last && (stream !== last.split(":")[0] || number === "1")) console.log("\n[The response starts over]");
      headers["Last-Event-ID"] = id;
      if (event.status) return event;
      process.stdout.write(event.chunk);
    }
    throw new Error("no terminal event");
  } finally {
    clearTimeout(timer);
  }
}

let end, pause = 0;
do {
  await sleep(pause);
  end = await chat().catch(({ cause, message }) => (
    { error: { code: "The connection was lost", message: cause?.message || message, retryable: true } }));
  pause = (end.error?.retry_after ?? 0.5) * 1000;
  // An error that is an event ends the stream. Another attempt needs a new key.
} while (!end.status && end.error.retryable && Date.now() + pause < lostAt + silence);
if (end.error) console.error(`\n${end.error.code}: ${end.error.message}`);
process.exitCode = end.error ? 1 : 0;
