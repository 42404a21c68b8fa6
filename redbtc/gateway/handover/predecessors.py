"""The processes that this one has taken over from, and that still finish their requests. What they
have in flight counts here, until they report that it has ended."""

from __future__ import annotations

import time
from collections.abc import Hashable
from typing import TypeVar

from redbtc.billing.billing import Billing
from redbtc.gateway.gateway import Gateway
from redbtc.gateway.handover.state import (
    Amounts,
    BucketState,
    GatewayState,
    InFlightReport,
    InFlightState,
)
from redbtc.gateway.service import Service
from redbtc.limits.buckets import Bucket
from redbtc.store.requests import costs_of


def restore_state(service: Service, state: GatewayState) -> None:
    """Go on with the limits, the totals and the uptime of the process that this one takes over
    from."""
    gateway, now = service.gateway, time.monotonic()
    service.uptime.meter.go_on_from(state.uptime)
    gateway.store.clock.go_on_with(state.clock)
    for name, each in state.counters.items():
        counters = gateway.limiter.counters_named(name)
        restore_bucket(counters.requests, each.requests, now)
        restore_bucket(counters.tokens, each.tokens, now)
        restore_bucket(counters.small_frames, each.small_frames, now)
    for payer, spending in state.spendings.items():
        known = gateway.billing.totals.begin(payer, spending.month, spending.cost, spending.spent)
        known.paid, known.notified_percent = spending.paid, spending.notified_percent
    gateway.upstreams.moved.add(state.moved_sessions)
    gateway.upstreams.go_on_with(state.outages)
    gateway.telemetry.add(state.metrics)


def restore_bucket(bucket: Bucket, state: BucketState, now: float) -> None:
    """Let a bucket hold what that of another process does at `now` (monotonic seconds)."""
    bucket.restore(state.limit, state.level, now)


class Predecessor:
    """The requests in flight of a process that this one has taken over from. They count in the
    limits, the holds and the list of requests that a revoked key aborts."""

    def __init__(self, gateway: Gateway, state: InFlightState) -> None:
        self.pid = state.pid
        self.keys: Amounts = {}
        self.rows: set[str] = set()
        self.followed: set[str] = set()
        self._gateway = gateway
        self._billed: set[str] = set()
        self._places: Amounts = {}
        self._upstreams: Amounts = {}
        self._held: dict[tuple[str, str], int] = {}
        self._growth: Amounts = {}
        self._unfinished: Amounts = {}
        self._take(
            InFlightReport(
                places=state.places,
                upstreams=state.upstreams,
                held=state.held,
                growth=state.growth,
                keys=state.keys,
                unfinished=state.unfinished,
                begun=state.rows,
                billed=state.billed,
                followed=state.followed,
            )
        )

    @property
    def state(self) -> InFlightState:
        """The state of what it has in flight now."""
        return InFlightState(
            pid=self.pid,
            places=dict(self._places),
            upstreams=dict(self._upstreams),
            held=dict(self._held),
            growth=dict(self._growth),
            keys=dict(self.keys),
            unfinished=dict(self._unfinished),
            rows=self.rows,
            billed=self._billed,
            followed=self.followed,
        )

    async def note(self, report: InFlightReport) -> None:
        """Bring everything up to date with a report. Raises StorageUnavailable, sqlite3.Error."""
        gateway = self._gateway
        if report.changed:
            await read_again(gateway.billing)
        await gateway.background.take_up(report.left)  # it is held here before it ends there
        self._take(report)
        gateway.billing.messages.wakeup.set()  # there may be some

    def _take(self, report: InFlightReport) -> None:
        gateway = self._gateway
        limiter, totals = gateway.limiter, gateway.billing.totals
        for name, (requests, tokens) in report.drawn.items():
            counters = limiter.counters_named(name)
            counters.requests.charge(requests)
            counters.tokens.charge(tokens)
        for payer, more in report.spent.items():
            totals.spend(payer, more)
        for payer, by in bring_up_to_date(self._held, report.held):
            totals.hold(payer, by)
        for name, by in bring_up_to_date(self._places, report.places):
            limiter.counters_named(name).places.change(by)
        for name, by in bring_up_to_date(self._upstreams, report.upstreams):
            gateway.upstreams.change_in_flight(name, by)
        for name, by in bring_up_to_date(self._growth, report.growth):
            gateway.objects.stop_growing({name: -by})
        for name, by in bring_up_to_date(self._unfinished, report.unfinished):
            gateway.background.unfinished.change(name, by)
        bring_up_to_date(self.keys, report.keys)
        gateway.telemetry.add(report.metrics)
        self.rows = (self.rows | report.begun) - report.ended
        self._billed = (self._billed | report.billed) & self.rows
        if report.followed is not None:
            self.followed = report.followed

    async def end(self) -> None:
        """Finish what is left of it: it has ended, perhaps by an accident. Its requests that have
        not ended are interrupted. Raises StorageUnavailable, OSError, sqlite3.Error."""
        gateway = self._gateway
        await gateway.store.finish_for(self.pid, self.rows)
        for payer, cost in await costs_of(gateway.store, self.rows - self._billed):
            gateway.billing.totals.spend(payer, cost)
        self._billed = set(self.rows)  # should this have to be done again
        await gateway.background.take_up(self.followed)
        self.release()

    def release(self) -> None:
        """Count nothing of it here any more."""
        self._take(
            InFlightReport(
                places=dict.fromkeys(self._places, 0),
                upstreams=dict.fromkeys(self._upstreams, 0),
                held=dict.fromkeys(self._held, 0),
                growth=dict.fromkeys(self._growth, 0),
                keys=dict.fromkeys(self.keys, 0),
                unfinished=dict.fromkeys(self._unfinished, 0),
                ended=self.rows,
                followed=set(),
            )
        )


async def read_again(billing: Billing) -> None:
    """Read what another process has changed. Raises StorageUnavailable, sqlite3.Error."""
    await billing.read()
    billing.totals.read_payments()


AnyName = TypeVar("AnyName", bound=Hashable)


def bring_up_to_date(
    before: dict[AnyName, int], now: dict[AnyName, int]
) -> list[tuple[AnyName, int]]:
    """Bring the amounts `before` up to date with those `now`; return by how much each changes."""
    found = [(name, amount - before.get(name, 0)) for name, amount in now.items()]
    before.update(now)
    for name, amount in now.items():
        if not amount:
            del before[name]
    return found
