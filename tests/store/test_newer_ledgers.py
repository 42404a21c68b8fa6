"""A ledger that a newer version has written: an older one says so, says how to go back, and leaves
it alone."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shlex
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import redbtc_proxy  # noqa: F401 (adds all commands)
from redbtc.cli.main import commands
from redbtc.errors import UserError
from redbtc.release import RELEASE
from redbtc.store.request_log.file import LOG_VERSION
from redbtc.store.schema import APPLICATION_ID, newest_version
from redbtc.store.versions import newer_version, refuse_newer
from tests.helpers.gateway import Gateway, MakeGateway, wait_until
from tests.helpers.ledgers import make_ledger
from tests.helpers.programs import next_version
from tests.helpers.upstream import Upstream
from tests.store.faults import post

pytestmark = pytest.mark.promise_9

NEWEST = newest_version()
COMMANDS = """
    account list | account add b | account resume acct_1 | account terminate acct_1 --yes
    account export acct_1 --to OUT.zip | account log acct_1 --off
    key add acct_1 | key list acct_1 | key revoke key_1
    price list | price which m | price add m --input 1 | price import PRICES
    payment add acct_1 5 | payment list | notice list | usage | usage show req_done
    statement acct_1 2100-01 | user add a@example.com --operator | user list
    db check | db backup OUT.db | db set-time --yes | db purge | webhook list
    check | check --json"""
Files = dict[str, tuple[bytes, int]]


def files_in(folder: Path) -> Files:
    """Return the content and the time of the last change of each file in a folder."""
    files = [each for each in folder.rglob("*") if each.is_file() and each.name != "stderr"]
    return {str(each): (each.read_bytes(), each.stat().st_mtime_ns) for each in files}


def set_version(path: Path, version: int) -> None:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute(f"PRAGMA user_version = {version}")


# Upgrade, and back again


def test_an_upgrade_and_the_way_back(tmp_path: Path, upstream: Upstream) -> None:
    folder = tmp_path / "gateway"
    old = Gateway(folder, upstream.url).start()
    key = old.new_key()
    assert post(old, key) == (200, "")
    assert old.terminate() == 0
    before = old.cli("usage")["requests"]
    new = Gateway(folder, upstream.url, root=next_version(tmp_path / "newer"))
    new.configure()
    new.start()
    assert post(new, key) == (200, "")
    new.kill()  # what it has migrated is in the -wal alone
    Path(f"{folder}/redbtc.db.lock").touch()
    files = files_in(folder)
    said = refused(old.run("serve"), 1)
    assert refused(old.run("account", "list"), 1) == said
    assert said in refused(old.run("check"), 2)
    assert files_in(folder) == files
    copy = folder / f"redbtc.db.before-schema-{NEWEST + 1}"
    assert said.startswith(
        f"{old.database} has schema {NEWEST + 1}, written by a newer version of this program; this "
        f"is version {RELEASE}, which knows schemas up to {NEWEST}. Nothing was changed. Use the "
        f"newer version again, or restore the copy from before the upgrade (schema {NEWEST}, made "
    )
    command = re.search(r"redbtc-proxy (db restore .+)", said)
    assert command
    assert shlex.split(command[1]) == ["db", "restore", str(copy)]
    new.start()  # it can still be used
    assert len(new.rows()) == 2
    assert new.terminate() == 0
    old.configure()
    restored = old.cli(*shlex.split(command[1]))
    assert restored["ok"]
    assert restored["schema"] == NEWEST
    old.start()
    assert old.rows() == before
    assert post(old, key) == (200, "")
    assert old.terminate() == 0


def refused(done: Any, status: int) -> str:
    """Return what a command has said that failed."""
    assert done.returncode == status
    said = str(done.stderr or done.stdout)
    assert "Traceback" not in said
    return said.strip().removeprefix("Error: ")


@pytest.mark.parametrize("is_in_wal", [False, True])
def test_no_command_touches_a_newer_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_in_wal: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "nice", lambda _: 0)
    (tmp_path / "config.toml").write_text("")
    (tmp_path / "PRICES").write_text('prices = [{ model = "m", input = 1 }]')
    made = tmp_path / "made"
    made.mkdir()
    make_ledger(made / "redbtc.db", NEWEST)
    with contextlib.closing(sqlite3.connect(made / "redbtc.db")) as database:
        database.execute("PRAGMA wal_autocheckpoint = 0")
        database.execute(f"PRAGMA user_version = {NEWEST + 3}")
        database.execute("CREATE TABLE added (x)")
        ends = ["", "-wal"] if is_in_wal else []
        for end in ends:
            shutil.copy(made / f"redbtc.db{end}", tmp_path)
    if not is_in_wal:
        shutil.copy(made / "redbtc.db", tmp_path)
    shutil.rmtree(made)
    (tmp_path / "redbtc.db.lock").touch()
    before = files_in(tmp_path)
    for line in re.split(r"[|\n]", COMMANDS.strip()):
        done = CliRunner().invoke(commands, ["--config", "config.toml", *line.split()])
        said = done.output + str(done.exception or "")
        assert f"has schema {NEWEST + 3}, written by a newer version" in said, line
        assert "there is no copy from before the upgrade" in said, line
        assert done.exit_code == (2 if line.split()[0] == "check" else 1), line
        assert files_in(tmp_path) == before, line


def test_the_way_back_is_the_newest_copy_of_a_known_schema(tmp_path: Path) -> None:
    path = tmp_path / "redbtc.db"
    make_ledger(path, NEWEST)
    copies = {"16": 3, "17": NEWEST, "17.1": NEWEST - 1, "18": NEWEST + 1, "19": NEWEST}
    for number, (name, version) in enumerate(copies.items()):
        copy = tmp_path / f"redbtc.db.before-schema-{name}"
        shutil.copy(path, copy)
        set_version(copy, version)
        os.utime(copy, (number, number))
    (tmp_path / "redbtc.db.before-schema-20").write_text("no database")
    (tmp_path / "redbtc.db.before-schema-19.sha256").write_text("")
    set_version(path, NEWEST + 5)
    with pytest.raises(UserError, match=r"db restore \S+redbtc\.db\.before-schema-19$"):
        refuse_newer(path)


# The request log


def test_a_newer_request_log_is_left_alone(make_gateway: MakeGateway) -> None:
    gateway = make_gateway().start()
    path = gateway.folder / "request_log.db"
    key = gateway.new_key()
    gateway.cli("account", "log", "test", "--days", "3")
    assert post(gateway, key) == (200, "")
    assert gateway.terminate() == 0
    set_version(path, LOG_VERSION + 1)
    before = log_files(gateway)
    gateway.start()
    assert post(gateway, key) == (200, "")
    wait_until(lambda: '"event":"request log unavailable"' in gateway.log())
    said = f"{path} has version {LOG_VERSION + 1}, written by a newer version of this program"
    assert said in gateway.log()
    assert gateway.terminate() == 0
    assert log_files(gateway) == before


def log_files(gateway: Gateway) -> Files:
    files = files_in(gateway.folder).items()
    return {name: found for name, found in files if Path(name).name.startswith("request_log")}


# Versions in a WAL file


def written(folder: Path, chance: random.Random) -> tuple[bytes, bytes]:
    """Return a database and its WAL file after a few commits, some of which change the version."""
    path = folder / "made.db"
    for file in folder.glob("made.db*"):
        file.unlink()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute(f"PRAGMA page_size = {chance.choice([512, 4096, 65536])}")
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA wal_autocheckpoint = 0")
        database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        database.execute("PRAGMA user_version = 5")
        database.execute("CREATE TABLE t (x)")
        for _ in range(chance.randrange(6)):
            if chance.random() < 0.3:
                database.execute("PRAGMA wal_checkpoint(RESTART)")
            database.execute("BEGIN")
            database.execute("INSERT INTO t VALUES (randomblob(?))", (chance.randrange(9000),))
            if chance.random() < 0.5:
                database.execute(f"PRAGMA user_version = {chance.randrange(3, 9)}")
            database.execute("COMMIT")
        return path.read_bytes(), Path(f"{path}-wal").read_bytes()


@pytest.mark.parametrize("seed", range(20))
def test_the_version_is_the_one_that_sqlite_finds(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    main, wal = written(tmp_path, chance)
    path = tmp_path / "found.db"
    for _ in range(25):
        cut = bytearray(wal[: chance.choice([len(wal), chance.randrange(len(wal) + 1)])])
        if cut and chance.random() < 0.3:
            cut[chance.randrange(len(cut))] ^= 1 << chance.randrange(8)
        path.write_bytes(main)
        Path(f"{path}-wal").write_bytes(cut)
        ours = newer_version(path, APPLICATION_ID, 5)
        assert path.read_bytes() == main
        assert Path(f"{path}-wal").read_bytes() == cut
        with contextlib.closing(sqlite3.connect(path)) as database:
            (version,) = database.execute("PRAGMA user_version").fetchone()
            (mark,) = database.execute("PRAGMA application_id").fetchone()
        if main[68:72] == APPLICATION_ID.to_bytes(4):
            assert mark == APPLICATION_ID
            assert ours == (version if version > 5 else None)
        for file in tmp_path.glob("found.db*"):
            file.unlink()
