"""Measures what a failing upstream costs: how many requests fail, and how much later their answers
come. See README.md beside.

    .venv/bin/python bench/failover.py [--requests 10000]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvloop

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.bench import JSON_BODY, Upstream, head  # noqa: E402
from tests.helpers.gateway import Gateway, free_port  # noqa: E402

SLICE = 250  # requests, by turns to both gateways
STATUSES = (429, 500, 502, 503, 504, 529, 401, 403)
TURN_SECONDS = 1.0
FLAPPING_SECONDS = 20.0


class Failing(Upstream):
    """Answers each request with an error."""

    def __init__(self, status: int) -> None:
        self._status = status

    def data_received(self, data: bytes) -> None:
        body = b'{"error":{"message":"no","type":"x","param":null,"code":"failing"}}'
        self.transport.write(
            b"HTTP/1.1 %d No\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s"
            % (self._status, len(body), body)
        )


class Flapping(Upstream):
    """Keeps its connections in a set, to end them all when it goes down."""

    connections: set[Flapping] = set()  # noqa: RUF012

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.connections.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self.connections.discard(self)


@contextlib.contextmanager
def black_hole() -> Iterator[str]:
    """Yield the URL of a port that answers no attempt to connect: its queue is full."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        waiting = [socket.socket() for _ in range(8)]
        for each in waiting:
            each.setblocking(False)
            each.connect_ex(server.getsockname())
        yield f"http://127.0.0.1:{server.getsockname()[1]}/v1"
        for each in waiting:
            each.close()


def gateway_of(folder: Path, *urls: str) -> tuple[Gateway, str]:
    """Start a gateway with an upstream at each URL. Return it, and a key."""
    tables = [{"name": f"up{n}", "base_url": url, "api_key_env": ""} for n, url in enumerate(urls)]
    connect = {"connect_timeout_seconds": 1}
    settings = {"server": {}, "upstreams": [table | connect for table in tables]}
    gateway = Gateway(folder, "", settings).start()
    return gateway, gateway.new_key()


class Client:
    """One client that sends its requests one after the other."""

    def __init__(self, gateway: Gateway, key: str) -> None:
        self._port = gateway.port
        self._request = head(key, JSON_BODY)
        self.seconds: list[float] = []
        self.failed = 0

    async def send(self, number: int) -> None:
        """Send so many requests, and note how long they took."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        for _ in range(number):
            started = time.monotonic()
            self.failed += await self._send_one(reader, writer) != 200
            self.seconds.append(time.monotonic() - started)
        writer.close()

    async def _send_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> int:
        writer.write(self._request)
        got = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = got.partition(b"content-length: ")[2].partition(b"\r\n")[0]
        await (reader.readexactly(int(length)) if length else reader.readuntil(b"0\r\n\r\n"))
        return int(got.split(b" ", 2)[1])

    def milliseconds(self) -> float:
        """Return the median."""
        return statistics.median(self.seconds) * 1000


async def compare(name: str, dead: str, good: tuple[str, str], requests: int) -> None:
    """Send requests by turns to a gateway of which one of two upstreams is dead, and to one with
    two good ones. Then to one of which both are dead."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        failing, key = await asyncio.to_thread(gateway_of, root / "failing", dead, good[1])
        healthy, other_key = await asyncio.to_thread(gateway_of, root / "healthy", *good)
        down, down_key = await asyncio.to_thread(gateway_of, root / "down", dead, dead)
        with_dead, without, all_down = (
            Client(failing, key),
            Client(healthy, other_key),
            Client(down, down_key),
        )
        for _ in range(requests // SLICE):
            await with_dead.send(SLICE)
            await without.send(SLICE)
        await all_down.send(20)  # until it is known
        all_down.seconds.clear()
        await all_down.send(200)
        more = with_dead.milliseconds() - without.milliseconds()
        print(
            f"{name:16} {with_dead.failed} of {len(with_dead.seconds)} failed, "
            f"median {with_dead.milliseconds():.2f} ms, {more:+.2f} ms; "
            f"all down: {all_down.milliseconds():.1f} ms, at most "
            f"{max(all_down.seconds) * 1000:.1f} ms",
            flush=True,
        )
        for gateway in (failing, healthy, down):
            await asyncio.to_thread(gateway.close)


async def flap(good: str | None) -> None:
    """Send requests to a gateway whose upstream is up and down by turns. With `good`, there is a
    second upstream, which is up."""
    loop, port = asyncio.get_running_loop(), free_port()
    with tempfile.TemporaryDirectory() as folder:
        urls = [f"http://127.0.0.1:{port}/v1", *([good] if good else [])]
        gateway, key = await asyncio.to_thread(gateway_of, Path(folder), *urls)
        client, served, possible = Client(gateway, key), 0, 0
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        ends = loop.time() + FLAPPING_SECONDS
        while loop.time() < ends:
            server = await loop.create_server(Flapping, "127.0.0.1", port, reuse_address=True)
            is_up, until = True, loop.time() + TURN_SECONDS
            while loop.time() < until + TURN_SECONDS:
                if is_up and loop.time() >= until:
                    server.close()
                    for each in list(Flapping.connections):
                        each.transport.abort()
                    is_up = False
                status = await client._send_one(reader, writer)
                if is_up or good:
                    possible += 1
                    served += status == 200
        writer.close()
        await asyncio.to_thread(gateway.close)
    beside = "beside a good one" if good else "alone"
    print(f"up and down, {beside}: {served} of {possible} served, {served / possible:.2%}")


async def run(requests: int) -> None:
    """Print a line for each way of failing."""
    loop = asyncio.get_running_loop()

    async def serve(protocol: Any) -> str:
        server = await loop.create_server(protocol, "127.0.0.1", 0)
        return f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"

    good = await serve(Upstream), await serve(Upstream)
    ways: dict[str, str] = {
        "refused": f"http://127.0.0.1:{free_port()}/v1",
        "unknown host": "http://no-such-host.invalid/v1",
        "no TLS": good[0].replace("http:", "https:"),
    }
    for status in STATUSES:
        ways[str(status)] = await serve(functools.partial(Failing, status))
    for name, url in ways.items():
        await compare(name, url, good, requests)
    with black_hole() as url:
        await compare("black hole", url, good, requests)
    await flap(None)
    await flap(good[0])


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000, help="with each way of failing")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run(parser.parse_args().requests))


if __name__ == "__main__":
    main()
