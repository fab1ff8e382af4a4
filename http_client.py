"""An HTTP/1.1 client for providers: an httpx transport on asyncio and httptools.

`ResponseBody.push` calls a function with the bytes of a response inside the event loop's read
callback, so that no task has to wake for an event of a stream. There are no redirects, cookies,
HTTP/2 or decompression.
"""

import asyncio
import base64
import ipaddress
import select
import socket
import ssl
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, suppress
from functools import partial
from itertools import chain
from typing import Any, cast

import anyio
import httptools
import httpx

# Bytes of a response that bring no body: its head with all interim responses, chunk extensions and
# trailers. The heads of real providers have 1 to 3 KB.
MAX_OVERHEAD_BYTES = 2**16
# RFC 9110, section 15.2: a client may have to skip several 1xx responses.
MAX_INTERIM_RESPONSES = 8
# Body bytes that wait for a reader before the connection stops reading.
MAX_HELD_BYTES = 2**16
# An idle connection saves the next request its handshakes. Servers close theirs after 5 to 400 s.
IDLE_SECONDS = 30.0
# A server may close an idle connection just as a request is sent. If it does so within this time,
# before any byte of a response, it has not read the request, which is then sent once more.
STALE_SECONDS = 1.0
# RFC 8305, section 8: how long to wait for one address before the next is tried as well.
ADDRESS_DELAY_SECONDS = 0.25


class StaleConnectionError(httpx.RemoteProtocolError):
    """The server closed the connection before it read the request."""


class ResponseBody(httpx.AsyncByteStream):
    """One response as it arrives on a connection. `head` is done when its headers are complete.

    The body is read once: by `push`, or by iteration if it is small enough for memory.
    """

    def __init__(self, connection: "Connection") -> None:
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._sent_at = self._loop.time()
        self.head: asyncio.Future[None] = self._loop.create_future()
        # Done when nothing more is read: the body is complete, has failed, or was stopped.
        self._end: asyncio.Future[None] = self._loop.create_future()
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self._interim_responses = 0
        self._received_bytes = 0
        self._overhead_bytes = 0
        self._parts: list[bytes] = []
        # httptools calls it for each part of the body, which is each event of a stream.
        self.on_body = self._parts.append
        self._parser = httptools.HttpResponseParser(self)
        self._consume: Callable[[bytes], None] | None = None
        self._complete = self._stopped = self._reusable = False

    async def push(self, consume: Callable[[bytes], None]) -> None:
        """Call `consume` with the body's bytes as they arrive; return at its end or after `stop`.

        An exception in `consume` ends the response and is raised here, as is httpx.TransportError
        if the body is cut short.
        """
        self._consume = consume
        self._deliver(consume)
        self.resume()
        await self._end

    async def __aiter__(self) -> AsyncIterator[bytes]:
        body = bytearray()
        await self.push(body.extend)
        yield bytes(body)

    def stop(self) -> None:
        """Let `push` return now. What is still to come of the body is not read."""
        self._stopped = True
        if not self._end.done():
            self._end.set_result(None)

    def pause(self) -> None:
        """Stop reading from the connection until `resume`."""
        self._connection.set_reading(False)

    def resume(self) -> None:
        self._connection.set_reading(True)

    async def aclose(self) -> None:
        """Give the connection back for the next request, or close it if the body has not ended.

        Does not suspend, so it also works in a task that is being cancelled.
        """
        self._connection.finish(reusable=self._complete and self._reusable)

    # Called by the connection

    def feed(self, data: bytes) -> None:
        """Parse what arrived and pass on the bytes of the body."""
        self._received_bytes += len(data)
        self._overhead_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            # Bytes that follow a complete response belong to nothing: only this connection ends.
            self._reusable = False
            self.fail(httpx.RemoteProtocolError(f"The response is not valid HTTP/1.1: {error}"))
        if self._parts:
            self._overhead_bytes = 0
        elif self._overhead_bytes > MAX_OVERHEAD_BYTES:
            problem = f"more than {MAX_OVERHEAD_BYTES} bytes of headers, chunk sizes or trailers"
            self.fail(httpx.RemoteProtocolError(f"The response has {problem}"))
        if self._consume is not None:
            self._deliver(self._consume)
        elif sum(map(len, self._parts)) > MAX_HELD_BYTES:
            self.pause()

    def _deliver(self, consume: Callable[[bytes], None]) -> None:
        """Pass on the parts of the body that have arrived."""
        body = b"".join(self._parts)
        self._parts.clear()
        if body and not self._stopped:
            try:
                consume(body)
            except Exception as error:
                self._stopped = True
                self.fail(error)
        if self._complete:
            self.stop()

    def fail(self, error: Exception) -> None:
        """End the response with `error`, unless it is complete."""
        for future in (self.head, self._end):
            if not (future.done() or (self._complete and not self._stopped)):
                future.set_exception(error)
                # Marks it as retrieved: nothing may be waiting for it.
                future.exception()

    def connection_lost(self, error: Exception | None) -> None:
        """End the response: with an error, unless the end of the connection is its end."""
        names = {name.lower() for name, _ in self.headers}
        # RFC 9112, section 6.3, rule 8.
        until_close = not names & {b"content-length", b"transfer-encoding"}
        if error is None and self.head.done() and until_close:
            self._complete = True
            if self._consume is not None:
                self.stop()
            return
        problem = "The connection was closed before the response was complete"
        failure: httpx.TransportError = httpx.ReadError(problem)
        if not self._received_bytes and self._loop.time() - self._sent_at < STALE_SECONDS:
            failure = StaleConnectionError(problem)
        failure.__cause__ = error
        self.fail(failure)

    # Called by httptools

    def on_header(self, name: bytes, value: bytes) -> None:
        # What follows the head are trailers (RFC 9110, section 6.5.1), which are ignored.
        if not self.head.done():
            self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if self.head.done():
            return
        if status >= 200:
            self.status = status
            self.head.set_result(None)
            return
        self.headers.clear()
        self._interim_responses += 1
        if self._interim_responses > MAX_INTERIM_RESPONSES:
            problem = f"The server sent more than {MAX_INTERIM_RESPONSES} interim responses"
            self.fail(httpx.RemoteProtocolError(problem))

    def on_message_complete(self) -> None:
        if self.status:
            self._reusable = self._parser.should_keep_alive() and not self._complete
            self._complete = True


class Connection(asyncio.Protocol):
    """A connection that carries one request and its response at a time.

    `on_idle` is called when the connection can carry another request.
    """

    transport: asyncio.Transport

    def __init__(self, on_idle: Callable[["Connection"], None]) -> None:
        self._on_idle = on_idle
        self._response: ResponseBody | None = None
        self._reading = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # asyncio declares only what read, write and datagram transports have in common.
        self.transport = cast(asyncio.Transport, transport)
        self._readable = select.poll()
        self._readable.register(transport.get_extra_info("socket").fileno(), select.POLLIN)

    def send(self, request: bytes) -> ResponseBody:
        """Send a whole request and return its response, of which nothing has arrived yet."""
        self._response = ResponseBody(self)
        self.transport.write(request)
        return self._response

    def data_received(self, data: bytes) -> None:
        if self._response is None:
            # No request is running: the server is confused, or about to close.
            self.transport.abort()
        else:
            self._response.feed(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._response is not None:
            self._response.connection_lost(exc)

    def set_reading(self, reading: bool) -> None:
        if reading == self._reading or self.transport.is_closing():
            return
        self._reading = reading
        if reading:
            self.transport.resume_reading()
        else:
            self.transport.pause_reading()

    def finish(self, *, reusable: bool) -> None:
        """End the exchange. The connection becomes idle if it is reusable, else it is closed."""
        self._response = None
        # A connection that does not read would never notice that the server closes it.
        self.set_reading(True)
        if reusable and not self.transport.is_closing():
            self._on_idle(self)
        else:
            self.transport.abort()

    def is_alive(self) -> bool:
        """Return whether an idle connection can be used: open, and with nothing to read.

        Bytes or an end that the event loop has not seen yet make a socket readable.
        """
        return not (self.transport.is_closing() or self._readable.poll(0))


class HTTPTransport(httpx.AsyncBaseTransport):
    """Sends requests over kept connections, directly or through an HTTP proxy.

    A request brings its own Host and Content-Length headers. The response's extension `body` is its
    `ResponseBody`. Of a request's timeouts only `connect` applies. It covers name resolution, all
    addresses, the proxy and TLS; the rest is up to the caller.
    """

    def __init__(self, tls: ssl.SSLContext, proxy: httpx.Proxy | None = None) -> None:
        self._tls = tls
        self._proxy = proxy
        self._proxy_headers: list[tuple[bytes, bytes]] = []
        if proxy is not None and proxy.raw_auth is not None:
            credentials = b"Basic " + base64.b64encode(b":".join(proxy.raw_auth))
            self._proxy_headers.append((b"Proxy-Authorization", credentials))
        # By origin; the connection that was used last is used first, so that others can expire.
        self._idle: defaultdict[tuple[str, bytes], list[tuple[Connection, asyncio.TimerHandle]]]
        self._idle = defaultdict(list)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send `request` and return when the head of its response has arrived."""
        message = self._encode(request) + await request.aread()
        connection = self._take_idle(request.url)
        if connection is not None:
            with suppress(StaleConnectionError):
                return await self._exchange(connection, message)
        return await self._exchange(await self._connect(request), message)

    async def _exchange(self, connection: Connection, message: bytes) -> httpx.Response:
        response = connection.send(message)
        try:
            await response.head
        except BaseException:
            connection.finish(reusable=False)
            raise
        extensions = {"http_version": b"HTTP/1.1", "body": response}
        return httpx.Response(
            response.status, headers=response.headers, stream=response, extensions=extensions
        )

    async def aclose(self) -> None:
        for connection, expiry in chain.from_iterable(self._idle.values()):
            expiry.cancel()
            connection.transport.abort()
        self._idle.clear()

    def _encode(self, request: httpx.Request) -> bytes:
        """Return the head of a request. Raise httpx.LocalProtocolError for an invalid header."""
        target, headers = request.url.raw_path, request.headers.raw
        if self._proxy is not None and request.url.scheme == "http":
            # RFC 9112, section 3.2.2: a proxy is sent the absolute form.
            target = str(request.url).encode()
            headers = [*headers, *self._proxy_headers]
        return encode_head(b"%b %b HTTP/1.1" % (request.method.encode(), target), headers)

    # Connections

    def _take_idle(self, url: httpx.URL) -> Connection | None:
        connections = self._idle[url.scheme, url.netloc]
        while connections:
            connection, expiry = connections.pop()
            expiry.cancel()
            if connection.is_alive():
                return connection
            connection.transport.abort()
        return None

    async def _connect(self, request: httpx.Request) -> Connection:
        """Open a connection for `request` within its connect timeout.

        Raise httpx.ConnectTimeout, httpx.ConnectError or httpx.ProxyError.
        """
        try:
            with anyio.fail_after(request.extensions.get("timeout", {}).get("connect")):
                return await self._open(request.url)
        except TimeoutError as error:
            raise httpx.ConnectTimeout("The connection took too long") from error
        except (OSError, UnicodeError) as error:
            raise httpx.ConnectError(str(error)) from error

    async def _open(self, url: httpx.URL) -> Connection:
        loop = asyncio.get_running_loop()
        connections = self._idle[url.scheme, url.netloc]

        def keep(connection: Connection) -> None:
            expiry = loop.call_later(IDLE_SECONDS, connection.transport.abort)
            connections.append((connection, expiry))

        server = url if self._proxy is None else self._proxy.url
        secure = url.scheme == "https"
        tls = self._tls if secure and self._proxy is None else None
        _, connection = await loop.create_connection(
            partial(Connection, keep),
            sock=await connect_socket(server.host, _port(server)),
            ssl=tls,
            server_hostname=url.host if tls else None,
        )
        if secure and self._proxy is not None:
            try:
                return await self._start_tunnel(url, connection, keep)
            except BaseException:
                connection.transport.abort()
                raise
        return connection

    async def _start_tunnel(
        self, url: httpx.URL, connection: Connection, keep: Callable[[Connection], None]
    ) -> Connection:
        """Request a tunnel from the proxy (RFC 9110, section 9.3.6) and start TLS in it."""
        host = f"[{url.host}]" if ":" in url.host else url.host
        authority = f"{host}:{_port(url)}".encode()
        headers = [(b"Host", authority), *self._proxy_headers]
        response = connection.send(encode_head(b"CONNECT %b HTTP/1.1" % authority, headers))
        await response.head
        if not 200 <= response.status < 300:
            raise httpx.ProxyError(f"The proxy answered CONNECT with status {response.status}")
        secured = Connection(keep)
        transport = await asyncio.get_running_loop().start_tls(
            connection.transport, secured, self._tls, server_hostname=url.host
        )
        secured.connection_made(cast(asyncio.Transport, transport))  # None is for datagrams
        return secured


def encode_head(start_line: bytes, headers: list[tuple[bytes, bytes]]) -> bytes:
    """Return the head of a request. Raise httpx.LocalProtocolError if a line break is in it."""
    lines = [start_line, *[b"%b: %b" % header for header in headers]]
    head = b"\r\n".join(lines)
    if head.count(b"\n") >= len(lines) or head.count(b"\r") >= len(lines):
        raise httpx.LocalProtocolError("A header of the request contains a line break")
    return head + b"\r\n\r\n"


async def connect_socket(host: str, port: int) -> socket.socket:
    """Return a socket that is connected to one of the host's addresses.

    The next address is tried when one fails or takes longer than ADDRESS_DELAY_SECONDS (RFC 8305);
    the first to connect wins. uvloop's create_connection would try one after the other.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    connected: list[socket.socket] = []
    failures: list[OSError] = []

    async def attempt(family: socket.AddressFamily, address: Any, failed: anyio.Event) -> None:
        try:
            connected.append(opened.enter_context(await _connect_address(family, address)))
            tasks.cancel_scope.cancel()
        except OSError as error:
            failures.append(error)
            failed.set()

    with ExitStack() as opened:
        async with anyio.create_task_group() as tasks:
            for family, *_, address in found:
                failed = anyio.Event()
                tasks.start_soon(attempt, family, address, failed)
                with anyio.move_on_after(ADDRESS_DELAY_SECONDS):
                    await failed.wait()
        if connected:
            # The others are closed here, if several addresses connected at the same moment.
            return socket.socket(fileno=connected[0].detach())
    raise failures[-1]


async def _connect_address(family: socket.AddressFamily, address: Any) -> socket.socket:
    connecting = socket.socket(family, socket.SOCK_STREAM)
    try:
        connecting.setblocking(False)
        connecting.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.get_running_loop().sock_connect(connecting, address)
    except BaseException:
        connecting.close()
        raise
    return connecting


def _port(url: httpx.URL) -> int:
    return url.port or (443 if url.scheme == "https" else 80)


def bypasses_proxy(url: httpx.URL, no_proxy: str) -> bool:
    """Return whether `no_proxy`, a list as in NO_PROXY, excludes `url` from the proxy.

    An entry is `*`, a name (which includes its subdomains), an address or a network, each with an
    optional port. IPv6 addresses may have brackets.
    """
    return any(_matches(url, entry) for entry in no_proxy.lower().replace(",", " ").split())


def _matches(url: httpx.URL, entry: str) -> bool:
    name, _, port = entry.rpartition(":")
    if name and port.isdecimal() and (":" not in name or name.endswith("]")):
        if int(port) != _port(url):
            return False
        entry = name
    with suppress(ValueError):
        return ipaddress.ip_address(url.host) in ipaddress.ip_network(
            entry.strip("[]"), strict=False
        )
    domain = entry.removeprefix("*").removeprefix(".")
    return entry == "*" or url.host == domain or url.host.endswith(f".{domain}")
