"""What /status says of the uptime of a real gateway, whose clock runs fast."""

from __future__ import annotations

import re
import sqlite3
import time
from contextlib import closing
from typing import Any

import httpx2
import pytest

from tests.helpers.gateway import ROOT, Gateway, MakeGateway, wait_until

pytestmark = [pytest.mark.promise_7, pytest.mark.promise_9]

# A minute of all clocks takes 0.2 s. Times go on over restarts, since they count from a fixed one.
FAST = """
import sys, time
wall, elapsed, speed = {wall}, {elapsed}, 300
true_wall, true_clock = time.time_ns, time.clock_gettime_ns
def time_ns():
    return wall + (true_wall() - wall) * speed
def clock_gettime_ns(clock):
    now = true_clock(clock)
    return elapsed + (now - elapsed) * speed if clock == time.CLOCK_BOOTTIME else now
time.time_ns, time.clock_gettime_ns = time_ns, clock_gettime_ns
sys.path.insert(0, {root!r})
from redbtc.gateway import status_route, uptime
uptime.CHECK_SECONDS, uptime.MAX_UNCHECKED = 0.02, 3_000_000
status_route.ANSWER_SECONDS = 0
"""

# Commits fail while the file is there.
FAILING = """
import os
from redbtc.store import writer
write = writer.Writer._write
def failing(self, *values):
    if os.path.exists({fault!r}):
        raise OSError(5, "by a test")
    return write(self, *values)
writer.Writer._write = failing
"""
PATIENT = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from redbtc.gateway import status_route
status_route.ANSWER_SECONDS = 999
"""


@pytest.fixture
def fast(make_gateway: MakeGateway) -> Gateway:
    gateway = make_gateway()
    wall, elapsed = time.time_ns(), time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    gateway.prelude = FAST.format(wall=wall, elapsed=elapsed, root=str(ROOT))
    return gateway


def uptime(gateway: Gateway) -> dict[str, Any]:
    found: dict[str, Any] = gateway.get("/status").json()["uptime"]
    return found


def wait_for_minutes(gateway: Gateway, what: str, count: int) -> dict[str, Any]:
    """Wait until there are so many minutes `up`, `down` or `planned`, and return the uptime."""
    name = f"{what}_minutes"
    wait_until(lambda: uptime(gateway)["last_24_hours"][name] >= count)
    return uptime(gateway)


def test_an_absence_counts_as_down_and_the_time_before_the_first_start_does_not(
    fast: Gateway,
) -> None:
    fast.start()
    first = wait_for_minutes(fast, "up", 5)
    assert first["last_24_hours"]["down_minutes"] == 0
    assert first["last_24_hours"]["percent"] == 100
    fast.kill()
    time.sleep(0.6)
    fast.start()
    before = uptime(fast)["last_24_hours"]
    kept = first["last_24_hours"]["up_minutes"]
    assert before["up_minutes"] >= kept - 1, "kill -9 loses the running minute at most"
    found = wait_for_minutes(fast, "up", before["up_minutes"] + 3)
    (outage,) = found["outages"]
    assert (outage["state"], found["last_24_hours"]["down_minutes"]) == (
        "stopped",
        outage["minutes"],
    )
    assert outage["minutes"] >= 3
    day = found["since"][:10]
    of_day = fast.get(f"/status?day={day}").json()
    assert of_day["day"] == day
    assert {each["state"] for each in of_day["periods"]} >= {"up", "no_data", "stopped"}
    with closing(sqlite3.connect(fast.database)) as database:
        ((rows,),) = database.execute("SELECT count(*) FROM uptime")
    assert rows == 2, "one for each time that it ran"


def test_announced_maintenance_is_planned_and_other_maintenance_is_down(fast: Gateway) -> None:
    fast.start()
    wait_for_minutes(fast, "up", 2)
    about = {"kind": "maintenance", "text": "Disk.", "refuses_requests": True}
    fast.api("POST", "/notices", {**about, "effective": "3m", "until": "8m"})
    found = wait_for_minutes(fast, "planned", 5)
    assert found["last_24_hours"]["down_minutes"] == 0
    assert [each["state"] for each in found["outages"]] == ["planned"]
    at_once = fast.api("POST", "/notices", about)
    found = wait_for_minutes(fast, "down", 2)
    assert found["outages"][0]["state"] == "maintenance"
    fast.api("POST", f"/notices/{at_once['id']}/withdraw")
    assert [each["text"] for each in fast.get("/status").json()["past"]] == ["Disk."]


def test_a_ledger_that_fails_is_noticed_without_requests_and_counts_as_down(fast: Gateway) -> None:
    fault = fast.folder / "fault"
    fast.prelude += FAILING.format(fault=str(fault))
    fast.start()
    wait_for_minutes(fast, "up", 2)
    fault.touch()
    wait_until(lambda: fast.get("/status").json()["status"] == "incident")
    found = wait_for_minutes(fast, "down", 4)
    assert {each["state"] for each in found["outages"]} == {"ledger"}, "also what is not written"
    fault.unlink()
    before = found["last_24_hours"]["up_minutes"]
    found = wait_for_minutes(fast, "up", before + 2)
    assert {each["state"] for each in found["outages"]} == {"ledger"}, (
        "it was measured all the time"
    )


def test_what_was_measured_is_kept_when_the_gateway_ends(fast: Gateway) -> None:
    fast.start()
    wait_for_minutes(fast, "up", 2)
    with closing(sqlite3.connect(fast.database)) as database:
        seen = database.execute("SELECT began_at, ended_at, state FROM uptime").fetchall()
    assert fast.terminate() == 0
    with closing(sqlite3.connect(fast.database)) as database:
        rows = database.execute("SELECT began_at, ended_at, state FROM uptime").fetchall()
    assert [(began, state) for began, _, state in rows[:1]] == [(seen[0][0], "up")]
    assert rows[0][1] >= seen[0][1]


def test_set_time_leaves_nothing_in_the_future_and_goes_on(fast: Gateway) -> None:
    fast.start()
    since = wait_for_minutes(fast, "up", 6)["since"]
    assert fast.cli("db", "set-time", since, "--yes")["moved"]["uptime"] == 1
    found = wait_for_minutes(fast, "up", 1)
    assert found["since"] >= since
    assert found["last_24_hours"]["down_minutes"] == 0, "what the clock has skipped is not known"


def test_answers_are_kept_for_a_moment_but_notices_are_shown_at_once(
    make_gateway: MakeGateway,
) -> None:
    gateway = make_gateway()
    gateway.prelude = PATIENT
    gateway.start()
    first = gateway.get("/status").content
    with closing(sqlite3.connect(gateway.database)) as database, database:
        database.execute("INSERT INTO uptime VALUES (0, 60000, 'up')")
    assert gateway.get("/status").content == first
    page = gateway.get("/status", headers={"accept": "text/html"}).text
    assert "Measured since" not in page
    for body in (gateway.get("/status"), gateway.get("/status", headers={"accept": "text/html"})):
        assert "Soon." not in body.text
    notice = gateway.api("POST", "/notices", {"kind": "incident", "text": "Soon."})
    for body in (gateway.get("/status"), gateway.get("/status", headers={"accept": "text/html"})):
        assert "Soon." in body.text
    assert gateway.get("/status").json()["status"] == "incident"
    gateway.api("POST", f"/notices/{notice['id']}/withdraw")
    assert "Soon." not in gateway.get("/status").text


def test_only_days_that_are_known_can_be_asked_for(gateway: Gateway) -> None:
    for day in ("2020-01-01", "today", "x" * 400, "2026-13-41", "%00", "..%2f"):
        answer = gateway.get(f"/status?day={day}")
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "day"
        page = gateway.get(f"/status?day={day}", headers={"accept": "text/html"})
        assert page.status_code == 404
        assert day[:10] not in page.text
    today = gateway.get("/status").json()["uptime"]["days"][-1]["day"]
    page = gateway.get(f"/status?day={today}", headers={"accept": "text/html"})
    assert page.status_code == 200


def test_the_public_status_names_no_account_and_no_upstream(gateway: Gateway) -> None:
    gateway.new_key("secret-account")
    gateway.api("POST", "/upstreams/test/rest", {"for": "10m"})
    for headers in ({}, {"accept": "text/html"}):
        text = gateway.get("/status", headers=headers).text
        assert "secret-account" not in text
        assert not re.search(r"\btest\b", text)


def test_many_readers_share_an_answer(gateway: Gateway) -> None:
    with httpx2.Client(base_url=gateway.url, trust_env=False) as client:
        bodies = {client.get("/status").content for _ in range(200)}
    assert len(bodies) <= 2
