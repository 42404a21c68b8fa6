"""The view that the admin API has of the gateway at work."""

from __future__ import annotations

import time
from typing import Any

from redbtc.admin.outputs import AtWork, UpstreamAtWork
from redbtc.config import DEMO
from redbtc.gateway.gateway import Gateway
from redbtc.money import NANOS, parse_amount
from redbtc.store.accounts import Account
from redbtc.store.keys import Key


class GatewayView:
    """The gateway as the admin API sees it (admin.actors.RunningGateway)."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    @property
    def example_model(self) -> str:
        """The model that examples name."""
        return "redbtc-demo" if self._gateway.upstreams.named(DEMO) else "gpt-5.4-mini"

    def serves(self, model: str) -> bool:
        """Return whether an upstream serves the model."""
        return self._gateway.upstreams.serve(model)

    def listed_models(self) -> set[str]:
        """Return the models that upstreams have listed so far."""
        return self._gateway.upstreams.listed_models()

    def abort_key(self, key_id: str) -> int:
        """Abort all that runs for a key, at the upstreams as well. Return how much that was."""
        in_background = self._gateway.background.cancel(key_id)
        return self._gateway.in_flight.abort_key(key_id) + in_background

    def set_back(self, at: int) -> None:
        """Let no background response have begun later than `at`: the ledger's time is set back."""
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

    def at_work(self) -> AtWork:
        """Return what is in flight, what was refused since the start, and the upstreams."""
        gateway = self._gateway
        return AtWork(
            running=True,
            uptime_seconds=round(time.monotonic() - gateway.started),
            in_flight=gateway.in_flight.count,
            queued=gateway.limiter.queued,
            refusals=gateway.telemetry.refusals(),
            upstreams=[
                UpstreamAtWork(name=each.name, usable=each.usable, in_flight=each.in_flight)
                for each in gateway.upstreams
            ],
        )
