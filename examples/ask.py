"""Asks, and prints the answer as it comes. Needs httpx and httpx-sse. Ctrl-C stops the answer."""

import json
import os
import sys
from typing import Any

import httpx
from httpx_sse import connect_sse

URL = os.environ.get("CHAT_URL", "http://127.0.0.1:8000") + "/api/v1/chat"
# Without a model the service's default answers.
BODY = {
    "message": os.environ.get("CHAT_MESSAGE", "Hello"),
    "model_id": os.environ.get("CHAT_MODEL"),
}
# At least every 15 s there is an event or a comment: a minute of silence is a dead connection.
SILENCE = float(os.environ.get("CHAT_SILENCE_SECONDS", "60"))


def ask() -> Any:
    """The last event, or the body of an answer with an error status; both may hold an `error`."""
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
    raise httpx.ReadError("no event said that it ended")


try:
    end = ask()
except (httpx.ConnectError, httpx.ConnectTimeout) as error:
    sys.exit(f"The service could not be reached: {error}")
except httpx.TransportError as error:
    sys.exit(f"\nThe answer was cut off: {error}")
except KeyboardInterrupt:
    sys.exit(130)  # The connection is closed, so the provider stops too.
if "error" in end:
    sys.exit(f"\n{end['error']['code']}: {end['error']['message']}")
