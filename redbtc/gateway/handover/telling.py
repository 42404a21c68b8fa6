"""Take the state from the process that is taken over from, and report its changes."""

from __future__ import annotations

import os
import time
from collections.abc import Hashable
from typing import TypeVar

from redbtc.gateway.background_leaving import LeftResponses
from redbtc.gateway.gateway import Gateway
from redbtc.gateway.handover.state import (
    Amounts,
    BucketState,
    CounterState,
    EarlierState,
    GatewayState,
    InFlightReport,
    InFlightState,
    Payer,
    SpendingState,
)
from redbtc.gateway.service import Service
from redbtc.limits.buckets import Bucket
from redbtc.telemetry import MetricNumbers

AmountName = TypeVar("AmountName", bound=Hashable)


def state_to_tell(
    service: Service, left: LeftResponses, earlier: list[EarlierState]
) -> GatewayState:
    """Return the state of a gateway that admits no more requests."""
    gateway, now = service.gateway, time.monotonic()
    billing = gateway.billing
    return GatewayState(
        clock=gateway.store.clock.state,
        uptime=service.uptime.meter.handover,
        counters={
            name: CounterState(
                bucket_state(each.requests, now),
                bucket_state(each.tokens, now),
                bucket_state(each.small_frames, now),
            )
            for name, each in gateway.limiter.counters()
        },
        spendings={
            payer: SpendingState(
                each.paid, each.cost, each.spent, each.month, each.notified_percent
            )
            for payer, each in billing.totals.known()
        },
        in_flight=in_flight_state(gateway, left),
        moved_sessions=gateway.upstreams.moved.known(),
        outages=gateway.upstreams.outages(),
        metrics=gateway.telemetry.numbers,
        earlier=earlier,
    )


def bucket_state(bucket: Bucket, now: float) -> BucketState:
    """Return the state of a bucket at `now` (monotonic seconds)."""
    return BucketState(bucket.limit, bucket.level(now))


def in_flight_state(gateway: Gateway, left: LeftResponses) -> InFlightState:
    """Return what is in flight in this process."""
    counters, totals = gateway.limiter.counters(), gateway.billing.totals.known()
    members = [each for each in gateway.upstreams if each.health.in_flight]
    return InFlightState(
        pid=os.getpid(),
        places={name: each.places.taken for name, each in counters if each.places.taken},
        upstreams={each.name: each.health.in_flight for each in members},
        held={payer: each.held for payer, each in totals if each.held},
        growth=gateway.objects.growing(),
        keys=gateway.in_flight.by_key(),
        unfinished=gateway.background.unfinished.by_account(),
        rows={each.row.request_id for each in gateway.in_flight.with_row},
        billed={each.row.request_id for each in gateway.in_flight.with_row if each.row.month},
        followed=left.followed(),
    )


class Reporter:
    """Finds what has changed in a process since its state was taken. Requests in flight are not
    slowed down: the amounts that they keep anyway are compared with those of the last report."""

    def __init__(self, gateway: Gateway, left: LeftResponses, told: InFlightState) -> None:
        """`told` is the state that the other process was told."""
        self._gateway = gateway
        self._left = left
        self._told = told
        self._drawn = self._drawn_now()
        self._cost = self._cost_now()
        self._metrics = gateway.telemetry.numbers
        self._changes = gateway.store.changes

    def report(self) -> InFlightReport | None:
        """Return what has changed, None if nothing has."""
        gateway, before = self._gateway, self._told
        now = in_flight_state(gateway, self._left)
        if gateway.objects.are_writing:
            now.growth = not_less(before.growth, now.growth)
        drawn, cost, changes = self._drawn_now(), self._cost_now(), gateway.store.changes
        report = InFlightReport(
            places=changed(before.places, now.places),
            drawn=self._more_drawn(drawn),
            upstreams=changed(before.upstreams, now.upstreams),
            held=changed(before.held, now.held),
            spent={
                payer: more
                for payer, each in cost.items()
                if (more := each - self._cost.get(payer, each))
            },
            growth=changed(before.growth, now.growth),
            keys=changed(before.keys, now.keys),
            unfinished=changed(before.unfinished, now.unfinished),
            begun=now.rows - before.rows,
            ended=before.rows - now.rows,
            billed=now.billed - before.billed,
            followed=None if now.followed == before.followed else now.followed,
            left=self._left.take_new(),
            metrics=self._more_metrics(),
            changed=changes != self._changes,
        )
        self._told, self._drawn, self._cost, self._changes = now, drawn, cost, changes
        return None if report == InFlightReport() else report

    def _drawn_now(self) -> dict[str, tuple[float, float]]:
        return {
            name: (each.requests.drawn, each.tokens.drawn)
            for name, each in self._gateway.limiter.counters()
        }

    def _more_drawn(self, now: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
        before, found = self._drawn, {}
        for name, (requests, tokens) in now.items():
            old = before.get(name, (0.0, 0.0))
            if (requests, tokens) != old:
                found[name] = requests - old[0], tokens - old[1]
        return found

    def _more_metrics(self) -> MetricNumbers:
        before, now = self._metrics, self._gateway.telemetry.numbers
        self._metrics = now
        return {
            name: [number - old for number, old in zip(numbers, before[name], strict=True)]
            if name in before
            else numbers
            for name, numbers in now.items()
            if before.get(name) != numbers
        }

    def _cost_now(self) -> dict[Payer, int]:
        return {payer: each.cost for payer, each in self._gateway.billing.totals.known()}


def not_less(before: Amounts, now: Amounts) -> Amounts:
    """Return the present growth, but no less than before: the other process must not take it for
    ended before it can read in the ledger what has become of it."""
    return now | {name: max(amount, now.get(name, 0)) for name, amount in before.items()}


def changed(before: dict[AmountName, int], now: dict[AmountName, int]) -> dict[AmountName, int]:
    """Return the present amounts that differ from those before; 0 for those that are gone."""
    found = {name: amount for name, amount in now.items() if before.get(name) != amount}
    return found | {name: 0 for name in before if name not in now}
