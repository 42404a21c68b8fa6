"""The metrics for an operator's alarms, beyond those of ledger and upstreams: what runs here, what
is taken of its limits, backups, keys that expire, messages to the webhook, and the log.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from redbtc.gateway.gateway import Gateway
from redbtc.gateway.watching import Watch
from redbtc.release import RELEASE
from redbtc.store.expiring_keys import EXPIRING_SOON_DAYS
from redbtc.store.schema import newest_version
from redbtc.telemetry import LOG, NOTED
from redbtc.times import now_ms


class OperatorMetrics:
    """Metrics that are read when somebody asks for them."""

    def __init__(self, gateway: Gateway, watch: Watch) -> None:
        self._gateway = gateway
        self._watch = watch
        self._build = [RELEASE, str(newest_version())]

    def collect(self) -> Iterator[Metric]:
        """Return what prometheus-client asks for whenever the metrics are read."""
        build = GaugeMetricFamily(
            "redbtc_build_info",
            "1, with the program's version and that of its schema",
            labels=["version", "schema"],
        )
        build.add_metric(self._build, 1)
        yield build
        yield from self._of_limits()
        yield from self._of_the_watch()
        lines = CounterMetricFamily(
            "redbtc_log_events",
            "Events of the log at this level, since the start",
            labels=["level"],
        )
        for level, count in NOTED.items():
            lines.add_metric([logging.getLevelName(level).lower()], count)
        yield lines
        yield CounterMetricFamily(
            "redbtc_log_lines_dropped", "Lines of the log that were not written", LOG.dropped
        )

    def _of_limits(self) -> Iterator[Metric]:
        gateway, gauge = self._gateway, GaugeMetricFamily
        counters, settings = gateway.limiter.of_gateway, gateway.settings
        taken = counters.places.taken
        yield gauge("redbtc_draining", "1 while the gateway ends", gateway.draining)
        yield gauge("redbtc_places_taken", "Places taken of limits.concurrency", taken)
        yield gauge(
            "redbtc_places_limit", "limits.concurrency; 0: no limit", settings.limits.concurrency
        )
        yield gauge(
            "redbtc_reading_bytes",
            "Memory of request bodies that counts for server.max_reading_bytes",
            counters.reading.taken,
        )
        yield gauge(
            "redbtc_reading_limit_bytes",
            "Maximum of redbtc_reading_bytes",
            settings.server.reading_bytes,
        )
        yield gauge(
            "redbtc_websocket_sessions", "WebSocket sessions of clients", gateway.sessions.total()
        )
        yield gauge(
            "redbtc_background_responses",
            "Background responses that have not ended",
            gateway.background.unfinished.total(),
        )

    def _of_the_watch(self) -> Iterator[Metric]:
        watch, messages, gauge = self._watch, self._gateway.billing.messages, GaugeMetricFamily
        yield gauge(
            "redbtc_disk_low", "1 while the database's disk is nearly full", watch.low_disk.holds
        )
        record, now = watch.backups.record, now_ms()
        if last := record.good_at(now) or watch.first_start:
            yield gauge(
                "redbtc_backup_age_seconds",
                "Age of the last good backup; if there is none, time since the first start",
                max(0, now - last) / 1000,
            )
        yield gauge("redbtc_backup_failed", "1 if the last backup failed", record.has_failed)
        yield gauge(
            "redbtc_keys_expiring",
            f"Keys that expire within {EXPIRING_SOON_DAYS} days and were not rotated",
            watch.keys_expiring,
        )
        yield gauge(
            "redbtc_webhook_waiting", "Messages to the webhook that wait", watch.messages_waiting
        )
        tries = CounterMetricFamily(
            "redbtc_webhook_tries", "Messages that were sent to the webhook", labels=["result"]
        )
        tries.add_metric(["accepted"], messages.delivered)
        tries.add_metric(["failed"], messages.failed)
        yield tries
