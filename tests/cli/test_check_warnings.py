"""What `check` warns of: what will hurt later. Warnings don't change its exit status."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shlex
import sqlite3
import time
from pathlib import Path

import pytest

from redbtc.cli import check_warnings
from redbtc.cli.check_warnings import (
    clock_is_synchronised,
    warnings_of,
    warnings_of_certificates,
    warnings_of_clock,
    warnings_of_descriptors,
    warnings_of_disk,
    warnings_of_upstreams,
)
from redbtc.config import LoadedSettings, parse_settings
from redbtc.store.disk import DiskRoom
from redbtc.times import DAY
from tests.gateway.test_operator_messages import expires_in
from tests.helpers.certificates import Authority
from tests.helpers.gateway import Gateway, MakeGateway
from tests.helpers.upstream import Upstream

GB = 1 << 30


@pytest.fixture(autouse=True)
def keep_the_clock_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether this machine's clock is synchronised is no matter of these tests."""
    monkeypatch.setattr(check_warnings, "clock_is_synchronised", lambda: None)


def warned(gateway: Gateway, status: int = 0) -> list[str]:
    """The warnings that the command prints, but for those about the machine that tests it."""
    done = gateway.run("check", "--json")
    assert done.returncode == status, done.stdout + done.stderr
    found = json.loads(done.stdout)
    lines = gateway.run("check").stdout.splitlines()
    assert [f"warning: {each}" for each in found["warnings"]] == [
        line for line in lines if line.startswith("warning: ")
    ]
    others = ("the clock is not synchronised", "at most ", "the disk of ")
    return [each for each in found["warnings"] if not each.startswith(others)]


def loaded(folder: Path, **tables: object) -> LoadedSettings:
    return LoadedSettings(parse_settings(tables), None, folder)


# ── Backups, keys and permissions, of a gateway that runs and of one that doesn't ────────────────


def test_a_usual_gateway_gets_no_warning(gateway: Gateway) -> None:
    gateway.new_key()
    assert warned(gateway) == []
    gateway.terminate()
    assert warned(gateway) == []


def test_no_database_gets_no_warning(make_gateway: MakeGateway) -> None:
    assert warned(make_gateway()) == []


def test_backups(gateway: Gateway) -> None:
    gateway.new_key()
    assert gateway.run("db", "backup", f"{gateway.folder}/missing/").returncode == 1
    (failed,) = warned(gateway)
    assert failed.startswith("the last backup failed (20")
    assert "missing does not exist; create it first. Correct that, and run db backup" in failed
    assert gateway.run("db", "backup", f"{gateway.folder}/b.db").returncode == 0
    assert warned(gateway) == []
    record = Path(f"{gateway.database}.backups")
    old = json.loads(record.read_text())
    old["succeeded_at"] -= 8 * DAY
    del old["failed_at"]
    record.write_text(json.dumps(old))
    (overdue,) = warned(gateway)
    assert overdue.startswith("no backup for 8 days (last: 20")
    record.unlink()
    assert warned(gateway) == [], "the ledger is new"
    gateway.terminate()
    with contextlib.closing(sqlite3.connect(gateway.database)) as database:
        database.execute("UPDATE runs SET started_at = started_at - 8 * 86400000")
        database.commit()
    (never,) = warned(gateway)
    assert never.startswith("no backup for 8 days (last: never): run db backup")


def test_keys(gateway: Gateway) -> None:
    gateway.api("POST", "/accounts", {"name": "ada"})
    ids = [gateway.api("POST", "/accounts/ada/keys", {"label": "x"})["id"] for _ in range(13)]
    gateway.terminate()
    for number, key_id in enumerate(ids[:12]):
        expires_in(gateway, key_id, 1 + number)
    expires_in(gateway, ids[12], 15)
    found = warned(gateway)
    assert len(found) == 11
    assert found[0].startswith(f"key {ids[0]} (x) of ada expires at ")
    assert found[-1] == "2 more keys expire within 14 days: see key list"


def test_permissions(gateway: Gateway) -> None:
    gateway.database.chmod(0o644)
    Path(f"{gateway.database}.sock").chmod(0o666)
    gateway.folder.chmod(0o777)
    gateway.config.chmod(0o666)
    try:
        found = warned(gateway)
    finally:
        gateway.folder.chmod(0o700)
    assert [line.partition(":")[0] for line in found] == [
        str(gateway.database),
        f"{gateway.database}.sock",
        str(gateway.folder),
        str(gateway.config),
    ]
    assert found[0].endswith(f"other users may use it (mode 644): chmod 600 {gateway.database}")
    gateway.folder.chmod(0o1777)
    assert str(gateway.folder) not in [line.partition(":")[0] for line in warned(gateway)], "sticky"


def test_commands_can_be_copied_from_odd_folders(tmp_path: Path, upstream: Upstream) -> None:
    gateway = Gateway(tmp_path / "a b", upstream.url)
    gateway.config.chmod(0o666)
    (line,) = [each for each in warned(gateway) if "chmod" in each]
    assert shlex.split(line.rpartition(": ")[2]) == ["chmod", "go-w", str(gateway.config)]


def test_settings_that_may_hold_a_secret(make_gateway: MakeGateway) -> None:
    headers = 'headers = { x-a = "{env:HOME}", x-b = "secret" }'
    gateway = make_gateway(
        '[billing]\nwebhook_url = "https://a.example/?token=1"\nwebhook_secret_env = "HOME"\n',
        headers,
    )
    gateway.config.chmod(0o644)
    (line,) = warned(gateway)
    assert "upstreams[0].headers.x-b, billing.webhook_url may hold a secret: chmod 600" in line
    gateway.config.chmod(0o600)
    assert warned(gateway) == []


def test_a_problem_is_no_warning(make_gateway: MakeGateway) -> None:
    """The exit status is that of the problem, and warnings are shown all the same."""
    gateway = make_gateway()
    gateway.database.write_text("no database")
    gateway.database.chmod(0o644)
    found = warned(gateway, status=2)
    assert len(found) == 1


# ── The clock and the machine ────────────────────────────────────────────────────────────────────


def test_a_clock_that_is_behind_the_ledger(gateway: Gateway) -> None:
    gateway.new_key()
    gateway.terminate()
    ahead = round((time.time() + 3600) * 1000)
    with contextlib.closing(sqlite3.connect(gateway.database)) as database:
        database.execute("INSERT OR REPLACE INTO heartbeat (id, beat_at) VALUES (1, ?)", (ahead,))
        database.commit()
    (line,) = warned(gateway)
    seconds = int(line.split()[3])
    assert 3500 < seconds <= 3600
    assert "correct the clock or, if the ledger is wrong, run db set-time" in line


@pytest.mark.parametrize(
    ("state", "known"), [(5, False), (0, True), (1, True), (-1, None), (None, None)]
)
def test_a_clock_that_nothing_keeps_right(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, state: int | None, known: bool | None
) -> None:
    """As adjtimex(2) says, where it is there and may be called."""

    class Library:
        if state is not None:

            def adjtimex(self, _: object) -> int:
                assert state is not None
                return state

    monkeypatch.setattr("ctypes.CDLL", lambda _: Library())
    monkeypatch.setattr(check_warnings, "clock_is_synchronised", clock_is_synchronised)
    assert clock_is_synchronised() is known
    assert len(list(warnings_of_clock(loaded(tmp_path)))) == (known is False)


def test_the_kernel_says_whether_the_clock_is_right() -> None:
    assert clock_is_synchronised() in (True, False, None)


def test_a_disk_that_is_nearly_full(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = "100 MB free: make room on it. A full disk stops the gateway"
    for free, warns in ((100 << 20, True), (10 * GB, False)):
        room = DiskRoom(99 * GB, free)
        monkeypatch.setattr(check_warnings, "disk_room", lambda _, room=room: room)
        found = list(warnings_of_disk(loaded(tmp_path)))
        assert found == [f"the disk of {tmp_path} has {text}"] * warns


def test_few_descriptors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for maximum, warns in ((1024, True), (4096, False), (resource.RLIM_INFINITY, False)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, most=maximum: (1024, most))
        assert len(list(warnings_of_descriptors(loaded(tmp_path)))) == warns


# ── Upstreams ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"base_url": "https://a.example/v1", "api_key_env": ""}, "has no key"),
        ({"base_url": "http://a.example/v1", "api_key_env": "K"}, "in plain text"),
        ({"base_url": "http://a.example/v1", "credentials": "client"}, "in plain text"),
        ({"base_url": "https://a.example/v1", "api_key_env": "K"}, None),
        ({"base_url": "https://a.example/v1", "credentials": "client"}, None),
        ({"base_url": "https://a.example/v1", "api_key_env": "", "headers": {"k": "v"}}, None),
        ({"base_url": "http://127.0.0.1:1/v1", "api_key_env": ""}, None),
        ({"base_url": "http://localhost/v1", "api_key_env": ""}, None),
        ({"base_url": "http://[::1]/v1", "api_key_env": ""}, None),
    ],
)
def test_upstreams(tmp_path: Path, table: dict[str, object], said: str | None) -> None:
    found = list(warnings_of_upstreams(loaded(tmp_path, upstreams=[{"name": "up", **table}])))
    assert len(found) == (said is not None)
    assert all(line.startswith('upstream "up"') and str(said) in line for line in found)


def test_a_certificate_that_expires_soon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Those that the tests make last for two days."""
    file = Authority(tmp_path / "ca").file
    table = {"base_url": "https://a.example/v1", "ca_file": str(file)}
    tables = [{"name": name, **table} for name in "ab"]
    settings = loaded(tmp_path, upstreams=tables)
    (line,) = warnings_of_certificates(settings)
    assert line.startswith(f"{file}: the certificate 'Test authority' expires in 1 days: put the")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3 * 86400)
    (line,) = warnings_of_certificates(settings)
    assert "'Test authority' has expired" in line
    monkeypatch.setattr(time, "time", lambda: now - 30 * 86400)
    assert list(warnings_of_certificates(settings)) == []


def test_nothing_is_written(tmp_path: Path) -> None:
    warnings_of(loaded(tmp_path))
    assert os.listdir(tmp_path) == []
