"""The view that the admin API has of the gateway at work."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from typing import Any

from msgspec.structs import asdict

from redbtc.admin.outputs import AtWork, Reloaded, UpstreamAtWork, UpstreamRested
from redbtc.codex.catalog import offered_models
from redbtc.codex.config_toml import CodexOffer, offer_of
from redbtc.config import DEMO, Settings
from redbtc.deadlines import TICK
from redbtc.errors import Conflict, NotFound
from redbtc.gateway.gateway import Gateway
from redbtc.gateway.upstream_shown import not_set, upstream_shown
from redbtc.money import NANOS, parse_amount
from redbtc.store.accounts import Account
from redbtc.store.closing import key_ids
from redbtc.store.keys import Key
from redbtc.upstream.upstreams import Upstream

END_SECONDS = 15  # for requests that were aborted, and background responses that are cancelled


class GatewayView:
    """The gateway as the admin API sees it (admin.actors.RunningGateway)."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    @property
    def settings(self) -> Settings:
        """The settings in force."""
        return self._gateway.settings

    @property
    def example_model(self) -> str:
        """The model that examples name."""
        return "redbtc-demo" if self._gateway.upstreams.named(DEMO) else "gpt-5.4-mini"

    def codex(self, own_login: bool | None) -> CodexOffer:
        """Return what the gateway offers to Codex CLI; see `offer_of`."""
        gateway = self._gateway
        models = () if gateway.upstreams.named(DEMO) else offered_models(gateway.catalog.models)
        return offer_of(gateway.settings, own_login, models)

    @contextlib.contextmanager
    def checking(self) -> Iterator[None]:
        """Don't let SIGTERM wait for the end of `with`: the database is checked."""
        self._gateway.checks += 1
        try:
            yield
        finally:
            self._gateway.checks -= 1

    def serves(self, model: str) -> bool:
        """Return whether an upstream serves the model."""
        return self._gateway.upstreams.serve(model)

    def listed_models(self) -> set[str]:
        """Return the models that upstreams have listed so far."""
        return self._gateway.upstreams.listed_models()

    def abort_key(self, key_id: str) -> int:
        """Abort all that runs for a key, at the upstreams as well. Return how much that was."""
        gateway = self._gateway
        in_background = gateway.background.cancel(key_id)
        elsewhere = gateway.in_flight.abort_elsewhere([key_id], key_id)
        return gateway.in_flight.abort_key(key_id) + in_background + elsewhere

    async def abort_account(self, account_id: str) -> int:
        """Abort all that runs for an account, whose keys are revoked, at the upstreams as well.
        Return how much that was."""
        gateway = self._gateway
        in_background = gateway.background.cancel(account_id)
        keys = await key_ids(gateway.store, account_id)
        elsewhere = gateway.in_flight.abort_elsewhere(keys, account_id)
        return await gateway.in_flight.abort_keys(keys) + in_background + elsewhere

    async def end_account(self, account_id: str) -> bool:
        """Abort all that runs for an account, and wait until it has ended, up to END_SECONDS.
        Return whether it has."""
        gateway = self._gateway
        await self.abort_account(account_id)
        keys = await key_ids(gateway.store, account_id)
        until = time.monotonic() + END_SECONDS
        while gateway.in_flight.has_any(keys) or gateway.background.unfinished.of(account_id):
            if time.monotonic() > until:
                return False
            await asyncio.sleep(TICK)
        gateway.objects.forget_listed(account_id)
        return True

    def set_back(self, at: int) -> None:
        """Let each background response have begun at `at` if it began later: the ledger's time is
        set back."""
        self._gateway.background.set_back(at)

    def limits_of_key(self, key: Key) -> dict[str, Any]:
        """Return the limits in force for a key and its account, and what is left of them."""
        return self._gateway.limiter.report(key, self._gateway.settings.limits)

    def limits_of_account(self, account: Account) -> dict[str, Any]:
        """Return the limits in force for an account, and what is left of them."""
        own = account.concurrency, account.requests_per_minute, account.tokens_per_minute
        factor = account.throttle_factor
        thousandths = None if factor is None else parse_amount(factor) // (NANOS // 1000)
        gateway = self._gateway
        return gateway.limiter.report_account(account.id, own, thousandths, gateway.settings.limits)

    async def reload(self) -> Reloaded:
        """Let a new process take over. Raises Conflict or UserError if none does."""
        return await self._gateway.reload()

    def at_work(self) -> AtWork:
        """Return what is in flight, what was refused since the start, and the upstreams."""
        gateway, now = self._gateway, self._gateway.store.time()
        return AtWork(
            running=True,
            uptime_seconds=round(time.monotonic() - gateway.started),
            in_flight=gateway.in_flight.count,
            queued=gateway.limiter.queued,
            refusals=gateway.telemetry.refusals(),
            upstreams=[upstream_shown(each, now) for each in gateway.upstreams],
        )

    def rest_upstream(self, name: str, seconds: float, by: str) -> UpstreamRested:
        """Let an upstream rest for so long. Raises NotFound, or Conflict if it can't be used."""
        upstream = self._to_steer(name)
        upstream.health.rest(seconds, by)
        is_last = upstream.health.is_last
        unserved = [each for each in upstream.settings.models if is_last(each)]
        return UpstreamRested(
            **asdict(upstream_shown(upstream, self._gateway.store.time())), unserved_models=unserved
        )

    def resume_upstream(self, name: str, by: str) -> UpstreamAtWork:
        """End an upstream's rests and outage. Raises NotFound, or Conflict if it can't be used."""
        upstream = self._to_steer(name)
        upstream.health.resume(by)
        return upstream_shown(upstream, self._gateway.store.time())

    def _to_steer(self, name: str) -> Upstream:
        found = [each for each in self._gateway.upstreams if each.name == name]
        if not found:
            names = ", ".join(each.name for each in self._gateway.upstreams)
            raise NotFound(f"upstream {name!r} does not exist; there are: {names}")
        if not found[0].usable:
            raise Conflict(f"upstream {name!r} can't be used: {not_set(found[0])}")
        return found[0]
