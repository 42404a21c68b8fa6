"""deploy/alerts.yml and deploy/grafana.json are right: Prometheus accepts them, each alert
fires when it should, and not when all is well, and every metric and label that they name is in the
real /metrics and shows what it should."""

from __future__ import annotations

import contextlib
import json
import re
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.gateway.test_operator_messages import PRELUDE as FAULTS
from tests.gateway.test_operator_messages import expires_in
from tests.helpers.gateway import ROOT, USUAL, Gateway, MakeGateway, free_port, toml, wait_until
from tests.helpers.request_logs import set_log
from tests.helpers.response_store import BODY, ResponseStore
from tests.helpers.tools import needs
from tests.helpers.upstream import (
    Received,
    Reply,
    Upstream,
    json_answer,
    openai_like,
    ws_like_openai,
)
from tests.helpers.webhook import SECRET, receiving
from tests.helpers.websocket_client import client as websocket
from tests.product.alert_cases import CASES, alert_tests
from tests.store.faults import post

ALERTS = ROOT / "deploy" / "alerts.yml"
DASHBOARD = ROOT / "deploy" / "grafana.json"
SEVERITIES = {"critical", "warning", "info"}
UNITS = {"short", "s", "bytes", "reqps", "ops", "percentunit"}
SELECTOR = re.compile(r"\b((?:redbtc|process)_\w+|up)\b(?:\{([^}]*)\})?")
MATCHER = re.compile(r'(\w+)(=~|!=|=)"([^"]*)"')
GROUPING = re.compile(r"\b(?:by|ignoring|on) \(([^)]*)\)")
TARGET = {"job", "instance"}  # labels that Prometheus adds


def alerts() -> list[dict[str, str]]:
    """The alerts, with their fields as text. (The file is plain enough to need no YAML reader.)"""
    found = []
    for block in re.split(r"^      - alert: ", ALERTS.read_text(), flags=re.MULTILINE)[1:]:
        name, _, rest = block.partition("\n")
        expr = re.search(r"^ +expr: (?:>-\n((?: {10}.*\n)+)|(.*)\n)", rest, re.MULTILINE)
        assert expr, name
        fields = {"alert": name, "expr": " ".join((expr[1] or expr[2]).split())}
        fields |= dict(re.findall(r"^ +(for|severity|summary): (.*)$", rest, re.MULTILINE))
        severity = re.search(r"labels: \{severity: (\w+)\}", rest)
        description = re.search(r"description: >-\n((?: {12}.*\n?)+)", rest)
        assert severity, name
        assert description, name
        found.append({**fields, "severity": severity[1], "description": description[1]})
    return found


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return found


def expressions_of_panels() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel.get("targets", ())]


def concrete(expression: str) -> str:
    """Return an expression with Grafana's variables replaced."""
    return expression.replace("$instance", ".*").replace("$__rate_interval", "10s")


def promtool(*arguments: str) -> str:
    done = subprocess.run([needs("promtool"), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ── Form ─────────────────────────────────────────────────────────────────────────────────────────


def test_prometheus_accepts_the_alerts() -> None:
    assert f"{len(alerts())} rules found" in promtool("check", "rules", str(ALERTS))


def test_each_alert_says_how_bad_it_is_and_what_to_do() -> None:
    names = [each["alert"] for each in alerts()]
    assert len({*names}) == len(names) > 20
    for each in alerts():
        assert each["severity"] in SEVERITIES
        assert re.fullmatch(r"\d+[smh]", each["for"]), each["alert"]
        assert each["summary"].startswith('"')
        assert len(each["description"].split()) > 5


@pytest.mark.slow
def test_each_alert_fires_when_it_should_and_not_when_all_is_well(tmp_path: Path) -> None:
    assert CASES.keys() == {each["alert"] for each in alerts()}
    file = tmp_path / "tests.yml"
    file.write_text(json.dumps(alert_tests(str(ALERTS))))
    assert "SUCCESS" in promtool("test", "rules", str(file))


def test_grafana_can_import_the_dashboard() -> None:
    """It has what Grafana's schema of a dashboard asks for, and depends on no data source by id.
    (Grafana itself is not available to these tests.)"""
    dashboard = json.loads(DASHBOARD.read_text())
    assert dashboard["schemaVersion"] >= 38, "Grafana 10"
    assert dashboard.get("id") is None
    assert "__inputs" not in dashboard
    names = {each["name"]: each["type"] for each in dashboard["templating"]["list"]}
    assert names == {"datasource": "datasource", "instance": "query"}
    found = panels()
    assert len({each["id"] for each in found}) == len(found) > 30
    for panel in found:
        if panel["type"] == "row":
            continue
        source = {"type": "prometheus", "uid": "${datasource}"}
        assert panel["type"] in ("timeseries", "stat", "state-timeline")
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
        assert panel["datasource"] == source
        assert panel["targets"]
        references = [each["refId"] for each in panel["targets"]]
        assert len({*references}) == len(references)
        for target in panel["targets"]:
            assert target["datasource"] == source
            assert 'job="redbtc",instance=~"$instance"' in target["expr"]


def test_panels_do_not_overlap() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in panels():
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        for x in range(at["x"], at["x"] + at["w"]):
            for y in range(at["y"], at["y"] + at["h"]):
                assert (x, y) not in taken, (panel["title"], taken[x, y])
                taken[x, y] = panel["title"]


def test_prometheus_can_read_each_expression_of_the_dashboard(tmp_path: Path) -> None:
    records = [
        {"record": f"r{number}", "expr": concrete(each)}
        for number, each in enumerate(expressions_of_panels())
    ]
    assert len(records) > 40
    file = tmp_path / "rules.yml"
    file.write_text(json.dumps({"groups": [{"name": "panels", "rules": records}]}))
    assert f"{len(records)} rules found" in promtool("check", "rules", str(file))


# ── Every metric that is named, driven to another value than a gateway has that just started ────


class Sample(NamedTuple):
    name: str
    labels: dict[str, str]
    value: float


def samples(gateway: Gateway) -> list[Sample]:
    text = gateway.get("/metrics").text
    return [
        Sample(sample.name, sample.labels, sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    ]


class Selector(NamedTuple):
    """A metric that an expression names, with what it wants of the labels."""

    name: str
    matchers: tuple[tuple[str, str, str], ...]

    def matches(self, sample: Sample) -> bool:
        return sample.name == self.name and all(
            label in sample.labels
            and (
                sample.labels[label] == text
                if how == "="
                else bool(re.fullmatch(text, sample.labels[label]))
            )
            for label, how, text in self.matchers
        )


def selectors_in(expression: str) -> Iterator[Selector]:
    for name, labels in SELECTOR.findall(expression):
        found = [each for each in MATCHER.findall(labels) if each[0] not in TARGET]
        if name != "up":  # Prometheus's own
            yield Selector(name, tuple(found))


EXPRESSIONS = [concrete(each) for each in expressions_of_panels()]
EXPRESSIONS += [each["expr"] for each in alerts()]
SELECTORS = {selector for each in EXPRESSIONS for selector in selectors_in(each)}

# Beside the faults of test_operator_messages: `lag`, `ahead` (seconds), `unlogged`, `bug`.
MORE_FAULTS = """
import time
from redbtc import telemetry
from redbtc.gateway import models
look, true_ns = watching.Watch._look, time.time_ns
def time_ns():
    try:
        return true_ns() + int(pathlib.Path("ahead").read_text()) * 10**9
    except OSError:
        return true_ns()
time.time_ns = time_ns
def faulty_look(self):
    telemetry.LOG_LINES_A_SECOND = 0 if pathlib.Path("unlogged").exists() else 2000
    if pathlib.Path("lag").exists():
        time.sleep(0.6)
    look(self)
watching.Watch._look = faulty_look
async def failing_list(*_):
    raise KeyError("a bug")
models.Models.list = failing_list
"""


def faulty(gateway: Gateway) -> Gateway:
    gateway.prelude = FAULTS + MORE_FAULTS
    return gateway


def hold(upstream: Upstream) -> threading.Event:
    """Let requests wait at the upstream until the event is set."""
    release = threading.Event()

    async def held(request: Received, reply: Reply) -> None:
        await reply.wait(release)
        await openai_like(request, reply)

    upstream.script = held
    return release


def traffic(make_gateway: MakeGateway, upstream: Upstream) -> Iterator[list[Sample]]:
    """Requests that are served, wait, are refused and are kept, over HTTP and WebSocket."""
    gateway = make_gateway(
        "[server]\nmax_body_bytes = 33554432\n[limits]\nconcurrency = 1\nqueue_seconds = 1"
    ).start()
    key = gateway.new_key()
    set_log(gateway, "test", 1)
    assert post(gateway, key) == (200, "")
    yield samples(gateway)

    release = hold(upstream)
    body = {"model": "gpt-up", "input": "Hi"}
    first = gateway.begin(key, body)
    wait_until(lambda: upstream.in_flight == 1)
    second = gateway.begin(key, body)
    wait_until(lambda: gateway.metrics()["redbtc_queued"] == 1)
    yield samples(gateway)
    assert b"concurrency_limit_exceeded" in second.recv(65536)
    release.set()
    assert b"200 OK" in first.recv(65536)
    first.close()
    second.close()
    upstream.script = openai_like
    upstream.talk = ws_like_openai
    with websocket(gateway, key) as session:
        session.send()
        session.completed()
        yield samples(gateway)
    with gateway.client(key) as client:
        client.post("/responses", json={"model": "gpt-up", "input": f"my key is {key}"})
    large = gateway.connect()
    head = f"POST /v1/responses HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {key}\r\n"
    head += f"content-type: application/json\r\ncontent-length: {20 << 20}\r\n\r\n"
    large.sendall(head.encode() + b"{" + b" " * (16 << 20))
    wait_until(lambda: gateway.metrics()["redbtc_reading_bytes"] > 0)
    yield samples(gateway)
    large.close()
    wait_until(lambda: gateway.metrics()["redbtc_request_log_withheld_total"] > 0)
    yield samples(gateway)


def background(make_gateway: MakeGateway, upstream: Upstream) -> Iterator[list[Sample]]:
    """A background response that goes on."""
    upstream.script = ResponseStore()
    gateway = make_gateway().start()
    with gateway.client(gateway.new_key()) as client:
        assert client.post("/responses", json={**BODY, "background": True}).status_code == 200
    wait_until(lambda: gateway.metrics()["redbtc_background_responses"] == 1)
    yield samples(gateway)
    gateway.kill()


def repaired(make_gateway: MakeGateway, upstream: Upstream) -> Iterator[list[Sample]]:
    """A row that another program closes, and a low limit of open files."""
    gateway = make_gateway()
    gateway.wrapper = (needs("prlimit"), "--nofile=2000:2000")
    gateway.start()
    key = gateway.new_key()
    release = hold(upstream)
    sent = gateway.begin(key, {"model": "gpt-up", "input": "Hi"})
    wait_until(lambda: upstream.in_flight == 1)
    with contextlib.closing(sqlite3.connect(gateway.database)) as other:
        other.execute("UPDATE requests SET outcome = 'interrupted', month = '2026-11'")
        other.commit()
    release.set()
    assert b"200 OK" in sent.recv(65536)
    wait_until(lambda: gateway.metrics()["redbtc_ledger_repairs_total"] == 1)
    sent.close()
    upstream.script = openai_like
    yield samples(gateway)


def faults(make_gateway: MakeGateway, _: Upstream) -> Iterator[list[Sample]]:
    """A machine, a ledger and an operator that have trouble."""
    with receiving() as hook:
        hook.answer = lambda _: 500
        billing = f'[billing]\nunpriced_models = "free"\n{hook.settings()}'
        gateway = faulty(make_gateway(billing, HOOK_SECRET=SECRET)).start()
        key = gateway.new_key()
        key_id = gateway.api("GET", "/accounts/test/keys")["keys"][0]["id"]
        gateway.terminate()
        expires_in(gateway, key_id, 3)
        (gateway.folder / "disk").write_text(f"{1 << 40} 1000000")
        gateway.start()
        assert gateway.run("db", "backup", f"{gateway.folder}/missing/").returncode == 1
        wait_until(lambda: gateway.metrics()["redbtc_webhook_waiting"] > 0)
        wait_until(lambda: gateway.metrics()["redbtc_backup_failed"] == 1)
        (gateway.folder / "ahead").write_text("120")
        yield samples(gateway)
        (gateway.folder / "ahead").unlink()
        (gateway.folder / "lag").touch()
        wait_until(lambda: gateway.metrics()["redbtc_loop_lag_seconds"] > 0.5)
        (gateway.folder / "lag").unlink()
        yield samples(gateway)
        (gateway.folder / "fault").touch()
        assert post(gateway, key) == (503, "ledger_unavailable")
        wait_until(lambda: gateway.metrics()['redbtc_ledger_state{state="failing"}'] == 1)
        yield samples(gateway)
        (gateway.folder / "fault").unlink()
        wait_until(lambda: gateway.metrics()["redbtc_ledger_healthy"] == 1)
        hook.answer = lambda _: 204
        (gateway.folder / "unlogged").touch()
        with gateway.client(key) as client:
            assert client.get("/models").status_code == 500
        wait_until(
            lambda: (
                gateway.get("/marker").status_code == 404
                and gateway.metrics()["redbtc_log_lines_dropped_total"] > 0
            )
        )
        yield samples(gateway)
        gateway.kill()
        (gateway.folder / "stderr").write_text("")  # it has the bug of this test


def lost(make_gateway: MakeGateway, _: Upstream) -> Iterator[list[Sample]]:
    """A request log that can't be used, and a ledger that is removed."""
    gateway = make_gateway().start()
    key = gateway.new_key()
    set_log(gateway, "test", 1)
    (gateway.folder / "request_log.db").write_text("no database" * 1000)
    assert post(gateway, key) == (200, "")
    wait_until(lambda: gateway.metrics()["redbtc_request_log_dropped_total"] > 0)
    yield samples(gateway)
    gateway.database.rename(gateway.folder / "away.db")
    wait_until(lambda: gateway.metrics()["redbtc_ledger_healthy"] == 0)
    yield samples(gateway)
    gateway.kill()


def upstreams(make_gateway: MakeGateway, upstream: Upstream) -> Iterator[list[Sample]]:
    """Upstreams that are out, limited, unusable and up."""

    async def answer(request: Received, reply: Reply) -> None:
        refused = {
            "Bearer bad": (401, "invalid_api_key"),
            "Bearer spent": (429, "insufficient_quota"),
        }
        if found := refused.get(request.header("authorization") or ""):
            status, code = found
            error = {"message": "no", "type": code, "param": None, "code": code}
            await json_answer({"error": error}, status)(request, reply)
        else:
            await openai_like(request, reply)

    upstream.script = answer
    names = {"bad": 1, "spent": 2, "missing": 3, "good": 4}
    tables = [
        {"name": name, "base_url": upstream.url, "api_key_env": name.upper(), "priority": priority}
        for name, priority in names.items()
    ]
    gateway = make_gateway(toml({"upstreams": tables}), BAD="bad", SPENT="spent", GOOD="good")
    gateway.start()
    assert post(gateway, gateway.new_key()) == (200, "")
    yield samples(gateway)
    yield samples(make_gateway(toml({"upstreams": [tables[2]]})).start())


SCENARIOS: list[Callable[[MakeGateway, Upstream], Iterator[list[Sample]]]] = [
    traffic,
    background,
    repaired,
    faults,
    lost,
    upstreams,
]


@pytest.mark.slow
def test_every_metric_that_is_named_shows_what_happens(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    """In one scenario at least, a sample that the expression selects has another value than at a
    gateway that has just started, or is not there."""
    fresh = make_gateway().start()
    before = {(each.name, *sorted(each.labels.items())): each.value for each in samples(fresh)}
    missing = {each for each in SELECTORS if each.name != "redbtc_build_info"}  # a constant
    labels: dict[str, set[str]] = {}
    for scenario in SCENARIOS:
        for found in scenario(make_gateway, upstream):
            for sample in found:
                labels.setdefault(sample.name, set()).update(sample.labels)
                value = before.get((sample.name, *sorted(sample.labels.items())), 0)
                if sample.value != value:
                    missing -= {each for each in missing if each.matches(sample)}
    assert not missing
    for expression in EXPRESSIONS:
        named = {each.name for each in selectors_in(expression)}
        known = TARGET.union(*(labels.get(name, set()) for name in named))
        for group in GROUPING.findall(expression):
            assert {each.strip() for each in group.split(",")} <= known, expression


def test_what_alerts_want_to_see_increase_is_there_from_the_start(gateway: Gateway) -> None:
    """For Prometheus, a counter that appears with 1 has not increased."""
    gateway.new_key()
    found = samples(gateway)
    for alert in alerts():
        if alert["expr"].startswith("increase("):
            (selector,) = selectors_in(alert["expr"])
            assert any(selector.matches(each) for each in found), alert["alert"]


def test_a_selector_that_matches_nothing_is_found() -> None:
    (selector,) = selectors_in('sum by (state) (redbtc_upstream_state{state=~"out|unusable"}) == 1')
    assert selector.matches(Sample("redbtc_upstream_state", {"state": "out"}, 1))
    assert not selector.matches(Sample("redbtc_upstream_state", {"state": "up"}, 1))
    assert not selector.matches(Sample("redbtc_upstream_state", {"status": "out"}, 1))
    assert not selector.matches(Sample("redbtc_upstream_states", {"state": "out"}, 1))


# ── A real Prometheus ────────────────────────────────────────────────────────────────────────────


class Prometheus:
    """A real Prometheus that scrapes a gateway every second, with the alerts."""

    def __init__(self, folder: Path, gateway: Gateway) -> None:
        self._url = f"http://127.0.0.1:{free_port()}"
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(ALERTS)],
            "scrape_configs": [
                {
                    "job_name": "redbtc",
                    "static_configs": [{"targets": [f"127.0.0.1:{gateway.port}"]}],
                }
            ],
        }
        file = folder / "prometheus.yml"
        file.write_text(json.dumps(config))
        command = [
            needs("prometheus"),
            f"--config.file={file}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={self._url.removeprefix('http://')}",
        ]
        self._log = (folder / "prometheus.log").open("wb")
        self.process = subprocess.Popen(command, stdout=self._log, stderr=self._log)

    def get(self, path: str, **parameters: str) -> Any:
        answer = httpx2.get(f"{self._url}/api/v1/{path}", params=parameters, **USUAL).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def value(self, query: str) -> float | None:
        """The one value of a query, None if there is none yet."""
        try:
            found = self.get("query", query=query)["result"]
        except (httpx2.HTTPError, ValueError):
            return None
        return float(found[0]["value"][1]) if found else None

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()
        self._log.close()


@pytest.mark.slow
def test_a_real_prometheus_scrapes_a_real_gateway(
    make_gateway: MakeGateway, upstream: Upstream, tmp_path: Path
) -> None:
    """Its rules can be evaluated, and each panel of the dashboard has something to show."""
    needs("prometheus")
    gateway = make_gateway().start()
    key = gateway.new_key()
    folder = tmp_path / "prometheus"
    folder.mkdir()
    prometheus = Prometheus(folder, gateway)

    async def failing(request: Received, reply: Reply) -> None:
        error = {"message": "no", "type": "server_error", "param": None, "code": None}
        await json_answer({"error": error}, 500)(request, reply)

    try:
        wait_until(lambda: prometheus.value('up{job="redbtc"}') == 1)
        for _ in range(5):
            assert post(gateway, key) == (200, "")
            upstream.script = failing
            assert post(gateway, key)[0] == 500
            upstream.script = openai_like
            assert gateway.get("/v1/models").status_code == 401
            time.sleep(1)
        total = "sum(redbtc_requests_total)"
        wait_until(lambda: (prometheus.value(total) or 0) >= 15)
        wait_until(
            lambda: all(
                rule["health"] == "ok"
                for group in prometheus.get("rules")["groups"]
                for rule in group["rules"]
            )
        )
        empty = [
            each
            for each in map(concrete, expressions_of_panels())
            if not prometheus.get("query", query=each)["result"]
        ]
        assert not empty
        gateway.kill()
        wait_until(lambda: prometheus.value('up{job="redbtc"}') == 0)
        pending = 'ALERTS{alertname="RedBTCDown",alertstate="pending"}'
        wait_until(lambda: prometheus.value(pending) == 1)
    finally:
        prometheus.close()
