"""What the admin API and /metrics show of the gateway at work."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from redbtc.admin.outputs import AtWork, UpstreamAtWork
from redbtc.config import DEMO
from redbtc.gateway.state import Gateway
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

    def cut(self, key_id: str) -> int:
        """Abort all that runs for a key, at the upstreams as well. Return how much that was."""
        in_background = self._gateway.unended.cancel(key_id)
        return self._gateway.in_flight.abort_key(key_id) + in_background

    def set_back(self, at: int) -> None:
        """Let no background response have begun later than `at`: the ledger's time is set back."""
        self._gateway.unended.set_back(at)

    def limits_of_key(self, key: Key) -> dict[str, Any]:
        """Return the limits in force for a key and its account, and what is left of them."""
        return self._gateway.limits.report(key, self._gateway.settings.limits)

    def limits_of_account(self, account: Account) -> dict[str, Any]:
        """Return the limits in force for an account, and what is left of them."""
        own = account.concurrency, account.requests_per_minute, account.tokens_per_minute
        factor = account.throttle_factor
        thousandths = None if factor is None else parse_amount(factor) // (NANOS // 1000)
        gateway = self._gateway
        return gateway.limits.report_account(account.id, own, thousandths, gateway.settings.limits)

    def at_work(self) -> AtWork:
        """Return what is in flight, what was refused since the start, and the upstreams."""
        gateway = self._gateway
        return AtWork(
            running=True,
            uptime_seconds=round(time.monotonic() - gateway.started),
            in_flight=gateway.in_flight.count,
            queued=gateway.limits.queued,
            refusals=gateway.watch.refusals(),
            upstreams=[
                UpstreamAtWork(name=each.name, usable=each.usable, in_flight=each.in_flight)
                for each in gateway.upstreams
            ],
        )


class GatewayMetrics:
    """A collector of prometheus-client: what the gateway is asked for at each reading."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of the gateway and of its ledger."""
        gauge, counter, gateway = GaugeMetricFamily, CounterMetricFamily, self._gateway
        store = gateway.store
        yield gauge("redbtc_in_flight", "Requests to /v1 in flight", gateway.in_flight.count)
        yield gauge("redbtc_queued", "Requests waiting for a free place", gateway.limits.queued)
        yield counter("redbtc_ledger_commits", "Ledger commits", store.commits.count)
        yield counter(
            "redbtc_ledger_repairs",
            "Rows closed by another process",
            store.commits.repaired,
        )
        yield gauge(
            "redbtc_clock_offset_seconds",
            "System clock minus ledger time",
            store.clock.offset / 1000,
        )
        yield gauge("redbtc_ledger_healthy", "1 while the ledger can commit", store.healthy)
