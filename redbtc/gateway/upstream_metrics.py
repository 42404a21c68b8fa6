"""The metrics of the upstreams' members."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from redbtc.store.upstream_changes import UpstreamState
from redbtc.upstream.configured import Upstreams
from redbtc.upstream.health import QUOTA
from redbtc.upstream.health_report import rejects_key


class UpstreamMetrics:
    """The metrics of the members that are in force, read when somebody asks for them."""

    def __init__(self, upstreams: Upstreams) -> None:
        self._upstreams = upstreams

    def collect(self) -> Iterator[Metric]:
        """Return what prometheus-client asks for whenever the metrics are read."""
        of = ["upstream"]
        states = GaugeMetricFamily(
            "redbtc_upstream_state", "1 for the state of the upstream", labels=[*of, "state"]
        )
        attempts = CounterMetricFamily(
            "redbtc_upstream_attempts", "Requests that were sent to the upstream", labels=of
        )
        failures = CounterMetricFamily(
            "redbtc_upstream_failures",
            "Requests that failed at the upstream, by error code or cause",
            labels=[*of, "reason"],
        )
        rejected = GaugeMetricFamily(
            "redbtc_upstream_key_rejected", "1 while the upstream rejects its key", labels=of
        )
        in_flight = GaugeMetricFamily(
            "redbtc_upstream_in_flight", "Requests in flight at the upstream", labels=of
        )
        for each in self._upstreams:
            health = each.health
            health.absences.end_rests()
            for state in get_args(UpstreamState):
                states.add_metric([each.name, state], health.state == state)
            attempts.add_metric([each.name], health.past.attempts)
            # A counter that begins with 1 has not increased, for Prometheus.
            for reason, count in ({QUOTA: 0} | health.past.failures).items():
                failures.add_metric([each.name, reason], count)
            rejected.add_metric([each.name], rejects_key(health))
            in_flight.add_metric([each.name], health.in_flight)
        yield GaugeMetricFamily(
            "redbtc_upstreams_available",
            "1 while an upstream can take requests for some model",
            self._upstreams.can_serve(),
        )
        yield from (states, attempts, failures, rejected, in_flight)
