"""The measure that other tests hold durations by tells work from waiting."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tests.helpers.gateway import PATIENCE_SECONDS, ROOT
from tests.helpers.speed import Stalls, calmest, cost, longest_step, work

SERVER = """
import asyncio, time
from tests.helpers.speed import work

async def answer(reader, writer):
    while head := await reader.read(1000):
        if b"/work" in head:
            for _ in range(200):
                work()
        if b"/sleep" in head:
            time.sleep(0.5)
        writer.write(b'HTTP/1.1 200 OK\\r\\n\\r\\n{"status":"ok"}')

async def main():
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()

asyncio.run(main())
"""


@pytest.fixture
def port() -> Iterator[int]:
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as server:
        assert server.stdout is not None
        yield int(server.stdout.readline())
        server.kill()


@pytest.mark.parametrize(("path", "held"), [("/", False), ("/work", True), ("/sleep", False)])
def test_stalls_are_work_on_the_loop(port: int, path: str, held: bool) -> None:
    with (
        Stalls(port) as stalls,
        socket.create_connection(("127.0.0.1", port), PATIENCE_SECONDS) as sock,
    ):
        sock.sendall(f"GET {path} HTTP/1.1\r\n\r\n".encode())
        assert sock.recv(1000)
    assert (stalls.longest > 100) == held, stalls.longest


def test_the_calmest_of_three_counts() -> None:
    for stalls, least, left in (([1, 9], 1, 1), ([9, 2, 9], 2, 1), ([9, 8, 7, 1], 7, 1)):
        measured = iter(stalls)
        assert calmest(measured.__next__, 5) == least
        assert len(list(measured)) == left


def test_sleep_costs_nothing_and_work_what_it_is() -> None:
    assert cost(lambda: time.sleep(0.05)) < 1
    assert 5 < cost(lambda: [work() for _ in range(10)]) < 20
    assert 5 < longest_step(len([work() for _ in range(count)]) for count in (1, 10, 1)) < 20
