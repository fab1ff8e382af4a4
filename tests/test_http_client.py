"""HTTPTransport as an HTTP client: framing, hostile servers, kept connections, TLS, proxies."""

import asyncio
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import httpx
import pytest

import http_client
from http_client import HTTPTransport, ResponseBody, bypasses_proxy, connect_socket

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
PLAIN = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
TEXT = "Grüße, 世界".encode()
CHUNKED = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"5;name=value\r\n" + TEXT[:5] + b"\r\n" + b"%x\r\n" % len(TEXT[5:]) + TEXT[5:] + b"\r\n"
    b"0\r\nTrailer: ignored\r\n\r\n"
)
SIZED = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(TEXT) + TEXT
UNTIL_CLOSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n" + TEXT


@asynccontextmanager
async def serving(serve: Serve, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """Run a server on a free port. `serve` is called per connection, which is then closed."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=tls)
    async with server:
        scheme = "https" if tls else "http"
        yield f"{scheme}://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def read_request(reader: asyncio.StreamReader) -> bytes:
    """Return the head of the next request, after its body has been read."""
    head = await reader.readuntil(b"\r\n\r\n")
    await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
    return head


def answering(*parts: bytes) -> Serve:
    """Answer one request with these parts, each in a segment of its own, and close."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0)

    return serve


def request(url: str, connect: float = 10.0) -> httpx.Request:
    extensions = {"timeout": {"connect": connect}}
    return httpx.Request("POST", f"{url}/v1/x?y=1", content=b"{}", extensions=extensions)


async def fetch(transport: HTTPTransport, url: str) -> tuple[int, bytes]:
    """Send a request and return the status and the pushed body."""
    response = await transport.handle_async_request(request(url))
    body = bytearray()
    try:
        await response.extensions["body"].push(body.extend)
    finally:
        await response.aclose()
    return response.status_code, bytes(body)


@pytest.fixture
async def transport() -> AsyncIterator[HTTPTransport]:
    transport = HTTPTransport(PLAIN)
    yield transport
    await transport.aclose()


# Framing


@pytest.mark.parametrize(
    "message", [CHUNKED, SIZED, UNTIL_CLOSE], ids=["chunked", "length", "until close"]
)
async def test_body_is_the_same_wherever_the_response_is_split(
    transport: HTTPTransport, message: bytes
) -> None:
    splits = iter(range(1, len(message)))

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        split = next(splits)
        writer.write(message[:split])
        await writer.drain()
        await asyncio.sleep(0)
        writer.write(message[split:])

    async with serving(serve) as url:
        for _ in range(1, len(message)):
            assert await fetch(transport, url) == (200, TEXT)


async def test_body_is_the_same_in_segments_of_one_byte(transport: HTTPTransport) -> None:
    async with serving(answering(*[bytes([byte]) for byte in CHUNKED])) as url:
        assert await fetch(transport, url) == (200, TEXT)


async def test_iterating_returns_the_whole_body(transport: HTTPTransport) -> None:
    async with serving(answering(CHUNKED)) as url:
        response = await transport.handle_async_request(request(url))
        assert b"".join([part async for part in response.extensions["body"]]) == TEXT
        await response.aclose()


async def test_httpx_client_can_use_the_transport(transport: HTTPTransport) -> None:
    async with serving(answering(SIZED)) as url, httpx.AsyncClient(transport=transport) as client:
        response = await client.post(url, content=b"{}")
    assert (response.status_code, response.content) == (200, TEXT)


@pytest.mark.parametrize("message", [CHUNKED, SIZED], ids=["chunked", "length"])
async def test_body_that_is_cut_short_is_an_error_after_what_came(
    transport: HTTPTransport, message: bytes
) -> None:
    end = message.index(TEXT[5:])
    async with serving(answering(message[: end + 2])) as url:
        response = await transport.handle_async_request(request(url))
        body = bytearray()
        with pytest.raises(httpx.ReadError):
            await response.extensions["body"].push(body.extend)
        await response.aclose()
    assert bytes(body) == TEXT[: len(body)] != b""


async def test_body_that_arrived_before_a_failure_is_pushed_first(transport: HTTPTransport) -> None:
    failed = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(CHUNKED[:-40])
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        failed.set()

    async with serving(serve) as url:
        response = await transport.handle_async_request(request(url))
        await failed.wait()
        body = bytearray()
        with pytest.raises(httpx.ReadError):
            await response.extensions["body"].push(body.extend)
        assert body
        await response.aclose()


async def test_reason_phrase_is_ignored(transport: HTTPTransport) -> None:
    message = SIZED.replace(b"OK", b"\xff\xfe \x80")
    async with serving(answering(message)) as url:
        assert await fetch(transport, url) == (200, TEXT)


async def test_error_in_the_consumer_ends_the_response_and_is_raised(
    transport: HTTPTransport,
) -> None:
    calls = []

    def consume(data: bytes) -> None:
        calls.append(data)
        raise ValueError("full")

    parts = [CHUNKED[:-30], *[CHUNKED[i : i + 1] for i in range(len(CHUNKED) - 30, len(CHUNKED))]]
    async with serving(answering(*parts)) as url:
        response = await transport.handle_async_request(request(url))
        with pytest.raises(ValueError, match="full"):
            await response.extensions["body"].push(consume)
        await response.aclose()
    assert len(calls) == 1


async def test_stopped_body_returns_and_closes_the_connection(transport: HTTPTransport) -> None:
    closed = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(CHUNKED[:-5])
        try:
            assert await reader.read(1) == b""
        finally:
            closed.set()

    async with serving(serve) as url:
        response = await transport.handle_async_request(request(url))
        body: ResponseBody = response.extensions["body"]
        await body.push(lambda data: body.stop())
        await response.aclose()
        await closed.wait()


async def test_cancelled_request_closes_the_connection(transport: HTTPTransport) -> None:
    arrived, closed = asyncio.Event(), asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        arrived.set()
        try:
            await reader.read(1)
        finally:
            closed.set()

    async with serving(serve) as url:
        task = asyncio.create_task(fetch(transport, url))
        await arrived.wait()
        task.cancel()
        await closed.wait()
        with pytest.raises(asyncio.CancelledError):
            await task


# Hostile servers


@pytest.mark.parametrize(
    "message",
    {
        "not HTTP": b"SSH-2.0-OpenSSH\r\n\r\n",
        "two framings": SIZED.replace(b"\r\n\r\n", b"\r\nTransfer-Encoding: chunked\r\n\r\n", 1),
        "bad chunk size": CHUNKED.replace(b"5;name=value", b"xyz"),
        "upgrade": b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\nabc",
        "many interim responses": b"HTTP/1.1 100 Continue\r\n\r\n" * 9 + SIZED,
        "endless interim responses": b"HTTP/1.1 103 Hints\r\nA: b\r\n\r\n" * 5000,
        "endless headers": b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 20_000,
        "one endless header": b"HTTP/1.1 200 OK\r\nA: " + b"b" * 100_000,
        "endless chunk extension": CHUNKED[:72] + b"5;" + b"x" * 100_000,
        "endless trailers": CHUNKED[:-2] + b"A: b\r\n" * 20_000,
    }.values(),
    ids=str,
)
async def test_invalid_or_endless_response_is_a_protocol_error(
    transport: HTTPTransport, message: bytes
) -> None:
    async with serving(answering(message)) as url:
        with pytest.raises(httpx.TransportError):
            await fetch(transport, url)


async def test_eight_interim_responses_are_skipped(transport: HTTPTransport) -> None:
    message = b"HTTP/1.1 100 Continue\r\nX: y\r\n\r\n" * 8 + SIZED
    async with serving(answering(message)) as url:
        assert await fetch(transport, url) == (200, TEXT)


async def test_reading_stops_while_nothing_takes_the_body(transport: HTTPTransport) -> None:
    size = 2**25
    sent = 0
    blocked = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        block = b"x" * 2**16
        while sent < size:
            writer.write(block)
            sent += len(block)
            try:
                await asyncio.wait_for(writer.drain(), 0.5)
            except TimeoutError:
                blocked.set()
                await writer.drain()

    async with serving(serve) as url:
        response = await transport.handle_async_request(request(url))
        await blocked.wait()
        assert sent < size
        received = 0

        def consume(data: bytes) -> None:
            nonlocal received
            received += len(data)

        await response.extensions["body"].push(consume)
        await response.aclose()
    assert received == size


async def test_body_can_be_paused_and_resumed_at_every_read(transport: HTTPTransport) -> None:
    block = b"x" * 1000
    async with serving(
        answering(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", *[block] * 100)
    ) as url:
        response = await transport.handle_async_request(request(url))
        body: ResponseBody = response.extensions["body"]
        received = bytearray()

        def consume(data: bytes) -> None:
            received.extend(data)
            body.pause()
            asyncio.get_running_loop().call_soon(body.resume)

        await body.push(consume)
        await response.aclose()
    assert bytes(received) == block * 100


def test_request_header_with_a_line_break_is_rejected() -> None:
    bad = httpx.Request("POST", "http://a", headers={"X": "a\r\nHost: b"}, content=b"")
    with pytest.raises(httpx.LocalProtocolError):
        HTTPTransport(PLAIN)._encode(bad)


# Kept connections


def keeping(log: list[int], *behaviours: str) -> Serve:
    """Answer requests on each connection. After the n-th answer, act as `behaviours[n]` says."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = len(log)
        log.append(0)
        while True:
            await read_request(reader)
            log[number] += 1
            behaviour = behaviours[log[number] - 1] if log[number] <= len(behaviours) else "keep"
            if behaviour == "close unanswered":
                return
            writer.write(SIZED if behaviour != "until close" else UNTIL_CLOSE)
            if behaviour == "extra":
                writer.write(b"garbage")
            if behaviour in ("close", "until close"):
                return

    return serve


async def test_connection_is_reused(transport: HTTPTransport) -> None:
    log: list[int] = []
    async with serving(keeping(log)) as url:
        for _ in range(5):
            assert await fetch(transport, url) == (200, TEXT)
    assert log == [5]


@pytest.mark.parametrize("behaviour", ["close", "until close", "extra"])
async def test_connection_that_cannot_be_reused_is_not(
    transport: HTTPTransport, behaviour: str
) -> None:
    log: list[int] = []
    async with serving(keeping(log, behaviour)) as url:
        for _ in range(3):
            assert await fetch(transport, url) == (200, TEXT)
    assert log[0] == 1
    assert sum(log) == 3


async def test_request_on_a_reused_connection_that_closes_at_once_is_repeated(
    transport: HTTPTransport,
) -> None:
    log: list[int] = []
    async with serving(keeping(log, "keep", "close unanswered")) as url:
        assert await fetch(transport, url) == (200, TEXT)
        assert await fetch(transport, url) == (200, TEXT)
    assert log == [2, 1]


async def test_request_on_a_new_connection_that_closes_at_once_is_not_repeated(
    transport: HTTPTransport,
) -> None:
    log: list[int] = []
    async with serving(keeping(log, "close unanswered")) as url:
        with pytest.raises(httpx.TransportError):
            await fetch(transport, url)
    assert log == [1]


async def test_request_is_not_repeated_after_a_byte_of_the_response(
    transport: HTTPTransport,
) -> None:
    requests = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal requests
        while True:
            await read_request(reader)
            requests += 1
            writer.write(SIZED if requests == 1 else b"H")
            if requests > 1:
                return

    async with serving(serve) as url:
        await fetch(transport, url)
        with pytest.raises(httpx.TransportError):
            await fetch(transport, url)
    assert requests == 2


async def test_request_is_not_repeated_when_the_connection_closes_later_than_a_second(
    transport: HTTPTransport,
) -> None:
    requests = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal requests
        while True:
            await read_request(reader)
            requests += 1
            if requests > 1:
                await asyncio.sleep(http_client.STALE_SECONDS + 0.2)
                return
            writer.write(SIZED)

    async with serving(serve) as url:
        await fetch(transport, url)
        with pytest.raises(httpx.TransportError):
            await fetch(transport, url)
    assert requests == 2


async def test_paused_connection_reads_again_when_it_is_reused(transport: HTTPTransport) -> None:
    log: list[int] = []
    async with serving(keeping(log)) as url:
        response = await transport.handle_async_request(request(url))
        body: ResponseBody = response.extensions["body"]
        await body.push(lambda data: body.pause())
        await response.aclose()
        assert await fetch(transport, url) == (200, TEXT)
    assert log == [2]


async def test_idle_connection_that_receives_something_is_closed(
    transport: HTTPTransport,
) -> None:
    garbage, closed, requests = asyncio.Event(), asyncio.Event(), 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal requests
        await read_request(reader)
        requests += 1
        writer.write(SIZED)
        if requests == 1:
            await garbage.wait()
            writer.write(b"garbage")
            # The client closes the connection.
            await reader.read(1)
            closed.set()

    async with serving(serve) as url:
        await fetch(transport, url)
        garbage.set()
        await closed.wait()
        assert await fetch(transport, url) == (200, TEXT)
    assert requests == 2


# Connecting


async def test_refused_connection_is_a_connect_error(transport: HTTPTransport) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(httpx.ConnectError):
        await fetch(transport, f"http://127.0.0.1:{port}")


async def test_unknown_host_is_a_connect_error(transport: HTTPTransport) -> None:
    with pytest.raises(httpx.ConnectError):
        await fetch(transport, "http://host.invalid")


async def test_server_that_never_starts_tls_is_a_connect_timeout() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    transport = HTTPTransport(httpx.create_ssl_context())
    async with serving(serve) as url:
        with pytest.raises(httpx.ConnectTimeout):
            await transport.handle_async_request(request(url.replace("http:", "https:"), 0.3))


async def test_next_address_is_tried_when_one_fails() -> None:
    """localhost is ::1 and 127.0.0.1, but the server listens on the latter alone."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        connected = await connect_socket("localhost", server.getsockname()[1])
        assert connected.getpeername()[0] == "127.0.0.1"
        assert connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        connected.close()


# TLS


def make_certificate(directory: Path, name: str, san: str, *prefix: str) -> tuple[Path, Path]:
    """Return a self-signed certificate for the subject alternative name `san`, and its key.

    It is valid for two days, on the clock under which the command `prefix` runs openssl.
    """
    key, certificate = directory / f"{name}.key", directory / f"{name}.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}"]
    command += ["-addext", f"subjectAltName={san}", "-days", "2"]
    command += ["-addext", "keyUsage=critical,digitalSignature,keyCertSign"]
    command += ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*prefix, *command], check=True, capture_output=True)
    return certificate, key


def server_context(certificate: Path, key: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    return context


@pytest.mark.slow
async def test_trusted_server_is_reached_over_tls(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path, "server", "IP:127.0.0.1")
    transport = HTTPTransport(ssl.create_default_context(cafile=str(certificate)))
    log: list[int] = []
    async with serving(keeping(log), server_context(certificate, key)) as url:
        assert await fetch(transport, url) == (200, TEXT)
        assert await fetch(transport, url) == (200, TEXT)
        await transport.aclose()
    assert log == [2]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["wrong name", "unknown authority", "expired"])
async def test_server_that_cannot_be_verified_is_a_connect_error(tmp_path: Path, case: str) -> None:
    name = "DNS:other.example" if case == "wrong name" else "IP:127.0.0.1"
    past = ("faketime", "-f", "-10d") if case == "expired" else ()
    certificate, key = make_certificate(tmp_path, "server", name, *past)
    other, _ = make_certificate(tmp_path, "other", name)
    trusted = other if case == "unknown authority" else certificate
    context = ssl.create_default_context(cafile=str(trusted))
    requests: list[int] = []
    async with serving(keeping(requests), server_context(certificate, key)) as url:
        with pytest.raises(httpx.ConnectError, match=r"(?i)certificate"):
            await fetch(HTTPTransport(context), url)
    assert sum(requests) == 0


# Proxies


@asynccontextmanager
async def proxying(log: list[bytes], status: bytes = b"200") -> AsyncIterator[str]:
    """Run a proxy that logs the head of each request and tunnels or forwards it."""

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        log.append(head)
        method, target, _ = head.split(b" ", 2)
        if method == b"CONNECT":
            writer.write(b"HTTP/1.1 %b Reason\r\n\r\n" % status)
            if status != b"200":
                return
            host, _, port = target.decode().rpartition(":")
            forwarded = b""
        else:
            url = httpx.URL(target.decode())
            host, port = url.host, str(url.port)
            forwarded = head.replace(target, url.raw_path, 1)
        there, out = await asyncio.open_connection(host.strip("[]"), int(port))
        out.write(forwarded)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(copy, reader, out)
            tasks.start_soon(copy, there, writer)

    async with serving(serve) as url:
        yield url


async def test_http_goes_through_a_proxy_in_absolute_form_with_credentials() -> None:
    log: list[bytes] = []
    async with serving(answering(SIZED)) as url, proxying(log) as proxy:
        address = proxy.replace("//", "//user:pass@")
        transport = HTTPTransport(PLAIN, httpx.Proxy(address))
        assert await fetch(transport, url) == (200, TEXT)
        await transport.aclose()
    [head] = log
    assert head.startswith(f"POST {url}/v1/x?y=1 HTTP/1.1\r\n".encode())
    assert b"Proxy-Authorization: Basic dXNlcjpwYXNz\r\n" in head


@pytest.mark.slow
async def test_https_goes_through_a_tunnel_that_is_reused(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path, "server", "IP:127.0.0.1")
    context = ssl.create_default_context(cafile=str(certificate))
    log: list[bytes] = []
    requests: list[int] = []
    tls = server_context(certificate, key)
    async with serving(keeping(requests), tls) as url, proxying(log) as proxy:
        transport = HTTPTransport(context, httpx.Proxy(proxy.replace("//", "//user:pass@")))
        assert await fetch(transport, url) == (200, TEXT)
        assert await fetch(transport, url) == (200, TEXT)
        await transport.aclose()
    [head] = log
    assert head.startswith(f"CONNECT 127.0.0.1:{httpx.URL(url).port} HTTP/1.1\r\n".encode())
    assert b"Proxy-Authorization: Basic dXNlcjpwYXNz\r\n" in head
    # The provider's key must not reach the proxy.
    assert b"/v1/x" not in head
    assert requests == [2]


async def test_tunnel_carries_tls_without_certificates() -> None:
    """An anonymous cipher needs no certificate, so that this test needs no other program."""
    server, client = (ssl.SSLContext(p) for p in (ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT))
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    for context in (server, client):
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers("AECDH-AES256-SHA:@SECLEVEL=0")
    requests: list[int] = []
    async with serving(keeping(requests), server) as url, proxying([]) as proxy:
        transport = HTTPTransport(client, httpx.Proxy(proxy))
        assert await fetch(transport, url) == (200, TEXT)
        assert await fetch(transport, url) == (200, TEXT)
        await transport.aclose()
    assert requests == [2]


@pytest.mark.slow
async def test_tunnel_checks_the_name_of_the_server(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path, "server", "DNS:other.example")
    context = ssl.create_default_context(cafile=str(certificate))
    log: list[bytes] = []
    async with (
        serving(keeping([]), server_context(certificate, key)) as url,
        proxying(log) as proxy,
    ):
        with pytest.raises(httpx.ConnectError, match=r"(?i)certificate"):
            await fetch(HTTPTransport(context, httpx.Proxy(proxy)), url)


async def test_rejected_tunnel_is_a_proxy_error() -> None:
    log: list[bytes] = []
    async with proxying(log, b"407") as proxy:
        transport = HTTPTransport(PLAIN, httpx.Proxy(proxy))
        with pytest.raises(httpx.ProxyError, match="407"):
            await fetch(transport, "https://provider.example")
    assert log[0].startswith(b"CONNECT provider.example:443 ")


@pytest.mark.parametrize(
    ("url", "no_proxy", "bypassed"),
    [
        ("http://api.example", "", False),
        ("http://api.example", "*", True),
        ("http://api.example", "other, API.example", True),
        ("http://api.example", "other api.example", True),
        ("http://v1.api.example", "api.example", True),
        ("http://v1.api.example", ".api.example", True),
        ("http://v1.api.example", "*.api.example", True),
        ("http://myapi.example", "api.example", False),
        ("http://api.example", "api.example:80", True),
        ("http://api.example", "api.example:8080", False),
        ("http://api.example:8080", "api.example:8080", True),
        ("https://api.example", "api.example:443", True),
        ("http://10.1.2.3", "10.0.0.0/8", True),
        ("http://11.1.2.3", "10.0.0.0/8", False),
        ("http://10.1.2.3", "10.1.2.3", True),
        ("http://10.1.2.3:81", "10.1.2.3:80", False),
        ("http://[::1]:8000", "::1", True),
        ("http://[::1]:8000", "[::1]", True),
        ("http://[::1]:8000", "[::1]:8000", True),
        ("http://[::1]:8001", "[::1]:8000", False),
        ("http://[2001:db8::5]", "2001:db8::/32", True),
        ("http://api.example", "10.0.0.0/8", False),
        ("http://api.example", ".", False),
    ],
)
def test_no_proxy_matches_names_networks_and_ports(url: str, no_proxy: str, bypassed: bool) -> None:
    assert bypasses_proxy(httpx.URL(url), no_proxy) is bypassed


# Real servers


@pytest.mark.slow
async def test_nginx_and_tinyproxy_are_understood(transport: HTTPTransport, tmp_path: Path) -> None:
    ports = []
    for _ in range(2):
        with socket.create_server(("127.0.0.1", 0)) as server:
            ports.append(server.getsockname()[1])
    (tmp_path / "body").write_bytes(b"x" * 300_000)
    nginx = f"""
        daemon off; master_process off; pid {tmp_path}/pid; error_log stderr; events {{}}
        http {{ access_log off; client_body_temp_path {tmp_path}; server {{
            listen 127.0.0.1:{ports[0]};
            location / {{
                root {tmp_path}; try_files /body =404; error_page 405 =200 /body; }} }} }}"""
    (tmp_path / "nginx.conf").write_text(nginx)
    proxy = f"Port {ports[1]}\nListen 127.0.0.1\nTimeout 60\nAllow 127.0.0.1\n"
    (tmp_path / "proxy.conf").write_text(proxy)
    commands = [
        ["nginx", "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf"), "-e", "stderr"],
        ["tinyproxy", "-d", "-c", str(tmp_path / "proxy.conf")],
    ]
    nothing = asyncio.subprocess.DEVNULL
    processes = [
        await asyncio.create_subprocess_exec(*command, stdout=nothing, stderr=nothing)
        for command in commands
    ]
    through_proxy = HTTPTransport(PLAIN, httpx.Proxy(f"http://127.0.0.1:{ports[1]}"))
    try:
        for port in ports:
            await wait_for_port(port)
        for sender in (transport, through_proxy):
            for _ in range(3):
                status, body = await fetch(sender, f"http://127.0.0.1:{ports[0]}")
                assert (status, len(body)) == (200, 300_000)
    finally:
        await through_proxy.aclose()
        for process in processes:
            process.terminate()
            await process.wait()


async def wait_for_port(port: int) -> None:
    """Return when a process listens on the port."""
    with anyio.fail_after(20):
        while True:
            try:
                (await connect_socket("127.0.0.1", port)).close()
            except OSError:
                await asyncio.sleep(0.05)
            else:
                return
