"""What the admin API shows of a member of the upstreams."""

from __future__ import annotations

from typing import cast

from redbtc.admin.outputs import LastError, RestAtWork, UpstreamAtWork
from redbtc.store.json_values import json_time
from redbtc.store.upstream_changes import UpstreamState
from redbtc.upstream.health_report import report
from redbtc.upstream.upstreams import Upstream


def upstream_shown(upstream: Upstream, now: int) -> UpstreamAtWork:
    """Return how a member is. `now` is the ledger's time, in milliseconds: the member's own times
    are relative, so that a jump of the machine's clock does not change them."""
    found, settings = report(upstream.health), upstream.settings
    lately, error = found.lately, None
    if found.last_error and found.last_error_seconds is not None:
        error = LastError(found.last_error, moment(now, -found.last_error_seconds))
    return UpstreamAtWork(
        name=upstream.name,
        usable=upstream.usable,
        state=cast(UpstreamState, found.state),
        since=moment(now, -found.state_seconds),
        reason=found.reason if upstream.usable else not_set(upstream),
        until=end_time(now, found.seconds_left),
        rests=[
            RestAtWork(each.model, each.reason, end_time(now, each.seconds_left))
            for each in found.rests
        ],
        in_flight=upstream.health.in_flight,
        max_concurrency=upstream.max_concurrency,
        priority=upstream.priority,
        weight=upstream.weight,
        models=list(settings.models),
        organization=settings.organization or None,
        requests=lately.requests,
        success_rate=None if lately.success_rate is None else round(lately.success_rate, 4),
        median_first_byte_ms=lately.median_first_byte_ms,
        last_error=error,
    )


def moment(now: int, seconds: float) -> str:
    """Return the time that is so many seconds after now, as JSON shows it."""
    return json_time(max(0, now + round(seconds * 1000)))


def end_time(now: int, seconds_left: float | None) -> str | None:
    """Return the time in so many seconds, as JSON shows it; None if it is not known."""
    return None if seconds_left is None else moment(now, seconds_left)


def not_set(upstream: Upstream) -> str:
    """Return which environment variables a member lacks that can't be used."""
    return f"not set: {', '.join(upstream.settings.missing_variables())}"
