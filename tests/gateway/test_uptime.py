"""How the gateway measures its own uptime."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redbtc.gateway.uptime import MAX_UNCHECKED, UptimeMeter, serving_state
from redbtc.store.database import Store
from redbtc.store.uptime import UptimePeriod, UptimeState, forgetting_periods, read_periods
from redbtc.times import DAY, MINUTE, now_ms

pytestmark = pytest.mark.promise_9

START = 1_796_000_000_000 // MINUTE * MINUTE  # the start of a minute


class Step(NamedTuple):
    """What happens until the next check, and what that finds. Times are in milliseconds."""

    passes: int
    clock_set: int
    change: str
    state: UptimeState


STEPS = st.lists(
    st.builds(
        Step,
        passes=st.sampled_from(
            [0, 1, 999, 1000, 5000, MAX_UNCHECKED, MAX_UNCHECKED + 1, 3 * MINUTE]
        ),
        clock_set=st.sampled_from(
            [0] * 12 + [1, MAX_UNCHECKED + 1, 5 * MINUTE, -1000, -5 * MINUTE]
        ),
        change=st.sampled_from([""] * 20 + ["killed", "handed over"]),
        state=st.sampled_from(["up"] * 12 + ["ledger", "upstreams", "draining", "maintenance"]),
    ),
    min_size=2,
    max_size=60,
)


class Checked(NamedTuple):
    """A check as it was: by the ledger's time and by the true time, and in which life."""

    at: int
    true: int
    life: int
    state: UptimeState


def run(steps: list[Step]) -> tuple[list[Checked], list[UptimePeriod]]:
    """Return the checks that these steps make, and the periods that are written."""
    meter, written = UptimeMeter(), dict[int, UptimePeriod]()
    true = life = offset = 0
    latest, checks = START, []
    for step in steps:
        true += step.passes
        offset += step.clock_set
        latest = max(latest, START + true + offset)  # the ledger's time never goes back
        if step.change == "killed":
            meter, life = UptimeMeter(), life + 1
        if step.change == "handed over":
            last, meter = meter.handover, UptimeMeter()
            meter.go_on_from(last)
        meter.check(latest, true, step.state)
        checks.append(Checked(latest, true, life, step.state))
        written.update(meter.unwritten)
        meter.unwritten = {}
    return checks, list(written.values())


def proven(checks: list[Checked], minute: int) -> bool:
    """Return whether one process has seen the whole minute, and has always found itself up."""
    first = max((at for at, each in enumerate(checks) if each.at <= minute), default=None)
    last = next((at for at, each in enumerate(checks) if each.at >= minute + MINUTE), None)
    if first is None or last is None:
        return False
    within = [each for each in checks if minute <= each.at < minute + MINUTE]
    passed = checks[first : last + 1]
    return all(each.state == "up" for each in within) and all(
        b.life == a.life
        and b.true - a.true <= MAX_UNCHECKED
        and (b.at - a.at) - (b.true - a.true) <= MAX_UNCHECKED
        for a, b in pairwise(passed)
    )


@given(steps=STEPS)
def test_a_minute_is_up_if_and_only_if_it_was_seen_to_be_up(steps: list[Step]) -> None:
    checks, periods = run(steps)
    up = {
        minute
        for began, ended, state in periods
        if state == "up"
        for minute in range(began, ended, MINUTE)
    }
    minutes = range(START - MINUTE, checks[-1].at + MINUTE, MINUTE)
    assert up == {minute for minute in minutes if proven(checks, minute)}
    ends = [ended for _, ended, _ in periods]
    assert all(end <= checks[-1].at for end in ends), "no minute is written before it is over"
    edges = sorted((began, ended) for began, ended, _ in periods)
    assert all(a[1] <= b[0] for a, b in pairwise(edges))
    assert all(edge % MINUTE == 0 for pair in edges for edge in pair)


def measured(*lives: list[tuple[int, UptimeState]]) -> list[tuple[int, int, UptimeState]]:
    """Return the periods that checks in several lives write; times are seconds after START."""
    found: dict[int, UptimePeriod] = {}
    for checks in lives:
        meter = UptimeMeter()
        for second, state in checks:
            meter.check(START + second * 1000, second * 1000, state)
        found.update(meter.unwritten)
    return [
        ((began - START) // MINUTE, (ended - START) // MINUTE, state)
        for began, ended, state in found.values()
    ]


def every_second(start: int, end: int, state: UptimeState = "up") -> list[tuple[int, UptimeState]]:
    return [(second, state) for second in range(start, end)]


def test_a_minute_has_its_worst_state() -> None:
    checks = every_second(-1, 200)
    checks[90] = (89, "ledger")
    checks[95] = (94, "maintenance")
    assert measured(checks) == [(0, 1, "up"), (1, 2, "ledger"), (2, 3, "up")]


def test_an_absence_is_left_out_as_is_the_minute_of_a_start() -> None:
    killed, started = every_second(-1, 130), every_second(200, 400)
    assert measured(killed, started) == [(0, 2, "up"), (4, 6, "up")]
    stopped = every_second(-1, 70) + every_second(100, 200)  # SIGSTOP, or a laptop that sleeps
    assert measured(stopped) == [(0, 1, "up"), (2, 3, "up")]


def test_a_clock_that_is_set_forward_makes_no_uptime() -> None:
    meter = UptimeMeter()
    for second in range(-1, 70):
        meter.check(START + second * 1000, second * 1000, "up")
    for second in range(70, 200):
        meter.check(START + second * 1000 + 400 * 86_400_000, second * 1000, "up")
    up, skipped, after = meter.unwritten.values()
    assert (up.state, up.ended_at) == ("up", START + MINUTE)
    assert (skipped.state, skipped.ended_at - skipped.began_at) == (
        "unknown",
        400 * 86_400_000 + MINUTE,
    )
    assert (after.state, after.ended_at - after.began_at) == ("up", MINUTE)


def test_a_ledger_that_is_set_back_has_nothing_later() -> None:
    meter = UptimeMeter()
    for second in range(-1, 700):
        meter.check(START + second * 1000, second * 1000, "up")
    for second in range(700, 900):
        meter.check(START + (second - 570) * 1000, second * 1000, "up")
    assert list(meter.unwritten.values()) == [
        (START, START + 130_000, "up"),  # as `db set-time` leaves the row
        (START + 2 * MINUTE, START + 3 * MINUTE, "unknown"),
        (START + 3 * MINUTE, START + 5 * MINUTE, "up"),
    ]


def test_a_ledger_that_fails_for_ever_piles_up_nothing() -> None:
    meter = UptimeMeter()
    for minute in range(3000):
        meter.check(START + minute * MINUTE, minute * 1000, "ledger" if minute % 2 else "up")
    assert len(meter.unwritten) <= 1000


def test_what_has_become_longer_while_it_was_written_is_written_again() -> None:
    meter = UptimeMeter()
    for second in range(-1, 61):
        meter.check(START + second * 1000, second * 1000, "up")
    written = dict(meter.unwritten)
    assert list(written.values()) == [(START, START + MINUTE, "up")]
    for second in range(61, 121):
        meter.check(START + second * 1000, second * 1000, "up")
    meter.forget(written)
    assert list(meter.unwritten.values()) == [(START, START + 2 * MINUTE, "up")]
    meter.forget(dict(meter.unwritten))
    assert not meter.unwritten


@pytest.mark.parametrize("fault", ["up", "ledger", "upstreams", "draining", "maintenance"])
def test_whatever_keeps_requests_from_being_served_is_noticed(fault: str) -> None:
    gateway: Any = SimpleNamespace(
        store=SimpleNamespace(healthy=fault != "ledger"),
        upstreams=SimpleNamespace(can_serve=lambda: fault != "upstreams"),
        draining=fault == "draining",
        billing=SimpleNamespace(
            notices=SimpleNamespace(maintenance=lambda: fault == "maintenance" or None)
        ),
    )
    assert serving_state(gateway) == fault


async def kept(path: Path) -> tuple[int, list[tuple[int, int, str]]]:
    """Open a ledger as a gateway does, forget what is old, and return its time and its periods."""
    async with Store.open(path, "normal") as store:
        await store.transact_step(forgetting_periods(store.time()))
        return store.time(), [each async for each in read_periods(store)]


def test_only_90_days_are_kept_and_the_newest_period_before(tmp_path: Path) -> None:
    path = tmp_path / "redbtc.db"
    asyncio.run(kept(path))
    now = now_ms() // MINUTE * MINUTE
    limit = now - 90 * DAY
    rows = [
        UptimePeriod(limit - 400 * DAY, limit - 300 * DAY, "up"),
        UptimePeriod(limit - 300 * DAY, limit - 200 * DAY, "ledger"),
        UptimePeriod(limit - 100 * DAY, limit - 50 * DAY, "up"),
        UptimePeriod(limit - DAY, limit + DAY, "up"),
        UptimePeriod(limit + 2 * DAY, limit + 3 * DAY, "up"),
    ]
    with closing(sqlite3.connect(path)) as database, database:
        database.executemany("INSERT INTO uptime VALUES (?, ?, ?)", rows)
    assert asyncio.run(kept(path))[1] == rows[2:]


def test_the_time_does_not_go_back_behind_the_uptime(tmp_path: Path) -> None:
    """Else a clock that is set back over a restart could make minutes of an absence up."""
    path = tmp_path / "redbtc.db"
    asyncio.run(kept(path))
    ahead = now_ms() // MINUTE * MINUTE + 30 * MINUTE
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("INSERT INTO uptime VALUES (?, ?, 'up')", (ahead - DAY, ahead))
    assert asyncio.run(kept(path))[0] >= ahead
