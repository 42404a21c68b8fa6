"""The look-up of names: joined, remembered, and never in the way of others."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from redbtc.upstream import addresses
from redbtc.upstream.addresses import HostName, HostNames, literal_addresses, with_port
from redbtc.upstream.event_loop import EventLoop
from tests.helpers.gateway import PATIENCE_SECONDS

pytestmark = pytest.mark.promise_9

NO_NAME = socket.gaierror(socket.EAI_NONAME, "Name or service not known")


class Resolver:
    """What answers instead of socket.getaddrinfo: `answer`, an address or an error, once `open` is
    set."""

    def __init__(self) -> None:
        self.answer: str | Exception = "192.0.2.1"
        self.open = threading.Event()
        self.open.set()
        self.asked = 0

    def __call__(self, host: str, port: int | None, flags: int = 0, **_: Any) -> Any:
        if flags & socket.AI_NUMERICHOST:
            raise NO_NAME
        self.asked += 1
        assert port is None
        assert self.open.wait(PATIENCE_SECONDS)
        if isinstance(self.answer, Exception):
            raise self.answer
        return [(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (self.answer, 0))]


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> Resolver:
    resolver = Resolver()
    monkeypatch.setattr(socket, "getaddrinfo", resolver)
    monkeypatch.setattr(addresses, "FRESH_SECONDS", 0.0)
    monkeypatch.setattr(addresses, "LOOK_UP_AGAIN_SECONDS", 0.0)
    return resolver


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(PATIENCE_SECONDS):
            await main()

    with asyncio.Runner(loop_factory=EventLoop) as runner:
        runner.run(bounded())


async def found(name: HostName) -> list[str]:
    return [each[4][0] for each in await name.addresses()]


def test_those_who_need_a_name_share_one_look_up(resolver: Resolver) -> None:
    async def main() -> None:
        names = HostNames()
        resolver.open.clear()
        waiting = [asyncio.create_task(found(names["a.test"])) for _ in range(20)]
        await asyncio.sleep(0)
        other = asyncio.create_task(found(names["b.test"]))
        while resolver.asked < 2:
            await asyncio.sleep(0.001)
        waiting[0].cancel()  # ends nobody else's look-up
        await asyncio.sleep(0.01)
        resolver.open.set()
        assert [await each for each in (*waiting[1:], other)] == [["192.0.2.1"]] * 20
        assert resolver.asked == 2

    run(main)


def test_addresses_are_used_for_a_while(
    resolver: Resolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(addresses, "FRESH_SECONDS", 1e6)

    async def main() -> None:
        name = HostName("a.test")
        for _ in range(3):
            assert await found(name) == ["192.0.2.1"]
        assert resolver.asked == 1
        resolver.answer = "192.0.2.2"
        name.distrust()
        assert await found(name) == ["192.0.2.2"]
        assert resolver.asked == 2

    run(main)


def test_the_last_good_addresses_are_kept_while_the_look_up_fails(resolver: Resolver) -> None:
    async def main() -> None:
        name = HostName("a.test")
        assert await found(name) == ["192.0.2.1"]
        resolver.answer = NO_NAME
        for _ in range(3):
            assert await found(name) == ["192.0.2.1"]
        assert resolver.asked == 4
        resolver.answer = "192.0.2.2"
        assert await found(name) == ["192.0.2.2"]

    run(main)


def test_the_last_good_addresses_are_used_while_nothing_answers(resolver: Resolver) -> None:
    async def main() -> None:
        name = HostName("a.test")
        assert await found(name) == ["192.0.2.1"]
        resolver.answer = "192.0.2.2"
        resolver.open.clear()
        before = time.monotonic()
        assert await found(name) == ["192.0.2.1"]
        waited = time.monotonic() - before
        assert waited >= 0.9 * addresses.STALE_SECONDS
        before = time.monotonic()
        for _ in range(100):  # the first has waited for all
            assert await found(name) == ["192.0.2.1"]
        assert time.monotonic() - before < 50 * waited
        assert resolver.asked == 2
        resolver.open.set()
        while await found(name) != ["192.0.2.2"]:
            await asyncio.sleep(0.001)

    run(main)


def test_a_look_up_that_fails_is_not_repeated_at_once(
    resolver: Resolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        name = HostName("a.test")
        resolver.answer = NO_NAME
        monkeypatch.setattr(addresses, "LOOK_UP_AGAIN_SECONDS", 1e6)
        for _ in range(3):
            with pytest.raises(socket.gaierror, match="not known"):
                await name.addresses()
        assert resolver.asked == 1
        other = HostName("b.test")
        resolver.answer = "192.0.2.1"
        assert await found(other) == ["192.0.2.1"]
        for _ in range(3):  # nor one whose addresses could not be connected to
            other.distrust()
            assert await found(other) == ["192.0.2.1"]
        assert resolver.asked == 2

    run(main)


@pytest.mark.parametrize("known", [True, False])
def test_without_a_thread_the_addresses_that_are_known_are_used(
    resolver: Resolver, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def main() -> None:
        name = HostName("a.test")
        if known:
            await name.addresses()
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            if known:
                assert await found(name) == ["192.0.2.1"]
            else:
                with pytest.raises(OSError, match="thread"):
                    await name.addresses()
        assert await found(name) == ["192.0.2.1"]

    run(main)


def test_what_can_be_no_name_is_not_found() -> None:
    async def main() -> None:
        for text in ("a..b", "a" * 70 + ".test"):
            with pytest.raises(socket.gaierror):
                await HostName(text).addresses()
            assert not literal_addresses(text, 80)

    run(main)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "127.1"])
def test_an_address_is_not_looked_up(host: str) -> None:
    (address,) = literal_addresses(host, 8080)
    assert address[4][:2] == ("127.0.0.1" if "." in host else "::1", 8080)
    assert with_port(address, 9090)[4] == (address[4][0], 9090, *address[4][2:])
    assert not literal_addresses("localhost", 80)


def test_a_loop_that_is_closed_meanwhile(resolver: Resolver) -> None:
    """The thread's result is for nobody then."""
    resolver.open.clear()

    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await HostName("a.test").addresses()

    run(main)
    resolver.open.set()
    for thread in threading.enumerate():
        if thread.name == "look up a.test":
            thread.join(PATIENCE_SECONDS)


def test_libraries_that_ask_the_loop_share_its_look_ups(resolver: Resolver) -> None:
    async def main() -> None:
        look_up = asyncio.get_running_loop().getaddrinfo
        resolver.open.clear()
        asked = [look_up("a.test", 80, type=socket.SOCK_STREAM) for _ in range(20)]
        waiting = [asyncio.create_task(each) for each in asked]
        await asyncio.sleep(0)
        resolver.open.set()
        address = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", ("192.0.2.1", 80))
        assert await asyncio.gather(*waiting) == [[address]] * 20
        assert resolver.asked == 1
        only_6: Any = {"family": socket.AF_INET6, "type": socket.SOCK_STREAM}
        with pytest.raises(socket.gaierror, match="no address"):
            await look_up(b"a.test", 443, **only_6)
        resolver.answer = NO_NAME
        with pytest.raises(socket.gaierror, match="not known"):
            await look_up("b.test", 80, type=socket.SOCK_STREAM)

    run(main)


@pytest.mark.parametrize("host", ["127.0.0.1", b"::1", "localhost", None])
@pytest.mark.parametrize("port", [80, "http", None])
@pytest.mark.parametrize("flags", [0, socket.AI_NUMERICHOST])
def test_a_loop_finds_what_the_system_finds(host: Any, port: Any, flags: int) -> None:
    asked: Any = {"type": socket.SOCK_STREAM, "flags": flags}

    async def by_loop() -> set[Any]:
        return {*await asyncio.get_running_loop().getaddrinfo(host, port, **asked)}

    async def by_system() -> set[Any]:
        return {*socket.getaddrinfo(host, port, **asked)}

    async def outcome(look_up: Callable[[], Awaitable[set[Any]]]) -> object:
        try:
            return await look_up()
        except socket.gaierror as error:
            return error.errno

    async def main() -> None:
        assert await outcome(by_loop) == await outcome(by_system)

    run(main)
