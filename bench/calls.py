#!/usr/bin/env python3
"""Count the function calls that a JSON chat and a streamed event cost the gateway, C functions
included: figures that don't depend on the machine's speed. The model has a price, and the account
has limits and a balance.

    bench/calls.py [CHECKOUT ...]

runs the gateway of this checkout, or of each CHECKOUT, in front of the tests' upstream. Each figure
is the difference of two profiled runs of different length, without the calls of timers: their
number in a second is measured in two runs without requests.
"""

from __future__ import annotations

import pstats
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import httpx2  # noqa: E402

from tests.helpers.gateway import Gateway, wait_until  # noqa: E402
from tests.helpers.upstream import Upstream, chat_stream  # noqa: E402

REQUESTS = 200, 1200
EVENTS = 200, 1200
IDLE_SECONDS = 1.0, 6.0
SETTINGS = """[limits]
requests_per_minute = 1000000000
[limits.account]
tokens_per_minute = 1000000000
[billing]
default_credit_limit = "1000000"
"""
RATES = ("--input=1.25", "--cached-input=0.125", "--output=10")
CHAT = {"model": "gpt-up", "messages": [{"role": "user", "content": "Hi"}]}
Work = Callable[[httpx2.Client, Upstream, float], None]


class Profiled(Gateway):
    """A gateway that is run under cProfile."""

    def command(self, *arguments: str) -> list[str]:
        python, script, *rest = super().command(*arguments)
        if "serve" not in arguments:
            return [python, script, *rest]
        return [python, "-m", "cProfile", "-o", str(self.folder / "profile"), script, *rest]


class Run(NamedTuple):
    """One run of a gateway."""

    amount: float  # requests, events or seconds
    seconds: float
    calls: int


def run(root: Path, work: Work, amount: float) -> Run:
    """Run a gateway from start to end with an amount of work."""
    with tempfile.TemporaryDirectory() as folder, Upstream() as upstream:
        gateway = Profiled(Path(folder), upstream.url, SETTINGS, root=root)
        key = gateway.new_key()
        assert gateway.run("price", "add", "gpt-up", *RATES).returncode == 0
        gateway.start()
        started = time.monotonic()
        with gateway.client(key) as client:
            work(client, upstream, amount)
        seconds = time.monotonic() - started
        gateway.terminate()
        wait_until((Path(folder) / "profile").exists)
        profile: Any = pstats.Stats(str(Path(folder) / "profile"))
        return Run(amount, seconds, int(profile.total_calls))


def send_requests(client: httpx2.Client, _: Upstream, amount: float) -> None:
    """Send JSON requests, one after the other."""
    for _number in range(int(amount)):
        assert client.post("/chat/completions", json=CHAT).status_code == 200


def read_events(client: httpx2.Client, upstream: Upstream, amount: float) -> None:
    """Read a stream of events, each of which arrives by itself."""
    upstream.script = chat_stream(["word "] * int(amount), pause=0.002)
    with client.stream("POST", "/chat/completions", json=CHAT | {"stream": True}) as response:
        assert response.read().endswith(b"data: [DONE]\n\n")


def wait(_client: httpx2.Client, _upstream: Upstream, amount: float) -> None:
    """Do nothing for so many seconds."""
    time.sleep(amount)


def calls_each(root: Path, work: Work, amounts: tuple[float, float], a_second: float) -> float:
    """Return the calls that a unit of work costs. `a_second` is the number of timers' calls."""
    few, many = (run(root, work, amount) for amount in amounts)
    timers = a_second * (many.seconds - few.seconds)
    return (many.calls - few.calls - timers) / (many.amount - few.amount)


def count(root: Path = ROOT) -> tuple[float, float]:
    """Return the calls that a JSON chat and an event cost the gateway of a checkout."""
    a_second = calls_each(root, wait, IDLE_SECONDS, 0.0)
    request = calls_each(root, send_requests, REQUESTS, a_second)
    return request, calls_each(root, read_events, EVENTS, a_second)


def main() -> None:
    """Print a line for each checkout."""
    for root in [Path(each) for each in sys.argv[1:]] or [ROOT]:
        request, event = count(root)
        print(f"{root}: {request:.1f} calls a JSON chat, {event:.1f} an event")


if __name__ == "__main__":
    main()
