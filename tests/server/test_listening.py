"""The addresses that the gateway listens on."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from redbtc.errors import UserError
from redbtc.server.listening import listen
from tests.helpers.gateway import Gateway, MakeGateway, wait_until
from tests.helpers.upstream import Upstream

pytestmark = pytest.mark.promise_9


def answer_at(host: str, port: int, path: str = "/healthz") -> bytes:
    """Return the status line of a response, or nothing if no one listens there."""
    try:
        with socket.create_connection((host, port), 20) as sock:
            sock.sendall(f"GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
            return sock.recv(65536).partition(b"\r\n")[0]
    except ConnectionRefusedError:
        return b""


def serving(gateway: Gateway) -> dict[str, Any]:
    """Return the log line that the gateway writes when it has started."""
    wait_until(lambda: '"event":"serving"' in gateway.log())
    lines = [json.loads(line) for line in gateway.log().splitlines() if line.startswith("{")]
    said: dict[str, Any] = next(line for line in lines if line["event"] == "serving")
    return said


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
OK = b"HTTP/1.1 200 OK"
V4, OTHER_V4, V6 = "127.0.0.1", "127.0.0.2", "::1"


@needs_ipv6
@pytest.mark.parametrize(
    ("host", "answering", "url"),
    [
        ("127.0.0.1", {V4}, "http://127.0.0.1:PORT/v1"),
        ("0.0.0.0", {V4, OTHER_V4}, "http://127.0.0.1:PORT/v1"),
        ("::", {V4, OTHER_V4, V6}, "http://[::1]:PORT/v1"),
        (["::0"], {V4, OTHER_V4, V6}, "http://[::1]:PORT/v1"),
        ("::1", {V6}, "http://[::1]:PORT/v1"),
        (["127.0.0.1", "::1"], {V4, V6}, "http://127.0.0.1:PORT/v1"),
        (["127.0.0.2", "127.0.0.1"], {V4, OTHER_V4}, "http://127.0.0.2:PORT/v1"),
        (["::", "127.0.0.2"], {OTHER_V4, V6}, "http://[::1]:PORT/v1"),
        (["::", "0.0.0.0"], {V4, OTHER_V4, V6}, "http://[::1]:PORT/v1"),
        (["localhost", "::1"], {V4, V6}, "http://127.0.0.1:PORT/v1"),
    ],
)
def test_it_answers_where_it_was_told_to(
    make_gateway: MakeGateway, host: str | list[str], answering: set[str], url: str
) -> None:
    gateway = make_gateway({"server": {"host": host}}).start(wait=False)
    wait_until(lambda: "serving" in gateway.log(), 150)
    wait_until(lambda: all(answer_at(each, gateway.port) == OK for each in answering), 150)
    assert {each for each in (V4, OTHER_V4, V6) if answer_at(each, gateway.port)} == answering
    assert serving(gateway)["url"] == url.replace("PORT", str(gateway.port))
    assert gateway.terminate() == 0


@needs_ipv6
def test_clients_of_both_kinds_are_known_by_their_address(make_gateway: MakeGateway) -> None:
    """Only loopback may read the metrics, and ::ffff:127.0.0.1 would not count as loopback."""
    gateway = make_gateway({"server": {"host": "::"}}).start()
    assert answer_at(V4, gateway.port, "/metrics") == OK
    assert answer_at(V6, gateway.port, "/metrics") == OK


@needs_ipv6
def test_the_option_can_be_repeated_and_goes_before_the_settings(
    make_gateway: MakeGateway,
) -> None:
    gateway = make_gateway({"server": {"host": "127.0.0.1"}})
    gateway.start("--host", "127.0.0.2", "--host", "::1", wait=False)
    wait_until(lambda: answer_at(V6, gateway.port) == OK, 150)
    assert answer_at(OTHER_V4, gateway.port) == OK
    assert not answer_at(V4, gateway.port)
    assert serving(gateway)["listening"] == [f"127.0.0.2:{gateway.port}", f"[::1]:{gateway.port}"]


@needs_ipv6
@pytest.mark.parametrize("hosts", [["::"], ["127.0.0.1", "::1", "127.0.0.2"]])
def test_a_free_port_is_the_same_everywhere(hosts: list[str]) -> None:
    listeners = listen(hosts, 0)
    ports = {listener.getsockname()[1] for listener in listeners}
    assert len(listeners) >= 2
    assert len(ports) == 1
    for listener in listeners:
        listener.close()


def test_a_free_port_that_is_taken_elsewhere_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = socket.create_server
    taken: list[socket.socket] = []

    def create(address: tuple[str, int], **options: Any) -> socket.socket:
        if address[0] == "127.0.0.2" and len(taken) < 3:
            taken.append(real(address, family=socket.AF_INET))
        return real(address, **options)

    monkeypatch.setattr(socket, "create_server", create)
    listeners = listen(["127.0.0.1", "127.0.0.2"], 0)
    assert len(taken) == 3
    assert len({listener.getsockname()[1] for listener in listeners}) == 1
    for listener in [*listeners, *taken]:
        listener.close()


@pytest.mark.parametrize(
    ("hosts", "named"),
    [
        (["192.0.2.7"], "192.0.2.7:"),
        (["127.0.0.1", "2001:db8::7"], "[2001:db8::7]:"),
        (["127.0.0.1", "127.0.0.1"], "127.0.0.1:"),
        (["no.such.name.invalid"], "no.such.name.invalid:"),
    ],
)
def test_an_address_that_cannot_be_had_is_named(hosts: list[str], named: str) -> None:
    with pytest.raises(UserError, match="can't listen on") as caught:
        listen(hosts, 0)
    assert f"can't listen on {named}" in str(caught.value)


def test_without_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.socket

    def no_ipv6(family: int = -1, *rest: Any, **options: Any) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(97, "Address family not supported by protocol")
        return real(family, *rest, **options)

    monkeypatch.setattr(socket, "socket", no_ipv6)
    with pytest.raises(UserError) as caught:
        listen(["::"], 8080)
    assert str(caught.value) == (
        "can't listen on [::]:8080: Address family not supported by protocol"
    )


@pytest.mark.parametrize("host", [[], "", [""], [1], 8080])
def test_settings_that_name_no_address(make_gateway: MakeGateway, host: Any) -> None:
    done = make_gateway({"server": {"host": host}}).run("check")
    assert done.returncode == 2
    assert "server.host" in done.stdout
    assert "found" in done.stdout


@needs_ipv6
def test_a_change_takes_a_restart(
    make_gateway: MakeGateway, upstream: Upstream, tmp_path: Path
) -> None:
    gateway = make_gateway({"server": {"host": ["127.0.0.1"]}}).start()
    for host, restart in (("127.0.0.1", False), (["127.0.0.1", "::1"], True)):
        before = gateway.log().count("reloaded")
        gateway.configure({"server": {"host": host}})
        gateway.signal(1)
        gateway.wait_for_log('"reloaded"', before + 1)
        last = json.loads(gateway.log().splitlines()[-1])
        assert ("server.host" in last["needs_restart"]) == restart
