"""What the webhook is told of the gateway itself: a ledger that fails, a disk that is nearly full,
backups that fail or are missing, and keys that expire. Each is told once, also across restarts."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from redbtc.billing.webhook_messages import MessageType
from tests.helpers.gateway import ROOT, Gateway, MakeGateway, wait_until
from tests.helpers.webhook import SECRET, Hook, Post, receiving
from tests.store.faults import fill, post

pytestmark = pytest.mark.promise_9

DAY = 86_400_000
SECONDS = {"LASTS_SECONDS": 0.2, "OVER_SECONDS": 0.4, "PAIR_SECONDS_OF_FAULTS": 0.0}
# A gateway whose watch is fast. Two files in its folder make it fail: with `fault`, no commit
# succeeds; `disk` holds the total and free bytes of its disk.
PRELUDE = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import pathlib, sqlite3
from redbtc.gateway import operator_messages, unopened_ledger, vitals, watching
from redbtc.store import disk, writer
watching.WATCH_LOOK_SECONDS = 0.02
watching.COUNT_SECONDS = 0.1
unopened_ledger.UNOPENED_SECONDS = 0.2
unopened_ledger.MAX_UNOPENED_PAUSE_SECONDS = 0.2
write = writer.Writer._write
def failing(self, *values):
    if pathlib.Path("fault").exists():
        raise sqlite3.OperationalError("database or disk is full")
    return write(self, *values)
writer.Writer._write = failing
disk_room = watching.disk_room
def room(path):
    try:
        return disk.DiskRoom(*map(int, pathlib.Path("disk").read_text().split()))
    except OSError:
        return disk_room(path)
watching.disk_room = vitals.disk_room = room
"""


@pytest.fixture
def hook() -> Iterator[Hook]:
    with receiving() as hook:
        yield hook


def watched(make_gateway: MakeGateway, hook: Hook | None, **seconds: float) -> Gateway:
    """A gateway with a webhook, which is not started yet."""
    billing = '[billing]\nunpriced_models = "free"\n' + (hook.settings() if hook else "")
    gateway = make_gateway(billing, HOOK_SECRET=SECRET)
    speed = (f"operator_messages.{name} = {value}\n" for name, value in (SECONDS | seconds).items())
    gateway.prelude = PRELUDE + "".join(speed)
    return gateway


def set_file(gateway: Gateway, name: str, text: str = "") -> None:
    new = gateway.folder / f"{name}.new"
    new.write_text(text)
    new.rename(gateway.folder / name)


def kinds(hook: Hook) -> list[str]:
    """The types of the messages. One can arrive twice if the gateway ends meanwhile."""
    return list({each.id: each.content["type"] for each in hook.accepted}.values())


def wait_for(hook: Hook, *expected: str) -> Post:
    """Wait until just these messages have arrived, in this order; the last one."""
    wait_until(lambda: len(kinds(hook)) >= len(expected), why=lambda: str(kinds(hook)))
    assert kinds(hook) == list(expected)
    return hook.accepted[-1]


def make_full(gateway: Gateway, key: str) -> None:
    set_file(gateway, "fault")
    assert post(gateway, key) == (503, "ledger_unavailable")


def mend(gateway: Gateway) -> None:
    (gateway.folder / "fault").unlink()


def listed(gateway: Gateway) -> list[tuple[str, str, int]]:
    """Type, state and tries of the messages, oldest first."""
    found = gateway.api("GET", "/webhook")["messages"][::-1]
    return [(each["type"], each["state"], each["tries"]) for each in found]


def settled(gateway: Gateway) -> None:
    """Wait for as long as a message about a fault or its end would take, several times over."""
    del gateway
    time.sleep(1.5)


# ── The ledger ───────────────────────────────────────────────────────────────────────────────────


def test_a_ledger_that_fails_and_is_back(make_gateway: MakeGateway, hook: Hook) -> None:
    """The message gets out although the ledger can't keep it, and is in the list afterwards."""
    gateway = watched(make_gateway, hook).start()
    key = gateway.new_key()
    make_full(gateway, key)
    first = wait_for(hook, "ledger.unhealthy").content
    assert first["data"] == {
        "state": "failing",
        "reason": "database or disk is full",
        "text": "The ledger can't commit: database or disk is full. New requests are refused until "
        "it can.",
    }
    settled(gateway)
    wait_for(hook, "ledger.unhealthy")
    mend(gateway)
    back = wait_for(hook, "ledger.unhealthy", "ledger.back").content
    assert back["data"]["state"] == "well"
    assert len(hook.posts) == 2, "no try was in vain"
    delivered = [("ledger.unhealthy", "delivered", 1), ("ledger.back", "delivered", 1)]
    wait_until(lambda: listed(gateway) == delivered, why=lambda: str(listed(gateway)))
    assert gateway.api("GET", "/webhook")["messages"][1]["id"] == hook.posts[0].id


def test_a_webhook_that_fails_is_tried_again_from_memory(
    make_gateway: MakeGateway, hook: Hook
) -> None:
    gateway = watched(make_gateway, hook).start()
    key = gateway.new_key()
    hook.answer = hook.fails_first
    make_full(gateway, key)
    wait_for(hook, "ledger.unhealthy")
    assert len({each.id for each in hook.posts}) == 1, "one message"
    assert len(hook.posts) == 2


def test_what_could_not_be_sent_from_memory_is_sent_from_the_ledger(
    make_gateway: MakeGateway, hook: Hook
) -> None:
    """In its order: that the ledger is back does not overtake that it failed."""
    gateway = watched(make_gateway, hook).start()
    key = gateway.new_key()
    hook.answer = lambda _: 500
    make_full(gateway, key)
    wait_until(lambda: hook.posts)
    mend(gateway)
    wait_until(lambda: len(listed(gateway)) == 2)
    hook.answer = lambda _: 204
    wait_for(hook, "ledger.unhealthy", "ledger.back")


def test_a_ledger_that_fails_by_turns_is_told_once(make_gateway: MakeGateway, hook: Hook) -> None:
    gateway = watched(make_gateway, hook, OVER_SECONDS=5.0).start()
    key = gateway.new_key()
    for _ in range(3):
        make_full(gateway, key)
        time.sleep(0.5)
        mend(gateway)
        wait_until(lambda: gateway.metrics()["redbtc_ledger_healthy"] == 1)
        time.sleep(0.5)
    wait_for(hook, "ledger.unhealthy")
    wait_for(hook, "ledger.unhealthy", "ledger.back")


def test_an_instant_is_not_told(make_gateway: MakeGateway, hook: Hook) -> None:
    gateway = watched(make_gateway, hook, LASTS_SECONDS=3.0).start()
    key = gateway.new_key()
    make_full(gateway, key)
    mend(gateway)
    wait_until(lambda: gateway.metrics()["redbtc_ledger_healthy"] == 1)
    settled(gateway)
    assert not hook.posts


def test_a_second_fault_waits_for_its_time(make_gateway: MakeGateway, hook: Hook) -> None:
    gateway = watched(make_gateway, hook, PAIR_SECONDS_OF_FAULTS=4.0).start()
    key = gateway.new_key()
    make_full(gateway, key)
    wait_for(hook, "ledger.unhealthy")
    told = time.monotonic()
    mend(gateway)
    wait_for(hook, "ledger.unhealthy", "ledger.back")
    make_full(gateway, key)
    wait_for(hook, "ledger.unhealthy", "ledger.back", "ledger.unhealthy")
    assert time.monotonic() - told > 3.5


def test_a_restart_while_the_ledger_fails(make_gateway: MakeGateway, hook: Hook) -> None:
    """What was told is taken over with what the ledger owes, and the end is told once."""
    gateway = watched(make_gateway, hook).start()
    key = gateway.new_key()
    make_full(gateway, key)
    wait_for(hook, "ledger.unhealthy")
    gateway.terminate()
    mend(gateway)
    gateway.start()
    wait_for(hook, "ledger.unhealthy", "ledger.back")
    gateway.restart()
    settled(gateway)
    wait_for(hook, "ledger.unhealthy", "ledger.back")


def test_a_ledger_that_was_removed_is_told(make_gateway: MakeGateway, hook: Hook) -> None:
    gateway = watched(make_gateway, hook).start()
    gateway.new_key()
    gateway.database.rename(gateway.folder / "away.db")
    data = wait_for(hook, "ledger.unhealthy").content["data"]
    assert data["state"] == "lost"
    gateway.kill()


def test_a_ledger_that_can_not_be_opened_is_told(make_gateway: MakeGateway, hook: Hook) -> None:
    """There is no ledger to keep the message; it is added once the ledger is open."""
    gateway = watched(make_gateway, hook).start()
    gateway.new_key()
    gateway.terminate()
    with contextlib.closing(sqlite3.connect(gateway.database)) as other:
        other.execute("BEGIN EXCLUSIVE")
        gateway.start()
        data = wait_for(hook, "ledger.unhealthy").content["data"]
        assert data["state"] == "closed"
        assert "lock" in data["reason"] or "use" in data["reason"]
        other.rollback()
    wait_for(hook, "ledger.unhealthy", "ledger.back")
    delivered = [("ledger.unhealthy", "delivered"), ("ledger.back", "delivered")]
    wait_until(lambda: [each[:2] for each in listed(gateway)] == delivered)


# ── The disk ─────────────────────────────────────────────────────────────────────────────────────


def test_a_disk_that_is_nearly_full(make_gateway: MakeGateway, hook: Hook) -> None:
    """With a margin, and across restarts."""
    gateway = watched(make_gateway, hook)
    set_file(gateway, "disk", f"{1 << 40} {255 << 20}")
    gateway.start()
    data = wait_for(hook, "disk.low").content["data"]
    assert data == {
        "folder": str(gateway.folder),
        "free_bytes": 255 << 20,
        "total_bytes": 1 << 40,
        "text": f"The disk of {gateway.folder} is nearly full: 255 MB are free. Make room on it.",
    }
    assert gateway.metrics()["redbtc_disk_low"] == 1
    set_file(gateway, "disk", f"{1 << 40} {257 << 20}")
    settled(gateway)
    wait_for(hook, "disk.low")
    set_file(gateway, "disk", f"{1 << 40} {255 << 20}")
    gateway.restart()
    settled(gateway)
    wait_for(hook, "disk.low")
    set_file(gateway, "disk", f"{1 << 40} {300 << 20}")
    assert wait_for(hook, "disk.low", "disk.room").content["data"]["free_bytes"] == 300 << 20


def test_a_disk_is_told_before_hundreds_of_other_messages(
    make_gateway: MakeGateway, hook: Hook
) -> None:
    """Each of which takes long."""
    gateway = watched(make_gateway, hook).start()
    gateway.new_key()
    gateway.terminate()
    with contextlib.closing(sqlite3.connect(gateway.database)) as database:
        database.executemany(
            "INSERT INTO webhook_messages (id, type, data, created_at)"
            " SELECT ?, 'key.expiring', '{}', max(started_at) FROM runs",
            [(f"msg_{number}",) for number in range(60)],
        )
        database.commit()

    def accept_slowly(_: str) -> int:
        time.sleep(0.3)
        return 204

    hook.answer = accept_slowly
    gateway.start()
    wait_until(lambda: len(hook.accepted) > 1)
    set_file(gateway, "disk", f"{1 << 40} 1000000")
    wait_until(lambda: "disk.low" in kinds(hook))
    assert len(hook.accepted) < 30


def test_a_disk_that_is_full_at_once(make_gateway: MakeGateway, hook: Hook) -> None:
    """Both messages get out although nothing can be committed."""
    gateway = watched(make_gateway, hook).start()
    key = gateway.new_key()
    make_full(gateway, key)
    set_file(gateway, "disk", f"{1 << 40} 0")
    wait_until(lambda: {*kinds(hook)} == {"ledger.unhealthy", "disk.low"})


def test_a_real_disk_that_is_full(make_gateway: MakeGateway, hook: Hook, small_disk: Path) -> None:
    """With the times and limits of a usual gateway, but for the end of a fault."""
    billing = f'[billing]\nunpriced_models = "free"\n{hook.settings()}'
    path = small_disk / "redbtc.db"
    gateway = make_gateway(f'[database]\npath = "{path}"\n{billing}', HOOK_SECRET=SECRET)
    gateway.database = path
    gateway.prelude = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from redbtc.gateway import operator_messages\noperator_messages.OVER_SECONDS = 1\n"
    )
    gateway.start()
    key = gateway.new_key()
    fill(small_disk / "filler")
    wait_until(lambda: post(gateway, key) == (503, "ledger_unavailable"))
    wait_until(lambda: {*kinds(hook)} == {"disk.low", "ledger.unhealthy"})
    (small_disk / "filler").unlink()
    ends = {"disk.low", "ledger.unhealthy", "disk.room", "ledger.back"}
    wait_until(lambda: {*kinds(hook)} == ends, why=lambda: str(kinds(hook)))
    assert len(kinds(hook)) == 4
    wait_until(lambda: {each[1] for each in listed(gateway)} == {"delivered"})


def test_without_a_webhook_nothing_is_noted(make_gateway: MakeGateway, hook: Hook) -> None:
    """A fault that lasts is told once there is a webhook."""
    gateway = watched(make_gateway, None)
    set_file(gateway, "disk", f"{1 << 40} 0")
    gateway.start()
    gateway.wait_for_log("disk nearly full")
    settled(gateway)
    assert listed(gateway) == []
    gateway.configure('[billing]\nunpriced_models = "free"\n' + hook.settings())
    gateway.signal(1)
    wait_for(hook, "disk.low")


# ── Backups ──────────────────────────────────────────────────────────────────────────────────────


def record(gateway: Gateway) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(f"{gateway.database}.backups").read_text())
    return found


def test_a_backup_that_fails_and_one_that_succeeds(make_gateway: MakeGateway, hook: Hook) -> None:
    gateway = watched(make_gateway, hook).start()
    gateway.new_key()
    backups = gateway.folder / "backups"
    backups.mkdir()
    for _ in range(2):
        assert gateway.run("db", "backup", f"{gateway.folder}/missing/").returncode == 1
    data = wait_for(hook, "backup.failed").content["data"]
    assert "missing does not exist" in data["reason"]
    assert data["reason"] in data["text"]
    assert data["succeeded_at"] is None
    assert gateway.metrics()["redbtc_backup_failed"] == 1
    gateway.restart()
    settled(gateway)
    wait_for(hook, "backup.failed")
    assert gateway.run("db", "backup", str(backups)).returncode == 0
    data = wait_for(hook, "backup.failed", "backup.made").content["data"]
    assert data["text"] == f"A backup was made: {record(gateway)['path']}."
    shown = gateway.metrics()
    assert shown["redbtc_backup_failed"] == 0
    assert 0 <= shown["redbtc_backup_age_seconds"] < 60
    assert gateway.run("db", "backup", str(backups)).returncode == 0
    settled(gateway)
    wait_for(hook, "backup.failed", "backup.made")


def test_what_waits_without_a_webhook_is_no_alarm(make_gateway: MakeGateway) -> None:
    gateway = watched(make_gateway, None).start()
    gateway.new_key()
    gateway.terminate()
    with contextlib.closing(sqlite3.connect(gateway.database)) as database:
        database.execute(
            "INSERT INTO webhook_messages (id, type, data, created_at)"
            " SELECT 'msg_1', 'account.closing', '{}', max(started_at) FROM runs"
        )
        database.commit()
    gateway.start()
    settled(gateway)
    assert gateway.metrics()["redbtc_webhook_waiting"] == 0


# The command `db backup`, which stays where it copies the database.
STUCK = """
import sys, time
sys.path.insert(0, sys.argv.pop(1))
from redbtc.store import backup
backup.copy = lambda *_, **__: time.sleep(100)
import redbtc_proxy
redbtc_proxy.main()
"""


@contextlib.contextmanager
def stuck_backup(gateway: Gateway, target: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a backup that does not end by itself."""
    arguments = ["--config", str(gateway.config), "db", "backup", target]
    command = [sys.executable, "-c", STUCK, str(ROOT), *arguments]
    with subprocess.Popen(command, cwd=gateway.folder) as backup:
        wait_until(lambda: Path(f"{target}.partial").exists())
        yield backup


def test_a_backup_that_is_killed_has_failed(make_gateway: MakeGateway, hook: Hook) -> None:
    """But not while it runs."""
    gateway = watched(make_gateway, hook).start()
    gateway.new_key()
    target = f"{gateway.folder}/b.db"
    with stuck_backup(gateway, target) as backup:
        settled(gateway)
        assert not hook.posts, "it runs"
        assert "warning: the last backup" not in gateway.run("check").stdout
        backup.kill()
    assert (
        "before the backup was complete" in wait_for(hook, "backup.failed").content["data"]["text"]
    )
    assert "warning: the last backup failed" in gateway.run("check").stdout
    gateway.restart()
    assert gateway.run("db", "backup", target).returncode == 0
    wait_for(hook, "backup.failed", "backup.made")


def test_a_disk_of_backups_that_does_not_answer_holds_up_no_gateway(
    make_gateway: MakeGateway, hook: Hook
) -> None:
    """Opening the unfinished backup would not return. Its folder may also be closed to the
    gateway's user."""
    gateway = watched(make_gateway, hook).start()
    gateway.new_key()
    target = f"{gateway.folder}/b.db"
    with stuck_backup(gateway, target) as backup:
        Path(f"{target}.partial").unlink()
        os.mkfifo(f"{target}.partial")
        settled(gateway)
        assert gateway.get("/healthz").status_code == 200
        assert not hook.posts, "it runs"
        backup.kill()
    wait_for(hook, "backup.failed")


def test_a_clock_that_was_ahead_at_a_backup_hides_nothing_later(
    make_gateway: MakeGateway, hook: Hook
) -> None:
    gateway = watched(make_gateway, hook).start()
    gateway.new_key()
    assert gateway.run("db", "backup", f"{gateway.folder}/b.db").returncode == 0
    ahead = record(gateway)
    ahead["succeeded_at"] += 1000 * DAY
    ahead["failed_at"] = ahead["succeeded_at"] + DAY
    set_file(gateway, "redbtc.db.backups", json.dumps(ahead))
    assert gateway.run("db", "backup", f"{gateway.folder}/missing/").returncode == 1
    wait_for(hook, "backup.failed")
    gateway.terminate()
    with contextlib.closing(sqlite3.connect(gateway.database)) as database:
        database.execute("UPDATE runs SET started_at = started_at - 8 * 86400000")
        database.commit()
    gateway.start()
    wait_for(hook, "backup.failed", "backup.overdue")
    assert gateway.metrics()["redbtc_backup_age_seconds"] > 7 * 86400
    assert "no backup for 8 days" in gateway.run("check").stdout
    failed = {**record(gateway), "failed_at": ahead["failed_at"]}
    set_file(gateway, "redbtc.db.backups", json.dumps(failed))
    assert gateway.run("db", "backup", f"{gateway.folder}/b.db").returncode == 0
    wait_for(hook, "backup.failed", "backup.overdue", "backup.made")
    assert gateway.metrics()["redbtc_backup_failed"] == 0


def test_a_backup_of_a_stopped_gateway_is_told_later(make_gateway: MakeGateway, hook: Hook) -> None:
    gateway = watched(make_gateway, hook).start()
    gateway.terminate()
    assert gateway.run("db", "backup", f"{gateway.folder}/missing/").returncode == 1
    gateway.start()
    wait_for(hook, "backup.failed")


def test_no_backup_for_a_week(make_gateway: MakeGateway, hook: Hook) -> None:
    gateway = watched(make_gateway, hook).start()
    gateway.new_key()
    gateway.terminate()
    with contextlib.closing(sqlite3.connect(gateway.database)) as database:
        database.execute(f"UPDATE runs SET started_at = started_at - {6.9 * DAY:.0f}")
        database.commit()
    gateway.start()
    settled(gateway)
    assert not hook.posts, "it is no week yet"
    gateway.terminate()
    with contextlib.closing(sqlite3.connect(gateway.database)) as database:
        database.execute(f"UPDATE runs SET started_at = started_at - {0.2 * DAY:.0f}")
        database.commit()
    gateway.start()
    data = wait_for(hook, "backup.overdue").content["data"]
    assert data["text"] == "No backup was made for 7 days: there is none. Run db backup."
    assert gateway.metrics()["redbtc_backup_age_seconds"] > 7 * 86400
    assert gateway.run("db", "backup", f"{gateway.folder}/b.db").returncode == 0
    wait_for(hook, "backup.overdue", "backup.made")
    old = record(gateway)
    old["succeeded_at"] -= 8 * DAY
    set_file(gateway, "redbtc.db.backups", json.dumps(old))
    data = wait_for(hook, "backup.overdue", "backup.made", "backup.overdue").content["data"]
    assert data["succeeded_at"] in data["text"]


def test_a_record_that_can_not_be_written_fails_no_backup(gateway: Gateway) -> None:
    Path(f"{gateway.database}.backups.new").mkdir()
    done = gateway.run("db", "backup", f"{gateway.folder}/b.db")
    assert done.returncode == 0
    assert "The backup was not recorded" in done.stderr
    assert (gateway.folder / "b.db").exists()


@pytest.mark.parametrize(
    "text",
    [
        '{"succeeded_at": "yes"',
        '{"failed_at": 1e300}',
        '{"failed_at": 99999999999999999}',
        "\\xff",
        "[]",
        '{"has_failed": "yes"}',
    ],
)
def test_a_record_that_is_broken_is_none(gateway: Gateway, text: str) -> None:
    Path(f"{gateway.database}.backups").write_text(text)
    settled(gateway)
    assert gateway.metrics()["redbtc_backup_failed"] == 0
    assert gateway.run("db", "backup", f"{gateway.folder}/b.db").returncode == 0
    assert record(gateway)["path"] == f"{gateway.folder}/b.db"


# ── Keys ─────────────────────────────────────────────────────────────────────────────────────────


def expires_in(gateway: Gateway, key_id: str, days: float, created_before: float = 30) -> None:
    """Let a key of a stopped gateway expire, as if it had been created some days ago."""
    now = round(time.time() * 1000)
    times = now + round(days * DAY), now - round(created_before * DAY)
    with contextlib.closing(sqlite3.connect(gateway.database)) as database:
        database.execute("INSERT INTO acting (id, name, at) VALUES (1, 'a test', 0)")
        database.execute(
            "UPDATE keys SET expires_at = ?, created_at = ? WHERE id = ?", (*times, key_id)
        )
        database.execute("DELETE FROM acting")
        database.commit()


def key_notices(gateway: Gateway) -> list[tuple[str, str]]:
    """The key and its expiry of each notice that the account is shown."""
    notices = gateway.api("GET", "/accounts/ada/notices")["notices"]
    return [(each["key_id"], each["until"]) for each in notices if each["kind"] == "key"]


def test_each_key_that_expires_soon_is_told_once(make_gateway: MakeGateway, hook: Hook) -> None:
    """Not one that was rotated or revoked, was made for less than a week, or lasts longer."""
    gateway = watched(make_gateway, hook).start()
    gateway.api("POST", "/accounts", {"name": "ada"})
    labels = ("soon", "later", "short", "rotated", "revoked", "never")
    ids = {
        label: gateway.api("POST", "/accounts/ada/keys", {"label": label})["id"] for label in labels
    }
    gateway.api("POST", f"/keys/{ids['rotated']}/rotate", {"overlap": "24h"})
    gateway.api("POST", f"/keys/{ids['revoked']}/revoke", {})
    gateway.terminate()
    for label, days in {"soon": 6.9, "later": 7.1, "rotated": 3, "revoked": 3}.items():
        expires_in(gateway, ids[label], days)
    expires_in(gateway, ids["short"], 3, created_before=1)
    gateway.start()
    data = wait_for(hook, "key.expiring").content["data"]
    assert re.fullmatch(r"\d{4}-.*Z", data["expires_at"])
    assert data == {
        "account": "ada",
        "key_id": ids["soon"],
        "label": "soon",
        "expires_at": data["expires_at"],
        "text": f"Key {ids['soon']} of ada expires at {data['expires_at']}. "
        "Create another one for its user.",
    }
    assert key_notices(gateway) == [(ids["soon"], data["expires_at"])]
    settled(gateway)
    assert gateway.metrics()["redbtc_keys_expiring"] == 3, "soon, later and short"
    gateway.restart()
    settled(gateway)
    wait_for(hook, "key.expiring")
    gateway.terminate()
    expires_in(gateway, ids["soon"], 5)
    gateway.start()
    data = wait_for(hook, "key.expiring", "key.expiring").content["data"]
    assert data["label"] == "soon", "it has another expiry"
    assert key_notices(gateway) == [(ids["soon"], data["expires_at"])], "not the earlier expiry"
    gateway.api("POST", f"/keys/{ids['soon']}/revoke", {})
    assert key_notices(gateway) == []


def test_a_key_whose_replacement_was_revoked_is_told(make_gateway: MakeGateway, hook: Hook) -> None:
    gateway = watched(make_gateway, hook).start()
    gateway.api("POST", "/accounts", {"name": "ada"})
    old = gateway.api("POST", "/accounts/ada/keys", {"label": "laptop"})["id"]
    new = gateway.api("POST", f"/keys/{old}/rotate", {"overlap": "24h"})["id"]
    gateway.terminate()
    expires_in(gateway, old, 3)
    gateway.start()
    settled(gateway)
    assert not hook.posts
    gateway.api("POST", f"/keys/{new}/revoke", {})
    assert wait_for(hook, "key.expiring").content["data"]["key_id"] == old


def test_an_account_is_told_of_its_keys_without_a_webhook(make_gateway: MakeGateway) -> None:
    gateway = watched(make_gateway, None).start()
    gateway.api("POST", "/accounts", {"name": "ada"})
    gateway.api("POST", "/accounts", {"name": "bob"})
    key = gateway.api("POST", "/accounts/ada/keys", {"label": "laptop"})["id"]
    gateway.terminate()
    expires_in(gateway, key, 3)
    gateway.start()
    wait_until(lambda: key_notices(gateway))
    (notice,) = gateway.api("GET", "/accounts/ada/notices")["notices"]
    assert (
        notice["text"] == f"{key} (laptop) expires at {notice['until']}. Create another one before."
    )
    assert gateway.api("GET", "/accounts/bob/notices")["notices"] == []
    assert gateway.get("/status").json()["notices"] == []
    changes = gateway.api("GET", "/changes")["changes"]
    assert "notice" not in [each["kind"] for each in changes]
    gateway.restart()
    settled(gateway)
    assert len(gateway.api("GET", "/accounts/ada/notices")["notices"]) == 1


# ── The documentation ────────────────────────────────────────────────────────────────────────────


def test_every_type_has_an_example() -> None:
    """The JSON blocks of the page are messages."""
    page = (ROOT / "docs" / "operating.md").read_text().partition("## The webhook")[2]
    page = page.partition("\n## ")[0]
    blocks = re.findall(r"^```json\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    messages = [each for block in blocks for each in re.split(r"\n(?=\{)", block)]
    shown = [json.loads(each) for each in messages]
    named = set(re.findall(r"^\| `([a-z.]+)` \|", page, re.MULTILINE))
    types = set(MessageType.__args__)  # type: ignore[attr-defined]
    assert named == types | {"webhook.test"}
    own = {each for each in types if each.split(".")[0] in ("ledger", "disk", "backup", "key")}
    assert {each["type"] for each in shown} == own
    for each in shown:
        assert each.keys() == {"type", "timestamp", "data"}
