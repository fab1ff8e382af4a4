"""An HTTP client on a plain socket, which can also misbehave."""

import asyncio
import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import h11

JSON = {"content-type": "application/json"}
# The provider's key in every test. No response and no log line may contain it: `Client` and
# tests/conftest.py search all of them.
CANARY = "sk-canary-0123456789abcdef"


class Response:
    """A response as it arrives: status and headers first, then the body, whole or by event."""

    def __init__(self, client: "Client", head: h11.Response) -> None:
        self._client = client
        self.status = head.status_code
        self.headers = {name.decode(): value.decode() for name, value in head.headers}
        self._buffer = b""
        self.ended = False

    async def block(self) -> str | None:
        """Return the next event or comment without its blank line, or None at the end."""
        while b"\n\n" not in self._buffer:
            if not await self._read():
                assert self._buffer == b"", self._buffer
                return None
        block, _, self._buffer = self._buffer.partition(b"\n\n")
        return block.decode()

    async def event(self) -> Any:
        """Return the next event's JSON, or None at the end. Skip comments."""
        while (block := await self.block()) is not None:
            if not block.startswith(":"):
                assert block.startswith("data: ")
                assert "\n" not in block
                return json.loads(block.removeprefix("data: "))
        return None

    async def events(self) -> list[Any]:
        """Return the remaining events; read to the end of the body."""
        events = []
        while (event := await self.event()) is not None:
            events.append(event)
        return events

    async def body(self) -> bytes:
        while await self._read():
            pass
        body, self._buffer = self._buffer, b""
        return body

    async def json(self) -> Any:
        return json.loads(await self.body())

    async def error(self) -> dict[str, Any]:
        """Return the error of an error response. Check what all error responses have in common."""
        body = await self.json()
        assert list(body) == ["error", "id"]
        assert body["id"] == self.headers["x-request-id"]
        error: dict[str, Any] = body["error"]
        assert list(error)[:4] == ["code", "message", "retryable", "retry_after"]
        assert list(error)[4:] == (["fields"] if error["code"] == "invalid_request" else [])
        wait = error["retry_after"]
        assert self.headers.get("retry-after") == (None if wait is None else str(wait))
        assert self.headers["content-type"] == "application/json"
        assert self.headers["cache-control"] == "no-store"
        assert self.headers["x-content-type-options"] == "nosniff"
        return error

    async def status_and_code(self) -> tuple[int, str]:
        """Return the status and the error code of an error response."""
        return self.status, (await self.error())["code"]

    def disconnect(self) -> None:
        """Abort the connection."""
        self._client.disconnect()

    async def _read(self) -> bool:
        if self.ended:
            return False
        part = await self._client.next_event()
        if isinstance(part, h11.Data):
            self._buffer += bytes(part.data)
            return True
        assert isinstance(part, h11.EndOfMessage), part
        self.ended = True
        self._client.reuse()
        return False


class Client:
    """One connection to a service."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self._http = h11.Connection(h11.CLIENT)

    @classmethod
    async def connect(cls, url: str, host: str | None = None) -> "Client":
        """Connect to the service at `url`, from loopback address `host` if given."""
        parts = urlsplit(url)
        local = (host, 0) if host else None
        return cls(*await asyncio.open_connection(parts.hostname, parts.port, local_addr=local))

    async def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Response:
        """Send a request. Return when the response's headers have arrived."""
        fields = {"host": "localhost", **(headers or {})}
        if body is not None and not {"content-length", "transfer-encoding"} & fields.keys():
            fields["content-length"] = str(len(body))
        request = h11.Request(method=method, target=path, headers=list(fields.items()))
        self.writer.write(self._http.send(request) or b"")
        if body:
            self.writer.write(self._http.send(h11.Data(body)) or b"")
        self.writer.write(self._http.send(h11.EndOfMessage()) or b"")
        return await self.head()

    async def chat(
        self, message: str = "Hello", headers: Mapping[str, str] | None = None, **fields: object
    ) -> Response:
        """Send a valid POST /api/v1/chat with these `fields` beside the message."""
        body = json.dumps({"message": message, **fields}).encode()
        return await self.request("POST", "/api/v1/chat", body, {**JSON, **(headers or {})})

    async def head(self) -> Response:
        """Return the next response when its headers have arrived."""
        part = await self.next_event()
        while isinstance(part, h11.InformationalResponse):
            part = await self.next_event()
        assert isinstance(part, h11.Response), part
        return Response(self, part)

    async def next_event(self) -> object:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            data = await self.reader.read(65536)
            assert CANARY.encode() not in data
            self._http.receive_data(data)
        return event

    def reuse(self) -> None:
        """Prepare for another request if the connection stays open."""
        if self._http.our_state is h11.DONE and self._http.their_state is h11.DONE:
            self._http.start_next_cycle()

    def disconnect(self) -> None:
        """Abort the connection, as a closed browser tab does."""
        self.writer.transport.abort()

    async def wait_closed(self) -> None:
        """Return when the service has closed or reset the connection."""
        try:
            while await self.reader.read(65536):
                pass
        except ConnectionError:
            pass
