"""Send a message and print the response as it arrives. Needs httpx and httpx-sse."""

import json
import os
import sys
import time
from typing import Any

import httpx
from httpx_sse import connect_sse

URL = os.environ.get("CHAT_URL", "http://127.0.0.1:8000") + "/api/v1/chat"
# Without a model id, the service uses its default model.
BODY = {
    "message": os.environ.get("CHAT_MESSAGE", "Hello"),
    "model_id": os.environ.get("CHAT_MODEL"),
}
# A heartbeat arrives every 15 s, so a connection that is silent for a minute is dead.
SILENCE = float(os.environ.get("CHAT_SILENCE_SECONDS", "60"))


def chat() -> Any:
    """Return the terminal event, or the body of an error response. Both can have an `error`."""
    with (
        httpx.Client(timeout=SILENCE) as client,
        connect_sse(client, "POST", URL, json=BODY) as source,
    ):
        if source.response.is_error:
            return json.loads(source.response.read())
        for event in source.iter_sse():
            data = json.loads(event.data)
            if "status" in data:
                return data
            print(data["chunk"], end="", flush=True)
    raise httpx.ReadError("no terminal event")


try:
    end = chat()
    for _ in range(2):
        # Only an error response is retried: after text, a retry would store a second turn.
        if "status" not in end and end["error"]["retryable"]:
            time.sleep(end["error"]["retry_after"] or 1)
            end = chat()
except httpx.ConnectError as error:
    sys.exit(f"Cannot connect to the service: {error}")
except httpx.TransportError as error:
    sys.exit(f"\nThe connection was lost: {error}")
except KeyboardInterrupt:
    sys.exit(130)  # Closes the connection, and the service cancels the request to the model.
if "error" in end:
    sys.exit(f"\n{end['error']['code']}: {end['error']['message']}")
