/** Requests to the service, the events of its streams, and its errors. */

// Relative, so that a proxy can serve everything under a prefix.
const API = "api/v1/";

export function request(method, path, { apiKey, body, signal } = {}) {
  const headers = body ? { "Content-Type": "application/json" } : {};
  if (apiKey) headers.Authorization = `Bearer ${apiKey}`;
  return fetch(API + path, { method, headers, signal, body: body && JSON.stringify(body) });
}

/** Yield the events of a stream. The last one has a status. Throw if it does not arrive. */
export async function* readEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let buffer = ""; ;) {
    const { value, done } = await reader.read();
    if (done) throw new TypeError("The stream has no terminal event.");
    const blocks = (buffer + value).split("\n\n");
    buffer = blocks.pop();
    for (const block of blocks) {
      // Other lines are comments, which keep the connection alive, and event ids.
      const line = block.split("\n").find((each) => each.startsWith("data: "));
      if (!line) continue;
      const event = JSON.parse(line.slice(6));
      yield event;
      if (event.status) return;
    }
  }
}

/** Return the error in a response whose status is an error, in the form of a terminal event. */
export async function readError(response) {
  const body = await response.json().catch(() => null);
  if (body?.error?.code) return body;
  return { error: { code: "unreachable", message: `HTTP status ${response.status}.`, retryable: true } };
}

/** Return the terminal event for an exception: the user stopped, or the connection failed. */
export function interruption(exception, response) {
  if (exception.name === "AbortError") return { status: "stopped" };
  const code = response?.ok ? "connection_lost" : "unreachable";
  return { id: response?.headers.get("X-Request-ID"), error: { code, retryable: true } };
}

// Where the service's own message speaks to developers, the playground has a sentence for users.
// The last two are the browser's.
const SENTENCES = {
  invalid_api_key: "The service needs a valid API key.",
  session_not_found: "This conversation has expired, or it belongs to another API key.",
  session_busy: "Another response is running in this conversation.",
  context_too_long: "The conversation is too long for the model.",
  content_refused: "The provider’s content policy rejected this message.",
  upstream_incomplete: "The response ended before it was complete.",
  upstream_timeout: "The model took too long to respond.",
  connection_lost: "The connection was lost before the response ended.",
  unreachable: "The service cannot be reached. Check that it is running and that you are online.",
};

export function describe(error) {
  return SENTENCES[error.code] ?? error.message;
}
