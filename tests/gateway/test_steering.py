"""Operators see the upstreams and steer them: in lists, on the overview, in metrics and by what
monitors are told."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from redbtc.gateway.upstream_shown import moment
from redbtc.upstream.absences import NOT_TRIED, URGENT_SECONDS
from redbtc.upstream.change import UpstreamChange
from redbtc.upstream.health import OUT_SECONDS, QUOTA, MemberHealth
from redbtc.upstream.health_report import can_serve, report
from redbtc.upstream.past_requests import FAILURES_IN_ROW, MAX_REASONS, OTHER
from tests.dashboard.pages import cells
from tests.helpers.gateway import NO_TLS, PATIENCE_SECONDS, ROOT, Gateway, MakeGateway, wait_until
from tests.helpers.logins import new_user
from tests.helpers.upstream import Received, Reply, Upstream, json_answer, openai_like, silent

pytestmark = pytest.mark.promise_9

BODY = {"model": "gpt-5.5", "input": "Hi"}
KEYS = {"KEY_A": "sk-canary-a-0123456789", "KEY_B": "sk-canary-b-0123456789"}
SOON = """
import sys
sys.path.insert(0, {root!r})
from redbtc.upstream import health

health.OUT_SECONDS = health.MAX_OUT_SECONDS = {seconds}
"""


# ── The report of one member ─────────────────────────────────────────────────────────────────────


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def changes() -> list[UpstreamChange]:
    return []


@pytest.fixture
def health(clock: Clock, changes: list[UpstreamChange]) -> MemberHealth:
    """The health of a member that is not the last one."""
    health = MemberHealth("test", True, clock, changes.append)
    health.is_last = lambda _: False
    return health


def fail_often(health: MemberHealth, code: str = "refused") -> None:
    for _ in range(FAILURES_IN_ROW):
        health.fail("m", code, NOT_TRIED)


def test_a_member_is_up_since_the_end_of_its_rest(
    health: MemberHealth, clock: Clock, changes: list[UpstreamChange]
) -> None:
    """Even if no request comes that could end the rest."""
    health.limit("m", "rate_limit_exceeded", 20.0, NOT_TRIED)
    clock.now += 5
    (rest,) = report(health).rests
    assert (rest.model, rest.reason, rest.seconds_left) == ("m", "rate_limit_exceeded", 15.0)
    clock.now += 25
    found = report(health)
    assert (found.state, found.state_seconds, found.reason, found.rests) == ("up", 10.0, None, [])
    assert [(change.state, change.reason) for change in changes][1:] == [("up", "rested")]
    assert (found.last_error, found.last_error_seconds) == ("rate_limit_exceeded", 30.0)


def test_a_rest_that_ends_in_an_outage_changes_nothing(
    health: MemberHealth, clock: Clock, changes: list[UpstreamChange]
) -> None:
    health.limit("m", "rate_limit_exceeded", 1.0, NOT_TRIED)
    fail_often(health)
    clock.now += 10
    found = report(health)
    assert (found.state, found.state_seconds, found.seconds_left) == ("out", 10.0, OUT_SECONDS - 10)
    assert (found.reason, found.rests) == ("refused", [])
    assert [change.state for change in changes] == ["resting", "out"]


def test_the_end_is_not_known_if_it_takes_a_success(health: MemberHealth, clock: Clock) -> None:
    health.limit("m", QUOTA, None, NOT_TRIED)
    clock.now += 100
    found = report(health)
    assert (found.state, found.reason, found.seconds_left) == ("resting", QUOTA, None)
    assert [(rest.model, rest.seconds_left) for rest in found.rests] == [(None, None)]


def test_the_last_member_is_up_and_says_what_is_wrong(health: MemberHealth) -> None:
    health.is_last = lambda _: True
    fail_often(health)
    found = report(health)
    assert (found.state, found.reason, found.seconds_left) == ("up", "refused", None)


def test_a_host_that_no_connection_reaches_can_serve_nothing(
    health: MemberHealth, clock: Clock
) -> None:
    """Until the gateway itself has found that it can be reached."""
    fail_often(health, "connect_timeout")
    clock.now += OUT_SECONDS + 1
    assert not can_serve(health)
    health.note_reachable()
    assert can_serve(health)
    health.is_last = lambda _: True
    health.resume("ada")
    fail_often(health, "dns")
    clock.now += OUT_SECONDS + 1
    assert not can_serve(health)
    health.note_reachable()
    assert can_serve(health)


def test_failures_are_counted_by_a_limited_number_of_reasons(health: MemberHealth) -> None:
    """The reasons are an upstream's words."""
    for number in range(2 * MAX_REASONS):
        health.fail("m", f"code_{number}", NOT_TRIED)
        health.fail("m", "code_0", NOT_TRIED)
    assert len(health.past.failures) == MAX_REASONS + 1
    assert health.past.failures["code_0"] == 2 * MAX_REASONS + 1
    assert health.past.failures[OTHER] == MAX_REASONS


def test_a_time_before_1970_is_not_shown() -> None:
    assert moment(1000, -5.0) == "1970-01-01T00:00:00.000Z"


# ── Lists, rests and resumptions ─────────────────────────────────────────────────────────────────


@pytest.fixture
def two_keys(make_gateway: MakeGateway, upstream: Upstream) -> Gateway:
    """A running gateway with an upstream that has two keys."""
    table = {"name": "up", "base_url": upstream.url, "api_key_envs": list(KEYS)}
    more = {"organization": "acme", "max_concurrency": 7, "models": ["gpt-5*", "codex*"]}
    return make_gateway({"upstreams": [{**table, **more}]}, **KEYS).start()


def ask(gateway: Gateway, key: str) -> httpx2.Response:
    with gateway.client(key) as client:
        return client.post("/responses", json=BODY)


def listed(gateway: Gateway) -> dict[str, dict[str, Any]]:
    """The upstreams by name."""
    found = gateway.api("GET", "/upstreams")
    assert found["running"]
    return {each["name"]: each for each in found["upstreams"]}


@pytest.fixture
def local(two_keys: Gateway) -> Iterator[httpx2.Client]:
    """A client of the admin API, which does not raise errors."""
    transport = httpx2.HTTPTransport(verify=NO_TLS, uds=f"{two_keys.database}.sock")
    with httpx2.Client(
        transport=transport, base_url="http://gateway/admin/v1", timeout=PATIENCE_SECONDS
    ) as client:
        yield client


def test_the_list_says_how_each_member_is(two_keys: Gateway, upstream: Upstream) -> None:
    key = two_keys.new_key()
    assert ask(two_keys, key).status_code == 200
    found = listed(two_keys)
    assert list(found) == ["up/KEY_A", "up/KEY_B"]
    served, other = sorted(found.values(), key=lambda each: -each["requests"])
    started = served["since"]
    assert started[:4] >= "2026"
    assert {name: served[name] for name in served if name not in ("name", "since")} == {
        "usable": True,
        "state": "up",
        "reason": None,
        "until": None,
        "rests": [],
        "in_flight": 0,
        "max_concurrency": 7,
        "priority": 1,
        "weight": 1,
        "models": ["gpt-5*", "codex*"],
        "organization": "acme",
        "requests": 1,
        "success_rate": 1.0,
        "median_first_byte_ms": served["median_first_byte_ms"],
        "last_error": None,
    }
    assert served["median_first_byte_ms"] >= 0
    assert (other["requests"], other["success_rate"]) == (0, None)
    upstream.script = json_answer({"error": {"code": "server_error", "message": "no"}}, 500)
    assert ask(two_keys, key).status_code == 500
    errors = [each["last_error"] for each in listed(two_keys).values()]
    assert [error["code"] for error in errors] == ["server_error"] * 2, "it was tried at both"
    assert all(error["at"] >= started for error in errors)


@pytest.mark.parametrize("path", ["up/KEY_A", "up%2FKEY_A"])
def test_a_member_that_rests_gets_no_requests(
    two_keys: Gateway, upstream: Upstream, path: str
) -> None:
    key = two_keys.new_key()
    rested = two_keys.api("POST", f"/upstreams/{path}/rest", {"for": "15m"})
    assert (rested["name"], rested["state"], rested["reason"]) == ("up/KEY_A", "resting", "by hand")
    assert rested["until"] > rested["since"]
    assert rested["unserved_models"] == []
    for _ in range(10):
        assert ask(two_keys, key).status_code == 200
    assert {row["upstream"] for row in two_keys.rows()} == {"up/KEY_B"}
    two_keys.restart()
    assert listed(two_keys)["up/KEY_A"]["state"] == "resting"
    resumed = two_keys.api("POST", f"/upstreams/{path}/resume")
    assert (resumed["state"], resumed["reason"], resumed["rests"]) == ("up", None, [])
    two_keys.restart()
    assert listed(two_keys)["up/KEY_A"]["state"] == "up"
    found = two_keys.api("GET", "/upstreams/changes")["changes"]
    by_hand = [(each["state"], each["reason"]) for each in found if each["changed_by"] == "local"]
    assert by_hand == [("up", "resumed by hand"), ("resting", "by hand")]


def test_the_answer_names_the_models_that_nobody_serves(
    two_keys: Gateway, upstream: Upstream
) -> None:
    key = two_keys.new_key()
    two_keys.api("POST", "/upstreams/up/KEY_A/rest")
    rested = two_keys.api("POST", "/upstreams/up/KEY_B/rest", {"for": "30d"})
    assert rested["unserved_models"] == ["gpt-5*", "codex*"]
    answer = ask(two_keys, key)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_upstream")
    assert 0 < int(answer.headers["retry-after"]) <= 600, "until the first one is back"
    assert not upstream.requests
    assert two_keys.get("/readyz").status_code == 503
    two_keys.api("POST", "/upstreams/up/KEY_B/resume")
    assert ask(two_keys, key).status_code == 200
    assert two_keys.get("/readyz").status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("nobody/rest", {}, 404, "upstream 'nobody' does not exist"),
        ("up/resume", {}, 404, "upstream 'up' does not exist; there are: up/KEY_A, up/KEY_B"),
        ("up/KEY_A/rest/rest", {}, 404, "upstream 'up/KEY_A/rest' does not exist"),
        ("up/KEY_A/rest", {"for": "soon"}, 400, "a duration such as 90s"),
        ("up/KEY_A/rest", {"duration": "5m"}, 400, "unknown field `duration`"),
        ("up/KEY_A/rest", {"for": "0"}, 409, "for must be from 1s to 30d, not '0'"),
        ("up/KEY_A/rest", {"for": "31d"}, 409, "for must be from 1s to 30d, not '31d'"),
    ],
)
def test_what_can_not_be_done_is_refused(
    local: httpx2.Client, path: str, body: dict[str, str], status: int, said: str
) -> None:
    answer = local.post(f"/upstreams/{path}", json=body)
    assert answer.status_code == status
    assert said in answer.json()["error"]["message"]


def test_a_member_without_its_key_can_not_be_steered(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    table = {"name": "up", "base_url": upstream.url, "api_key_envs": ["KEY_A", "KEY_C"]}
    gateway = make_gateway({"upstreams": [table]}, **KEYS).start()
    lacking = listed(gateway)["up/KEY_C"]
    assert (lacking["state"], lacking["usable"]) == ("unusable", False)
    assert lacking["reason"] == "not set: KEY_C"
    for action in ("rest", "resume"):
        done = gateway.cli("upstream", action, "up/KEY_C", check=False)
        assert done.returncode == 1
        assert done.stderr == "Error: upstream 'up/KEY_C' can't be used: not set: KEY_C\n"


@pytest.mark.parametrize("restarted", [False, True])
def test_the_last_member_serves_although_it_rested_beside_others(
    make_gateway: MakeGateway, upstream: Upstream, restarted: bool
) -> None:
    """Its answer is better than none, once the settings have no other member any more."""
    table = {"name": "up", "base_url": upstream.url}
    gateway = make_gateway({"upstreams": [{**table, "api_key_envs": list(KEYS)}]}, **KEYS).start()
    key = gateway.new_key()
    limit = json_answer({"error": {"code": "rate_limit_exceeded"}}, 429, [("retry-after", "500")])

    async def limit_once(request: Received, reply: Reply) -> None:
        upstream.script = openai_like
        await limit(request, reply)

    upstream.script = limit_once
    assert ask(gateway, key).status_code == 200
    (resting,) = [each["name"] for each in listed(gateway).values() if each["rests"]]
    left = resting.partition("/")[2]
    gateway.configure({"upstreams": [{**table, "api_key_envs": [left]}]})
    if restarted:
        gateway.restart()
    else:
        gateway.signal(signal.SIGHUP)
        gateway.wait_for_log('"reloaded"')
    assert ask(gateway, key).status_code == 200
    assert listed(gateway)[resting]["state"] == "up"


def test_a_rest_by_hand_outlives_the_outage_that_it_began_in(
    two_keys: Gateway, upstream: Upstream
) -> None:
    """Even if a request that had been let through before succeeds then."""
    key, go = two_keys.new_key(), threading.Event()
    reject = json_answer({"error": {"code": "invalid_api_key"}}, 401)
    upstream.script = reject
    assert ask(two_keys, key).status_code == 502
    (out,) = [each["name"] for each in listed(two_keys).values() if each["state"] == "out"]
    bad = KEYS[out.partition("/")[2]]

    async def answer_late(request: Received, reply: Reply) -> None:
        if request.header("authorization") == f"Bearer {bad}":
            await reply.wait(go)
            await openai_like(request, reply)
        else:
            await reject(request, reply)

    upstream.script = answer_late
    statuses: list[int] = []
    asking = threading.Thread(target=lambda: statuses.append(ask(two_keys, key).status_code))
    time.sleep(URGENT_SECONDS)
    asking.start()
    wait_until(lambda: listed(two_keys)[out]["in_flight"])
    two_keys.api("POST", f"/upstreams/{out}/rest", {"for": "2h"})
    go.set()
    asking.join()
    assert statuses == [200]
    found = listed(two_keys)[out]
    assert (found["state"], found["reason"]) == ("resting", "by hand")
    two_keys.restart()
    found = listed(two_keys)[out]
    assert (found["state"], found["reason"]) == ("resting", "by hand")


def test_a_rest_ends_with_a_reload_that_brings_another_key(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    """It does not come back with a restart."""

    def tables(variable: str) -> dict[str, Any]:
        table = {"name": "up", "base_url": upstream.url, "api_key_env": variable}
        return {"upstreams": [table, {**table, "name": "other"}]}

    gateway = make_gateway(tables("KEY_A"), **KEYS).start()
    gateway.api("POST", "/upstreams/up/rest", {"for": "2h"})
    gateway.configure(tables("KEY_B"))
    gateway.signal(signal.SIGHUP)
    gateway.wait_for_log('"reloaded"')
    assert listed(gateway)["up"]["state"] == "up"
    gateway.restart()
    assert listed(gateway)["up"]["state"] == "up"


# ── The commands ─────────────────────────────────────────────────────────────────────────────────


def test_the_commands_show_and_steer(two_keys: Gateway, upstream: Upstream) -> None:
    key = two_keys.new_key()
    upstream.script = json_answer(
        {"error": {"code": "rate_limit_exceeded", "message": "no"}}, 429, [("retry-after", "500")]
    )
    assert ask(two_keys, key).status_code == 429
    done = two_keys.run("upstream", "rest", "up/KEY_A", "--for", "1h")
    assert done.returncode == 0
    assert done.stdout.startswith("Upstream up/KEY_A rests until 20")
    found = two_keys.cli("upstream", "list")
    names = [each["name"] for each in found["upstreams"]]
    assert (found["running"], names) == (True, list(listed(two_keys)))
    shown = two_keys.run("upstream", "list").stdout
    assert max(map(len, shown.splitlines())) <= 100, shown
    head, first, second, *rests = shown.splitlines()
    columns = ["name", "state", "since", "until", "in_flight", "success", "first_byte", "reason"]
    assert head.split() == columns
    assert first.split()[:2] == ["up/KEY_A", "resting"]
    assert first.endswith("by hand")
    assert "0 %" in first + second
    assert any(line.startswith("up/KEY_") and "rests for gpt-5.5 until" in line for line in rests)
    done = two_keys.run("upstream", "rest", "up/KEY_B")
    assert (
        done.stderr == "Warning: no other upstream serves these models meanwhile: gpt-5*, codex*\n"
    )
    for name in names:
        done = two_keys.run("upstream", "resume", name)
        assert done.stdout == f"Upstream {name} is sent requests again.\n"
    assert {each["state"] for each in listed(two_keys).values()} == {"up"}


def test_a_member_that_is_out_and_rests_is_said_to_rest_until_then(
    two_keys: Gateway, upstream: Upstream
) -> None:
    """Not until the end of its outage, which comes sooner."""
    upstream.script = json_answer({"error": {"code": "invalid_api_key"}}, 401)
    assert ask(two_keys, two_keys.new_key()).status_code == 502
    (out,) = [each["name"] for each in listed(two_keys).values() if each["state"] == "out"]
    done = two_keys.run("upstream", "rest", out, "--for", "2h")
    said = done.stdout.removeprefix(f"Upstream {out} rests until ")
    assert said > listed(two_keys)[out]["until"], done.stdout
    shown = two_keys.run("upstream", "list").stdout
    assert re.search(f"^{out} rests until .*: by hand$", shown, re.MULTILINE)


def test_without_a_gateway_there_is_nothing_to_steer(make_gateway: MakeGateway) -> None:
    gateway = make_gateway()
    assert gateway.cli("upstream", "list") == {"running": False, "upstreams": []}
    assert gateway.run("upstream", "list").stdout.startswith("No gateway runs.")
    for action in ("rest", "resume"):
        done = gateway.cli("upstream", action, "test", check=False)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("Error: no gateway runs, so 'test' can't re")


# ── The overview ─────────────────────────────────────────────────────────────────────────────────


def test_the_overview_shows_and_steers(two_keys: Gateway) -> None:
    operator = new_user(two_keys, "ada@example.com")

    def states() -> dict[str, list[str]]:
        text = operator.get("/dashboard/overview").text
        return {row[0]: row[1:] for row in cells(text, "Upstreams, and their")}

    assert [row[0] for row in states().values()] == ["up", "up"]
    form = {"do": "rest", "upstream": "up/KEY_A"}
    assert operator.post("/dashboard/overview", **form).status_code == 303
    state, since, why, *_ = states()["up/KEY_A"]
    assert (state, why[:15]) == ("resting", "by hand, until ")
    assert why[15:] > since
    page = operator.post("/dashboard/overview", **{**form, "upstream": "up/KEY_B"})
    assert "No other upstream serves these models meanwhile: gpt-5*, codex*" in page.text
    for name in ("up/KEY_A", "up/KEY_B"):
        answer = operator.post("/dashboard/overview", do="resume", upstream=name)
        assert answer.status_code == 303
    assert [row[0] for row in states().values()] == ["up", "up"]
    assert operator.post("/dashboard/overview", do="rest", upstream="x").status_code == 404
    found = two_keys.api("GET", "/upstreams/changes")["changes"]
    assert {each["changed_by"] for each in found} == {"ada@example.com"}
    operator.client.headers["origin"] = "https://elsewhere.example"
    assert operator.post("/dashboard/overview", **form).status_code == 403
    operator.client.close()


# ── Metrics, and what monitors are told ──────────────────────────────────────────────────────────


def test_attempts_failures_and_states_are_metrics(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    with Upstream() as broken:
        tables = [
            {"name": name, "base_url": at.url, "api_key_env": "TEST_UPSTREAM_KEY", "priority": rank}
            for rank, (name, at) in enumerate((("broken", broken), ("good", upstream)), 1)
        ]
        gateway = make_gateway({"upstreams": tables}).start()
        key = gateway.new_key()
        broken.script = json_answer({"error": {"code": "server_error", "message": "no"}}, 500)
        requests = FAILURES_IN_ROW + 2
        for _ in range(requests):
            assert ask(gateway, key).status_code == 200
        found = gateway.metrics()

    def of(name: str, member: str, more: str = "") -> float:
        return found[f'redbtc_upstream_{name}{{{more}upstream="{member}"}}']

    assert of("attempts_total", "broken") == FAILURES_IN_ROW
    assert of("attempts_total", "good") == requests
    assert of("failures_total", "broken", 'reason="server_error",') == FAILURES_IN_ROW
    assert of("in_flight", "good") == 0
    states = {
        member: [
            state
            for state in ("up", "resting", "out", "unusable")
            if found[f'redbtc_upstream_state{{state="{state}",upstream="{member}"}}']
        ]
        for member in ("broken", "good")
    }
    assert states == {"broken": ["out"], "good": ["up"]}
    assert not any(found[name] for name in found if "failures_total" in name and '"good"' in name)


def test_requests_in_flight_are_counted_across_a_reload(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    gateway = make_gateway().start()
    upstream.script = silent
    metric = 'redbtc_upstream_in_flight{upstream="test"}'
    with gateway.begin(gateway.new_key(), BODY):
        wait_until(lambda: gateway.metrics()[metric] == 1)
        table = {"name": "test", "base_url": upstream.url, "api_key_env": "TEST_UPSTREAM_KEY"}
        gateway.configure({"upstreams": [{**table, "weight": 7}]})
        gateway.signal(signal.SIGHUP)
        wait_until(lambda: listed(gateway)["test"]["weight"] == 7)
        assert listed(gateway)["test"]["in_flight"] == gateway.metrics()[metric] == 1


def told(gateway: Gateway) -> tuple[int, str]:
    """The status of /readyz, and what /status says."""
    answer = gateway.get("/readyz")
    if answer.status_code == 503:
        assert answer.json()["error"]["code"] == "no_upstream"
    return answer.status_code, gateway.get("/status").json()["status"]


def two_dead(make_gateway: MakeGateway, dead: tuple[Upstream, Upstream], seconds: float) -> Gateway:
    """A gateway in front of two upstreams that serve nothing. An outage lasts `seconds`."""
    tables = [
        {"name": f"up{rank}", "base_url": each.url, "api_key_env": "TEST_UPSTREAM_KEY"}
        for rank, each in enumerate(dead)
    ]
    gateway = make_gateway({"upstreams": tables})
    gateway.prelude = SOON.format(root=str(ROOT), seconds=seconds)
    gateway.start()
    assert told(gateway) == (200, "ok")
    return gateway


def fail_until_known(gateway: Gateway) -> None:
    key = gateway.new_key()

    def is_known() -> bool:
        assert ask(gateway, key).status_code >= 500
        return told(gateway) == (503, "degraded")

    wait_until(is_known)


@pytest.fixture
def ended() -> tuple[Upstream, Upstream]:
    """Two upstreams that don't listen any more."""
    with Upstream() as first, Upstream() as second:
        pass
    return first, second


def test_monitors_are_told_if_no_upstream_can_serve(
    make_gateway: MakeGateway, ended: tuple[Upstream, Upstream]
) -> None:
    gateway = two_dead(make_gateway, ended, 3600.0)
    fail_until_known(gateway)
    page = gateway.get("/status", headers={"accept": "text/html"}).text
    assert "Requests can&#39;t be served at the moment" in page
    gateway.api("POST", "/notices", {"kind": "incident", "text": "It is known."})
    assert told(gateway) == (503, "incident"), "the worst is told"


def test_the_gateway_is_ready_again_when_an_upstream_may_be_tried(
    make_gateway: MakeGateway, ended: tuple[Upstream, Upstream], upstream: Upstream
) -> None:
    """By itself: a load balancer sends no requests to a gateway that is not ready."""
    upstream.script = json_answer({"error": {"code": "server_error", "message": "no"}}, 500)
    gateway = two_dead(make_gateway, (ended[0], upstream), 2.0)
    fail_until_known(gateway)
    wait_until(lambda: told(gateway) == (200, "ok"))
    fail_until_known(gateway)  # it was tried in vain
    upstream.script = openai_like
    wait_until(lambda: told(gateway) == (200, "ok"))
    key = gateway.new_key()
    wait_until(lambda: ask(gateway, key).status_code == 200)
    assert told(gateway) == (200, "ok")
