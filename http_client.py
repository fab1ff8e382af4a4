"""An HTTP/1.1 client for providers: an httpx transport on asyncio and httptools.

`ResponseBody.push` calls a function with the bytes of a response inside the event loop's read
callback, so that no task has to wake for an event of a stream. Iterating a body, as httpx does,
works too. There are no redirects, cookies, HTTP/2 or decompression.
"""

import asyncio
import base64
import ipaddress
import select
import socket
import ssl
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from itertools import chain, zip_longest
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

Address = tuple[socket.AddressFamily, Any]


class ResponseBody(httpx.AsyncByteStream):
    """One response as it arrives on a connection. `head` is done when its headers are complete.

    The body is read once, either by `push` or by iteration.
    """

    def __init__(self, connection: "Connection") -> None:
        self._connection = connection
        self._parser = httptools.HttpResponseParser(self)
        self._loop = asyncio.get_running_loop()
        self.head: asyncio.Future[None] = self._loop.create_future()
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.received = False
        self._interim_responses = 0
        self._overhead_bytes = 0
        self._parts: list[bytes] = []
        self._held = bytearray()
        self._consume: Callable[[bytes], None] | None = None
        # Set whenever a waiting reader has to look again: bytes are held, or the body has ended.
        self._changed: asyncio.Future[None] | None = None
        self._complete = self._stopped = self._reusable = False
        self._error: Exception | None = None

    # Reading

    async def push(self, consume: Callable[[bytes], None]) -> None:
        """Call `consume` with the body's bytes as they arrive; return at its end or after `stop`.

        An exception in `consume` ends the response and is raised here, as is httpx.TransportError
        if the body is cut short.
        """
        if self._held:
            held, self._held = bytes(self._held), bytearray()
            consume(held)
        self._consume = consume
        self.resume()
        while not (self._complete or self._stopped or self._error):
            await self._wait()
        if self._error and not self._stopped:
            raise self._error

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            if self._held:
                held, self._held = bytes(self._held), bytearray()
                self.resume()
                yield held
            elif self._complete:
                return
            elif self._error:
                raise self._error
            else:
                await self._wait()

    def stop(self) -> None:
        """Let `push` return now. What is still to come of the body is not read."""
        self._stopped = True
        self._notify()

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

    async def _wait(self) -> None:
        self._changed = self._loop.create_future()
        await self._changed

    def _notify(self) -> None:
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)

    # Called by the connection

    def feed(self, data: bytes) -> None:
        """Parse what arrived and pass on the bytes of the body."""
        self.received = True
        self._overhead_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            # Bytes that follow a complete response belong to nothing: only this connection ends.
            self._reusable = False
            self.fail(httpx.RemoteProtocolError(f"The response is not valid HTTP/1.1: {error}"))
        if self._parts:
            body = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
            self._parts.clear()
            self._overhead_bytes = 0
            self._deliver(body)
        elif self._overhead_bytes > MAX_OVERHEAD_BYTES:
            problem = f"more than {MAX_OVERHEAD_BYTES} bytes of headers, chunk sizes or trailers"
            self.fail(httpx.RemoteProtocolError(f"The response has {problem}"))
        if self._complete:
            self._notify()

    def _deliver(self, body: bytes) -> None:
        if self._stopped or self._error:
            return
        if self._consume is None:
            self._held += body
            if len(self._held) > MAX_HELD_BYTES:
                self.pause()
            self._notify()
            return
        try:
            self._consume(body)
        except Exception as error:
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """End the response with `error`, unless it is complete or has failed before."""
        if self._complete or self._error:
            return
        self._error = error
        if not self.head.done():
            self.head.set_exception(error)
        self._notify()

    def connection_lost(self, error: Exception | None) -> None:
        """End the response: with an error, unless the end of the connection is its end."""
        if error is None and self.head.done() and self._until_close:
            self._complete = True
            self._notify()
            return
        problem = "The connection was closed before the response was complete"
        failure = httpx.ReadError(problem) if error else httpx.RemoteProtocolError(problem)
        failure.__cause__ = error
        self.fail(failure)

    @property
    def _until_close(self) -> bool:
        """Whether the body ends with the connection (RFC 9112, section 6.3, rule 8)."""
        names = [name.lower() for name, _ in self.headers]
        return not (b"content-length" in names or b"transfer-encoding" in names)

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

    def on_body(self, body: bytes) -> None:
        self._parts.append(body)

    def on_message_complete(self) -> None:
        if self.head.done() and not self._error:
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
        self.closed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # asyncio declares only what read, write and datagram transports have in common.
        self.transport = cast(asyncio.Transport, transport)

    def send(self, request: bytes) -> ResponseBody:
        """Send a whole request and return its response, of which nothing has arrived yet."""
        self._response = ResponseBody(self)
        self.transport.write(request)
        return self._response

    def data_received(self, data: bytes) -> None:
        if self._response is None:
            # No request is running: the server is confused, or about to close.
            self.abort()
        else:
            self._response.feed(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
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
        if self._response is None:
            return
        self._response = None
        # A connection that does not read would never notice that the server closes it.
        self.set_reading(True)
        if reusable and not self.transport.is_closing():
            self._on_idle(self)
        else:
            self.abort()

    def abort(self) -> None:
        self.closed = True
        self.transport.abort()

    def is_alive(self) -> bool:
        """Return whether an idle connection can be used: open, and with nothing to read.

        Bytes or an end that the event loop has not seen yet make a socket readable.
        """
        if self.closed or self.transport.is_closing():
            return False
        readable = select.poll()
        readable.register(self.transport.get_extra_info("socket").fileno(), select.POLLIN)
        return not readable.poll(0)


class HTTPTransport(httpx.AsyncBaseTransport):
    """Sends requests over kept connections, directly or through an HTTP proxy.

    The response's extension `body` is its `ResponseBody`. Of a request's timeouts only `connect`
    applies. It covers name resolution, all addresses, the proxy and TLS. The rest is the caller's.
    """

    def __init__(self, tls: ssl.SSLContext, proxy: httpx.Proxy | None = None) -> None:
        self._tls = tls
        self._proxy = proxy
        # By origin; the connection that was used last is used first, so that others can expire.
        self._idle: defaultdict[str, list[tuple[Connection, asyncio.TimerHandle]]]
        self._idle = defaultdict(list)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send `request` and return when the head of its response has arrived."""
        message = self._encode(request, await request.aread())
        now = asyncio.get_running_loop().time
        connection = self._take_idle(request.url)
        if connection is not None:
            sent_at = now()
            response = connection.send(message)
            try:
                await response.head
                return self._wrap(response)
            except httpx.TransportError:
                connection.finish(reusable=False)
                if response.received or now() - sent_at > STALE_SECONDS:
                    raise
            except BaseException:
                connection.finish(reusable=False)
                raise
        connection = await self._connect(request)
        response = connection.send(message)
        try:
            await response.head
        except BaseException:
            connection.finish(reusable=False)
            raise
        return self._wrap(response)

    def _wrap(self, response: ResponseBody) -> httpx.Response:
        extensions = {"http_version": b"HTTP/1.1", "body": response}
        return httpx.Response(
            response.status, headers=response.headers, stream=response, extensions=extensions
        )

    async def aclose(self) -> None:
        for connections in self._idle.values():
            for connection, expiry in connections:
                expiry.cancel()
                connection.abort()
        self._idle.clear()

    def _encode(self, request: httpx.Request, body: bytes) -> bytes:
        """The bytes of a request: head and body in one write."""
        url = request.url
        target = url.raw_path
        headers = request.headers.raw
        if self._proxy is not None and url.scheme == "http":
            # RFC 9112, section 3.2.2: a proxy is sent the absolute form.
            target = _origin(url).encode() + target
            headers = [*headers, *self._proxy_headers()]
        names = {name.lower() for name, _ in headers}
        if b"host" not in names:
            headers = [(b"Host", url.netloc), *headers]
        if b"content-length" not in names and (body or request.method in ("POST", "PUT", "PATCH")):
            headers = [*headers, (b"Content-Length", b"%d" % len(body))]
        lines = [b"%b %b HTTP/1.1" % (request.method.encode(), target)]
        lines += [b"%b: %b" % header for header in headers]
        head = b"\r\n".join(lines)
        if head.count(b"\n") >= len(lines) or head.count(b"\r") >= len(lines):
            raise httpx.LocalProtocolError("A header of the request contains a line break")
        return head + b"\r\n\r\n" + body

    def _proxy_headers(self) -> list[tuple[bytes, bytes]]:
        if self._proxy is None or self._proxy.raw_auth is None:
            return []
        credentials = base64.b64encode(b":".join(self._proxy.raw_auth))
        return [(b"Proxy-Authorization", b"Basic " + credentials)]

    # Connections

    def _take_idle(self, url: httpx.URL) -> Connection | None:
        connections = self._idle[_origin(url)]
        while connections:
            connection, expiry = connections.pop()
            expiry.cancel()
            if connection.is_alive():
                return connection
            connection.abort()
        return None

    async def _connect(self, request: httpx.Request) -> Connection:
        """Open a connection for `request` within its connect timeout.

        Raise httpx.ConnectTimeout, httpx.ConnectError or httpx.ProxyError.
        """
        seconds = request.extensions.get("timeout", {}).get("connect")
        try:
            with anyio.fail_after(seconds):
                return await self._open(request.url)
        except TimeoutError as error:
            raise httpx.ConnectTimeout("The connection took too long") from error
        except (OSError, UnicodeError) as error:
            raise httpx.ConnectError(str(error)) from error

    async def _open(self, url: httpx.URL) -> Connection:
        loop = asyncio.get_running_loop()
        connections = self._idle[_origin(url)]

        def keep(connection: Connection) -> None:
            expiry = loop.call_later(IDLE_SECONDS, connection.abort)
            connections.append((connection, expiry))

        secure = url.scheme == "https"
        server = self._proxy.url if self._proxy is not None else url
        open_socket = await connect_to_any(server.host, _port(server))
        tunnel = secure and self._proxy is not None
        tls = self._tls if secure and not tunnel else None
        _, connection = await loop.create_connection(
            lambda: Connection(keep),
            sock=open_socket,
            ssl=tls,
            server_hostname=url.host if tls else None,
        )
        if tunnel:
            try:
                return await self._start_tunnel(url, connection, keep)
            except BaseException:
                connection.abort()
                raise
        return connection

    async def _start_tunnel(
        self, url: httpx.URL, connection: Connection, keep: Callable[[Connection], None]
    ) -> Connection:
        """Ask the proxy for a tunnel (RFC 9110, section 9.3.6) and start TLS in it."""
        authority = f"{_bracketed(url.host)}:{_port(url)}".encode()
        lines = [b"CONNECT %b HTTP/1.1" % authority, b"Host: %b" % authority]
        lines += [b"%b: %b" % header for header in self._proxy_headers()]
        response = connection.send(b"\r\n".join([*lines, b"", b""]))
        await response.head
        if not 200 <= response.status < 300:
            raise httpx.ProxyError(f"The proxy answered CONNECT with status {response.status}")
        secured = Connection(keep)
        transport = await asyncio.get_running_loop().start_tls(
            connection.transport, secured, self._tls, server_hostname=url.host
        )
        if transport is None:
            raise httpx.ProxyError("The proxy closed the tunnel")
        secured.connection_made(transport)
        return secured


async def connect_to_any(host: str, port: int) -> socket.socket:
    """Return a socket that is connected to one of the host's addresses.

    The next address is tried when one fails or takes longer than ADDRESS_DELAY_SECONDS (RFC 8305);
    the first to connect wins. Raise the last OSError if none does.
    """
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = _alternate([(family, address) for family, _, _, _, address in found])
    attempts: set[asyncio.Task[socket.socket]] = set()
    error: BaseException = OSError(f"{host} has no address")
    try:
        while addresses or attempts:
            if addresses:
                attempts.add(loop.create_task(_connect_socket(*addresses.pop(0))))
            delay = ADDRESS_DELAY_SECONDS if addresses else None
            done, _ = await asyncio.wait(
                attempts, timeout=delay, return_when=asyncio.FIRST_COMPLETED
            )
            for attempt in done:
                attempts.discard(attempt)
                failure = attempt.exception()
                if failure is None:
                    return attempt.result()
                error = failure
        raise error
    finally:
        for attempt in attempts:
            attempt.cancel()
            attempt.add_done_callback(_close_result)


def _alternate(addresses: list[Address]) -> list[Address]:
    """Alternate between the address families, beginning with that of the first address."""
    same = [each for each in addresses if each[0] == addresses[0][0]]
    other = [each for each in addresses if each[0] != addresses[0][0]]
    return [each for each in chain.from_iterable(zip_longest(same, other)) if each is not None]


async def _connect_socket(family: socket.AddressFamily, address: Any) -> socket.socket:
    connecting = socket.socket(family, socket.SOCK_STREAM)
    try:
        connecting.setblocking(False)
        connecting.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.get_running_loop().sock_connect(connecting, address)
    except BaseException:
        connecting.close()
        raise
    return connecting


def _close_result(attempt: asyncio.Task[socket.socket]) -> None:
    """Close the socket of an attempt that succeeded after another one had won."""
    if not attempt.cancelled() and attempt.exception() is None:
        attempt.result().close()


def _origin(url: httpx.URL) -> str:
    return f"{url.scheme}://{_bracketed(url.host)}:{_port(url)}"


def _port(url: httpx.URL) -> int:
    return url.port or (443 if url.scheme == "https" else 80)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def bypasses_proxy(url: httpx.URL, no_proxy: str) -> bool:
    """Return whether `no_proxy`, a list as in NO_PROXY, excludes `url` from the proxy.

    An entry is `*`, a name (which includes its subdomains), an address or a network, each with an
    optional port. IPv6 addresses may have brackets.
    """
    entries = no_proxy.lower().replace(",", " ").split()
    return any(_matches(url, entry) for entry in entries)


def _matches(url: httpx.URL, entry: str) -> bool:
    if entry == "*":
        return True
    name, colon, port = entry.rpartition(":")
    if colon and port.isdecimal() and (":" not in name or name.endswith("]")):
        if int(port) != _port(url):
            return False
        entry = name
    entry = entry.strip("[]")
    with suppress(ValueError):
        network = ipaddress.ip_network(entry, strict=False)
        return ipaddress.ip_address(url.host) in network
    domain = entry.removeprefix("*").lstrip(".")
    return bool(domain) and (url.host == domain or url.host.endswith(f".{domain}"))
