"""The size of the WAL file, reads that hold nothing up, and the metrics and warnings of both."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator

import httpx2
import psutil
import pytest

from tests.helpers.gateway import PATIENCE_SECONDS, ROOT, Gateway, MakeGateway, wait_until

pytestmark = pytest.mark.promise_9

RESPONSE = {"model": "gpt-up", "input": "Hi"}
OWN_MODULES = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
KEPT_WAL_BYTES = 6 << 20  # in these tests, which are faster so
SMALL_FILES = f"{OWN_MODULES}from redbtc.store import wal; wal.KEPT_WAL_BYTES = {KEPT_WAL_BYTES}\n"
FOR_EVER = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT * FROM n"


def wal_bytes(gateway: Gateway) -> int:
    return os.stat(f"{gateway.database}-wal").st_size


def logged(gateway: Gateway, event: str) -> list[str]:
    return [line for line in gateway.log().splitlines() if f'"event":"{event}"' in line]


@contextlib.contextmanager
def load(gateway: Gateway) -> Iterator[Callable[[int], None]]:
    """Three clients that send requests all the time. Yields a function that waits until so many
    more are served."""
    key, stop, served = gateway.new_key("load", concurrency=100), threading.Event(), [0]

    def send() -> None:
        with gateway.client(key) as client:
            while not stop.is_set():
                assert client.post("/responses", json=RESPONSE).status_code == 200
                served[0] += 1

    def wait_for_more(number: int) -> None:
        wanted = served[0] + number
        wait_until(lambda: served[0] >= wanted)

    with running(*[send] * 3, stop=stop):
        yield wait_for_more


@contextlib.contextmanager
def running(*functions: Callable[[], None], stop: threading.Event) -> Iterator[None]:
    """Threads that run these functions until `stop` is set, which it is at the end."""
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(PATIENCE_SECONDS)


@contextlib.contextmanager
def reader(gateway: Gateway) -> Iterator[None]:
    """A snapshot of another program's, which the WAL file must keep."""
    path = f"{gateway.database.as_uri()}?mode=ro"
    with contextlib.closing(sqlite3.connect(path, uri=True)) as database:
        database.execute("BEGIN")
        database.execute("SELECT count(*) FROM requests").fetchall()
        yield


def fill(gateway: Gateway, rows: int) -> None:
    """Make a ledger of so many rows, for a gateway that is not started yet."""
    gateway.start().new_key("filled")
    gateway.terminate()
    with contextlib.closing(sqlite3.connect(gateway.database)) as database:
        database.execute(
            f"""
            WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {rows})
            INSERT INTO requests (request_id, account_id, key_id, endpoint, requested_model,
                                  upstream, started_at, outcome, usage_source, month)
            SELECT 'req_' || i, account_id, id, '/v1/responses', 'm', 'test',
                   1700000000000 + i, 'completed', 'none', '2023-11' FROM n, keys"""
        )
        database.commit()


# ── The WAL file ─────────────────────────────────────────────────────────────────────────────────


def test_the_wal_file_is_small_again_after_a_reader(make_gateway: MakeGateway) -> None:
    """While requests come, and when none does."""
    gateway = make_gateway()
    gateway.prelude = SMALL_FILES
    gateway.start()
    with load(gateway):
        with reader(gateway):
            wait_until(lambda: wal_bytes(gateway) > 1.5 * KEPT_WAL_BYTES)
        wait_until(lambda: wal_bytes(gateway) <= KEPT_WAL_BYTES)
    with reader(gateway):
        with load(gateway):
            wait_until(lambda: wal_bytes(gateway) > 1.5 * KEPT_WAL_BYTES)
        time.sleep(3)
        assert wal_bytes(gateway) > KEPT_WAL_BYTES, "a reader needs it"
        with gateway.client(gateway.new_key()) as client:
            assert client.post("/responses", json=RESPONSE).status_code == 200
    wait_until(lambda: wal_bytes(gateway) == 0)
    assert not logged(gateway, "WAL file not emptied")
    assert gateway.metrics()["redbtc_ledger_healthy"] == 1


def test_snapshots_that_overlap_for_ever_dont_keep_the_wal_file(make_gateway: MakeGateway) -> None:
    """There is always one open: SQLite alone never reuses the file."""
    gateway = make_gateway()
    gateway.prelude = f"""{SMALL_FILES}
import asyncio
from redbtc.billing import reports
wal.MAX_WAL_BYTES = {KEPT_WAL_BYTES}
usage_by = reports.usage_by
async def slow(*given):
    found = await usage_by(*given)
    await asyncio.sleep(0.1)
    return found
reports.usage_by = slow
"""
    gateway.start()
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            gateway.api("GET", "/usage")

    with running(*[read] * 4, stop=stop), load(gateway) as served:
        served(10)
        for _ in range(2):
            wait_until(lambda: wal_bytes(gateway) > KEPT_WAL_BYTES)
            wait_until(lambda: wal_bytes(gateway) < KEPT_WAL_BYTES)


def test_a_client_that_reads_slowly_keeps_no_snapshot(make_gateway: MakeGateway) -> None:
    gateway = make_gateway()
    fill(gateway, 5000)
    gateway.start()
    files = set(os.listdir(gateway.folder))
    with socket.socket(socket.AF_UNIX) as slow:
        slow.connect(f"{gateway.database}.sock")
        slow.sendall(b"GET /admin/v1/requests HTTP/1.1\r\nhost: gateway\r\n\r\n")
        answer = slow.recv(4096)
        assert answer.startswith(b"HTTP/1.1 200")
        with load(gateway) as served:
            served(700)
        assert wal_bytes(gateway) < 10 << 20
        assert set(os.listdir(gateway.folder)) == files
        slow.settimeout(PATIENCE_SECONDS)
        while not answer.endswith(b"\r\n0\r\n\r\n"):
            part = slow.recv(1 << 20)
            assert part, "the answer is torn"
            answer += part
    body, rest = b"", answer.partition(b"\r\n\r\n")[2]
    while rest:  # chunks
        size, _, rest = rest.partition(b"\r\n")
        body, rest = body + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    found = json.loads(body)
    assert [row["request_id"] for row in found["requests"]] == [f"req_{i}" for i in range(1, 5001)]
    assert found["totals"]["requests"] == 5000, "of the same instant"


def test_a_client_that_leaves_its_report_leaves_nothing_behind(make_gateway: MakeGateway) -> None:
    gateway = make_gateway()
    fill(gateway, 5000)
    gateway.start()
    process = psutil.Process(gateway.pid)
    gateway.api("GET", "/requests")
    threads, files = process.num_threads(), gateway.open_files()
    for _ in range(10):
        with socket.socket(socket.AF_UNIX) as leaving:
            leaving.connect(f"{gateway.database}.sock")
            leaving.sendall(b"GET /admin/v1/requests HTTP/1.1\r\nhost: gateway\r\n\r\n")
            leaving.recv(4096)
    wait_until(lambda: process.num_threads() <= threads)
    assert gateway.open_files() < files + 10  # SQLite keeps some for its next connections


def test_a_snapshot_ends_after_a_time_with_an_error(make_gateway: MakeGateway) -> None:
    """The client doesn't get a part for the whole, and the query doesn't go on."""
    gateway = make_gateway()
    gateway.prelude = f"""{OWN_MODULES}
from redbtc.store import readers
from redbtc.billing import reports
readers.MAX_SNAPSHOT_SECONDS = 1
reports.REQUESTS = {f"{FOR_EVER} WHERE i < 0"!r}
"""
    gateway.start()
    threads = psutil.Process(gateway.pid).num_threads()
    done = gateway.run("usage", "--json")
    assert done.returncode == 1
    assert done.stdout.strip() == ""
    assert "longer than 1 seconds" in done.stderr
    wait_until(lambda: psutil.Process(gateway.pid).num_threads() <= threads)
    assert gateway.api("GET", "/usage")["totals"]["requests"] == 0


# ── Checks ───────────────────────────────────────────────────────────────────────────────────────


def test_nothing_waits_for_a_check_of_the_database(make_gateway: MakeGateway) -> None:
    """Neither an account's first request, which reads its balance, nor a report, nor the end of
    the process."""
    gateway = make_gateway()
    gateway.prelude = f"""{OWN_MODULES}
from redbtc.store import consistency
consistency.CHECKS["for ever"] = {f"{FOR_EVER} WHERE i < 0"!r}
"""
    gateway.start()
    keys = [gateway.new_key(name, monthly_budget="1") for name in ("a", "b")]

    def check() -> None:
        with pytest.raises(httpx2.HTTPError):
            gateway.api("POST", "/db/check")

    with running(check, stop=threading.Event()):
        busy = psutil.Process(gateway.pid)
        began = busy.cpu_times().user
        wait_until(lambda: busy.cpu_times().user - began > 0.5)
        for key in keys:
            with gateway.client(key) as client:
                assert client.post("/responses", json=RESPONSE).status_code == 200
        assert len(gateway.rows()) == 2
        assert gateway.api("GET", "/usage")["totals"]["requests"] == 2
        assert gateway.terminate() == 0


@pytest.mark.parametrize("running", [True, False])
def test_a_check_finds_damage_in_each_table(make_gateway: MakeGateway, running: bool) -> None:
    """In an index and in a table: the check goes on after what can't be read."""
    gateway = make_gateway()
    fill(gateway, 2000)
    with contextlib.closing(sqlite3.connect(gateway.database)) as database:
        (size,) = database.execute("PRAGMA page_size").fetchone()
        pages = dict(database.execute("SELECT name, rootpage FROM sqlite_schema"))
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with gateway.database.open("r+b") as file:
        for name in ("requests_of_an_account", "stored_objects"):
            file.seek((pages[name] - 1) * size)
            file.write(b"\x0d\xff\xff" * 30)
    if running:
        gateway.start()
    found = gateway.run("db", "check", "--json")
    assert found.returncode == 1
    problems = json.loads(found.stdout)["problems"]
    names = {line.partition(":")[0] for line in problems}
    assert {"integrity of requests", "integrity of stored_objects"} <= names, problems


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE usage_by_day SET cost_nanos = cost_nanos + 1",
        "UPDATE usage_by_month SET cost_units = cost_units + 1",
        "UPDATE usage_by_month SET output_tokens = output_tokens - 1",
        "DELETE FROM usage_by_month",
        "UPDATE traffic_by_day SET requests = requests + 1",
    ],
)
def test_a_check_finds_sums_that_are_not_those_of_the_requests(
    gateway: Gateway, key: str, change: str
) -> None:
    """Balances come from the sums by month, pages from all of them."""
    with gateway.client(key) as client:
        assert client.post("/responses", json=RESPONSE).status_code == 200
    assert gateway.terminate() == 0
    with contextlib.closing(sqlite3.connect(gateway.database)) as database:
        database.execute(change)
        database.commit()
    found = gateway.run("db", "check", "--json")
    assert found.returncode == 1
    assert json.loads(found.stdout)["problems"]


# ── Metrics and warnings ─────────────────────────────────────────────────────────────────────────


def test_metrics_of_size_and_time(gateway: Gateway, key: str) -> None:
    with gateway.client(key) as client:
        for _ in range(10):
            assert client.post("/responses", json=RESPONSE).status_code == 200
    wait_until(lambda: gateway.metrics()["redbtc_ledger_begin_seconds_count"] == 10)
    found = gateway.metrics()
    assert found["redbtc_ledger_wal_bytes"] == wal_bytes(gateway)
    free = shutil.disk_usage(gateway.folder).free
    assert abs(found["redbtc_disk_free_bytes"] - free) < 0.2 * free + (1 << 30)
    assert found["redbtc_ledger_begin_seconds_sum"] > 0
    commits = found["redbtc_ledger_commit_seconds_count"]
    assert found["redbtc_ledger_commits_total"] >= commits >= 10
    assert found["redbtc_ledger_commit_seconds_sum"] > 0
    later = gateway.metrics()["redbtc_ledger_seconds_since_commit"]
    assert 0 < found["redbtc_ledger_seconds_since_commit"] < later


def test_the_lag_of_the_event_loop_is_a_metric(gateway: Gateway) -> None:
    gateway.signal(signal.SIGSTOP)
    time.sleep(1)
    gateway.signal(signal.SIGCONT)
    wait_until(lambda: gateway.metrics()["redbtc_loop_lag_seconds"] > 0.8)


def test_a_disk_that_gets_full_is_logged_once(make_gateway: MakeGateway) -> None:
    gateway = make_gateway()
    free = gateway.folder / "free"
    free.write_text(str(1 << 40))
    gateway.prelude = f"""{OWN_MODULES}
import pathlib, shutil
from redbtc.gateway import vitals
vitals.WATCH_SECONDS = 0.02
usage, asked = shutil.disk_usage, 0
def disk_usage(path):
    global asked
    asked += 1
    pathlib.Path({str(gateway.folder / "asked")!r}).write_text(str(asked))
    return usage(path)._replace(free=int(pathlib.Path({str(free)!r}).read_text()))
shutil.disk_usage = disk_usage
"""
    gateway.start()

    def set_free(size: int) -> None:
        """Set what is free, and wait until that has been read a few times."""
        changed = gateway.folder / "changed"
        changed.write_text(str(size))
        changed.replace(free)
        asked = gateway.folder / "asked"
        before = int(asked.read_text() or 0)
        wait_until(lambda: int(asked.read_text() or 0) > before + 5)

    wait_until((gateway.folder / "asked").exists)
    mib = 1 << 20
    low = min(256 * mib, shutil.disk_usage(gateway.folder).total // 20)
    for size in (low + mib, low - mib, low + mib, low - mib, 0):
        set_free(size)
    assert len(logged(gateway, "disk nearly full")) == 1
    assert not logged(gateway, "disk has room again"), "it would be said over and over"
    set_free(2 * low)
    assert gateway.metrics()["redbtc_disk_free_bytes"] == 2 * low
    wait_until(lambda: logged(gateway, "disk has room again"))
    assert len(logged(gateway, "disk has room again")) == 1
    assert len(logged(gateway, "disk nearly full")) == 1
