"""Reloads a gateway again and again under a load that never stops, and counts what the clients
notice. See README.md beside.

    .venv/bin/python bench/reload.py [--reloads 50] [--clients 200]
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.helpers.gateway import Gateway  # noqa: E402
from tests.helpers.reloading import adopt_orphans, reload  # noqa: E402
from tests.helpers.steady_load import CountingUpstream, SteadyLoad  # noqa: E402

FEW = 3  # requests in flight that one account may have


def gateway_in(folder: Path, upstream: CountingUpstream) -> Gateway:
    """Return a gateway with the upstream of HTTP and that of WebSockets."""
    upstreams = (("http", upstream.url, "h*"), ("sockets", upstream.socket_url, "w*"))
    return Gateway(
        folder,
        upstream.url,
        {
            "limits": {"queue_seconds": 120, "account": {"concurrency": 0}},
            "upstreams": [
                {"name": name, "base_url": url, "models": [models], "api_key_env": ""}
                for name, url, models in upstreams
            ],
        },
    )


def add_clients(
    load: SteadyLoad, clients: int, many: str, few: str, with_sockets: list[str]
) -> None:
    """Add the clients: half of them stream, a tenth uses WebSockets (of several accounts, of which
    each may make 600 handshakes a minute), and a tenth is of the account `few`, whose requests wait
    for places."""
    load.add("stream", clients // 2, many, "h", seconds=4)
    load.add("json", clients // 5, many, "h")
    load.add("connections", clients // 10, many, "h")
    for number in range(clients // 10):
        load.add("websocket", 1, with_sockets[number % len(with_sockets)], "w")
    load.add("json", clients // 20, few, "h-few")
    load.add("stream", clients // 20, few, "h-few")


async def measure(reloads: int, clients: int) -> None:
    """Print what happened."""
    took = []
    with tempfile.TemporaryDirectory() as folder:
        async with CountingUpstream() as upstream:
            gateway = gateway_in(Path(folder), upstream)
            await asyncio.to_thread(gateway.start)
            many = await asyncio.to_thread(gateway.new_key, "many")
            few = await asyncio.to_thread(lambda: gateway.new_key("few", concurrency=FEW))
            names = [f"sockets-{number}" for number in range(4)]
            with_sockets = [await asyncio.to_thread(gateway.new_key, name) for name in names]
            load = SteadyLoad(gateway.port)
            add_clients(load, clients, many, few, with_sockets)
            await asyncio.sleep(5)
            calm, load.seconds = sorted(load.seconds), []
            for _ in range(reloads):
                began = time.monotonic()
                await asyncio.to_thread(reload, gateway)
                took.append(time.monotonic() - began)
            await load.stop()
        rows = await asyncio.to_thread(gateway.rows)
        paused = sorted(map(int, re.findall(r'"paused_ms":(\d+)', gateway.log())))
        gateway.close()
    show(load, upstream, took, calm, rows)
    print(f"new requests waited, median (ms)       {paused[len(paused) // 2]:9}")
    print(f"new requests waited, most (ms)         {paused[-1]:9}")


def show(
    load: SteadyLoad,
    upstream: CountingUpstream,
    took: list[float],
    calm: list[float],
    rows: list[dict[str, object]],
) -> None:
    """Print the figures."""
    asked, outcomes = upstream.served.total(), Counter(str(row["outcome"]) for row in rows)
    busy = sorted(load.seconds)
    print(f"reloads                                {len(took):9}")
    print(f"a reload, median (s)                   {sorted(took)[len(took) // 2]:9.2f}")
    print(f"answers that clients had whole         {load.done.total():9}")
    print(f"refused, torn or not answered          {load.failed.total():9}")
    print(f"WebSockets that were told to move      {load.moved:9}")
    print(f"answers that the upstream gave         {asked:9}")
    print(f"rows in the ledger                     {len(rows):9}")
    print(f"of them completed                      {outcomes['completed']:9}")
    print(f"responses with two rows                {len(rows) - len({*ids_of(rows)}):9}")
    print(f"most in flight of an account with {FEW}    {upstream.most_at_once['h-few']:9}")
    for name, seconds in (("before", calm), ("during", busy)):
        print(f"an answer {name} the reloads, 99 % (ms)  {at(seconds, 0.99) * 1000:9.0f}")
        print(f"the slowest of them (ms)               {seconds[-1] * 1000:9.0f}")
    for what, number in load.failed.most_common(10):
        print(f"{number} x {what}")


def ids_of(rows: list[dict[str, object]]) -> list[str]:
    """Return the id of the response of each row."""
    return [str(row["response_id"]) for row in rows]


def at(seconds: list[float], share: float) -> float:
    """Return the value below which a share of sorted values is."""
    return seconds[int(len(seconds) * share)]


def main() -> None:
    """Measure, as the options say."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reloads", type=int, default=50)
    parser.add_argument("--clients", type=int, default=200)
    options = parser.parse_args()
    adopt_orphans()
    asyncio.run(measure(options.reloads, options.clients))


if __name__ == "__main__":
    main()
