"""Faults that nobody thought of: nothing is admitted meanwhile, it is said, and nothing is lost."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.helpers.gateway import PATIENCE_SECONDS, ROOT, Gateway, MakeGateway, wait_until
from tests.helpers.response_store import ResponseStore
from tests.helpers.tools import needs
from tests.helpers.upstream import Received, Reply, Upstream, openai_like
from tests.store.faults import RESPONSE, fill, post

pytestmark = [pytest.mark.promise_3, pytest.mark.promise_9]

REFUSED = (503, "ledger_unavailable")
# Code that a faulty gateway runs first. A test names the fault in the file `fault`.
PRELUDE = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import asyncio, builtins, sqlite3
def named(error):
    return getattr(sqlite3, error, None) or getattr(builtins, error)
def fault():
    try:
        with open("fault") as file:
            return file.read()
    except OSError:
        return ""
"""


def faulty(gateway: Gateway, code: str) -> Gateway:
    gateway.prelude = PRELUDE + code
    return gateway


def set_fault(gateway: Gateway, name: str = "yes") -> None:
    (gateway.folder / "fault").write_text(name)


def mend(gateway: Gateway) -> None:
    (gateway.folder / "fault").unlink()


class InFlight:
    """Requests that wait at the upstream until `release`."""

    def __init__(self, gateway: Gateway, upstream: Upstream, key: str, count: int = 1) -> None:
        self._release = threading.Event()
        self.results: list[tuple[int, str] | str] = []
        self._gateway, self._upstream, self._key = gateway, upstream, key
        upstream.script = self._script
        self._threads = [threading.Thread(target=self._post) for _ in range(count)]
        for thread in self._threads:
            thread.start()
        wait_until(lambda: upstream.in_flight == count)

    async def _script(self, request: Received, reply: Reply) -> None:
        await reply.wait(self._release)
        await openai_like(request, reply)

    def _post(self) -> None:
        try:
            self.results.append(post(self._gateway, self._key))
        except httpx2.HTTPError as error:
            self.results.append(type(error).__name__)

    def release(self) -> None:
        self._release.set()
        self._upstream.script = openai_like

    def join(self) -> list[tuple[int, str] | str]:
        for thread in self._threads:
            thread.join(PATIENCE_SECONDS)
        return self.results


def outcomes(gateway: Gateway) -> list[str]:
    return [row["outcome"] for row in gateway.rows()]


# ── A commit that fails in any way ───────────────────────────────────────────────────────────────

RAISING = """
from redbtc.store import writer
write = writer.Writer._write
def raising(self, *values):
    name = fault()
    if name:
        raise named(name)("by a test")
    return write(self, *values)
writer.Writer._write = raising
"""
ERRORS = (
    "MemoryError",
    "OSError",
    "RuntimeError",
    "KeyError",
    "RecursionError",
    "DatabaseError",
    "OperationalError",
    "InternalError",
    "ProgrammingError",
    "NotSupportedError",
)


def test_any_error_of_a_commit_is_a_503_and_passes(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    gateway = faulty(make_gateway(), RAISING).start()
    key = gateway.new_key()
    for count, name in enumerate(ERRORS):
        flying = InFlight(gateway, upstream, key)
        served = len(upstream.requests)
        set_fault(gateway, name)
        assert post(gateway, key) == REFUSED, name
        assert gateway.get("/readyz").status_code == 503
        assert gateway.get("/healthz").status_code == 200
        assert gateway.get("/status").json()["status"] == "incident"
        assert gateway.metrics()["redbtc_ledger_healthy"] == 0
        flying.release()
        assert post(gateway, key) == REFUSED, name
        assert len(upstream.requests) == served, "nothing is served unmetered"
        mend(gateway)
        assert flying.join() == [(200, "")], "it got its end when its row was written"
        wait_until(lambda: gateway.get("/readyz").status_code == 200)
        assert post(gateway, key) == (200, "")
        gateway.wait_for_log("ledger recovered", count + 1)
        assert gateway.flushed_log().count("ledger unavailable") == count + 1, "said once"
    assert set(outcomes(gateway)) == {"completed"}
    assert len(gateway.rows()) == len(upstream.requests)
    set_fault(gateway, "MemoryError")
    assert gateway.terminate() == 0, "SIGTERM has its effect"


# ── Tasks that end ───────────────────────────────────────────────────────────────────────────────

ENDING = {
    "ledger": """
from redbtc.store import commits
async def ending(self, *values):
    if fault():
        raise named(fault())
    return await write(self, *values)
write, commits.Commits._write_group = commits.Commits._write_group, ending
""",
    "ledger watch": """
from redbtc.store import entries
def ending(self, *values):
    if fault():
        raise named(fault())
entries.ChangeQueue.refuse_late = ending
""",
    "thread": """
import aiosqlite.core
from redbtc.store import writer
def ending(self, *values):
    if fault():  # the thread ends with what it does next
        self._tx.put_nowait((None, lambda: aiosqlite.core._STOP_RUNNING_SENTINEL))
        raise OSError
    return write(self, *values)
write, writer.Writer._write = writer.Writer._write, ending
""",
    "webhook": """
from redbtc.billing import webhook
async def ending(*values):
    while not fault():
        await asyncio.sleep(0.01)
    raise named(fault())
webhook.post_all = ending
""",
    "clock": """
from redbtc.store import clock
async def ending(*values):
    while not fault():
        await asyncio.sleep(0.01)
    raise asyncio.CancelledError  # nobody has cancelled it
clock.watch_clock = ending
""",
    "log": """
import threading
from redbtc import telemetry
def ending(self):
    if fault() and threading.current_thread().name == "log":
        raise named(fault())
    return write(self)
write, telemetry.Log._write_lines = telemetry.Log._write_lines, ending
""",
}


ENDS = [
    (task, error)
    for task, code in ENDING.items()
    for error in ("MemoryError", "KeyError", "DatabaseError")
    if error == "MemoryError" or "named" in code
]
ENDS.remove(("webhook", "DatabaseError"))  # which it survives: it tries again


@pytest.mark.parametrize(("task", "error"), ENDS)
def test_a_task_that_ends_ends_the_process_which_says_why(
    make_gateway: MakeGateway, upstream: Upstream, task: str, error: str
) -> None:
    gateway = faulty(make_gateway(), ENDING[task]).start()
    key = gateway.new_key()
    assert post(gateway, key) == (200, "")
    flying = InFlight(gateway, upstream, key)
    gateway.expected_dead = True
    set_fault(gateway, error)
    flying.release()
    with contextlib.suppress(httpx2.HTTPError):
        post(gateway, key)  # something is to be written and logged
    assert gateway.wait() == 70
    flying.join()
    name = "ledger" if task == "thread" else task
    assert f'"event":"task ended","task":"{name}' in gateway.log()
    assert '"error":null' not in gateway.log(), "it says why"
    mend(gateway)
    gateway.start()
    assert "pending" not in outcomes(gateway)
    assert outcomes(gateway).count("completed") >= 1
    assert gateway.cli("db", "check")["ok"]


def test_what_waited_for_the_ledgers_task_is_kept(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    gateway = faulty(make_gateway(), ENDING["ledger"]).start()
    key = gateway.new_key()
    flying = InFlight(gateway, upstream, key)
    gateway.expected_dead = True
    set_fault(gateway)
    flying.release()
    assert gateway.wait() == 70
    flying.join()
    mend(gateway)
    gateway.start()
    assert outcomes(gateway) == ["completed"]
    assert "took up what was owed" in gateway.flushed_log()
    assert gateway.terminate() == 0
    assert not Path(f"{gateway.database}.owed").exists()


def without_columns(line: bytes, names: set[str]) -> list[Any]:
    """Return the change in a line of the spill file as a version without these columns wrote it."""
    sql, values, *kind = json.loads(line[9:])
    found = re.match(r"\s*INSERT INTO requests \((.*?)\) VALUES", sql)
    if found is None:
        return [sql, values, *kind]
    columns = found[1].split(", ")
    kept = [name for name in columns if name not in names]
    by_name = dict(zip(columns, values, strict=True))
    places, settled = ", ".join("?" * len(kept)), kept[kept.index("first_byte_ms") :]
    sql = f"""INSERT INTO requests ({", ".join(kept)}) VALUES ({places})
        ON CONFLICT (request_id) DO UPDATE SET
            {", ".join(f"{name} = excluded.{name}" for name in settled)}
        WHERE outcome = 'pending'"""
    return [sql, [by_name[name] for name in kept], *kind]


NEWER_COLUMNS = {
    "attempts",
    "upstream_status",
    "upstream_error_code",
    "upstream_request_id",
    "credentials",
}


@pytest.mark.parametrize("names_kind", [True, False])
@pytest.mark.parametrize("outcome", ["pending", "interrupted"])
def test_what_an_older_version_owed_closes_a_row_that_was_closed_meanwhile(
    make_gateway: MakeGateway, upstream: Upstream, names_kind: bool, outcome: str
) -> None:
    """The lines of an old one don't say that they are rows of requests. Rows had fewer columns."""
    gateway = faulty(make_gateway(), ENDING["ledger"]).start()
    flying = InFlight(gateway, upstream, gateway.new_key())
    gateway.expected_dead = True
    set_fault(gateway)
    flying.release()
    assert gateway.wait() == 70
    flying.join()
    mend(gateway)
    owed = Path(f"{gateway.database}.owed")
    lines = [line for line in owed.read_bytes().rstrip(b"\0").split(b"\n") if line]
    older = [without_columns(line, NEWER_COLUMNS) for line in lines]
    texts = [json.dumps(each if names_kind else each[:2]).encode() for each in older]
    assert not any(b"attempts" in text for text in texts)
    owed.write_bytes(b"".join(b"%08x %b\n" % (zlib.crc32(text), text) for text in texts))
    with contextlib.closing(sqlite3.connect(gateway.database)) as ledger:
        month = None if outcome == "pending" else "2026-11"
        ledger.execute("UPDATE requests SET outcome = ?, month = ?", (outcome, month))
        ledger.commit()
    gateway.start()
    assert outcomes(gateway) == ["completed"]
    assert gateway.row()["attempts"] is None
    assert gateway.cli("db", "check")["ok"]


# ── A value that is refused ──────────────────────────────────────────────────────────────────────


def test_a_settled_row_is_written_without_the_field_that_is_refused(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    code = """
from redbtc.store import request_sql
values_of = request_sql.values_of
def too_large(row):
    values = values_of(row)
    if fault() and row.outcome != "pending":
        values[request_sql.COLUMNS.index(fault())] = 2**64
    return values
request_sql.values_of = too_large
"""
    gateway = faulty(make_gateway(), code).start()
    key = gateway.new_key()
    for name in ("reasoning_tokens", "cost", "duration_ms", "month"):
        set_fault(gateway, name)
        assert post(gateway, key) == (200, "")
    mend(gateway)
    assert post(gateway, key) == (200, ""), "the ledger is well"
    rows = gateway.rows()
    assert [row["outcome"] for row in rows] == ["completed"] * 3 + ["pending"] + ["completed"]
    assert rows[0]["reasoning_tokens"] is None
    assert rows[1]["cost"] is None
    assert rows[2]["duration_ms"] is None
    assert all(row["input_tokens"] for row in rows if row["outcome"] == "completed")
    assert gateway.flushed_log().count('"value refused"') == 4
    refused = Path(f"{gateway.database}.owed.refused").read_text()
    assert rows[3]["request_id"] in refused, "what can't be written at all is put aside"


# ── Pages that are damaged ───────────────────────────────────────────────────────────────────────


def damage(database: Path, table: str) -> None:
    """Overwrite the root page of a table, of a database that nobody has open."""
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        (size,) = connection.execute("PRAGMA page_size").fetchone()
        (page,) = connection.execute(
            "SELECT rootpage FROM sqlite_schema WHERE name = ?", (table,)
        ).fetchone()
    with database.open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(os.urandom(size))


def test_a_damaged_page_is_noticed_and_nothing_is_served_unmetered(
    gateway: Gateway, upstream: Upstream, key: str, tmp_path: Path
) -> None:
    """The page is needed when a row is settled, not when it is begun."""
    assert post(gateway, key) == (200, "")
    assert gateway.terminate() == 0
    shutil.copy(gateway.database, tmp_path / "copy.db")
    damage(gateway.database, "traffic_by_day")
    gateway.start()
    served = len(upstream.requests)
    assert post(gateway, key) == (200, ""), "it was served and is owed to the ledger"
    for _ in range(5):
        assert post(gateway, key) == REFUSED
    assert len(upstream.requests) == served + 1
    assert gateway.get("/readyz").status_code == 503
    assert gateway.terminate() == 0
    assert gateway.log().count("ledger lost") == 1, "said once"
    shutil.copy(tmp_path / "copy.db", gateway.database)
    gateway.start()
    assert outcomes(gateway) == ["completed"] * 2
    assert post(gateway, key) == (200, "")
    assert gateway.cli("db", "check")["ok"]


def test_after_a_kill_damaged_pages_are_found_before_the_first_request(
    gateway: Gateway, upstream: Upstream, key: str, tmp_path: Path
) -> None:
    assert post(gateway, key) == (200, "")
    assert gateway.run("db", "backup", str(tmp_path / "copy.db")).returncode == 0
    gateway.kill()
    damage(gateway.database, "payments")
    before = gateway.database.read_bytes()
    gateway.start()
    served = len(upstream.requests)
    assert post(gateway, key) == REFUSED
    assert gateway.get("/readyz").status_code == 503
    assert len(upstream.requests) == served
    assert gateway.flushed_log().count("ledger damaged") == 1
    assert gateway.database.read_bytes() == before, "nothing was written into it"
    done = gateway.run("db", "restore", str(tmp_path / "copy.db"))
    assert done.returncode == 0, done.stderr
    wait_until(lambda: gateway.get("/readyz").status_code == 200, why="it is opened again")
    assert post(gateway, key) == (200, "")
    assert gateway.terminate() == 0


def test_a_check_after_a_kill_refuses_requests_until_it_is_through(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    code = """
import time
from redbtc.store import checks
def slowly(self, *values):
    while fault():
        time.sleep(0.01)
        if self._must_end():
            return []
    return find(self, *values)
find, checks.PageCheck._check_tables = checks.PageCheck._check_tables, slowly
"""
    gateway = faulty(make_gateway(), code).start()
    key = gateway.new_key()
    assert post(gateway, key) == (200, "")
    gateway.kill()
    set_fault(gateway)
    gateway.start()
    assert post(gateway, key) == REFUSED
    assert gateway.get("/readyz").status_code == 503
    gateway.signal(signal.SIGHUP)
    mend(gateway)
    wait_until(lambda: gateway.get("/readyz").status_code == 200)
    assert post(gateway, key) == (200, "")
    assert "ledger checked after an unclean end" in gateway.flushed_log()
    wait_until(lambda: '"reloaded"' in gateway.log(), why="a SIGHUP meanwhile is honoured")
    gateway.kill()
    set_fault(gateway)
    gateway.start()
    assert gateway.terminate() == 0, "SIGTERM ends the check"


def test_a_check_after_a_kill_says_how_far_it_is_and_is_bounded(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    code = """
import time
from redbtc.store import checks
checks.STEPS_A_CALL, checks.SECONDS_BETWEEN_LINES = 50, 0.1
def slowly(self):
    time.sleep(0.02)
    return look(self)
look, checks.PageCheck._must_end = checks.PageCheck._must_end, slowly
"""
    gateway = faulty(make_gateway("[database]\ncheck_seconds = 1"), code).start()
    key = gateway.new_key()
    for _ in range(20):
        assert post(gateway, key) == (200, "")
    gateway.kill()
    gateway.start()
    wait_until(lambda: gateway.get("/readyz").status_code == 200)
    assert post(gateway, key) == (200, "")
    assert '"event":"checking the ledger","table":' in gateway.flushed_log()
    assert gateway.flushed_log().count("ledger not checked to its end") == 1


def test_a_copy_put_beside_a_left_over_log_is_not_served(
    gateway: Gateway, upstream: Upstream, key: str, tmp_path: Path
) -> None:
    """A restore by hand after a kill: the log of the other database is still there."""
    for _ in range(5):
        assert post(gateway, key) == (200, "")
    assert gateway.terminate() == 0
    shutil.copy(gateway.database, tmp_path / "old.db")
    gateway.start()
    for number in range(200):
        gateway.api("POST", "/accounts", {"name": f"a{number}"})
        post(gateway, key)
    gateway.kill()
    shutil.copy(tmp_path / "old.db", gateway.database)
    served = len(upstream.requests)
    gateway.start()
    assert post(gateway, key) == REFUSED
    assert "ledger damaged" in gateway.flushed_log()
    assert len(upstream.requests) == served


# ── Disks that are full, or don't answer ─────────────────────────────────────────────────────────

HANG = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static void hang(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return;
    path[length] = 0;
    if (strstr(path, "redbtc.db") && !strstr(path, ".owed"))
        while (access("fault", F_OK) == 0) usleep(5000);
}
int fsync(int fd) {
    hang(fd);
    return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(fd);
}
int fdatasync(int fd) {
    hang(fd);
    return ((int (*)(int))dlsym(RTLD_NEXT, "fdatasync"))(fd);
}
"""


def build_shim(folder: Path, code: str) -> Path:
    """Return a library for LD_PRELOAD, compiled from C."""
    source, shim = folder / "hang.c", folder / "hang.so"
    source.write_text(code)
    subprocess.run([needs("cc"), "-shared", "-fPIC", "-o", shim, source, "-ldl"], check=True)
    return shim


IMPATIENT = """
from redbtc.store import database
from redbtc.store import commits
from redbtc import start
database.TRANSACT_SECONDS = commits.MAX_CLOSE_SECONDS = start.MAX_END_SECONDS = 1
"""


@pytest.fixture
def hanging(make_gateway: MakeGateway, tmp_path: Path) -> Gateway:
    """A gateway whose disk does not answer while there is a file `fault`."""
    gateway = make_gateway(LD_PRELOAD=str(build_shim(tmp_path, HANG)))
    return faulty(gateway, IMPATIENT).start()


def test_a_disk_that_does_not_answer_makes_nobody_wait(
    hanging: Gateway, upstream: Upstream
) -> None:
    key = hanging.new_key()
    assert post(hanging, key) == (200, "")
    flying = InFlight(hanging, upstream, key)
    set_fault(hanging)
    flying.release()  # its row waits for the disk
    wait_until(lambda: hanging.get("/readyz").status_code == 503)
    assert post(hanging, key) == REFUSED, "while the disk does not answer"
    assert post(hanging, key) == REFUSED
    assert hanging.get("/readyz").status_code == 503
    assert hanging.get("/healthz").status_code == 200
    with pytest.raises(AssertionError, match="the disk has not answered"):
        hanging.api("POST", "/accounts", {"name": "b"})
    mend(hanging)
    assert flying.join() == [(200, "")]
    wait_until(lambda: hanging.get("/readyz").status_code == 200)
    assert post(hanging, key) == (200, "")
    wait_until(lambda: set(outcomes(hanging)) == {"completed"})
    assert len(hanging.rows()) == len(upstream.requests), "none of those that were refused"
    assert hanging.log().count("ledger unavailable") == 1


def test_a_disk_that_never_answers_does_not_keep_the_process(
    hanging: Gateway, upstream: Upstream
) -> None:
    key = hanging.new_key()
    flying = InFlight(hanging, upstream, key)
    set_fault(hanging)
    flying.release()
    wait_until(lambda: hanging.get("/readyz").status_code == 503)
    assert hanging.terminate() == 70
    assert flying.join() == [(200, "")], "what it used is owed to the ledger"
    mend(hanging)
    hanging.start()
    assert outcomes(hanging) == ["completed"]


def on_disk(make_gateway: MakeGateway, disk: Path) -> Gateway:
    gateway = make_gateway(f'[database]\npath = "{disk}/redbtc.db"')
    gateway.database = disk / "redbtc.db"
    return gateway


def test_what_is_owed_outlives_a_stop_on_a_full_disk(
    make_gateway: MakeGateway, upstream: Upstream, small_disk: Path
) -> None:
    gateway = on_disk(make_gateway, small_disk).start()
    key = gateway.new_key(concurrency=20)
    flying = InFlight(gateway, upstream, key, 10)
    fill(small_disk / "filler")
    why = "the write-ahead log's own room is used up at last"
    wait_until(lambda: post(gateway, key) == REFUSED, why=why)
    flying.release()
    gateway.signal(signal.SIGTERM)
    assert gateway.wait() == 0
    assert flying.join() == [(200, "")] * 10
    (small_disk / "filler").unlink()
    gateway.start()
    assert outcomes(gateway).count("completed") == len(gateway.rows()) >= 10
    assert gateway.cli("db", "check")["ok"]


@pytest.mark.parametrize("clean", [True, False])
def test_a_gateway_starts_on_a_full_disk_and_recovers(
    make_gateway: MakeGateway, upstream: Upstream, small_disk: Path, clean: bool
) -> None:
    gateway = on_disk(make_gateway, small_disk).start()
    key = gateway.new_key()
    assert post(gateway, key) == (200, "")
    if clean:
        gateway.terminate()
    else:
        gateway.kill()
    fill(small_disk / "filler")
    gateway.start()
    assert post(gateway, key) == REFUSED
    assert gateway.get("/readyz").status_code == 503
    wait_until(lambda: gateway.log().count("ledger unavailable") == 1)
    (small_disk / "filler").unlink()
    wait_until(lambda: gateway.get("/readyz").status_code == 200)
    assert post(gateway, key) == (200, "")
    assert outcomes(gateway) == ["completed"] * 2


# ── Files that are gone ──────────────────────────────────────────────────────────────────────────


def remove(gateway: Gateway, suffixes: tuple[str, ...]) -> None:
    for suffix in suffixes:
        Path(f"{gateway.database}{suffix}").unlink(missing_ok=True)


def rescued(gateway: Gateway) -> Path:
    wait_until(lambda: '"event":"ledger rescued"' in gateway.log(), why=gateway.log)
    found = list(gateway.folder.glob("redbtc.db.rescue-*"))
    assert len(found) == 1, (found, gateway.flushed_log())
    return found[0]


@pytest.mark.parametrize(
    "suffixes",
    [("", "-wal", "-shm", ".lock", ".owed"), ("-wal",), ("-shm",), ("",)],
    ids=["all", "wal", "shm", "database"],
)
def test_removed_files_are_noticed_and_what_they_held_is_rescued(
    gateway: Gateway, upstream: Upstream, key: str, suffixes: tuple[str, ...]
) -> None:
    for _ in range(20):
        assert post(gateway, key) == (200, "")
    flying = InFlight(gateway, upstream, key)
    remove(gateway, suffixes)
    time.sleep(0.3)  # as often as the files are looked at
    served = len(upstream.requests)
    assert post(gateway, key) == REFUSED
    assert post(gateway, key) == REFUSED
    assert gateway.get("/readyz").status_code == 503
    assert len(upstream.requests) == served
    flying.release()
    assert flying.join() == [(200, "")], "it is owed to the ledger"
    file = rescued(gateway)
    assert gateway.flushed_log().count("ledger lost") == 1, "said once"
    assert file.stat().st_mode & 0o777 == 0o600
    assert gateway.terminate() == 0
    if "" in suffixes:
        done = gateway.run("serve", "--port", "0")
        assert done.returncode == 1
        assert file.name in done.stderr
        assert "db restore" in done.stderr
        assert not gateway.database.exists()
    assert gateway.run("db", "restore", str(file)).returncode == 0
    gateway.start()
    assert outcomes(gateway) == ["completed"] * 21
    assert post(gateway, key) == (200, "")
    assert gateway.cli("db", "check")["ok"]


def test_a_ledger_whose_wal_was_removed_is_not_begun_anew_after_a_kill(
    gateway: Gateway, key: str
) -> None:
    for _ in range(5):
        assert post(gateway, key) == (200, "")
    remove(gateway, ("-wal",))
    time.sleep(0.3)
    assert post(gateway, key) == REFUSED
    file = rescued(gateway)
    gateway.kill()
    done = gateway.run("serve", "--port", "0")
    assert done.returncode == 1
    assert file.name in done.stderr
    assert file.name in gateway.run("check").stdout
    assert gateway.run("db", "restore", str(file)).returncode == 0
    gateway.start()
    assert outcomes(gateway) == ["completed"] * 5
    assert post(gateway, key) == (200, "")


def test_removed_files_are_noticed_while_no_request_comes(gateway: Gateway, key: str) -> None:
    for _ in range(5):
        assert post(gateway, key) == (200, "")
    remove(gateway, ("-wal",))
    file = rescued(gateway)
    gateway.kill()
    assert gateway.run("db", "restore", str(file)).returncode == 0
    gateway.start()
    assert outcomes(gateway) == ["completed"] * 5


def test_a_symbolic_link_to_the_database_is_no_other_place(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    """All that belongs to the database is beside the file itself, where SQLite keeps its -wal."""
    gateway = make_gateway('[database]\npath = "link.db"\n')
    (gateway.folder / "link.db").symlink_to(gateway.database)
    key = gateway.start().new_key()
    assert post(gateway, key) == (200, "")
    assert list(gateway.folder.glob("link.db*")) == [gateway.folder / "link.db"]
    assert gateway.metrics()["redbtc_ledger_wal_bytes"] > 0
    remove(gateway, ("-wal",))
    time.sleep(0.3)
    assert post(gateway, key) == REFUSED
    with contextlib.closing(sqlite3.connect(rescued(gateway))) as file:
        assert file.execute("SELECT outcome FROM requests").fetchall() == [("completed",)]


def test_a_replaced_database_is_noticed(
    gateway: Gateway, upstream: Upstream, key: str, tmp_path: Path
) -> None:
    assert post(gateway, key) == (200, "")
    with contextlib.closing(sqlite3.connect(tmp_path / "other.db")) as other:
        other.execute("CREATE TABLE theirs (x)")
    os.replace(tmp_path / "other.db", gateway.database)
    time.sleep(0.3)
    assert post(gateway, key) == REFUSED
    with contextlib.closing(sqlite3.connect(rescued(gateway))) as file:
        assert file.execute("SELECT outcome FROM requests").fetchall() == [("completed",)]
    assert "replaced by another file" in gateway.flushed_log()


# ── Two gateways ─────────────────────────────────────────────────────────────────────────────────


def test_a_second_gateway_is_refused_also_without_the_lock_file(gateway: Gateway, key: str) -> None:
    Path(f"{gateway.database}.lock").unlink()
    done = gateway.run("serve", "--port", "0")
    assert done.returncode == 1
    assert "in use" in done.stderr
    assert post(gateway, key) == (200, "")


def test_rows_that_another_process_has_closed_are_opened_again(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    """As where locks have no effect: the second process takes those in flight for left behind."""
    gateway.api("POST", "/prices", {"prices": [{"model": "gpt-up", "input": "1", "output": "2"}]})
    flying = InFlight(gateway, upstream, key, 8)
    with contextlib.closing(sqlite3.connect(gateway.database)) as other:
        other.execute(
            "UPDATE requests SET outcome = 'interrupted', month = '2026-11'"
            " WHERE outcome = 'pending'"
        )
        other.commit()
    flying.release()
    assert flying.join() == [(200, "")] * 8
    rows = gateway.rows()
    assert {row["outcome"] for row in rows} == {"completed"}
    assert all(row["cost"] and row["usage_source"] == "upstream" for row in rows)
    assert gateway.metrics()["redbtc_ledger_repairs_total"] == 8
    assert gateway.flushed_log().count("row closed by another process") == 8
    assert gateway.cli("db", "check")["ok"]
    used = gateway.cli("usage", "--group-by", "model")
    assert used["totals"]["requests"] == 8
    assert used["totals"]["unreported"] == 0


def test_a_background_response_is_asked_for_after_any_error(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    code = """
from redbtc.gateway import asking
async def ending(*values):
    if fault():
        raise getattr(builtins, fault())
    return await ask(*values)
ask, asking.ask = asking.ask, ending
"""
    gateway = faulty(make_gateway(), code).start()
    key = gateway.new_key()
    set_fault(gateway, "MemoryError")
    upstream.script = ResponseStore()
    with gateway.client(key) as client:
        answer = client.post("/responses", json={**RESPONSE, "background": True})
    assert answer.status_code == 200
    wait_until(lambda: "background response not asked for" in gateway.log())
    mend(gateway)
    wait_until(lambda: outcomes(gateway) == ["completed"])


def test_a_background_response_that_can_not_be_settled_ends_the_process(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    code = """
from redbtc.gateway import settlement
async def ending(*values):
    if fault():
        raise RuntimeError
    return await count(*values)
count, settlement.count_containers = settlement.count_containers, ending
"""
    gateway = faulty(make_gateway(), code).start()
    key = gateway.new_key()
    upstream.script = ResponseStore()
    set_fault(gateway)
    with gateway.client(key) as client:
        client.post("/responses", json={**RESPONSE, "background": True})
    assert gateway.wait() == 70
    assert '"task":"background responses"' in gateway.log()
    mend(gateway)
    gateway.start()
    wait_until(lambda: outcomes(gateway) == ["completed"])


# ── Starts that go wrong, and ends ───────────────────────────────────────────────────────────────


def test_a_start_that_waits_for_a_full_disk_goes_on_waiting(
    make_gateway: MakeGateway, upstream: Upstream, small_disk: Path
) -> None:
    """A try that failed closes the files again, which must not end the process later."""
    code = """
import threading
init = threading.Timer.__init__
def shortly(self, seconds, *values):
    init(self, min(seconds, 0.5), *values)
threading.Timer.__init__ = shortly
"""
    gateway = faulty(on_disk(make_gateway, small_disk), code).start()
    key = gateway.new_key()
    gateway.kill()
    fill(small_disk / "filler")
    gateway.start()
    wait_until(lambda: gateway.log().count("ledger unavailable") == 1)
    time.sleep(1)
    assert post(gateway, key) == REFUSED
    (small_disk / "filler").unlink()
    wait_until(lambda: gateway.get("/readyz").status_code == 200)
    time.sleep(1)
    assert post(gateway, key) == (200, "")
    assert gateway.log().count("ledger checked after an unclean end") == 1, "not for each try"


@pytest.mark.parametrize("there", [True, False])
def test_a_log_without_its_database_is_left_alone(
    gateway: Gateway, upstream: Upstream, key: str, there: bool
) -> None:
    """SQLite would remove it, and with it what only it holds."""
    assert post(gateway, key) == (200, "")
    gateway.kill()
    log = Path(f"{gateway.database}-wal")
    before = log.read_bytes()
    gateway.database.unlink()
    if there:
        gateway.database.touch()
    done = gateway.run("serve", "--port", "0")
    assert done.returncode == 1
    assert log.name in done.stderr
    assert log.read_bytes() == before


@pytest.mark.parametrize("table", ["prices", "notices", "secrets", "unsettled", "runs", "users"])
def test_a_start_on_a_damaged_table_refuses_requests_and_says_so_once(
    gateway: Gateway, upstream: Upstream, key: str, tmp_path: Path, table: str
) -> None:
    """Also without a check, after a clean end."""
    assert gateway.run("db", "backup", str(tmp_path / "copy.db")).returncode == 0
    assert gateway.terminate() == 0
    damage(gateway.database, table)
    gateway.start()
    wait_until(lambda: '"level":"critical"' in gateway.log())
    time.sleep(1)
    assert post(gateway, key) == REFUSED
    assert gateway.log().count("ledger lost") <= 1
    assert gateway.log().count("ledger damaged") <= 2, "what was met, and what the check found"
    served = table == "users"  # that is found too late to open the ledger again
    if served:
        assert gateway.terminate() == 0
    assert gateway.run("db", "restore", str(tmp_path / "copy.db")).returncode == 0
    if served:
        gateway.start()
    wait_until(lambda: gateway.get("/readyz").status_code == 200)
    assert post(gateway, key) == (200, "")


def test_after_a_damaged_page_was_found_the_next_start_checks_the_database(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    assert gateway.terminate() == 0
    damage(gateway.database, "users")
    gateway.start()
    wait_until(lambda: "ledger lost" in gateway.log())
    assert gateway.terminate() == 0
    gateway.start()
    wait_until(lambda: "ledger damaged" in gateway.log())
    assert post(gateway, key) == REFUSED


OWED = """
from redbtc.store import writer
write = writer.Writer._write
def raising(self, changes, *values):
    if fault() and any(fault() in sql for sql, _ in changes):
        raise sqlite3.OperationalError("by a test")
    return write(self, changes, *values)
writer.Writer._write = raising
"""


def test_what_nobody_waits_for_is_owed_at_the_end(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    """Nothing is in flight, but the ledger can't write who owns a response."""
    gateway = faulty(make_gateway(), OWED).start()
    key = gateway.new_key()
    upstream.script = ResponseStore()
    set_fault(gateway, "DELETE FROM requests")
    with gateway.client(key) as client:
        found = client.post("/responses", json=RESPONSE).json()["id"]
    set_fault(gateway, "INTO")
    assert post(gateway, key) == REFUSED
    wait_until(lambda: gateway.metrics()["redbtc_in_flight"] == 0)
    assert gateway.terminate() == 0
    assert Path(f"{gateway.database}.owed").stat().st_size
    assert found
    mend(gateway)
    gateway.start()
    assert "took up what was owed" in gateway.flushed_log()


def test_a_repair_that_fails_is_tried_again(make_gateway: MakeGateway, upstream: Upstream) -> None:
    gateway = faulty(make_gateway(), OWED).start()
    key = gateway.new_key()
    for ends in (False, True):
        flying = InFlight(gateway, upstream, key)
        with contextlib.closing(sqlite3.connect(gateway.database)) as other:
            other.execute(
                "UPDATE requests SET outcome = 'interrupted', month = '2026-11'"
                " WHERE outcome = 'pending'"
            )
            other.commit()
        set_fault(gateway, "INTO reopened")
        flying.release()
        wait_until(lambda: gateway.get("/readyz").status_code == 503)
        if ends:
            assert gateway.terminate() == 0
        mend(gateway)
        assert flying.join() == [(200, "")]
        if ends:
            gateway.start()
        wait_until(lambda: set(outcomes(gateway)) == {"completed"})
    assert gateway.cli("db", "check")["ok"]


def test_a_disk_that_does_not_answer_does_not_keep_a_second_sigterm(
    make_gateway: MakeGateway, upstream: Upstream, tmp_path: Path
) -> None:
    """Nor that of the spill file."""
    shim = build_shim(tmp_path, HANG.replace('&& !strstr(path, ".owed")', ""))
    gateway = faulty(make_gateway(LD_PRELOAD=str(shim)), IMPATIENT).start()
    key = gateway.new_key()
    flying = InFlight(gateway, upstream, key)
    set_fault(gateway)
    flying.release()
    wait_until(lambda: gateway.get("/readyz").status_code == 503)
    gateway.terminate(wait=False)
    wait_until(lambda: "ledger given up" in gateway.log())
    assert gateway.terminate() in (70, 143)
    flying.join()
    mend(gateway)
    gateway.start()
    assert gateway.cli("db", "check")["ok"]


def test_a_webhook_that_can_not_be_posted_to_does_not_end_the_process(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    settings = """
[billing]
unpriced_models = "free"
webhook_url = "http://127.0.0.1:1/"
webhook_secret_env = "SECRET"
"""
    code = """
from redbtc.billing import webhook
def signature(*values):
    raise KeyError
webhook.signature = signature
"""
    gateway = faulty(make_gateway(settings, SECRET="whsec_é"), code).start()
    key = gateway.new_key()
    prices = [{"model": "gpt-up", "input": "30000", "output": "0"}]
    gateway.api("POST", "/prices", {"prices": prices})
    account = {"monthly_budget": "1", "credit_limit": "unlimited"}
    gateway.api("PATCH", "/accounts/test", account)
    assert post(gateway, key) == (200, "")
    wait_until(lambda: "webhook failed" in gateway.log())
    assert gateway.get("/readyz").status_code == 200


SPILL_FAILS_ONCE = (
    OWED
    + """
import errno, os
from redbtc.store import spill
once = {"pwrite", "short", "open"}
def fails(name):
    if os.path.exists(name) and name in once:
        once.remove(name)
        return True
def failing(name):
    call = getattr(os, name)
    def replaced(*values):
        if fails(name):
            raise OSError(errno.EIO, "by a test")
        return call(*values)
    setattr(spill.os, name, replaced)
def short(file, data, at):
    return pwrite(file, data[:10] if fails("short") else data, at)
pwrite, os.pwrite = os.pwrite, short
for name in ("pwrite", "open"):
    failing(name)
"""
)


@pytest.mark.parametrize("call", ["pwrite", "short", "open"])
def test_a_spill_file_that_fails_once_keeps_what_is_owed(
    make_gateway: MakeGateway, upstream: Upstream, call: str
) -> None:
    """`open`: somebody removes the file, and it can't be made again at once."""
    gateway = faulty(make_gateway(), SPILL_FAILS_ONCE).start()
    key = gateway.new_key(concurrency=20)
    flying = InFlight(gateway, upstream, key, 3)
    set_fault(gateway, "INTO")
    flying.release()
    wait_until(lambda: gateway.get("/readyz").status_code == 503)
    if call == "open":
        Path(f"{gateway.database}.owed").unlink()
    (gateway.folder / call).touch()
    assert gateway.terminate() == 0
    assert flying.join() == [(200, "")] * 3
    assert "row not kept" not in gateway.log()
    (gateway.folder / call).unlink()
    mend(gateway)
    gateway.start()
    assert outcomes(gateway) == ["completed"] * 3
    assert '"damaged":0' in gateway.flushed_log()
