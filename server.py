"""How the process listens and how it ends: uvicorn, with a way to cut a client and a drain.

Nothing here knows what is served.
"""

import asyncio
import http.client
import logging
import re
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from types import FrameType
from typing import Any, cast

import anyio
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from errors import ServiceError
from settings import Settings, SettingsError

# The ASGI extension by which this server lends the way to cut a connection.
ABORT = "chat_sidecar.abort"
UPGRADE = re.compile(rb"\r\nupgrade:", re.I)
# After the last word, and after a deadline of ours, a client has this long.
CUT_SECONDS = 3.0
# Longer than the 60 s for which load balancers keep an idle connection.
KEEP_ALIVE_SECONDS = 75
# A head is a few kilobytes, cookies and all; h11 allows as much.
MAX_HEAD_BYTES = 2**16
# Docker's and Kubernetes' probes have 30 s and 1 s unless told otherwise.
PROBE_SECONDS = 2.0


def listen(settings: Settings) -> list[socket.socket]:
    """A socket for each address of HOST. Raises SettingsError where it can't be had."""
    host, port = settings.host, settings.port
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        listeners = [socket.create_server(at, family=kind) for kind, *_, at in found]
    except (OSError, UnicodeError) as error:
        problem = f"HOST={host!r}, PORT={port}: {error}"
        raise SettingsError(f"{problem}. Set another, or stop what listens there") from None
    # For a client that takes nothing of what our own buffers are too large to notice, or vanished
    # without a word: else the kernel goes on trying for a quarter of an hour. Linux's alone.
    patience = int(1000 * (2 * settings.write_timeout_seconds + CUT_SECONDS))
    with suppress(AttributeError):
        for listener in listeners:
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, patience)
    return listeners


def reset_connection(transport: asyncio.Transport) -> None:
    """Reset a connection. `close` would wait for the client to read, `abort` alone would leave the
    kernel megabytes to hold for one that does not (socket(7), SO_LINGER)."""
    linger = struct.pack("ii", 1, 0)
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    transport.abort()


class HTTPProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1, one request at a time, with a way to cut a client that does not read.

    What is sent behind a request that is not yet answered is passed over, and the connection is
    closed after the answer: whoever pipelines asks again on another (RFC 9112, 9.3.2).
    """

    # Between two requests, where what comes next is a head.
    _between = True
    # Bytes of a head, or of trailers, that have not ended yet.
    _head_bytes = 0

    def data_received(self, data: bytes) -> None:
        if self._head_bytes > MAX_HEAD_BYTES:
            return
        # httptools leaves what follows a wish to upgrade to the new protocol, so the body of a POST
        # by Java's client or `curl --http2` would be lost. None is granted, so none is asked. Only
        # a whole head is touched: a byte more in a body would make its end the next request.
        head, end, rest = data.partition(b"\r\n\r\n")
        if self._between and end:
            data = UPGRADE.sub(b"\r\nx-upgrade:", head) + end + rest
        self._head_bytes += len(data)
        super().data_received(data)
        if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("The head of this request is too large.")

    def on_message_begin(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            # Ends the parsing, in `send_400_response`.
            raise OverflowError
        super().on_message_begin()
        self._between = False
        # ASGI calls extensions dictionaries; this one is a function.
        self.scope["extensions"] = {ABORT: cast(Any, partial(reset_connection, self.transport))}

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._head_bytes = 0
        # What follows are trailers, which must not pass for headers (RFC 9110, 6.5.1).
        self.headers = []

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        self._head_bytes = 0

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._between = True
        if self.parser.should_upgrade():
            # The head came in parts. Its body was passed over and is not the next request.
            self.cycle.keep_alive = False

    def send_400_response(self, msg: str) -> None:
        cycle = self.cycle
        response_pending = cycle is not None and not cycle.response_complete
        if response_pending and (cycle.response_started or not cycle.more_body):
            # There is no place for another answer, before this one or in its middle.
            cycle.keep_alive = False
        else:
            super().send_400_response(msg)


def shutting_down() -> ServiceError:
    return ServiceError("shutting_down", "The service is being stopped. Try again.", retry_after=1)


class Drain:
    """The end of the service: what is under way may finish for a while, then it is ended."""

    def __init__(self) -> None:
        self.draining = False
        self._over = False
        self._ends: set[Callable[[ServiceError], None]] = set()
        self._changed = asyncio.Event()

    def check(self) -> None:
        """Raises ShuttingDown once the service is being stopped."""
        if self.draining:
            raise shutting_down()

    @contextmanager
    def track(self, abort: Callable[[ServiceError], None]) -> Iterator[None]:
        """Held by whatever must not be cut without a word; `abort` is the way to end it."""
        self._ends.add(abort)
        if self._over:
            abort(shutting_down())
        try:
            yield
        finally:
            self._ends.discard(abort)
            self._changed.set()

    def force(self) -> None:
        """End what is under way now."""
        self._over = True
        self._changed.set()

    async def drain(self, seconds: float) -> None:
        """Return when nothing is under way, or when all that was has been told to end."""
        self.draining = True
        with anyio.move_on_after(seconds):
            while self._ends and not self._over:
                self._changed.clear()
                await self._changed.wait()
        self._over = True
        for abort in list(self._ends):
            abort(shutting_down())


class Server(uvicorn.Server):
    """uvicorn's server, which says where it listens and lets answers end when it is stopped."""

    def __init__(self, app: ASGIApp, settings: Settings, log: logging.Logger, drain: Drain) -> None:
        config = uvicorn.Config(
            app,
            http=HTTPProtocol,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            forwarded_allow_ips=[str(network) for network in settings.forwarded_allow_ips],
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
        )
        super().__init__(config)
        self._settings = settings
        self._log = log
        self._drain = drain

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        answers = f"{self._settings.default_provider_name} ({self._settings.default_model})"
        self._log.info("Listening on %s; answers come from %s", url, answers)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins the end, a second one hurries it. uvicorn would remember them and
        end with the signal's status; this service ends with 0."""
        if self.should_exit and self.started:
            self._loop.call_soon_threadsafe(self._drain.force)
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # The listeners stay open until the answers have ended: a late request is told 503.
        self._log.info("Stopping")
        await self._drain.drain(self._settings.drain_seconds)
        cutting = self._loop.call_later(CUT_SECONDS, self._cut)
        await super().shutdown(sockets)
        cutting.cancel()
        self._log.info("Stopped")

    def _cut(self) -> None:
        for connection in list(self.server_state.connections):
            reset_connection(connection.transport)


def probe(settings: Settings) -> str | None:
    """What is wrong with the service that listens as `settings` say, in a line; None if it is
    ready. To connect to 0.0.0.0 is to connect to this machine."""
    connection = http.client.HTTPConnection(settings.host, settings.port, timeout=PROBE_SECONDS)
    allowed = settings.allowed_hosts[0].replace("*", "localhost")
    try:
        with closing(connection):
            connection.request("GET", "/readyz", headers={"Host": allowed})
            status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        return f"Nothing answers at {settings.host}:{settings.port}: {error}"
    return None if status == 200 else f"Not ready: {settings.host}:{settings.port} answers {status}"
