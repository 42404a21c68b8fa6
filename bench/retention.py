"""Measures what the daily work costs requests: two gateways with the same large ledger take turns,
of which one erases old requests meanwhile. It is stopped (SIGSTOP) while the other is measured.
See README.md beside.

    .venv/bin/python bench/retention.py
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import os
import platform
import signal
import sqlite3
import sys
import tempfile
import time
from pathlib import Path

import uvloop

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.bench import Upstream, fill, requests  # noqa: E402
from tests.helpers.gateway import Gateway  # noqa: E402

CLIENTS = 4
ACCOUNTS = 100
SHARES = {"median": 0.5, "99 %": 0.99, "99.9 %": 0.999}


def erased_from(gateway: Gateway) -> int:
    with contextlib.closing(sqlite3.connect(gateway.database)) as database:
        (rows,) = database.execute("SELECT sum(requests) FROM rolled_up").fetchone()
        return int(rows)


def latencies_at(found: list[float]) -> dict[str, float]:
    ordered = sorted(found)
    return {name: ordered[int(len(ordered) * share)] * 1000 for name, share in SHARES.items()}


async def main(rows: int, seconds: float) -> None:
    server = await asyncio.get_running_loop().create_server(Upstream, "127.0.0.1", 0)
    upstream = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    print(f"{datetime.date.today()}, Python {platform.python_version()}, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as closing:
        gateways, keys = {}, {}
        for name in ("alone", "erasing"):
            gateway = gateways[name] = Gateway(Path(folder, name), upstream)
            keys[name] = gateway.new_key("bench")
            fill(gateway.database, rows, ACCOUNTS)
            await asyncio.to_thread(gateway.start)
            closing.callback(gateway.kill)
        erasing = gateways["erasing"]
        erasing.configure({"retention": {"usage_days": 1}})
        found: dict[str, list[float]] = {"alone": [], "erasing": []}
        began, turns = time.monotonic(), 0
        while "old data erased" not in erasing.log():
            for name, gateway in gateways.items():
                if name == "erasing":
                    gateway.signal(signal.SIGCONT)
                    load = asyncio.create_task(requests(gateway.port, keys[name], seconds, CLIENTS))
                    await asyncio.sleep(0.1)
                    if not turns:
                        gateway.signal(signal.SIGHUP)  # the work begins, under load
                    found[name] += await load
                    gateway.signal(signal.SIGSTOP)
                else:
                    found[name] += await requests(gateway.port, keys[name], seconds, CLIENTS)
            turns += 1
        erasing.signal(signal.SIGCONT)
        alone, beside = latencies_at(found["alone"]), latencies_at(found["erasing"])
        took = time.monotonic() - began
        print(f"{erased_from(erasing)} rows erased in {took / 2:.0f} s of load, {turns} turns")
        for name in SHARES:
            ratio = beside[name] / alone[name]
            print(
                f"{name:8} {alone[name]:.2f} ms alone, {beside[name]:.2f} ms erasing: {ratio:.3f}"
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000, help="that are erased, of each ledger")
    parser.add_argument("--seconds", type=float, default=5, help="of each turn")
    arguments = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(arguments.rows, arguments.seconds))
