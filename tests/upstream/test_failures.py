"""The cause of each failure, as both transports and a WebSocket show it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvloop
from websockets.exceptions import ConnectionClosed, ConnectionClosedError, InvalidHandshake
from websockets.frames import Close

from redbtc.config import parse_settings
from redbtc.upstream import upstreams
from redbtc.upstream.failures import cause_of, failed_to_connect
from redbtc.upstream.upstreams import UploadBody
from tests.helpers.certificates import Authority
from tests.helpers.gateway import PATIENCE_SECONDS
from tests.helpers.upstream import Received, Reply, Script, Socket, Upstream, json_answer
from tests.upstream.test_connecting import black_hole
from tests.upstream.test_transport import CHUNKED, OK, SIZED, raw

pytestmark = pytest.mark.promise_9

WAYS = ["asyncio", "httpx", "websocket"]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


async def failure_of(way: str, url: str, **table: Any) -> tuple[Exception, bool]:
    """Return what a request fails with, and whether the head of its response had come."""
    transport = "asyncio" if way == "websocket" else way
    table = {"name": "up", "base_url": url, "api_key_env": "", "transport": transport, **table}
    upstream = upstreams.Upstream(parse_settings({"upstreams": [table]}).upstreams[0])
    head_came = False
    try:
        if way == "websocket":
            await (await upstream.connect([])).recv()
        else:
            async with asyncio.timeout(upstream.settings.first_byte_timeout_seconds):
                body = UploadBody(b"{}")
                headers = [(b"content-length", b"2")]
                response = await upstream.open("POST", "/responses", b"", headers, body)
                head_came = True
                try:
                    async for _ in response.body:
                        pass
                finally:
                    await response.body.aclose()
    except (OSError, httpx2.HTTPError, InvalidHandshake, ConnectionClosed) as error:
        return error, head_came
    finally:
        await upstream.close()
    raise AssertionError("it did not fail")


def cause(way: str, url: str, **table: Any) -> tuple[str, bool]:
    """Return the cause of a request's failure, and whether it can't have reached the upstream."""

    async def main() -> tuple[str, bool]:
        async with asyncio.timeout(PATIENCE_SECONDS):
            error, head_came = await failure_of(way, url, **table)
            return cause_of(error, head_came), failed_to_connect(error)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main())


@pytest.mark.parametrize("way", WAYS)
def test_no_connection(way: str, authority: Authority, tmp_path: Path) -> None:
    """The causes by which nothing has reached the upstream."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    assert cause(way, f"http://127.0.0.1:{port}") == ("refused", True)
    assert cause(way, f"http://localhost:{port}") == ("refused", True)
    assert cause(way, "http://no-such-host.invalid") == ("dns", True)
    assert cause(way, "http://255.255.255.255") == ("unreachable", True)
    with black_hole("127.0.0.2", port):
        late = cause(way, f"http://127.0.0.2:{port}", connect_timeout_seconds=0.2)
        assert late == ("connect_timeout", True)
    other = Authority(tmp_path)
    with Upstream(authority.server_context()) as upstream:
        unknown = "tls: unable to get local issuer certificate"
        for ca_file in ("", str(other.file)):
            assert cause(way, upstream.url, ca_file=ca_file) == (unknown, True)
        for host, said in (("127.0.0.1", "IP address"), ("ip6-localhost", "Hostname")):
            with contextlib.suppress(socket.gaierror):
                socket.getaddrinfo(host, None)
                url = upstream.url.replace("localhost", host)
                mismatch = cause(way, url, ca_file=str(authority.file))
                assert mismatch in ((f"tls: {said} mismatch", True), ("refused", True))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("answer", "expected"), [(b"", "reset"), (OK, "tls: wrong version number")]
)
def test_an_answer_that_is_no_tls_handshake(way: str, answer: bytes, expected: str) -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        if answer:
            writer.write(answer)
            await reader.read()
            writer.close()
        else:
            writer.transport.abort()

    async def main() -> tuple[str, bool]:
        server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
        try:
            port = server.sockets[0].getsockname()[1]
            error, _ = await failure_of(way, f"https://127.0.0.1:{port}")
            return cause_of(error), failed_to_connect(error)
        finally:
            server.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(main()) == (expected, True)


async def answer_late(request: Received, reply: Reply) -> None:
    await reply.wait(request.closed)


async def stop_within_the_body(request: Received, reply: Reply) -> None:
    await reply.raw(SIZED + b"he")
    await reply.wait(request.closed)


ANSWERS: dict[str, tuple[str, Script]] = {
    "nothing": ("reset", raw(b"", "close")),
    "nothing, torn": ("reset", raw(b"", "tear")),
    "torn in the head": ("reset", raw(OK + b"Content-", "tear")),
    "torn in the body": ("reset", raw(SIZED + b"he", "tear")),
    "garbage": ("not_http", raw(b"garbage\r\n\r\n", "close")),
    "a TLS alert": ("not_http", raw(b"\x15\x03\x03\x00\x02\x02\x28", "close")),
    "half a head": ("reset", raw(OK + b"Content-", "close")),
    "bad length": ("protocol", raw(OK + b"Content-Length: five\r\n\r\nhello", "close")),
    "too short": ("protocol", raw(SIZED + b"hell", "close")),
    "bad chunk size": ("protocol", raw(CHUNKED + b"3\r\nabc\r\nxyz\r\n", "close")),
    "length and chunks": (
        "protocol",
        raw(OK + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "close"),
    ),
    "late": ("first_byte_timeout", answer_late),
}


@pytest.mark.parametrize("way", ["asyncio", "httpx"])
@pytest.mark.parametrize("name", ANSWERS)
def test_answers(upstream: Upstream, way: str, name: str) -> None:
    expected, upstream.script = ANSWERS[name]
    seconds = 1 if name == "late" else PATIENCE_SECONDS
    found = cause(way, upstream.url, first_byte_timeout_seconds=seconds)
    assert found == (expected, False)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (raw(b"", "close"), "reset"),
        (raw(b"", "tear"), "reset"),
        (raw(b"garbage\r\n\r\n", "close"), "not_http"),
        (json_answer({"error": {}}, 404), "protocol"),
        (raw(b"HTTP/1.1 101 Switching\r\nUpgrade: other\r\n\r\n"), "protocol"),
    ],
)
def test_answers_to_a_handshake(upstream: Upstream, answer: Script, expected: str) -> None:
    upstream.script = answer
    assert cause("websocket", upstream.url) == (expected, False)


def test_a_handshake_that_is_not_answered(upstream: Upstream) -> None:
    upstream.script = answer_late
    found = cause("websocket", upstream.url, connect_timeout_seconds=0.5)
    assert found == ("connect_timeout", True)


def test_ends_of_a_websocket(upstream: Upstream) -> None:
    async def close(sock: Socket) -> None:
        await sock.close(1011, "a secret of the upstream's")

    async def tear(sock: Socket) -> None:
        sock.tear()

    for talk in (close, tear):
        upstream.talk = talk
        assert cause("websocket", upstream.url) == ("reset", False)
    silent = ConnectionClosedError(None, Close(1011, "keepalive ping timeout"))
    assert cause_of(silent) == "idle_timeout"
    too_large = ConnectionClosedError(Close(1009, ""), Close(1009, "too big"), False)
    assert cause_of(too_large) == "protocol"


def test_timeouts() -> None:
    """Those of a deadline, which are no failure to connect, and of httpx2."""
    for error in (TimeoutError(), httpx2.ReadTimeout("")):
        assert cause_of(error) == "first_byte_timeout"
        assert cause_of(error, head_came=True) == "idle_timeout"
        assert not failed_to_connect(error)
    assert cause_of(httpx2.WriteTimeout("")) == "idle_timeout"
    assert cause_of(httpx2.LocalProtocolError("")) == "protocol"


def test_what_the_host_has_said_comes_first() -> None:
    """If its addresses failed in different ways."""
    errors = [OSError(101, "unreachable"), ConnectionRefusedError(111, "refused")]
    error = httpx2.ConnectError("all failed")
    error.__cause__ = ExceptionGroup("several", errors)
    assert cause_of(error) == "refused"
    for each, expected in (
        (ssl.SSLError(1, "no words"), "tls: no handshake"),
        (OSError("can't start new thread"), "unreachable"),
    ):
        assert cause_of(each) == expected
        assert failed_to_connect(each)
