"""Measures backups and restores of a large ledger, and what backups cost the requests of a gateway
that runs meanwhile. See README.md beside.

    .venv/bin/python bench/backup.py
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvloop

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.bench import Upstream, fill, requests  # noqa: E402
from redbtc.store import backup as backup_module  # noqa: E402
from redbtc.store import consistency  # noqa: E402
from tests.helpers.gateway import Gateway  # noqa: E402

CLIENTS = 4


def show(name: str, figure: str) -> None:
    print(f"{name:32} {figure}", flush=True)


def timed(name: str, work: Callable[[], Any]) -> None:
    started = time.monotonic()
    work()
    show(name, f"{time.monotonic() - started:.1f} s")


def measure_commands(gateway: Gateway, backup: Path, rows: int) -> None:
    """Measure each command on a stopped gateway, its own start included."""
    size = gateway.database.stat().st_size
    show("size", f"{size / 1e6:.0f} MB, {size / rows:.0f} bytes a row")
    timed("db backup", lambda: gateway.cli("db", "backup", str(backup)))
    for name, query in consistency.CHECKS.items():
        checked = {name: query}
        timed(f"  check: {name}"[:32], lambda: backup_module.verify(backup, backup, checked))  # noqa: B023
    timed("db restore", lambda: gateway.cli("db", "restore", str(backup)))
    timed("db check", lambda: gateway.cli("db", "check"))


async def measure_requests(gateway: Gateway, key: str, backup: Path, seconds: float) -> None:
    """Measure requests by turns without a backup and while backups are made all the time."""
    for _ in range(2):
        show_latencies("requests, alone", await requests(gateway.port, key, seconds, CLIENTS))
        load = asyncio.create_task(requests(gateway.port, key, seconds, CLIENTS))
        while not load.done():
            await asyncio.to_thread(gateway.cli, "db", "backup", str(backup))
        show_latencies("requests, during backups", await load)


def show_latencies(name: str, latencies: list[float]) -> None:
    median, high = (latencies[int(len(latencies) * share)] * 1000 for share in (0.5, 0.99))
    most = latencies[-1] * 1000
    show(name, f"{median:.1f} ms median, {high:.1f} ms 99 %, {most:.0f} ms at most")


async def main(rows: int, seconds: float) -> None:
    server = await asyncio.get_running_loop().create_server(Upstream, "127.0.0.1", 0)
    upstream = server.sockets[0].getsockname()[1]
    version = f"Python {platform.python_version()}, {os.cpu_count()} cores"
    print(f"{datetime.date.today()}, {version}, {rows} rows\n")
    with tempfile.TemporaryDirectory() as folder:
        gateway = Gateway(Path(folder, "gateway"), f"http://127.0.0.1:{upstream}/v1")
        key = gateway.new_key("bench")
        fill(gateway.database, rows)
        backup = Path(folder, "backup.db")
        measure_commands(gateway, backup, rows)
        await asyncio.to_thread(gateway.start)
        try:
            await measure_requests(gateway, key, backup, seconds)
        finally:
            gateway.kill()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the ledger")
    parser.add_argument("--seconds", type=float, default=10, help="of each load")
    arguments = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(arguments.rows, arguments.seconds))
