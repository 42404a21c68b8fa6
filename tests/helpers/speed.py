"""Measure durations in units of this machine's speed. No test asserts an absolute time: a duration
is compared with that of a fixed piece of work, which the same process did just before."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType

import psutil

PROBE = """
import select, socket, sys
port, pid = map(int, sys.argv[1:])
from tests.helpers.speed import process_seconds, unit
sock = socket.create_connection(("127.0.0.1", port), 600)
sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
sys.stdin = open(0, "rb", buffering=0)
worst, measure = 0.0, unit()
print("ready", flush=True)
while not select.select([0], [], [], 0.001)[0]:
    start = process_seconds(pid)
    sock.sendall(b"GET /healthz HTTP/1.1\\r\\nhost: a\\r\\n\\r\\n")
    answer = b""
    while b'{"status":"ok"}' not in answer:
        answer += sock.recv(65536) or sys.exit("the connection ended")
    worst = max(worst, process_seconds(pid) - start)
print(worst / measure, flush=True)
"""


def work() -> int:
    """A fixed piece of work: 0.7 ms of processor time on an ordinary machine of 2026."""
    total = 0
    for number in range(20_000):
        total += number * number % 7
    return total


def unit() -> float:
    """Return the processor seconds that `work` takes now, the shortest of seven tries."""
    return min(cpu_seconds(work) for _ in range(7))


def cpu_seconds(function: Callable[[], object]) -> float:
    """Return the processor seconds of this thread that a call takes. Other processes on the machine
    do not change it."""
    start = time.thread_time()
    function()
    return time.thread_time() - start


def process_seconds(pid: int) -> float:
    """Return the processor seconds that all threads of a process have used."""
    if sys.platform == "linux":
        return time.clock_gettime(~pid << 3 | 2)  # its clock, as clock_getcpuclockid(3) makes it
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def cost(function: Callable[[], object], tries: int = 3) -> float:
    """Return the processor time of a call in units, the least of some tries."""
    return min(cpu_seconds(function) for _ in range(tries)) / unit()


def longest_step(steps: Iterable[object]) -> float:
    """Return the longest time between two steps of an iterator, in units: how long work in slices
    holds the loop."""
    measure, longest = unit(), 0.0
    iterator = iter(steps)
    while True:
        start = time.thread_time()
        try:
            next(iterator)
        except StopIteration:
            return max(longest, time.thread_time() - start) / measure
        longest = max(longest, time.thread_time() - start)


def calmest(stall: Callable[[], float], limit: float) -> float:
    """Call `stall`, which returns how long something held the loop, until that is below the limit,
    at most three times. Return the least. On a busy machine a stall can measure several times what
    it is, but not below."""
    least = stall()
    for _ in range(2):
        if least >= limit:
            least = min(least, stall())
    return least


class Stalls:
    """While this is open, a separate process keeps requesting /healthz from the gateway at `port`.
    Afterwards `longest` is the most processor time, in units, that the gateway used between such a
    request and its response: how long its loop was held by work, or by a thread that held Python's
    lock. Time in which the gateway did not run does not count, so a busy machine is no stall."""

    longest = 0.0

    def __init__(self, port: int) -> None:
        self._port = port

    def __enter__(self) -> Stalls:
        (pid,) = {
            each.pid
            for each in psutil.net_connections("tcp")
            if each.laddr and each.laddr.port == self._port and each.status == psutil.CONN_LISTEN
        }
        self._probe = subprocess.Popen(
            [sys.executable, "-c", PROBE, str(self._port), str(pid)],
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._probe.stdout is not None
        assert self._probe.stdout.readline() == "ready\n"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        out, _err = self._probe.communicate("\n", timeout=600)
        if kind is None:
            assert self._probe.returncode == 0, "the probe lost its connection"
            self.longest = float(out)
