"""Print the response to a message, also if the connection is lost. Needs httpx and httpx-sse."""

import json
import os
import sys
import time
import uuid
from typing import Any

import httpx
from httpx_sse import connect_sse

URL = os.environ.get("CHAT_URL", "http://127.0.0.1:8000") + "/api/v1"
BODY = {
    "message": os.environ.get("CHAT_MESSAGE", "Hello"),
    "model_id": os.environ.get("CHAT_MODEL"),
}
# A heartbeat arrives every 15 s. After a minute without data, retrying is in vain: by default, the
# service cancels a stream without a reader after 60 s.
SILENCE = float(os.environ.get("CHAT_SILENCE_SECONDS", "60"))
headers = {"Idempotency-Key": str(uuid.uuid4())}
session_id = ""
lost_at = time.monotonic()


def chat(client: httpx.Client) -> Any:
    """Return the terminal event, or the body of an error response. Both can have an `error`."""
    global session_id, lost_at
    # The same key and body: the service continues the stream, and does not call the model again.
    with connect_sse(client, "POST", f"{URL}/chat", json=BODY, headers=headers) as source:
        if source.response.is_error:
            return json.loads(source.response.read())
        session_id = source.response.headers["X-Session-ID"]
        for event in source.iter_sse():
            lost_at = time.monotonic()
            stream, number = event.id.rsplit(":", 1)
            last_stream = headers.get("Last-Event-ID", event.id).rsplit(":", 1)[0]
            if stream != last_stream or (number == "1" and "Last-Event-ID" in headers):
                print("\n[The response starts over]")
            headers["Last-Event-ID"] = event.id
            data = json.loads(event.data)
            if "status" in data:
                return data
            print(data["chunk"], end="", flush=True)
    raise httpx.ReadError("no terminal event")


def chat_until_end(client: httpx.Client) -> Any:
    """Return the result of `chat`. Retry if the connection is lost or the error is retryable."""
    while True:
        try:
            end = chat(client)
            if "status" in end or not end["error"]["retryable"]:
                return end
            pause = end["error"]["retry_after"] or 1
        except httpx.TransportError as error:
            end, pause = {"error": {"code": "The connection was lost", "message": error}}, 0.5
        if time.monotonic() + pause > lost_at + SILENCE:
            return end
        time.sleep(pause)


with httpx.Client(timeout=SILENCE) as client:
    try:
        end = chat_until_end(client)
    except KeyboardInterrupt:
        # The stream would go on without this client.
        client.delete(f"{URL}/sessions/{session_id}/stream")
        sys.exit(130)
if "error" in end:
    sys.exit(f"\n{end['error']['code']}: {end['error']['message']}")
