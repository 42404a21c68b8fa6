"""Connecting to upstreams by name: their addresses, and the certificates that they show."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
import uvloop
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from redbtc.upstream import addresses, connecting
from redbtc.upstream.addresses import HostNames
from redbtc.upstream.certificates import context_trusting
from redbtc.upstream.connecting import Connector
from redbtc.upstream.failures import ConnectTimedOut
from tests.helpers.certificates import Authority
from tests.helpers.gateway import PATIENCE_SECONDS, Gateway, MakeGateway, wait_until
from tests.helpers.upstream import Upstream, ws_like_openai
from tests.helpers.websocket_client import client

pytestmark = pytest.mark.promise_9

LOOPS = ["uvloop", "asyncio"]
# Code that lets a gateway find names in the environment variable NAMES, each with its addresses. A
# name without addresses gets no answer.
NAMES = """
import json, os, socket, threading
real, names = socket.getaddrinfo, json.loads(os.environ["NAMES"])
def getaddrinfo(host, port, *arguments, flags=0, **more):
    if host not in names or flags & socket.AI_NUMERICHOST:
        return real(host, port, *arguments, flags=flags, **more)
    if not names[host]:
        threading.Event().wait()
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port or 0)) for each in names[host]]
socket.getaddrinfo = getaddrinfo
"""


def run(main: Callable[[], Awaitable[None]], loops: str = "uvloop") -> None:
    factory = uvloop.new_event_loop if loops == "uvloop" else asyncio.new_event_loop

    async def bounded() -> None:
        async with asyncio.timeout(PATIENCE_SECONDS):
            await main()

    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(bounded())


@contextlib.contextmanager
def black_hole(address: str, port: int) -> Iterator[None]:
    """Listen there without accepting anything: further connections get no answer."""
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.create_server((address, port), backlog=0))
        for _ in range(3):
            clog = stack.enter_context(socket.socket())
            clog.setblocking(False)
            clog.connect_ex(full.getsockname())
        yield


def resolving(monkeypatch: pytest.MonkeyPatch, *found: str) -> list[str]:
    """Let each name have these addresses; return the names that are looked up."""
    real, asked = socket.getaddrinfo, []

    def getaddrinfo(host: str, port: int | None, flags: int = 0, **more: Any) -> Any:
        if flags & socket.AI_NUMERICHOST:
            return real(host, port, flags=flags, **more)
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, 0)) for each in found]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked


async def connected(connector: Connector, port: int, timeout: float = PATIENCE_SECONDS) -> str:
    """Connect to a.test; return the address that has answered."""
    loop = asyncio.get_running_loop()
    open_on = functools.partial(loop.create_connection, asyncio.Protocol)
    url = httpx2.URL(f"http://a.test:{port}")
    transport, _ = await connector.connect(url, timeout, open_on)
    sock = transport.get_extra_info("socket")
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    transport.abort()
    return str(sock.getpeername()[0])


@pytest.mark.parametrize("loops", LOOPS)
def test_an_address_that_does_not_answer_delays_the_next_one_little(
    monkeypatch: pytest.MonkeyPatch, loops: str
) -> None:
    resolving(monkeypatch, "127.0.0.2", "127.0.0.3")
    with socket.create_server(("127.0.0.3", 0)) as server:
        port = server.getsockname()[1]
        with black_hole("127.0.0.2", port):

            async def main() -> None:
                before = time.monotonic()
                assert await connected(Connector(HostNames(), None), port) == "127.0.0.3"
                assert time.monotonic() - before >= 0.9 * connecting.NEXT_ADDRESS_SECONDS
                assert len(asyncio.all_tasks()) == 1

            run(main, loops)


@pytest.mark.parametrize("loops", LOOPS)
def test_an_address_that_refuses_delays_the_next_one_not_at_all(
    monkeypatch: pytest.MonkeyPatch, loops: str
) -> None:
    monkeypatch.setattr(connecting, "NEXT_ADDRESS_SECONDS", 2 * PATIENCE_SECONDS)
    resolving(monkeypatch, "127.0.0.2", "127.0.0.3", "127.0.0.4")
    with socket.create_server(("127.0.0.4", 0)) as server:
        port = server.getsockname()[1]

        async def main() -> None:
            assert await connected(Connector(HostNames(), None), port) == "127.0.0.4"

        run(main, loops)


@pytest.mark.parametrize("loops", LOOPS)
def test_all_addresses_fail(monkeypatch: pytest.MonkeyPatch, loops: str) -> None:
    """A connection that is refused says more than an address that can't be reached. The next
    connection looks the name up again."""
    monkeypatch.setattr(addresses, "LOOK_UP_AGAIN_SECONDS", 0.0)
    with socket.create_server(("127.0.0.3", 0)) as closed:
        port = closed.getsockname()[1]
    asked = resolving(monkeypatch, "127.0.0.2", "255.255.255.255")

    async def main() -> None:
        connector = Connector(HostNames(), None)
        with pytest.raises(ConnectionRefusedError):
            await connected(connector, port)
        resolving(monkeypatch, "127.0.0.4")
        with socket.create_server(("127.0.0.4", port)), black_hole("127.0.0.5", port):
            assert await connected(connector, port) == "127.0.0.4"
            resolving(monkeypatch, "127.0.0.5")
            with pytest.raises(ConnectTimedOut):
                await connected(Connector(HostNames(), None), port, 0.2)
        assert len(asyncio.all_tasks()) == 1

    run(main, loops)
    assert asked == ["a.test"]


@pytest.mark.parametrize("loops", LOOPS)
def test_a_name_that_is_not_answered_in_time(monkeypatch: pytest.MonkeyPatch, loops: str) -> None:
    hanging = threading.Event()
    monkeypatch.setattr(connecting, "literal_addresses", lambda host, port: [])
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: hanging.wait(PATIENCE_SECONDS))

    async def main() -> None:
        with pytest.raises(socket.gaierror):
            await connected(Connector(HostNames(), None), 80, 0.1)

    try:
        run(main, loops)
    finally:
        hanging.set()


@pytest.mark.slow
@pytest.mark.parametrize("loops", LOOPS)
@pytest.mark.parametrize("tls", [True, False])
def test_cancelled_anywhere_it_leaves_nothing_open(
    monkeypatch: pytest.MonkeyPatch, authority: Authority, loops: str, tls: bool
) -> None:
    resolving(monkeypatch, "127.0.0.2", "127.0.0.3", "127.0.0.1")
    monkeypatch.setattr(connecting, "NEXT_ADDRESS_SECONDS", 0.001)
    context = context_trusting(authority.file.read_text())
    server = Upstream(authority.server_context() if tls else None)
    with server as upstream, black_hole("127.0.0.2", upstream.port):

        async def main() -> None:
            loop, names = asyncio.get_running_loop(), HostNames()
            connector = Connector(names, context)
            open_on = functools.partial(loop.create_connection, asyncio.Protocol)
            url = httpx2.URL(f"{'https' if tls else 'http'}://localhost:{upstream.port}")
            (await connector.connect(url, None, open_on))[0].abort()
            made = cut = 0
            files = psutil.Process().num_fds()
            for steps in range(200):
                task = asyncio.create_task(connector.connect(url, None, open_on))
                for _ in range(steps // 4):
                    await asyncio.sleep(0)
                await asyncio.sleep(steps / 4e4)
                if task.done():
                    made += 1
                    (await task)[0].abort()
                else:
                    cut += task.cancel()
                    await asyncio.wait([task])
                    if not task.cancelled():
                        task.result()[0].abort()
            assert made
            assert cut
            assert asyncio.all_tasks() == {asyncio.current_task()}
            while psutil.Process().num_fds() > files:
                await asyncio.sleep(0.01)

        run(main, loops)
        upstream.wait_for(lambda: upstream.connections == 0)


@pytest.mark.parametrize("transport", ["asyncio", "httpx"])
def test_a_name_that_hangs_delays_no_other_upstream(
    make_gateway: MakeGateway, upstream: Upstream, transport: str
) -> None:
    upstream.talk = ws_like_openai
    hosts = {"hanging": "hangs.test", "good": "good.test"}
    upstreams = [
        {
            "name": name,
            "base_url": f"http://{host}:{upstream.port}/v1",
            "api_key_env": "",
            "models": [name],
            "transport": transport,
            "connect_timeout_seconds": 2 * PATIENCE_SECONDS,
            "priority": len(name),  # a WebSocket is opened to the other one first
        }
        for name, host in hosts.items()
    ]
    tables = {"server": {}, "limits": {"account": {"concurrency": 0}}, "upstreams": upstreams}
    names = {"hangs.test": [], "good.test": ["127.0.0.1"]}
    gateway = make_gateway(tables, NAMES=json.dumps(names))
    gateway.prelude = NAMES
    gateway.start()
    key = gateway.new_key()
    bad = [gateway.begin(key, {"model": "hanging", "input": "Hi"}) for _ in range(20)]
    wait_until(lambda: gateway.metrics()["redbtc_in_flight"] == 20)
    with gateway.client(key) as http:
        for _ in range(20):
            assert http.post("/responses", json={"model": "good", "input": "Hi"}).is_success
    if transport == "asyncio":
        with client(gateway, key) as ws:
            ws.send(model="good")
            ws.completed()
    assert gateway.metrics()["redbtc_in_flight"] == 20
    for sock in bad:
        sock.close()
    gateway.kill()


def test_the_first_address_may_be_a_black_hole(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    """For HTTP and WebSocket."""
    upstream.talk = ws_like_openai
    settings = "connect_timeout_seconds = 60"
    names = {"two.test": ["127.0.0.2", "127.0.0.1"]}
    gateway = make_gateway(upstream_settings=settings, NAMES=json.dumps(names))
    gateway.prelude = NAMES
    config = gateway.config.read_text().replace("http://127.0.0.1:", "http://two.test:")
    gateway.config.write_text(config)
    with black_hole("127.0.0.2", upstream.port):
        gateway.start()
        key = gateway.new_key()
        with gateway.client(key) as http:
            assert http.post("/responses", json={"model": "m", "input": "Hi"}).is_success
        with client(gateway, key) as ws:
            ws.send(model="m")
            ws.completed()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


def answer(gateway: Gateway, key: str) -> int:
    """Return the status of a request, which is also that of a WebSocket."""
    with gateway.client(key) as http:
        status = http.post("/responses", json={"model": "m", "input": "Hi"}).status_code
    if "httpx" not in gateway.config.read_text():
        if status == 200:
            with client(gateway, key) as ws:
                ws.send(model="m")
                ws.completed()
        else:
            assert refused_websocket(gateway, key) == status
    return status


def refused_websocket(gateway: Gateway, key: str) -> int:
    async def handshake() -> None:
        url = f"{gateway.base_url.replace('http', 'ws')}/responses"
        async with connect(url, additional_headers={"authorization": f"Bearer {key}"}, proxy=None):
            pass

    with pytest.raises(InvalidStatus) as refused:
        asyncio.run(handshake())
    return refused.value.response.status_code


@pytest.mark.parametrize("transport", ["asyncio", "httpx"])
def test_an_upstream_with_a_certificate_of_its_own_authority(
    make_gateway: MakeGateway, authority: Authority, transport: str
) -> None:
    """It is trusted by `ca_file` alone, which is relative to the settings file."""
    with Upstream(authority.server_context()) as upstream:
        upstream.talk = ws_like_openai
        table = {"name": "own", "base_url": upstream.url, "api_key_env": ""}
        table["transport"] = transport

        def tables(**more: str) -> dict[str, Any]:
            return {"server": {}, "upstreams": [{**table, **more}]}

        gateway = make_gateway(tables(), SSL_CERT_FILE=str(authority.file)).start()
        key = gateway.new_key()
        assert answer(gateway, key) == 502
        file = gateway.folder / "own.pem"
        file.write_text(f"# Autorität\n{authority.file.read_text()}")
        gateway.configure(tables(ca_file="own.pem"))
        gateway.signal(1)
        gateway.wait_for_log('"reloaded"')
        assert answer(gateway, key) == 200


def test_a_reload_reads_the_certificates_again(
    make_gateway: MakeGateway, authority: Authority, tmp_path: Path
) -> None:
    other = Authority(tmp_path / "other")
    with Upstream(authority.server_context()) as upstream:
        upstream.talk = ws_like_openai
        table = {"name": "own", "base_url": upstream.url, "api_key_env": "", "ca_file": "own.pem"}
        gateway = make_gateway({"server": {}, "upstreams": [table]})
        file = gateway.folder / "own.pem"
        file.write_text(authority.file.read_text())
        gateway.start()
        key = gateway.new_key()
        assert answer(gateway, key) == 200
        file.write_text("not a certificate")
        gateway.signal(1)
        gateway.wait_for_log('"reload refused"')
        assert str(file) in gateway.log()
        assert answer(gateway, key) == 200, "what was read stays in force"
        file.write_text(other.file.read_text())
        gateway.signal(1)
        gateway.wait_for_log('"reloaded"')
        assert answer(gateway, key) == 502
        file.write_text(other.file.read_text() + authority.file.read_text())
        gateway.signal(1)
        gateway.wait_for_log('"reloaded"', 2)
        assert answer(gateway, key) == 200


def test_an_upstream_can_be_removed_together_with_its_certificates(
    make_gateway: MakeGateway, authority: Authority, upstream: Upstream
) -> None:
    own = {"name": "own", "base_url": "https://localhost:1/v1", "ca_file": "own.pem"}
    other = {"name": "other", "base_url": upstream.url, "api_key_env": ""}
    upstream.talk = ws_like_openai
    gateway = make_gateway({"server": {}, "upstreams": [own]})
    file = gateway.folder / "own.pem"
    file.write_text(authority.file.read_text())
    gateway.start()
    key = gateway.new_key()
    file.unlink()
    gateway.configure({"server": {}, "upstreams": [other]})
    gateway.signal(1)
    gateway.wait_for_log('"reload')
    assert '"reloaded"' in gateway.log()
    assert [each["name"] for each in gateway.api("GET", "/upstreams")["upstreams"]] == ["other"]
    assert answer(gateway, key) == 200


@pytest.mark.parametrize(
    ("contents", "said"),
    [
        (None, "No such file or directory"),
        ("", "no certificates"),
        ("Hello", "no certificates"),
        ("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "no certificates"),
        ("a folder", "Is a directory"),
        ("not allowed", "Permission denied"),
    ],
)
def test_a_file_without_certificates_is_named(
    make_gateway: MakeGateway, contents: str | None, said: str
) -> None:
    """By `check` and by a gateway that does not start. Other commands don't need the file."""
    gateway = make_gateway(upstream_settings='ca_file = "own.pem"')
    file = gateway.folder / "own.pem"
    if contents == "a folder":
        file.mkdir()
    elif contents is not None:
        file.write_text(contents)
    if contents == "not allowed":
        file.chmod(0)
        if os.access(file, os.R_OK):
            pytest.skip("root may read everything")
    (line,) = [line for line in gateway.run("check").stdout.splitlines() if "ca_file" in line]
    assert f"upstreams.ca_file: {file}: {said}" in line
    assert gateway.run("check").returncode == 2
    done = gateway.run("serve")
    assert (done.returncode, done.stdout) == (1, "")
    assert f"upstreams.ca_file: {file}: {said}" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert gateway.run("account", "list").returncode == 0
