"""The messages to the webhook about the gateway itself: the ledger, the disk and the backups.

A fault is told once it has lasted for LASTS_SECONDS, and its end once it has been over for
OVER_SECONDS. So a fault that comes and goes by turns is one fault. Within PAIR_SECONDS there is at
most one message that a fault has begun. What was told last is in the ledger, so that a restart
repeats nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from redbtc.billing.webhook_messages import Told, WebhookMessages
from redbtc.store.backup_record import MAX_BACKUP_DAYS, BackupRecord
from redbtc.store.database import Store
from redbtc.store.disk import DiskRoom
from redbtc.times import DAY, iso_time, now_ms

LASTS_SECONDS = 5.0
OVER_SECONDS = 60.0
PAIR_SECONDS_OF_FAULTS = 600.0
ENDS = {"ledger": "ledger.back", "disk": "disk.room", "backup": "backup.made"}


class Finding(NamedTuple):
    """The present state of a subject: the type of the message that says so, and its data."""

    kind: str
    data: Mapping[str, Any]


class SubjectMessages:
    """The messages about one subject."""

    def __init__(self, end: str, messages: WebhookMessages) -> None:
        """`end` is the type of the message that all is well again."""
        self._end = end
        self._messages = messages
        self._told = self._found = end
        self._found_at = 0.0  # since when it has been the case, by the event loop's clock
        self._next_fault_at = 0.0  # no message that a fault has begun is sent before
        self._has_sent = False  # any message, in this process

    def resume(self, told: Told, now: int) -> None:
        """Go on after a restart. `now` is the ledger's time in milliseconds."""
        if self._has_sent:  # the ledger could not be read before
            return
        self._told = told.kind
        passed = max(0.0, (now - told.at) / 1000)
        wait = max(0.0, PAIR_SECONDS_OF_FAULTS - passed)
        self._next_fault_at = asyncio.get_running_loop().time() + wait

    def note(self, finding: Finding) -> None:
        """Tell the webhook of what is the case if it should know. Called every second."""
        now = asyncio.get_running_loop().time()
        if finding.kind != self._found:
            self._found, self._found_at = finding.kind, now
        if finding.kind == self._told or self._messages.webhook is None:
            return
        is_over = finding.kind == self._end
        due = self._found_at + (OVER_SECONDS if is_over else LASTS_SECONDS)
        if now < due or (not is_over and now < self._next_fault_at):
            return
        if not is_over:
            self._next_fault_at = now + PAIR_SECONDS_OF_FAULTS
        self._told, self._has_sent = finding.kind, True
        self._messages.add_now(finding.kind, finding.data)


class OperatorMessages:
    """Tells the webhook of the ledger, the disk and the backups."""

    def __init__(self, messages: WebhookMessages) -> None:
        self._subjects = {name: SubjectMessages(end, messages) for name, end in ENDS.items()}

    def resume(self, told: Mapping[str, Told], now: int) -> None:
        """Go on after a restart. `now` is the ledger's time in milliseconds."""
        for name, last in told.items():
            self._subjects[name].resume(last, now)

    def note(self, finding: Finding) -> None:
        """Tell the webhook of what is the case if it should know."""
        self._subjects[finding.kind.partition(".")[0]].note(finding)


def ledger_finding(store: Store) -> Finding:
    """Return whether the ledger commits."""
    if store.healthy:
        text = "The ledger commits again. Requests are served."
        return Finding("ledger.back", {"state": "well", "reason": "", "text": text})
    return unhealthy_finding(store.commits.state.health, store.failure)


def unhealthy_finding(state: str, reason: str) -> Finding:
    """Return that the ledger does not commit. `state` is failing, lost or closed."""
    texts = {
        "failing": f"The ledger can't commit: {reason}. New requests are refused until it can.",
        "lost": f"The ledger is lost to this process: {reason}. New requests are refused. The log "
        "line `ledger lost` says what to do.",
        "closed": f"The ledger can't be opened: {reason}. Requests are refused until it can.",
    }
    return Finding("ledger.unhealthy", {"state": state, "reason": reason, "text": texts[state]})


def disk_finding(database: Path, room: DiskRoom, is_low: bool) -> Finding:
    """Return whether the database's disk is nearly full."""
    folder, free = database.parent, room.free >> 20
    if is_low:
        kind = "disk.low"
        text = f"The disk of {folder} is nearly full: {free} MB are free. Make room on it."
    else:
        kind, text = "disk.room", f"The disk of {folder} has room again: {free} MB are free."
    sizes = {"free_bytes": room.free, "total_bytes": room.total}
    return Finding(kind, {"folder": str(folder), **sizes, "text": text})


def backup_finding(record: BackupRecord, first_start: int) -> Finding:
    """Return whether the last backup succeeded, and is not too old. `first_start` is when a gateway
    started with this database for the first time, in milliseconds."""
    now = now_ms()
    good_at, succeeded_at = record.good_at(now), record.succeeded_at
    last = (
        f"the last good one is from {iso_time(succeeded_at)}" if succeeded_at else "there is none"
    )
    if now - max(good_at or 0, first_start) > MAX_BACKUP_DAYS * DAY:
        days = MAX_BACKUP_DAYS
        kind, text = "backup.overdue", f"No backup was made for {days} days: {last}. Run db backup."
    elif record.has_failed:
        kind, text = "backup.failed", f"A backup failed: {record.reason}."
    else:
        kind, text = "backup.made", f"A backup was made: {record.path}."
    data = {
        "succeeded_at": iso_time(succeeded_at),
        "failed_at": iso_time(record.failed_at),
        "reason": record.reason if record.has_failed else "",
        "text": text,
    }
    return Finding(kind, data)
