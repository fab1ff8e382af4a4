"""The process that listens: sockets, access to a client's connection, graceful shutdown.

uvicorn serves HTTP/1.1. This module adds what it lacks: an ASGI extension through which a stream
writes to its connection, bounds on what a client may send, and a drain. It does not know which
application it serves.
"""

import asyncio
import errno
import http.client
import logging
import re
import resource
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from types import FrameType
from typing import Any, cast

import anyio
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from errors import ServiceError
from settings import Settings, SettingsError

# The ASGI extension with which this server gives an application the connection of a request.
CONNECTION = "chat_sidecar.connection"
UPGRADE = re.compile(rb"\r\nupgrade:", re.I)
# How long clients have to take the end of their response, after a shutdown or a write timeout.
CLOSE_SECONDS = 3.0
# Longer than the 60 s for which load balancers keep an idle connection.
KEEP_ALIVE_SECONDS = 75
# Bytes of a request that bring no body: its head, chunk extensions, trailers. h11 allows as much.
MAX_OVERHEAD_BYTES = 2**16
# Body bytes that are read and dropped after the response, so that a client that sends before it
# reads gets the response. A connection that sends more is reset.
MAX_DROPPED_BYTES = 2**22
# Parsing a body takes time per HTTP chunk, so small chunks are bounded in number. curl sends
# 64 KiB in a few.
MAX_BODY_CHUNKS = 2**13
# Docker's and Kubernetes' probes have 30 s and 1 s by default.
PROBE_SECONDS = 2.0
# Descriptors that are neither a client's nor a provider's connection: listeners, database, log.
SPARE_DESCRIPTORS = 64


def listen(settings: Settings) -> list[socket.socket]:
    """Return a listening socket for each address of HOST.

    Raise SettingsError if none can be used or the port is in use. An address that this machine does
    not have is skipped: `localhost` often includes ::1 where IPv6 is off.
    """
    host, port = settings.host, settings.port
    listeners: list[socket.socket] = []
    failures: list[OSError] = []
    with ExitStack() as opened:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        except UnicodeError:
            raise SettingsError(f"HOST={host!r} is not a host name or an address") from None
        except OSError as error:
            found, failures = [], [error]
        for family, _, _, _, address in found:
            try:
                listener = opened.enter_context(socket.create_server(address, family=family))
                listeners.append(listener)
            except OSError as error:
                failures.append(error)
        if errno.EADDRINUSE in {error.errno for error in failures}:
            problem = f"PORT={port} is in use. Stop the process that uses it, or set PORT"
            raise SettingsError(problem)
        if not listeners:
            problem = f"HOST={host!r} with PORT={port} cannot be used ({failures[-1].strerror})"
            raise SettingsError(f"{problem}. Use HOST=127.0.0.1, or 0.0.0.0 for all addresses")
        opened.pop_all()
    # The kernel drops a client that acknowledges nothing. Without this it retries for 15 minutes.
    # Linux only.
    milliseconds = int(1000 * (2 * settings.write_timeout_seconds + CLOSE_SECONDS))
    with suppress(AttributeError):
        for listener in listeners:
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
    return listeners


def raise_descriptor_limit(settings: Settings) -> str | None:
    """Raise the limit of open files to the hard limit.

    Return a warning if MAX_STREAMS cannot be reached: a stream takes two connections.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    needed = 2 * settings.max_streams + SPARE_DESCRIPTORS
    if hard == resource.RLIM_INFINITY or hard >= needed:
        return None
    return (
        f"MAX_STREAMS={settings.max_streams} needs {needed} open files, but the limit is {hard}."
        " Raise it (ulimit -n), or lower MAX_STREAMS"
    )


def reset_connection(transport: asyncio.Transport) -> None:
    """Close a connection with a RST.

    `close` would wait for the client to read. `abort` alone would leave the kernel's buffer
    to be delivered to a client that does not read (socket(7), SO_LINGER).
    """
    linger = struct.pack("ii", 1, 0)
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    transport.abort()


class ClientConnection:
    """The connection of one request: the value of the ASGI extension CONNECTION.

    Between `http.response.start` and the last `http.response.body`, an application may `write`
    parts of the body itself, also inside a callback of the event loop.
    The server calls `on_resume` and `on_disconnect`, which the application sets.
    """

    def __init__(self, cycle: RequestResponseCycle, peer: str | None) -> None:
        self._cycle = cycle
        # The address that connected: a proxy's, where there is one.
        self.peer = peer
        self.on_resume: Callable[[], None] = _ignore
        self.on_disconnect: Callable[[], None] = _ignore

    def write(self, data: bytes) -> None:
        """Write part of the body, framed as an HTTP chunk unless the client speaks HTTP/1.0."""
        # uvloop raises when a connection is closed, where asyncio drops what is written.
        if not self.disconnected:
            chunked = self._cycle.chunked_encoding
            self._cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data) if chunked else data)

    @property
    def paused(self) -> bool:
        """Whether the client does not read: 64 KiB wait to be sent."""
        return self._cycle.flow.write_paused

    @property
    def disconnected(self) -> bool:
        return self._cycle.disconnected

    @property
    def body_arrived(self) -> bool:
        """Whether the whole body of the request is here, so that `receive` will not wait."""
        return not self._cycle.more_body

    def abort(self) -> None:
        """Reset the connection."""
        reset_connection(self._cycle.transport)


def _ignore() -> None:
    pass


class StartQueue:
    """Starts at most one request in each turn of the event loop, in the order they arrived.

    Starting a request takes as long as relaying about fifty events. Without the queue, 1,000
    requests at once would delay every running stream until all of them are started.
    """

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], None]] = deque()
        self._turn_taken = False

    def add(self, start: Callable[[], None]) -> None:
        if self._turn_taken:
            self._waiting.append(start)
        else:
            self._start(start)

    def _start(self, start: Callable[[], None]) -> None:
        self._turn_taken = True
        asyncio.get_running_loop().call_soon(self._next_turn)
        start()

    def _next_turn(self) -> None:
        self._turn_taken = False
        if self._waiting:
            self._start(self._waiting.popleft())


class PipelinedRequestError(Exception):
    """Raised inside the parser's callback to stop parsing: the parser has no other way out."""


class HTTPProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 protocol, one request at a time, with bounds.

    A request that is sent before the previous one was answered is ignored and the connection is
    closed after the response: the client sends it again elsewhere (RFC 9112, section 9.3.2).
    `on_malformed` is called with the reason when a request is answered 400 before it reaches the
    application.
    """

    def __init__(
        self,
        *args: Any,
        starts: StartQueue,
        on_malformed: Callable[[str], None],
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self._starts = starts
        self._on_malformed = on_malformed
        # Whether the next bytes begin a head.
        self._between_requests = True
        self._overhead_bytes = 0
        self._dropped_bytes = 0
        self._body_chunks = 0

    def data_received(self, data: bytes) -> None:
        if self._overhead_bytes > MAX_OVERHEAD_BYTES:
            # Dropped while a response is still being sent; then the connection is closed.
            self._overhead_bytes += len(data)
            if self._overhead_bytes > MAX_DROPPED_BYTES:
                reset_connection(self.transport)
            return
        # httptools passes what follows an Upgrade header to the new protocol, so the body of a POST
        # by Java's client or `curl --http2` would be lost. The header is renamed, since no upgrade
        # is offered. Only a whole head is changed: a byte more in a body would turn its end into
        # the next request.
        head, end, rest = data.partition(b"\r\n\r\n")
        if self._between_requests and end:
            data = UPGRADE.sub(b"\r\nx-upgrade:", head) + end + rest
        self._overhead_bytes += len(data)
        super().data_received(data)
        if self._overhead_bytes > MAX_OVERHEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("The head of this request is too large.")

    def on_message_begin(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            raise PipelinedRequestError
        super().on_message_begin()
        self._between_requests = False
        self._dropped_bytes = self._body_chunks = 0

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        # ASGI declares extensions as dictionaries; this one is an object.
        self.scope["extensions"] = {
            CONNECTION: cast(
                Any, ClientConnection(self.cycle, self.client[0] if self.client else None)
            )
        }
        self._overhead_bytes = 0
        # What follows are trailers, which must not pass for headers (RFC 9110, section 6.5.1).
        self.headers = []

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        if self.scope["http_version"] == "1.0":
            app = without_chunked_encoding(app, cycle)
        self._starts.add(partial(super()._start_asgi_task, cycle, app))

    def on_chunk_header(self) -> None:
        self._body_chunks += 1
        if self._body_chunks == MAX_BODY_CHUNKS:
            reset_connection(self.transport)

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        self._overhead_bytes = 0
        if self.cycle.response_complete:
            self._dropped_bytes += len(body)
            if self._dropped_bytes > MAX_DROPPED_BYTES:
                reset_connection(self.transport)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._between_requests = True
        if self.parser.should_upgrade():
            # The head came in parts, so its body was passed over and is not the next request.
            self.cycle.keep_alive = False

    def send_400_response(self, msg: str) -> None:
        cycle = self.cycle
        pending = cycle is not None and not cycle.response_complete
        if pending and (cycle.response_started or not cycle.more_body):
            # Another response, here or in the middle of the one that is pending, would be garbage.
            cycle.keep_alive = False
        else:
            self._on_malformed(msg)
            super().send_400_response(msg)

    def resume_writing(self) -> None:
        super().resume_writing()
        if (connection := self._client_connection()) is not None:
            connection.on_resume()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if (connection := self._client_connection()) is not None:
            connection.on_disconnect()

    def _client_connection(self) -> ClientConnection | None:
        """Return the connection of the request whose response is not complete."""
        if self.cycle is None or self.cycle.response_complete:
            return None
        extensions = cast(dict[str, Any], self.cycle.scope["extensions"])
        return cast(ClientConnection, extensions[CONNECTION])


def without_chunked_encoding(app: ASGIApp, cycle: RequestResponseCycle) -> ASGIApp:
    """Wrap `app` for a client that speaks HTTP/1.0, which has no chunked encoding.

    uvicorn would use it all the same. A response without Content-Length ends with the connection.
    """

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_unframed(message: Message) -> None:
            if message["type"] == "http.response.start":
                names = {name.lower() for name, _ in message["headers"]}
                if b"content-length" not in names:
                    cycle.chunked_encoding = False
            elif cycle.chunked_encoding is False and cycle.expected_content_length == 0:
                cycle.transport.write(message.get("body", b""))
                message = {**message, "body": b""}
            await send(message)

        await app(scope, receive, send_unframed)

    return wrapped


def shutting_down() -> ServiceError:
    return ServiceError(
        "shutting_down", "The service is shutting down. Retry in 1 s.", retry_after=1
    )


class Drain:
    """Graceful shutdown: active streams may finish for a while, then they are aborted."""

    def __init__(self) -> None:
        self.draining = False
        self._forced = False
        self._aborts: set[Callable[[ServiceError], None]] = set()
        self._changed = asyncio.Event()

    @property
    def active(self) -> int:
        return len(self._aborts)

    def check(self) -> None:
        """Raise shutting_down while draining."""
        if self.draining:
            raise shutting_down()

    @contextmanager
    def track(self, abort: Callable[[ServiceError], None]) -> Iterator[None]:
        """Let the shutdown wait for the block. `abort` has to end it early."""
        self._aborts.add(abort)
        if self._forced:
            abort(shutting_down())
        try:
            yield
        finally:
            self._aborts.discard(abort)
            self._changed.set()

    def force(self) -> None:
        """Abort what is active now, instead of waiting for it."""
        self._forced = True
        self._changed.set()

    async def drain(self, seconds: float) -> None:
        """Wait until nothing is active, at most `seconds`; then abort what still is."""
        self.draining = True
        with anyio.move_on_after(seconds):
            while self._aborts and not self._forced:
                self._changed.clear()
                await self._changed.wait()
        self._forced = True
        for abort in list(self._aborts):
            abort(shutting_down())


class Server(uvicorn.Server):
    """uvicorn's server with a drain. The process ends with status 0 after a signal.

    `on_started` is called with the service's URL once it listens.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: Settings,
        log: logging.Logger,
        drain: Drain,
        *,
        on_started: Callable[[str], None],
        on_malformed: Callable[[str], None],
    ) -> None:
        trusted = [str(network) for network in settings.forwarded_allow_ips]
        config = uvicorn.Config(
            app,
            # uvicorn accepts a factory, though it declares a class.
            http=cast(Any, partial(HTTPProtocol, starts=StartQueue(), on_malformed=on_malformed)),
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            proxy_headers=bool(trusted),
            forwarded_allow_ips=trusted,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
        )
        super().__init__(config)
        self._settings = settings
        self._log = log
        self._drain = drain
        self._on_started = on_started

    @property
    def url(self) -> str:
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self._on_started(self.url)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin the shutdown at the first signal, force it at the second.

        uvicorn would end the process with the signal's status.
        """
        if self.should_exit and self.started:
            self._loop.call_soon_threadsafe(self._drain.force)
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # The listeners stay open until the streams have finished: a late request gets a 503.
        active, seconds = self._drain.active, self._settings.drain_seconds
        streams = f"{active} stream{'' if active == 1 else 's'}"
        waiting = f": waiting up to {seconds:g} s for {streams}. Press Ctrl-C again to stop now."
        self._log.info("Shutting down%s", waiting if active else "")
        await self._drain.drain(seconds)
        closing = self._loop.call_later(CLOSE_SECONDS, self._reset_connections)
        await super().shutdown(sockets)
        closing.cancel()
        self._log.info("Shut down")

    def _reset_connections(self) -> None:
        for connection in list(self.server_state.connections):
            reset_connection(connection.transport)


def probe(settings: Settings) -> str | None:
    """Return why the service at HOST and PORT is not ready, or None if it is.

    Connecting to 0.0.0.0 connects to this machine.
    """
    connection = http.client.HTTPConnection(settings.host, settings.port, timeout=PROBE_SECONDS)
    allowed = settings.allowed_hosts[0].replace("*", "localhost")
    address = f"{settings.host}:{settings.port}"
    try:
        with closing(connection):
            connection.request("GET", "/readyz", headers={"Host": allowed})
            status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        return f"Nothing responds at {address}: {error}"
    return None if status == 200 else f"Not ready: {address} responds with status {status}"
