"""Migrations of ledgers of every version that ever landed: nothing is lost, under kill -9 at any
instant, on a full disk and where a migration fails; and an older version leaves a newer ledger
alone."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from redbtc.errors import StorageUnavailable
from redbtc.store import backup, consistency
from redbtc.store.database import Store
from redbtc.store.schema import newest_version
from tests.helpers.gateway import PATIENCE_SECONDS, ROOT, Gateway, MakeGateway
from tests.helpers.ledgers import (
    IN_TRANSACTIONS,
    LANDED,
    Rows,
    digest_of_tables,
    make_ledger,
    make_tables,
    rows_in,
)
from tests.helpers.programs import next_version
from tests.helpers.upstream import Upstream
from tests.store.faults import build_shim, fill, on_disk

pytestmark = pytest.mark.promise_9

NEWEST = newest_version()
EARLIER = range(1, NEWEST)
# Not compared row by row: what a start does with requests in flight changes these, and the checks
# of `db check` hold the sums against the rows.
CHANGED_BY_A_START = {"usage_by_day", "usage_by_month", "traffic_by_day", "unsettled"}
DROPPED = {"known_browsers"}


def open_ledger(path: Path) -> None:
    """Open a ledger as a command does, and close it."""

    async def open_it() -> None:
        async with Store.open(path, "full"):
            pass

    asyncio.run(open_it())


def assert_has_all(after: Rows, before: Rows) -> None:
    """Each row from before is there, with the same values, except those of requests in flight."""
    for table, rows in before.items():
        if table in DROPPED | CHANGED_BY_A_START:
            continue
        known = [tuple(row.get(name) for name in rows[0]) for row in after[table] if rows]
        for row in rows:
            if row.get("outcome") != "pending":
                assert tuple(row.values()) in known, f"{table}: {row}"


def assert_sound(path: Path) -> None:
    """The ledger is whole, and its sums are those of its rows."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (NEWEST,)
        assert backup.problems(database, consistency.CHECKS) == []


def copies_of(path: Path) -> list[Path]:
    """Return the copies that were made before a migration."""
    pattern = f"{path.name}.before-schema-{NEWEST}"
    return [
        each for each in (path.with_name(pattern), path.with_name(f"{pattern}.1")) if each.exists()
    ]


def leftovers(path: Path) -> set[str]:
    """Return the files beside a ledger that is closed, other than those which belong there."""
    copies = copies_of(path)
    known = {path, Path(f"{path}.lock"), *copies, *map(backup.digest_file, copies)}
    return {file.name for file in path.parent.iterdir() if file not in known}


# What landed


def test_every_version_that_landed_is_recorded() -> None:
    assert list(LANDED) == list(range(1, NEWEST + 1)), (
        "record the newest: see tests/helpers/ledgers.py"
    )


@pytest.mark.parametrize("version", LANDED)
def test_no_section_was_edited_after_it_landed(version: int) -> None:
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as database:
        make_tables(database, version)
        assert digest_of_tables(database) == LANDED[version]


@pytest.mark.parametrize("version", LANDED)
def test_a_ledger_of_the_helper_has_rows_in_every_table(tmp_path: Path, version: int) -> None:
    make_ledger(tmp_path / "redbtc.db", version)
    rows = rows_in(tmp_path / "redbtc.db")
    assert {table for table in rows if not rows[table]} <= IN_TRANSACTIONS


# Nothing is lost


@pytest.mark.parametrize("version", EARLIER)
def test_a_migration_keeps_every_row(tmp_path: Path, version: int) -> None:
    path = tmp_path / "redbtc.db"
    make_ledger(path, version)
    before = rows_in(path)
    open_ledger(path)
    assert_sound(path)
    assert_has_all(rows_in(path), before)
    (copy,) = copies_of(path)
    assert backup.verify(copy, copy, consistency.CHECKS).schema == version
    assert rows_in(copy) == before
    assert leftovers(path) == set()
    open_ledger(tmp_path / "new.db")
    assert tables_of(path) == tables_of(tmp_path / "new.db")


# kill -9 at any instant

# Kills the process before the n-th call from now on that changes a file. A killed process leaves
# what its calls have done, so these are all the states that a kill can leave. (What SQLite writes
# into the -shm file by memory is made anew after a kill.)
KILL_AT_CALLS = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/stat.h>
#include <unistd.h>

static long left = -1, done = 0;
void kill_before(long calls) { left = calls; done = 0; }
long calls_done(void) { return done; }
static void step(void) {
    if (left-- == 0) kill(getpid(), SIGKILL);
    done++;
}
static int is_file(int fd) {
    struct stat found;
    return !fstat(fd, &found) && S_ISREG(found.st_mode);
}
#define NEXT(name) ((__typeof__(&name)) dlsym(RTLD_NEXT, #name))
ssize_t write(int fd, const void *data, size_t size) {
    if (is_file(fd)) step();
    return NEXT(write)(fd, data, size);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    step();
    return NEXT(pwrite)(fd, data, size, at);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    step();
    return NEXT(pwrite64)(fd, data, size, at);
}
int ftruncate(int fd, off_t size) { step(); return NEXT(ftruncate)(fd, size); }
int ftruncate64(int fd, off64_t size) { step(); return NEXT(ftruncate64)(fd, size); }
int rename(const char *from, const char *to) { step(); return NEXT(rename)(from, to); }
int unlink(const char *path) { step(); return NEXT(unlink)(path); }
int open(const char *path, int flags, ...) {
    va_list more;
    va_start(more, flags);
    mode_t mode = va_arg(more, mode_t);
    va_end(more);
    if (flags & O_CREAT) step();
    return NEXT(open)(path, flags, mode);
}
int open64(const char *path, int flags, ...) {
    va_list more;
    va_start(more, flags);
    mode_t mode = va_arg(more, mode_t);
    va_end(more);
    if (flags & O_CREAT) step();
    return NEXT(open64)(path, flags, mode);
}
"""
# Opens copies of a ledger in child processes that are killed: each copy twice, at two instants, the
# second one while it is tried again. Then one opens it to the end. Prints the number of calls.
KILL_TWICE = f"""
import ctypes, json, os, random, shutil, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from tests.store.test_migrations import open_ledger
shim = ctypes.CDLL(os.environ["LD_PRELOAD"])
template, copies, seed, rounds = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])

def opened(folder, calls):
    child = os.fork()
    if not child:
        try:
            shim.kill_before(calls)
            open_ledger(folder / "redbtc.db")
            calls = shim.calls_done()
            shim.kill_before(-1)
            (folder / "calls").write_text(str(calls))
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1]

whole = copies / "whole"
shutil.copytree(template, whole)
assert opened(whole, -1) == 0
calls = int((whole / "calls").read_text())
chance = random.Random(seed)
for number in range(rounds):
    folder = copies / str(number)
    shutil.copytree(template, folder)
    for again in range(2):
        status = opened(folder, chance.randrange(calls))
        assert status in (0, 9), status
        (folder / "calls").unlink(missing_ok=True)
        shutil.copytree(folder, copies / f"{{number}}-{{again}}")
    assert opened(folder, -1) == 0
    (folder / "calls").unlink()
(whole / "calls").unlink()
print(calls)
"""


@pytest.fixture(scope="module")
def killer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that kills."""
    return build_shim(tmp_path_factory.mktemp("killer"), KILL_AT_CALLS)


@pytest.mark.slow
@pytest.mark.parametrize("version", EARLIER)
def test_a_migration_that_is_killed_again_and_again_loses_nothing(
    tmp_path: Path, killer: Path, version: int
) -> None:
    template, copies = tmp_path / "template", tmp_path / "copies"
    template.mkdir()
    copies.mkdir()
    make_ledger(template / "redbtc.db", version)
    before, rounds, seed = rows_in(template / "redbtc.db"), 8, str(random.random())
    command = [sys.executable, "-c", KILL_TWICE, str(template), str(copies), seed, str(rounds)]
    env = {**os.environ, "LD_PRELOAD": str(killer), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, env=env
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 100, "of calls that change a file"
    wanted = rows_in(copies / "whole" / "redbtc.db")
    for number in range(rounds):
        where = f"seed {seed}, round {number}"
        for killed in (copies / f"{number}-0", copies / f"{number}-1"):
            assert_killed_is_whole(killed / "redbtc.db", version, before, where)
        path = copies / str(number) / "redbtc.db"
        assert_sound(path)
        assert without_chance(rows_in(path)) == without_chance(wanted), where
        assert_has_all(rows_in(path), before)
        assert leftovers(path) == set(), where
        assert copies_of(path), where
        for copy in copies_of(path):
            assert rows_in(copy) == before, where


def assert_killed_is_whole(path: Path, version: int, before: Rows, where: str) -> None:
    """A killed migration has left the ledger as it was or migrated, and whole copies or none."""
    for copy in copies_of(path):
        assert backup.verify(copy, copy, consistency.CHECKS).schema == version, where
        assert backup.kept_digest(copy) in (None, backup.sha256_of(copy)), where
    if (found := version_of(path)) == version:
        assert rows_in(path) == before, where
    else:
        assert found == NEWEST, where
        assert copies_of(path), where
        assert_has_all(rows_in(path), before)
    with contextlib.closing(sqlite3.connect(path)) as database:
        assert backup.problems(database, backup.FILE_CHECKS) == [], where


def version_of(path: Path) -> int:
    with contextlib.closing(sqlite3.connect(path)) as database:
        version: int = database.execute("PRAGMA user_version").fetchone()[0]
        return version


def without_chance(rows: Rows) -> Rows:
    """Return rows without those that differ each time: the secret is random where it is new."""
    return {table: found for table, found in rows.items() if table != "secrets"}


def tables_of(path: Path) -> str:
    with contextlib.closing(sqlite3.connect(path)) as database:
        return digest_of_tables(database)


@pytest.mark.parametrize("version", EARLIER[-1:])
def test_a_migrated_ledger_is_locked(gateway: Gateway, version: int) -> None:
    """Without SQLite's lock, the next program to read the database would remove its WAL file."""
    gateway.terminate()
    for file in gateway.folder.glob("redbtc.db*"):
        file.unlink()
    make_ledger(gateway.database, version)
    gateway.start("--accept-clock")
    inode = gateway.database.stat().st_ino
    locks = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    held = {each[3] for each in locks if each[1] == "POSIX" and each[5].endswith(f":{inode}")}
    assert held == {"READ"}
    with contextlib.closing(sqlite3.connect(gateway.database)) as other:
        assert other.execute("SELECT count(*) FROM requests").fetchone()
    assert Path(f"{gateway.database}-wal").exists()
    assert gateway.get("/readyz").status_code == 200


# A migration that fails


FAILS = "DELETE FROM heartbeat; INSERT INTO heartbeat VALUES (2, 0);"


@pytest.mark.parametrize("version", [1, NEWEST])
def test_a_migration_that_fails_leaves_the_ledger_to_the_earlier_version(
    tmp_path: Path, upstream: Upstream, version: int
) -> None:
    gateway = Gateway(
        tmp_path / "gateway", upstream.url, root=next_version(tmp_path / "newer", FAILS)
    )
    make_ledger(gateway.database, version)
    before = rows_in(gateway.database)
    for command in (["serve"], ["account", "list"]):
        done = gateway.run(*command)
        assert done.returncode == 1
        said = (
            f"Error: {gateway.database} could not be migrated from schema {version} to "
            f"{NEWEST + 1}: CHECK constraint failed: id = 1. It was not changed: the "
            "version that you used before can use it. A copy is kept, too: "
            f"{gateway.database}.before-schema-{NEWEST + 1}. Report this error"
        )
        assert done.stderr.splitlines()[-1] == said
        assert version_of(gateway.database) == version
        assert rows_in(gateway.database) == before
    open_ledger(gateway.database)
    assert_sound(gateway.database)
    assert_has_all(rows_in(gateway.database), before)


@pytest.mark.parametrize("free", [0, 20, 40, 80, 120, 160, 200, 300, 1400])
def test_a_migration_on_a_full_disk_loses_nothing(
    tmp_path: Path, small_disk: Path, free: int
) -> None:
    path = small_disk / "redbtc.db"
    put_on(small_disk, tmp_path / "made.db", 14)
    before = rows_in(tmp_path / "made.db")
    reserved = small_disk / "reserved"
    reserved.write_bytes(bytes(free << 10))
    fill(small_disk / "filler")
    reserved.unlink()
    full = opening_fails(path)
    assert full or free
    assert not full or free < 1400
    if full:
        looked_at = tmp_path / "looked_at"
        shutil.copytree(small_disk, looked_at, ignore=shutil.ignore_patterns("filler"))
        if version_of(looked_at / "redbtc.db") == NEWEST:  # what follows had no room
            assert_has_all(rows_in(looked_at / "redbtc.db"), before)
        else:
            assert rows_in(looked_at / "redbtc.db") == before
    (small_disk / "filler").unlink()
    if full:
        open_ledger(path)
    assert_sound(path)
    assert_has_all(rows_in(path), before)
    for copy in copies_of(path):
        assert rows_in(copy) == before
    assert leftovers(path) == set()


def put_on(disk: Path, made: Path, version: int) -> None:
    """Make a ledger, and put it on a disk that is too small to make it there."""
    make_ledger(made, version)
    shutil.copy(made, disk / "redbtc.db")


def opening_fails(path: Path) -> bool:
    """Open a ledger, and return whether the disk was too full for that."""
    try:
        open_ledger(path)
    except StorageUnavailable:
        return True
    return False


def test_a_gateway_migrates_once_its_disk_has_room(
    tmp_path: Path, make_gateway: MakeGateway, small_disk: Path
) -> None:
    gateway = on_disk(make_gateway, small_disk)
    put_on(small_disk, tmp_path / "made.db", NEWEST - 1)
    fill(small_disk / "filler")
    gateway.start("--accept-clock", wait=False)
    gateway.wait_for_log('"event":"ledger unavailable"')
    (small_disk / "filler").unlink()
    gateway.wait_for_log('"event":"migrated"')
    assert gateway.terminate() == 0
    assert_sound(gateway.database)
    assert len(copies_of(gateway.database)) == 1


def test_what_a_killed_copy_has_left_makes_room_for_the_next(tmp_path: Path) -> None:
    path = tmp_path / "redbtc.db"
    make_ledger(path, NEWEST - 1)
    for name in (f"before-schema-{NEWEST}.partial", f"before-schema-{NEWEST - 1}.partial-sha256"):
        Path(f"{path}.{name}").write_bytes(b"x")
    open_ledger(path)
    assert leftovers(path) == set()
