"""A gateway in front of two upstreams of equal priority, of which one fails."""

from __future__ import annotations

import contextlib
import itertools
import signal
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx2

from tests.helpers.fork_server import ForkServer
from tests.helpers.gateway import UPSTREAM_KEY, Gateway, free_port, wait_until
from tests.helpers.upstream import CHAT_USAGE, Upstream, openai_like

MODEL = "gpt-up"
CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
RESPONSE: dict[str, Any] = {"model": MODEL, "input": "Hi"}
OFTEN = 1_000_000  # the weight of the upstream that is tried first, but once in a million times
BALANCE = "10"
# Of CHAT_USAGE: 10 tokens of input, 8 cached, 2 written to the cache, 7 of output.
PRICE = {
    "model": MODEL,
    "input": "1",
    "cached_input": "0.1",
    "cache_write": "2",
    "output": "10",
    "image_input": "1",
    "image_output": "10",
    "max_output_tokens": 1000,
}
CHAT_COST = Decimal(10 * 1000 + 8 * 100 + 2 * 2000 + 7 * 10_000) / 10**9
assert CHAT_USAGE["prompt_tokens"] == 20


def nowhere() -> str:
    """Return the URL of a port that refuses connections."""
    return f"http://127.0.0.1:{free_port()}/v1"


class Pair:
    """`bad` and `good` are the upstreams, `key` is a new account's, which has prepaid BALANCE."""

    def __init__(self, folder: Path, fork_server: ForkServer, bad: Upstream, good: Upstream):
        self.bad, self.good = bad, good
        self._numbers = itertools.count(1)
        self.gateway = Gateway(folder, good.url, self._settings(), SECOND_KEY=UPSTREAM_KEY)
        self.gateway.fork_server = fork_server
        self.gateway.start()
        self.gateway.api("POST", "/prices", {"prices": [PRICE], "without_notice": "test"})
        self._new_account()

    def _settings(self, *tables: dict[str, Any], **settings: Any) -> dict[str, Any]:
        """Return settings with upstreams of new names, whose health is not known."""
        self.number = next(self._numbers)
        usual = {"api_key_env": "TEST_UPSTREAM_KEY"}
        tables = tables or ({"weight": OFTEN, "base_url": self.bad.url}, {})
        return {
            "server": {"log_level": "debug"},
            "billing": {"unpriced_models": "refuse"},
            **settings,
            "upstreams": [
                {
                    "name": f"{('bad', 'good')[at] if at < 2 else f'more{at}'}{self.number}",
                    "base_url": self.good.url,
                    **({} if "api_key_envs" in table else usual),
                    **table,
                }
                for at, table in enumerate(tables)
            ],
        }

    def _new_account(self) -> None:
        self.account = f"account{self.number}"
        self.key = self.gateway.new_key(self.account, credit_limit="0")
        payment = {"amount": BALANCE, "reason": "test"}
        self.gateway.api("POST", f"/accounts/{self.account}/payments", payment)

    def use(
        self, bad: dict[str, Any] | None = None, *more: dict[str, Any], **settings: Any
    ) -> None:
        """Use upstreams whose health is not known, and a new account. `bad` is added to the table
        of the upstream that is tried first; `more` are the tables of the others, one if none is
        given, and `settings` the other tables."""
        self.bad.script = self.good.script = openai_like
        self.bad.requests.clear()
        self.good.requests.clear()
        first = {"weight": OFTEN, "base_url": self.bad.url, **(bad or {})}
        self.configure(self._settings(first, *(more or ({},)), **settings))
        self._new_account()

    def alone(self, **bad: Any) -> None:
        """Use one upstream, the bad one."""
        self.use(bad, {"base_url": self.bad.url, "models": ["other"]})

    def configure(self, settings: dict[str, Any]) -> None:
        """Let the running gateway use these settings."""
        self.settings = settings
        before = len(self.gateway.log())
        self.gateway.configure(settings)
        self.gateway.signal(signal.SIGHUP)
        wait_until(lambda: '"event":"reload' in self.gateway.log()[before:])
        log = self.gateway.log()[before:]
        assert '"reload refused"' not in log, log

    # What it does

    def ask(self, path: str = "/chat/completions", **more: Any) -> httpx2.Response:
        """Send a request with these fields, or these options of httpx2, and return the answer."""
        options: dict[str, Any] = {
            name: more.pop(name) for name in ("content", "headers") if name in more
        }
        if "content" not in options:
            body = CHAT if path == "/chat/completions" else RESPONSE
            options["json"] = {**body, **more}
        with self.gateway.client(self.key) as client:
            return client.post(path, **options)

    @property
    def row(self) -> dict[str, Any]:
        """The only row of the account."""
        (row,) = self.gateway.rows(account=self.account)
        return row

    def name(self, which: str) -> str:
        """Return the name of the upstream "bad" or "good" in the settings of now."""
        return f"{which}{self.number}"

    def wait_until_idle(self) -> None:
        """Wait until no request is in flight, and none has a place at an upstream."""

        def idle() -> bool:
            found = self.gateway.api("GET", "/overview")
            members = [each["in_flight"] for each in found["upstreams"]]
            return not (found["in_flight"] or found["queued"] or any(members))

        wait_until(idle)

    def met(self, *names: str) -> tuple[Any, ...]:
        """Return the fields of the only row, once all is given back: places and hold. What was paid
        is what the row says."""
        self.wait_until_idle()
        row = self.row
        account = self.gateway.api("GET", f"/accounts/{self.account}")
        assert Decimal(account["held"]) == 0
        assert Decimal(BALANCE) - Decimal(account["balance"]) == Decimal(row["cost"] or 0)
        limits = self.gateway.api("GET", f"/accounts/{self.account}/limits")
        assert limits["concurrency"]["in_flight"] == 0
        return tuple(row[name] for name in names)

    def assert_served_by_good(self, attempts: int = 2, cost: Decimal | None = None) -> None:
        """Assert that there is one row of a request that the good upstream has served."""
        names = ("upstream", "attempts", "upstream_status", "upstream_error_code", "outcome")
        found = self.met(*names, "status")
        assert found == (self.name("good"), attempts, 200, None, "completed", 200)
        if cost is not None:
            assert Decimal(self.row["cost"]) == cost


@contextlib.contextmanager
def running_pair(folder: Path, fork_server: ForkServer) -> Iterator[Pair]:
    """Run a pair, and close it."""
    with Upstream() as bad, Upstream() as good:
        pair = Pair(folder, fork_server, bad, good)
        try:
            yield pair
        finally:
            pair.gateway.close()
