/** Requests to the service, the events of its streams, and its errors. */

/** Send a request. The URL is relative, so that a proxy can serve everything under a prefix. */
export function request(method, path, { apiKey, body, key } = {}) {
  const headers = {};
  if (body) headers["Content-Type"] = "application/json";
  if (apiKey) headers.Authorization = `Bearer ${apiKey}`;
  // A stream with a key goes on while its client is away, and can be resumed.
  if (key) headers["Idempotency-Key"] = key;
  return fetch(`api/v1/${path}`, { method, headers, body: body && JSON.stringify(body) });
}

/** Yield the events of a stream. The last one has a status. Throw if it does not arrive. */
export async function* readEvents(response, signal) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  signal.addEventListener("abort", () => reader.cancel());
  for (let buffer = ""; ;) {
    const { value, done } = await reader.read();
    if (done) throw new TypeError("The stream has no terminal event.");
    const blocks = (buffer + value).split("\n\n");
    buffer = blocks.pop();
    for (const block of blocks) {
      // Other lines are comments, which keep the connection alive, and the ids of events.
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
  const message = `A server between this page and the service responded with ${response.status}.`;
  return { error: { code: "unreachable", message, retryable: true } };
}

/** Return the terminal event for a connection that failed before or after the response began. */
export function connectionError(response) {
  const code = response?.ok ? "connection_lost" : "unreachable";
  return { id: response?.headers.get("X-Request-ID"), error: { code, retryable: true } };
}

// Sentences for users, where the service's own message is for developers. The last two errors are
// detected by the browser.
const SENTENCES = {
  invalid_api_key: "The service needs a valid API key.",
  session_not_found: "This conversation has expired, or it belongs to another API key.",
  session_busy: "Another response is running in this conversation.",
  context_too_long: "The message is too long for the model.",
  content_refused: "The provider’s content policy rejected this message.",
  upstream_incomplete: "The response ended before it was complete.",
  upstream_timeout: "The model took too long to respond.",
  connection_lost: "The connection was lost before the response ended.",
  unreachable: "The service cannot be reached. Check that it is running and that you are online.",
};

export function describe(error) {
  return SENTENCES[error.code] ?? error.message;
}
