"""The report on the uptime: which minutes are up, down, planned or not known, and their sums."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redbtc.admin.uptime_report import (
    MAX_OUTAGES,
    MinutesOfState,
    MinuteState,
    UptimeMinutes,
    UptimeSums,
)
from redbtc.billing.notices import PlannedTime
from redbtc.store.json_values import json_time
from redbtc.store.uptime import UptimePeriod, UptimeState
from redbtc.times import DAY, MINUTE

pytestmark = pytest.mark.promise_9

NOW = 1_796_000_000_000 // DAY * DAY + 600 * MINUTE + 1234  # at ten o'clock
RUNNING = NOW - NOW % MINUTE  # the start of the running minute


def period(since: int, until: int, state: UptimeState = "up") -> UptimePeriod:
    """Return a period that begins and ends so many minutes before the running one."""
    return UptimePeriod(RUNNING - since * MINUTE, RUNNING - until * MINUTE, state)


def planned(since: int, until: int) -> PlannedTime:
    return PlannedTime(RUNNING - since * MINUTE, RUNNING - until * MINUTE)


def minutes_of(periods: list[UptimePeriod], plan: list[PlannedTime]) -> UptimeMinutes:
    minutes = UptimeMinutes(NOW)
    for each in periods:
        minutes.add(each)
    for time in plan:
        minutes.plan(time)
    return minutes


def counts(sums: UptimeSums) -> tuple[int, int, int, int, float | None]:
    return (
        sums.up_minutes,
        sums.down_minutes,
        sums.planned_minutes,
        sums.no_data_minutes,
        sums.percent,
    )


def outage(since: int, until: int, state: MinuteState) -> MinutesOfState:
    began, ended = (json_time(RUNNING - each * MINUTE) for each in (since, until))
    return MinutesOfState(began, ended, since - until, state)


def test_what_was_measured_is_up_or_down_and_what_is_before_is_not_known() -> None:
    periods = [period(100, 80), period(70, 60, "ledger"), period(60, 10), period(10, 0, "unknown")]
    found = minutes_of(periods, []).shown()
    assert found.since == json_time(RUNNING - 100 * MINUTE)
    assert found.until == json_time(RUNNING)
    assert counts(found.last_24_hours) == (70, 20, 0, 1440 - 90, 77.777)
    assert counts(found.last_90_days) == (70, 20, 0, 90 * 1440 - 90, 77.777)
    assert found.outages == [outage(70, 60, "ledger"), outage(80, 70, "stopped")]
    assert [each.day for each in found.days][-1] == json_time(NOW)[:10]
    assert len(found.days) == 90
    assert counts(found.days[-1]) == (70, 20, 0, 600 - 90, 77.777)
    assert counts(found.days[0]) == (0, 0, 0, 1440, None)


def test_announced_maintenance_is_neither_up_nor_down() -> None:
    periods = [period(100, 80), period(80, 70, "maintenance"), period(70, 65), period(60, 0)]
    found = minutes_of(periods, [planned(90, 62), planned(5, -600)]).shown()
    assert counts(found.last_24_hours)[:3] == (20 + 5 + 60, 2, 10 + 3)
    assert found.outages == [
        outage(62, 60, "stopped"),
        outage(65, 62, "planned"),
        outage(80, 70, "planned"),
    ]
    part_of_a_minute = PlannedTime(RUNNING - 61 * MINUTE + 1, RUNNING - 61 * MINUTE + 2)
    found = minutes_of(periods, [part_of_a_minute]).shown()
    assert outage(61, 60, "planned") in found.outages


def test_a_percentage_is_rounded_down() -> None:
    found = minutes_of([period(129_600, 1)], []).shown()
    assert counts(found.last_90_days) == (129_599, 1, 0, 0, 99.999)
    assert found.last_90_days.percent != 100


def test_a_gateway_that_was_off_for_a_year_was_down() -> None:
    found = minutes_of([period(500_000, 400_000)], []).shown()
    assert counts(found.last_90_days) == (0, 129_600, 0, 0, 0.0)
    assert found.since == found.outages[0].began_at


def test_nothing_is_known_before_the_first_minute() -> None:
    found = minutes_of([], [planned(100, 0)]).shown()
    assert (found.since, found.outages) == (None, [])
    assert counts(found.last_90_days) == (0, 0, 0, 129_600, None)


PERIODS = st.lists(
    st.tuples(st.integers(0, 5000), st.sampled_from(["up", "unknown", "ledger", "draining"])),
    max_size=30,
)
PLANNED_TIMES = st.lists(st.tuples(st.integers(-10, 9000), st.integers(0, 500)), max_size=5)


@given(periods=PERIODS, times=PLANNED_TIMES)
def test_minutes_are_what_each_of_them_is_by_itself(
    periods: list[tuple[int, UptimeState]], times: list[tuple[int, int]]
) -> None:
    """The sums of days, and the periods of one day, count each minute once."""
    edges, at = [], 9000
    for length, state in periods:
        if at - length >= 0:
            edges.append(period(at, at - length, state))
            at -= length + length % 3
    plan = [planned(since, since - length) for since, length in times]
    minutes = minutes_of(edges, plan)
    expected: dict[str, int] = {}
    for number in range(9000):
        start = RUNNING - (number + 1) * MINUTE
        what: str = "no_data"
        if edges and start >= edges[0].began_at:
            what = next((s for b, e, s in edges if b <= start < e), "stopped")
        if what == "unknown":
            what = "no_data"
        is_planned = any(b < start + MINUTE and start < e for b, e in plan)
        if is_planned and what not in ("up", "no_data"):
            what = "planned"
        expected[what] = expected.get(what, 0) + 1
    found: dict[str, int] = {}
    for each in minutes.periods(RUNNING - 9000 * MINUTE, RUNNING):
        found[each.state] = found.get(each.state, 0) + each.minutes
    assert found == expected
    days = [sums for _, sums in minutes.days()]
    assert sum(each.up_minutes for each in days) == expected.get("up", 0)
    assert sum(each.planned_minutes for each in days) == expected.get("planned", 0)


def test_outages_are_bounded_for_a_gateway_that_flaps() -> None:
    periods = [period(at, at - 1) for at in range(129_600, 0, -2)]
    found = minutes_of(periods, []).shown()
    assert len(found.outages) == MAX_OUTAGES
    assert counts(found.last_90_days) == (64_800, 64_800, 0, 0, 50.0)
