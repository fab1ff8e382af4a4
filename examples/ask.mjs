// Asks, and prints the answer as it comes. Node 18 or newer, nothing else. Ctrl-C stops the answer.

const { CHAT_URL = "http://127.0.0.1:8000", CHAT_MESSAGE = "Hello", CHAT_MODEL } = process.env;
// Without a model the service's default answers.
const body = JSON.stringify({ message: CHAT_MESSAGE, model_id: CHAT_MODEL ?? null });
// An aborted fetch closes the connection, so the provider stops too.
const stop = new AbortController();
process.once("SIGINT", () => stop.abort("Stopped"));
// At least every 15 s there is an event or a comment: a minute of silence is a dead connection.
const seconds = Number(process.env.CHAT_SILENCE_SECONDS ?? 60);
const giveUp = () => stop.abort(`The answer was cut off: silence for ${seconds} s`);
const alive = setTimeout(giveUp, seconds * 1000).unref();
let failed = "The service could not be reached";

async function* events(response) {
  let rest = "";
  for await (const text of response.body.pipeThrough(new TextDecoderStream())) {
    alive.refresh();
    const lines = (rest + text).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data: ")) yield JSON.parse(line.slice(6));
  }
}

// The last event, or the body of an answer with an error status; both may hold an `error`.
async function ask() {
  const headers = { "Content-Type": "application/json" };
  const asked = { method: "POST", headers, body, signal: stop.signal };
  const response = await fetch(`${CHAT_URL}/api/v1/chat`, asked);
  failed = "The answer was cut off";
  if (!response.ok) return response.json();
  for await (const event of events(response)) {
    if (event.status) return event;
    process.stdout.write(event.chunk);
  }
  throw new Error("no event said that it ended");
}

try {
  const { error } = await ask();
  if (error) console.error(`\n${error.code}: ${error.message}`);
  process.exitCode = error ? 1 : 0;
} catch (error) {
  console.error(`\n${stop.signal.reason ?? `${failed}: ${error.cause?.message || error.message}`}`);
  process.exitCode = 1;
}
