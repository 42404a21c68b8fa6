#!/usr/bin/env python3
"""Compare what a JSON request costs the gateway of this checkout and that of another one, over many
starts of both. Two processes with the same code differ by 3 % (standard deviation) for as long as
they run, probably because of where the system puts their memory. So one start of each can't show a
smaller difference, however long it is measured.

    bench/starts.py CHECKOUT [--starts 30]

prints the mean of the ratios, the CPU time of this checkout divided by that of the other, and its
standard error. At each start, both run at the same time and take turns.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import sys
import tempfile
from pathlib import Path

import uvloop

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.bench import LOAD_CORE, Proxy, Upstream, cost_of, poll, redbtc  # noqa: E402

TURNS = 4
SECONDS = 0.7  # of each turn


async def compare(proxies: list[Proxy]) -> list[float]:
    """Return the medians of the CPU microseconds a request."""
    costs: list[list[float]] = [[] for _ in proxies]
    for turn in range(TURNS):
        for which in (0, 1) if turn % 2 else (1, 0):
            with proxies[which].alone():
                costs[which].append(await cost_of(proxies[which], SECONDS))
    return [statistics.median(each) for each in costs]


async def main(other: Path, starts: int) -> None:
    """Print the figures of each start, and the mean ratio."""
    os.sched_setaffinity(0, LOAD_CORE)
    server = await asyncio.get_running_loop().create_server(Upstream, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    polling = asyncio.create_task(poll())
    ratios = []
    for start in range(starts):
        order = [0, 1] if start % 2 else [1, 0]
        proxies: list[Proxy] = []
        with contextlib.ExitStack() as stack:
            for which in order:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                gateway = redbtc(folder, port, root=(ROOT, other)[which])
                proxies.append(await asyncio.to_thread(stack.enter_context, gateway))
            first, second = await compare(proxies)
        this, that = (second, first) if order[0] else (first, second)
        ratios.append(this / that)
        print(f"{start + 1}: {this:.1f} µs, {that:.1f} µs, {this / that:.3f}", flush=True)
    error = statistics.stdev(ratios) / len(ratios) ** 0.5
    print(f"{ROOT.name}/{other.name}: {statistics.mean(ratios):.3f} ± {error:.3f}")
    polling.cancel()
    server.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("other", metavar="CHECKOUT", type=Path)
    parser.add_argument("--starts", type=int, default=30)
    arguments = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(arguments.other, arguments.starts))
