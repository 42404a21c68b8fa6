"""Backups, restores and the copy made before a migration: under load, with kill -9 at every step,
and with files that are no backups."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx2
import pytest

from redbtc.cli.main import main
from redbtc.errors import UserError
from redbtc.store import backup as backup_module
from redbtc.store import consistency
from redbtc.store.schema import APPLICATION_ID, migrations, newest_version, schema
from redbtc.times import iso_time
from redbtc_proxy import run
from tests.helpers.gateway import PATIENCE_SECONDS, ROOT, RUN, Gateway, MakeGateway, wait_until
from tests.helpers.upstream import Received, Reply, Upstream, json_answer, response_object
from tests.store.logged import open_log

pytestmark = pytest.mark.promise_9

BODY = {"model": "gpt-up", "input": "Hi"}
FIRST = 1_795_000_000_000  # when the first request started, less one millisecond
ADD_REQUESTS = f"""
    WITH RECURSIVE n(i) AS (SELECT ? UNION ALL SELECT i + 1 FROM n WHERE i < ?)
    INSERT INTO requests (request_id, account_id, key_id, endpoint, requested_model, upstream,
                          started_at, outcome, usage_source, cost, month)
    SELECT printf('req_%d', i), accounts.id, keys.id, '/v1/responses', 'm', 'u', {FIRST} + i,
           'completed', 'upstream', 1500000001, '2026-11'
      FROM n, accounts, keys"""
# Kills the process before a call: `calls` are names of functions in os, `left` is how many calls
# are made first.
KILL = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
def kill_after(left, calls):
    def wrap(function):
        def call(*arguments, **options):
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return function(*arguments, **options)
        return call
    for name in calls:
        setattr(os, name, wrap(getattr(os, name)))
"""
# Runs a piece of code in copies of a folder: killed before its first, second, … call to the system,
# until it ends by itself. Prints how many copies there are.
KILL_AT_EACH_STEP = (
    KILL
    + """
import itertools, shutil
from pathlib import Path
from redbtc.store import backup, consistency
CALLS = "open replace unlink ftruncate fchmod fchown fsync pwrite write mkdir".split()
template, copies, code = sys.argv[1:]
backup.PAGES_A_STEP = 40
for number in itertools.count():
    folder = Path(copies, str(number))
    shutil.copytree(template, folder)
    child = os.fork()
    if not child:
        kill_after(number, CALLS)
        exec(code)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
print(number + 1)
"""
)


def database_with(path: Path, requests: int) -> None:
    """Make a database with an account, a key and so many requests."""
    sections = migrations(schema())
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        database.executescript("".join(sections[number] for number in sorted(sections)))
        database.execute(f"PRAGMA user_version = {max(sections)}")
        database.executescript("""
            INSERT INTO acting VALUES (1, 'test', 0);
            INSERT INTO accounts (id, name, created_at) VALUES ('acct_1', 'test', 0);
            INSERT INTO keys (id, hash, account_id, created_at)
                VALUES ('key_1', zeroblob(32), 'acct_1', 0);
            DELETE FROM acting;""")
        add_requests(database, 1, requests)
    path.chmod(0o600)


def add_requests(database: sqlite3.Connection, first: int, last: int) -> None:
    if first <= last:
        database.execute(ADD_REQUESTS, (first, last))


def crashed(path: Path, requests: int, unwritten: int) -> None:
    """Make a database as a killed gateway leaves it: its last requests are in the -wal alone."""
    live = path.with_name("live.db")
    database_with(live, requests - unwritten)
    with contextlib.closing(sqlite3.connect(live, isolation_level=None)) as database:
        database.execute("PRAGMA wal_autocheckpoint = 0")
        add_requests(database, requests - unwritten + 1, requests)
        shutil.copy(live, path)
        shutil.copy(f"{live}-wal", f"{path}-wal")
    for file in path.parent.glob("live.db*"):
        file.unlink()


def requests_in(path: Path) -> int:
    """Return how many requests a sound database has."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        assert backup_module.problems(database, consistency.CHECKS) == []
        count: int = database.execute("SELECT count(*) FROM requests").fetchone()[0]
        return count


def assert_whole(path: Path, requests: int) -> None:
    """The file is a backup with so many requests, beside its digest, and nobody else's to read."""
    assert backup_module.verify(path, path, consistency.CHECKS).requests == requests
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert Path(f"{path}.sha256").read_text() == f"{digest}  {path.name}\n"
    assert {file.stat().st_mode & 0o777 for file in (path, Path(f"{path}.sha256"))} == {0o600}


class Commands:
    """The command line on a database in a folder, within this process. The instance returns the
    exit status; `out` and `err` are what was printed."""

    def __init__(self, folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.database = folder / "redbtc.db"
        self.config = folder / "config.toml"
        self.config.write_text("")
        self.out = self.err = ""
        self._capsys, self._monkeypatch = capsys, monkeypatch

    def __call__(self, *arguments: str | Path) -> int:
        command = ["redbtc-proxy", "--config", str(self.config), *map(str, arguments)]
        self._monkeypatch.setattr(sys, "argv", command)
        umask = os.umask(0o022)
        try:
            main(run)
        except SystemExit as end:
            return int(end.code or 0)
        finally:
            os.umask(umask)
            self.out, self.err = self._capsys.readouterr()
        return 0

    def json(self, *arguments: str | Path) -> dict[str, Any]:
        assert self(*arguments, "--json") == 0, self.err
        printed: dict[str, Any] = json.loads(self.out)
        return printed

    def refuses(self, *arguments: str | Path) -> str:
        """The command changes nothing in the folder but the record of backups, and prints one
        line, which is returned."""
        before = self._files()
        assert self(*arguments) == 1
        assert self._files() == before
        assert self.out == ""
        (line,) = self.err.splitlines()
        assert line.startswith("Error: ")
        return line

    def _files(self) -> dict[str, bytes | None]:
        others = ("redbtc.db-shm", "redbtc.db-wal", "redbtc.db.lock", "redbtc.db.backups")
        ours = [file for file in self.folder.rglob("*") if file.name not in others]
        return {str(file): file.read_bytes() if file.is_file() else None for file in ours}


@pytest.fixture
def commands(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> Commands:
    database_with(tmp_path / "redbtc.db", 50)
    monkeypatch.setattr(os, "nice", lambda _: 0)  # this process stays as it is
    return Commands(tmp_path, capsys, monkeypatch)


# The drill


class Load:
    """Clients that post as long as the block lasts. Each answer has an id of its own; `complete`
    are those whose end a client saw."""

    def __init__(self, gateway: Gateway, upstream: Upstream, key: str) -> None:
        self.complete: list[str] = []
        self._numbers = iter(range(10**9))
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._gateway, self._key = gateway, key
        upstream.script = self._answer
        self._threads = [threading.Thread(target=self._post) for _ in range(4)]

    async def _answer(self, request: Received, reply: Reply) -> None:
        with self._lock:
            number = next(self._numbers)
        await json_answer(response_object(id=f"resp_{number}"))(request, reply)

    def _post(self) -> None:
        while not self._stop.is_set():
            try:
                with self._gateway.client(self._key) as client:
                    while not self._stop.is_set():
                        answer = client.post("/responses", json=BODY)
                        if answer.status_code == 200:  # else the ledger took too long
                            self.complete.append(answer.json()["id"])
                        time.sleep(0.005)
            except httpx2.HTTPError:
                time.sleep(0.01)

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        self.more()
        return self

    def more(self) -> None:
        """Wait for more answers."""
        enough = len(self.complete) + 20
        wait_until(lambda: len(self.complete) >= enough)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(PATIENCE_SECONDS)


def killed(gateway: Gateway, left: int, calls: list[str], *arguments: str) -> None:
    """Run a command that is killed before a call."""
    prelude = f"{KILL}\nkill_after({left}, {calls!r})\n\n"
    prelude += "from redbtc.store import backup\nbackup.PAGES_A_STEP = 4\n"
    command = [sys.executable, "-c", prelude + RUN, *gateway.command(*arguments)[1:]]
    done = subprocess.run(command, capture_output=True, timeout=PATIENCE_SECONDS)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_the_drill_backup_under_load_disaster_restore(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    gateway = make_gateway("[limits.account]\nconcurrency = 0").start()
    key = gateway.new_key("a")
    gateway.api("POST", "/prices", {"prices": [{"model": "gpt-up", "input": "1", "output": "10"}]})
    backups = gateway.folder / "backups"
    backups.mkdir()
    with Load(gateway, upstream, key) as load:
        killed(gateway, 9, ["fsync"], "db", "backup", str(backups))
        assert [file.name for file in backups.iterdir()] == ["redbtc.partial"]
        made = gateway.cli("db", "backup", str(backups))
        assert_whole(Path(made["path"]), made["requests"])
        load.more()
        before = set(load.complete)
        gateway.signal(signal.SIGSTOP)  # a gateway that hangs
        made = gateway.cli("db", "backup", str(backups), "--keep", "1")
        gateway.signal(signal.SIGCONT)
        load.more()
        wait_until(lambda: gateway.get("/readyz").status_code == 200)
        for _ in range(2):
            refused = gateway.cli("db", "restore", made["path"], check=False)
            assert (refused.returncode, refused.stdout) == (1, "")
            assert "in use" in refused.stderr
            Path(f"{gateway.database}.lock").unlink()  # somebody takes it for a stale one
        gateway.kill()
    assert sorted(file.name for file in backups.iterdir()) == [
        Path(made["path"]).name,
        Path(f"{made['path']}.sha256").name,
    ]
    assert_whole(Path(made["path"]), made["requests"])
    everything = set(load.complete)
    lost = list(gateway.folder.glob("redbtc.db*"))
    killed(gateway, 2, ["replace"], "db", "restore", made["path"])  # the -wal has left
    restored = gateway.cli("db", "restore", made["path"])
    assert restored["ok"]
    assert restored["requests"] == made["requests"]
    gateway.start()
    rows = gateway.rows()
    assert len(rows) == made["requests"]
    assert before <= {row["response_id"] for row in rows} - {None} < everything
    assert {row["outcome"] for row in rows} <= {"completed", "interrupted"}
    spent = sum(Decimal(row["cost"]) for row in rows if row["cost"])
    assert Decimal(gateway.cli("account", "show", "a")["balance"]) == -spent < 0
    assert gateway.cli("db", "check")["ok"]
    with gateway.client(key) as client:
        assert client.post("/responses", json=BODY).status_code == 200
    assert gateway.terminate() == 0
    # What was replaced is a backup, too: nothing of it is lost, though it was killed with a -wal.
    assert lost
    first = min(gateway.folder.glob("redbtc.db.replaced-*Z"))
    gateway.cli("db", "restore", str(first))
    assert everything <= {row["response_id"] for row in gateway.rows()}


@pytest.mark.parametrize("renames", [0, 1, 3])
def test_a_start_finishes_a_restore_or_never_sees_it(
    make_gateway: MakeGateway, renames: int
) -> None:
    gateway = make_gateway()
    crashed(gateway.database, 30, unwritten=10)
    database_with(gateway.folder / "other.db", 50)
    killed(gateway, renames, ["replace"], "db", "restore", str(gateway.folder / "other.db"))
    gateway.start()
    assert len(gateway.rows()) == (30 if renames == 0 else 50)
    finished = re.search(r'"event":"restore finished","replaced":"([^"]+)"', gateway.flushed_log())
    assert (finished is None) == (renames == 0)
    if finished:
        assert requests_in(Path(finished[1])) == 30
    assert not list(gateway.folder.glob("*.restor*"))


# kill -9 at every step


def copies_killed_at_each_step(template: Path, code: str) -> Iterator[Path]:
    """Yield copies of a folder in which the code was killed, each time a step later. In the last
    one it ended by itself."""
    copies = template.with_name("copies")
    copies.mkdir()
    command = [sys.executable, "-c", KILL_AT_EACH_STEP, str(template), str(copies), code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.returncode == 0, done.stderr
    for number in range(int(done.stdout)):
        yield copies / str(number)


@pytest.mark.slow
def test_a_killed_backup_leaves_whole_files_and_the_next_one_succeeds(tmp_path: Path) -> None:
    template = tmp_path / "template"
    template.mkdir()
    path = template / "b.db"
    for requests in (20, 30):
        database_with(template / "redbtc.db", requests)
        backup_module.back_up(template / "redbtc.db", str(path), keep=3)
        (template / "redbtc.db").unlink()
    crashed(template / "redbtc.db", 40, unwritten=10)
    code = "backup.back_up(folder / 'redbtc.db', str(folder / 'b.db'), keep=3)"
    seen = set()
    for folder in copies_killed_at_each_step(template, code):
        files = [file for file in folder.iterdir() if re.fullmatch(r"b\.db(\.\d)?", file.name)]
        for file in files:
            backup_module.verify(file, file, consistency.CHECKS)
            assert backup_module.kept_digest(file) in (None, backup_module.sha256_of(file))
        found = [requests_in(file) for file in sorted(files)]
        seen.add(tuple(found))
        assert {20, 30} <= set(found)
        backup_module.back_up(folder / "redbtc.db", str(folder / "b.db"), keep=3)
        assert_whole(folder / "b.db", 40)
        assert not [file for file in folder.iterdir() if "partial" in file.name]
    assert seen >= {(30, 20), (40, 30, 20)}


@pytest.mark.slow
def test_a_killed_restore_leaves_the_old_database_or_the_new_one(tmp_path: Path) -> None:
    template = tmp_path / "template"
    template.mkdir()
    crashed(template / "redbtc.db", 30, unwritten=10)
    database_with(template / "other.db", 50)
    backup_module.back_up(template / "other.db", str(template / "b.db"))
    code = "backup.restore(folder / 'redbtc.db', str(folder / 'b.db'), consistency.CHECKS)"
    found = []
    for folder in copies_killed_at_each_step(template, code):
        backup_module.complete_restore(folder / "redbtc.db")
        found.append(requests_in(folder / "redbtc.db"))
        replaced = list(folder.glob("*.replaced-*Z"))
        assert [requests_in(file) for file in replaced] == ([30] if found[-1] == 50 else [])
        assert not list(folder.glob("*.restor*"))
        assert_whole(folder / "b.db", 50)
    assert found == sorted(found)
    assert set(found) == {30, 50}


# Backups


def test_a_copy_is_of_one_instant_and_ends_whatever_is_written_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "redbtc.db"
    database_with(path, 1000)
    fsync = os.fsync
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as writer:
        steps = 0

        def commit_at_each_step(file: int) -> None:
            nonlocal steps
            steps += 1
            add_requests(writer, 1000 + steps, 1000 + steps)
            fsync(file)

        monkeypatch.setattr(backup_module, "PAGES_A_STEP", 1)
        monkeypatch.setattr(os, "fsync", commit_at_each_step)
        made = backup_module.back_up(path, str(tmp_path / "b.db"))
    assert steps >= made.bytes // 4096 > 50
    assert_whole(tmp_path / "b.db", 1000)
    assert requests_in(path) == 1000 + steps


def test_what_a_backup_says(commands: Commands) -> None:
    made = commands.json("db", "backup", commands.folder / "b.db")
    path = Path(made["path"])
    assert path == commands.folder / "b.db"
    assert made["bytes"] == path.stat().st_size
    assert made["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (made["requests"], made["schema"]) == (50, newest_version())
    assert made["seconds"] > 0
    assert_whole(path, 50)
    assert commands("db", "backup", path) == 0
    assert re.fullmatch(
        r"Backup \S+: \d+ bytes, 50 requests, schema \d+, in \S+ s\.\n", commands.out
    )


def test_what_only_a_wal_holds_is_in_the_backup(commands: Commands) -> None:
    crashed(commands.database, 30, unwritten=10)
    assert commands.json("db", "backup", commands.folder / "b.db")["requests"] == 30


def test_backups_in_a_folder_are_named_by_the_time(
    commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = commands.folder / "backups"
    folder.mkdir()
    others = [folder / name for name in ("redbtc-notes.db", "other-20260101T000000Z.db", "b.db")]
    for other in others:
        other.touch()
    names = [f"redbtc-2026110{day}T000000Z.db" for day in (1, 2, 3)]
    for name in names:
        (folder / name).touch()
        Path(folder / f"{name}.sha256").touch()
    made = Path(commands.json("db", "backup", folder)["path"])
    assert re.fullmatch(r"redbtc-\d{8}T\d{6}Z\.db", made.name)
    assert len(list(folder.iterdir())) == 3 + 6 + 2
    made.unlink()
    made = Path(commands.json("db", "backup", f"{folder}/", "--keep", "3")["path"])
    kept = [folder / name for name in [*names[1:], made.name]]
    digests = [Path(f"{file}.sha256") for file in kept]
    assert set(folder.iterdir()) == {*others, *kept, *digests}

    class Earlier(datetime):
        @classmethod
        def now(cls, *_: Any) -> Any:
            return cls(2020, 1, 1)

    monkeypatch.setattr(backup_module, "datetime", Earlier)
    made = Path(commands.json("db", "backup", folder, "--keep", "1")["path"])
    assert made.name == "redbtc-20200101T000000Z.db"
    assert set(folder.iterdir()) == {*others, made, Path(f"{made}.sha256")}


def test_backups_of_one_name_are_numbered(commands: Commands) -> None:
    path = commands.folder / "b.db"
    with contextlib.closing(sqlite3.connect(commands.database, isolation_level=None)) as database:
        for last in (51, 52, 53, 54):
            add_requests(database, last, last)
            commands.json("db", "backup", path, "--keep", "3")
    held = {"b.db": 54, "b.db.1": 53, "b.db.2": 52}
    for name, requests in held.items():
        assert_whole(commands.folder / name, requests)
    assert not (commands.folder / "b.db.3").exists()
    commands.json("db", "backup", path)
    assert (commands.folder / "b.db.2").exists()
    commands.json("db", "backup", path, "--keep", "1")
    assert sorted(each.name for each in commands.folder.glob("b.db*")) == ["b.db", "b.db.sha256"]


def test_keep_is_at_least_one(commands: Commands) -> None:
    assert commands("db", "backup", commands.folder / "b.db", "--keep", "0") == 2
    assert "--keep" in commands.err


@pytest.mark.parametrize(
    "name",
    [
        "redbtc.db",
        "redbtc.db-wal",
        "redbtc.db.restored",
        "redbtc.db.replaced-20261129T101530.123Z",
        "redbtc.db.rescue-20261129T101530Z",
        "redbtc.db.owed-4711",
        "redbtc.db.trial-wal",
        "config.toml",
        "null",
        "theirs.db",
        "no/b.db",
        "no/",
    ],
)
def test_a_backup_replaces_nothing_but_a_backup(commands: Commands, name: str) -> None:
    (commands.folder / "null").symlink_to("/dev/null")
    database_with(commands.folder / "theirs.db", 1)
    (commands.folder / "theirs.db.lock").touch()
    commands.config.write_text("# not empty\n")
    said = commands.refuses("db", "backup", f"{commands.folder}/{name}")
    assert "choose another file" in said or "create it first" in said


def damage(path: Path) -> None:
    """Overwrite a page in the middle of a file."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 4096 // 2 * 4096)
        file.write(b"\x07" * 4096)


def another_programs(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE theirs (x)")


@pytest.mark.parametrize(
    "make", [damage, lambda path: path.unlink(), lambda path: path.write_text("x" * 9000)]
)
def test_a_database_that_is_not_whole_gives_no_backup(
    commands: Commands, make: Callable[[Path], Any]
) -> None:
    shutil.copy(commands.database, commands.folder / "b.db")
    make(commands.database)
    commands.refuses("db", "backup", commands.folder / "b.db")


def test_a_backup_that_fails_leaves_nothing(
    commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = commands.folder / "b.db"
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))
        assert "5 bytes free" in commands.refuses("db", "backup", path)

    def refused(*_: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", refused)
        assert "Permission denied" in commands.refuses("db", "backup", path)
    with backup_module.temporary(commands.folder / "b.db.partial"):
        assert commands("db", "backup", path) == 1
        assert "another command" in commands.err
    assert commands("db", "backup", path) == 0


def test_a_full_disk_is_one_clear_line(make_gateway: MakeGateway) -> None:
    gateway = make_gateway()
    database_with(gateway.database, 500)
    limit = "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
    command = gateway.command("db", "backup", str(gateway.folder / "b.db"))[1:]
    done = subprocess.run(
        [sys.executable, "-c", limit + RUN, *command], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"Error: No backup of \S+ was made: .+\n", done.stderr)
    assert not list(gateway.folder.glob("b.db*"))


# The request log


def log_bodies(folder: Path, *request_ids: str) -> None:
    """Store bodies of requests in the request log of a folder."""

    async def run() -> None:
        async with open_log(folder) as tested:
            for request_id in request_ids:
                await tested.add(request_id, request_id.encode() * 1000)

    asyncio.run(run())


def logged_in(path: Path) -> list[str]:
    """Return the ids in a copy of a request log, which is whole and beside its digest."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert Path(f"{path}.sha256").read_text() == f"{digest}  {path.name}\n"
    assert path.stat().st_mode & 0o777 == 0o600
    with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?immutable=1", uri=True)) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return [found for (found,) in database.execute("SELECT request_id FROM logged ORDER BY id")]


def test_the_request_log_is_in_a_backup_only_if_that_is_wanted(commands: Commands) -> None:
    path = commands.folder / "b.db"
    bodies = Path(f"{path}.request_log.db")
    made = commands.json("db", "backup", path, "--with-request-log")
    assert made["request_log"] is None, "there is none"
    log_bodies(commands.folder, "req_1")
    assert commands.json("db", "backup", path)["request_log"] is None
    assert not bodies.exists()
    for number in range(2, 6):
        log_bodies(commands.folder, f"req_{number}")
        with_them = [] if number == 4 else ["--with-request-log"]
        made = commands.json("db", "backup", path, "--keep", "3", *with_them)
        assert made["request_log"] == (None if number == 4 else str(bodies))
    assert logged_in(bodies) == [f"req_{number}" for number in range(1, 6)]
    assert logged_in(Path(f"{path}.2.request_log.db")) == ["req_1", "req_2", "req_3"]
    names = {"b.db", "b.db.1", "b.db.2", "b.db.request_log.db", "b.db.2.request_log.db"}
    digests = {f"{name}.sha256" for name in names}
    assert {file.name for file in commands.folder.glob("b.db*")} == names | digests
    assert commands("db", "backup", path, "--keep", "1") == 0
    assert sorted(file.name for file in commands.folder.glob("b.db*")) == ["b.db", "b.db.sha256"]


def test_old_request_logs_leave_a_folder_with_their_backups(
    commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = commands.folder / "backups"
    folder.mkdir()
    log_bodies(commands.folder, "req_1")
    for day in (1, 2, 3):

        class Today(datetime):
            @classmethod
            def now(cls, *_: Any, day: int = day) -> Any:
                return cls(2026, 11, day)

        monkeypatch.setattr(backup_module, "datetime", Today)
        made = commands.json("db", "backup", folder, "--keep", "2", "--with-request-log")
        assert logged_in(Path(made["request_log"])) == ["req_1"]
    assert len(list(folder.iterdir())) == 2 * 4


def test_the_request_log_is_copied_at_one_instant_and_again_if_it_was_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database_with(tmp_path / "redbtc.db", 1)
    log_bodies(tmp_path, *(f"req_{number}" for number in range(200)))
    file = tmp_path / "request_log.db"
    expected = [f"req_{number}" for number in range(200)]
    steps = 0
    fsync = os.fsync

    def change_at_each_step(descriptor: int, replaced_at: int) -> None:
        nonlocal steps
        steps += 1
        fsync(descriptor)
        with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as database:
            database.execute("UPDATE logged SET account_id = account_id || 'x'")
        if steps == replaced_at:
            shutil.copy(file, tmp_path / "copy")
            os.replace(tmp_path / "copy", file)

    monkeypatch.setattr(backup_module, "PAGES_A_STEP", 40)
    for replaced_at in (-1, 8):
        steps = 0
        changed = functools.partial(change_at_each_step, replaced_at=replaced_at)
        monkeypatch.setattr(os, "fsync", changed)
        backup_module.back_up(tmp_path / "redbtc.db", str(tmp_path / "b.db"), with_request_log=True)
        assert logged_in(tmp_path / "b.db.request_log.db") == expected
        assert steps > 10
    monkeypatch.setattr(backup_module, "BODIES_TRIES", 1)
    steps = 0
    with pytest.raises(UserError, match="run the backup again"):
        backup_module.back_up(tmp_path / "redbtc.db", str(tmp_path / "c.db"), with_request_log=True)
    assert not list(tmp_path.glob("c.db*"))


@pytest.mark.parametrize("name", ["request_log.db", "request_log.db-wal", "t.db"])
def test_a_backup_replaces_no_request_log_but_of_a_backup(commands: Commands, name: str) -> None:
    log_bodies(commands.folder, "req_1")
    database_with(commands.folder / "t.db.request_log.db", 1)
    said = commands.refuses("db", "backup", commands.folder / name, "--with-request-log")
    assert "choose another file" in said


# Restores


def test_a_restore_keeps_what_it_replaces_and_can_be_undone(commands: Commands) -> None:
    path = commands.folder / "b.db"
    commands.json("db", "backup", path)
    crashed(commands.database, 30, unwritten=10)
    done = commands.json("db", "restore", path)
    assert (done["ok"], done["problems"]) == (True, [])
    assert (done["requests"], done["schema"]) == (50, newest_version())
    assert done["latest_request_at"] == iso_time(FIRST + 50)
    assert done["database"] == str(commands.database)
    assert requests_in(commands.database) == 50
    assert commands.database.stat().st_mode & 0o777 == 0o600
    assert_whole(path, 50)
    assert commands("db", "restore", done["replaced"]) == 0
    assert f"30 requests, newest from {iso_time(FIRST + 30)}" in commands.out
    assert "The replaced database is kept: " in commands.out
    assert requests_in(commands.database) == 30


def test_a_restore_needs_no_database_but_its_spill_files_stay(commands: Commands) -> None:
    path = commands.folder / "b.db"
    commands.json("db", "backup", path)
    for suffix in ("", "-wal", "-shm"):
        Path(f"{commands.database}{suffix}").unlink(missing_ok=True)
    owed = Path(f"{commands.database}.owed")
    owed.write_bytes(b"")
    assert commands.json("db", "restore", path)["replaced"] is None
    assert owed.exists()
    assert requests_in(commands.database) == 50


def test_a_restore_through_a_symbolic_link_keeps_the_link(commands: Commands) -> None:
    path = commands.folder / "b.db"
    commands.json("db", "backup", path)
    (commands.folder / "disk").mkdir()
    target = commands.folder / "disk" / "ledger.db"
    crashed(target, 30, unwritten=10)
    commands.database.unlink()
    commands.database.symlink_to(target)
    replaced = Path(commands.json("db", "restore", path)["replaced"])
    assert replaced.parent == target.parent
    assert [requests_in(file) for file in (commands.database, target, replaced)] == [50, 50, 30]


def test_a_restore_overwrites_no_kept_database(tmp_path: Path) -> None:
    path = tmp_path / "redbtc.db"
    database_with(path, 50)
    database_with(tmp_path / "redbtc.db.restored", 30)
    backup_module.complete_restore(path)
    (replaced,) = tmp_path.glob("redbtc.db.replaced-*Z")
    path.rename(tmp_path / "redbtc.db.restored")
    path.touch()
    with pytest.raises(FileExistsError):
        backup_module.complete_restore(path)
    assert requests_in(replaced) == 50


def test_a_wal_beside_a_backup_with_a_digest_is_ignored(commands: Commands) -> None:
    """It belongs to another file: SQLite would apply it to this one."""
    path = commands.folder / "b.db"
    crashed(commands.folder / "c.db", 30, unwritten=10)
    commands.json("db", "backup", path)
    shutil.copy(commands.folder / "c.db-wal", f"{path}-wal")
    assert commands.json("db", "restore", path)["requests"] == 50


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3000] ^= 1
    path.write_bytes(content)


def change(sql: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        Path(f"{path}.sha256").unlink()
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
            database.executescript(sql)

    return make


def without_digest(make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def both(path: Path) -> None:
        Path(f"{path}.sha256").unlink()
        make(path)

    return both


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (flip_a_byte, "SHA-256"),
        (lambda path: Path(f"{path}.sha256").write_text("?"), "sha256sum"),
        (without_digest(damage), "damaged"),
        (without_digest(lambda path: os.truncate(path, 40_000)), "damaged"),
        (without_digest(lambda path: path.write_bytes(b"")), "not a RedBTC database"),
        (without_digest(lambda path: path.write_text("text\n" * 2000)), "not a database"),
        (change("PRAGMA application_id = 1"), "not a RedBTC database"),
        (change("PRAGMA user_version = 99"), "newer version"),
        (change("UPDATE usage_by_day SET requests = 1"), "not equal the sum"),
        (
            change("PRAGMA foreign_keys = OFF; UPDATE keys SET account_id = 'acct_2'"),
            "foreign keys",
        ),
        (lambda path: path.unlink(), "does not exist"),
    ],
)
def test_what_is_not_a_whole_backup_is_not_restored(
    commands: Commands, make: Callable[[Path], Any], said: str
) -> None:
    path = commands.folder / "b.db"
    commands.json("db", "backup", path)
    make(path)
    assert said in commands.refuses("db", "restore", path)
    assert requests_in(commands.database) == 50


def test_a_restore_names_a_file_that_is_not_the_database(commands: Commands) -> None:
    assert "the database itself" in commands.refuses("db", "restore", commands.database)
    assert "does not exist" in commands.refuses("db", "restore", commands.folder)


def test_a_restore_without_room_changes_nothing(
    commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = commands.folder / "b.db"
    commands.json("db", "backup", path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))
    assert "5 bytes free" in commands.refuses("db", "restore", path)


# Migrations


def earlier_database(path: Path) -> None:
    """Make a database of the schema before the newest."""
    sections = migrations(schema())
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA journal_mode = WAL")
        for number in range(1, newest_version()):
            database.executescript(sections[number])
        database.executescript(f"""
            PRAGMA application_id = {APPLICATION_ID};
            PRAGMA user_version = {newest_version() - 1};
            INSERT INTO acting VALUES (1, 'test', 0);
            INSERT INTO accounts (id, name, created_at) VALUES ('acct_1', 'before', 0);
            DELETE FROM acting;""")


def version_of(path: Path) -> int:
    with contextlib.closing(sqlite3.connect(path)) as database:
        version: int = database.execute("PRAGMA user_version").fetchone()[0]
        return version


def migrated_line(gateway: Gateway) -> dict[str, Any]:
    log = gateway.flushed_log() if gateway.alive() else gateway.log()
    (line,) = [line for line in log.splitlines() if '"event":"migrated"' in line]
    said: dict[str, Any] = json.loads(line)
    return said


def test_a_migration_makes_a_backup_first_also_when_it_is_killed(
    make_gateway: MakeGateway,
) -> None:
    gateway = make_gateway()
    newest = newest_version()
    earlier_database(gateway.database)
    gateway.prelude = f"""{KILL}
import aiosqlite, sqlite3
async def kill_before_commit(self, script):
    await self._execute(self._conn.executescript, script.replace("COMMIT;", ""))
    os.kill(os.getpid(), signal.SIGKILL)
aiosqlite.Connection.executescript = kill_before_commit
"""
    gateway.start(wait=False)
    assert gateway.wait() == -signal.SIGKILL
    assert version_of(gateway.database) == newest - 1
    gateway.prelude = ""
    gateway.start()
    said = migrated_line(gateway)
    assert (said["before"], said["after"]) == (newest - 1, newest)
    assert said["seconds"] >= 0
    assert said["no_backup"] == ""
    copy = gateway.folder / f"redbtc.db.before-schema-{newest}"
    assert said["backup"] == str(copy)
    for file in (copy, Path(f"{copy}.1")):
        assert version_of(file) == newest - 1
        assert_whole(file, 0)
    (account,) = gateway.api("GET", "/accounts")["accounts"]
    assert account["name"] == "before"
    assert gateway.terminate() == 0
    done = gateway.cli("db", "restore", str(copy), check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["schema"] == newest - 1
    text = rf"Migrated the database from schema {newest - 1} to {newest} in \S+ s\. "
    assert re.search(rf"{text}A copy of the old one is kept: \S+\n", done.stderr)
    assert version_of(gateway.database) == newest


def test_a_migration_without_room_goes_on_and_says_so(make_gateway: MakeGateway) -> None:
    gateway = make_gateway()
    earlier_database(gateway.database)
    gateway.prelude = "import shutil\nusage = shutil.disk_usage\n"
    gateway.prelude += "shutil.disk_usage = lambda path: usage(path)._replace(free=5)\n"
    gateway.start()
    said = migrated_line(gateway)
    assert said["backup"] == ""
    assert "5 bytes free" in said["no_backup"]
    assert not list(gateway.folder.glob("*before-schema*"))


def test_a_migration_that_is_tried_again_makes_one_copy(make_gateway: MakeGateway) -> None:
    gateway = make_gateway()
    earlier_database(gateway.database)
    gateway.prelude = """
import aiosqlite, os, sqlite3
run, failures = aiosqlite.Connection.executescript, []
async def fail_twice(self, script):
    if len(failures) < 2:
        failures.append(1)
        error = sqlite3.OperationalError("database or disk is full")
        error.sqlite_errorcode = sqlite3.SQLITE_FULL
        raise error
    return await run(self, script)
aiosqlite.Connection.executescript = fail_twice
"""
    gateway.start()
    wait_until(lambda: gateway.get("/readyz").status_code == 200)
    copy = f"redbtc.db.before-schema-{newest_version()}"
    assert migrated_line(gateway)["backup"] == str(gateway.folder / copy)
    assert sorted(file.name for file in gateway.folder.glob("*before-schema*")) == [
        copy,
        f"{copy}.sha256",
    ]


def test_a_copy_does_not_take_the_room_that_the_migration_needs(make_gateway: MakeGateway) -> None:
    gateway = make_gateway()
    earlier_database(gateway.database)
    free = gateway.database.stat().st_size * 2
    gateway.prelude = "import shutil\nusage = shutil.disk_usage\n"
    gateway.prelude += f"shutil.disk_usage = lambda path: usage(path)._replace(free={free})\n"
    gateway.start()
    said = migrated_line(gateway)
    assert said["backup"] == ""
    assert "and its migration need" in said["no_backup"]


def test_a_damaged_database_is_not_migrated(commands: Commands) -> None:
    commands.database.unlink()
    earlier_database(commands.database)
    with contextlib.closing(sqlite3.connect(commands.database)) as database:
        (page,) = database.execute(
            "SELECT rootpage FROM sqlite_schema WHERE name = 'requests_by_time'"
        ).fetchone()
    with commands.database.open("r+b") as file:
        file.seek((page - 1) * 4096)
        file.write(b"\x07" * 4096)
    assert commands("account", "list") == 1
    assert "damaged" in commands.err
    assert version_of(commands.database) == newest_version() - 1


def test_a_new_database_has_no_backup(commands: Commands) -> None:
    commands.database.unlink()
    assert commands("account", "add", "a") == 0
    assert commands.err == ""
    assert not list(commands.folder.glob("*before-schema*"))
