"""The watch over the ledger, the disk, the backups and the keys that expire soon: for the log, the
metrics and the webhook.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time

from redbtc.billing.key_notices import tell_of_expiring_keys
from redbtc.billing.webhook_messages import WebhookMessages
from redbtc.errors import StorageUnavailable
from redbtc.gateway.operator_messages import (
    OperatorMessages,
    backup_finding,
    disk_finding,
    ledger_finding,
)
from redbtc.gateway.vitals import Condition
from redbtc.store.backup_record import FIRST_START, WatchedBackups
from redbtc.store.database import Store
from redbtc.store.disk import disk_room
from redbtc.store.expiring_keys import COUNT_EXPIRING, EXPIRING_SOON_DAYS
from redbtc.times import DAY, now_ms

WATCH_LOOK_SECONDS = 1.0  # between two looks at the ledger, the disk and the record of backups
COUNT_SECONDS = 60.0  # between two looks at the keys and the messages


class Watch:
    """The watch, and what it has seen at its last look."""

    def __init__(self, store: Store, messages: WebhookMessages) -> None:
        self.keys_expiring = 0  # within EXPIRING_SOON_DAYS
        self.messages_waiting = 0
        self.first_start: int | None = None  # of a gateway with this database; None: not read yet
        self.backups = WatchedBackups(store.path)
        self.low_disk = Condition("disk nearly full", "disk has room again")
        self._store = store
        self._messages = messages
        self._operator = OperatorMessages(messages)
        self._counted_at = 0.0
        self._was_healthy = True

    async def watch_for_ever(self) -> None:
        """Look every second."""
        while True:
            if self.first_start is None:
                with contextlib.suppress(sqlite3.Error, StorageUnavailable):
                    await self._resume()
            self._look()
            with contextlib.suppress(sqlite3.Error, StorageUnavailable):
                if time.monotonic() - self._counted_at > COUNT_SECONDS:
                    self._counted_at = time.monotonic()
                    await self._count()
            await asyncio.sleep(WATCH_LOOK_SECONDS)

    async def _resume(self) -> None:
        self._operator.resume(await self._messages.told(), self._store.time())
        row = await self._store.one(FIRST_START)
        self.first_start = row["at"] if row else now_ms()

    def _look(self) -> None:
        store = self._store
        if store.healthy and not self._was_healthy:
            self._messages.wakeup.set()  # what waits in the ledger can be sent again
        self._was_healthy = store.healthy
        self._operator.note(ledger_finding(store))
        if room := disk_room(store.path):  # else commits fail, too
            is_low = room.is_low(self.low_disk.holds)
            self.low_disk.note(is_low, free_bytes=room.free, folder=str(store.path.parent))
            self._operator.note(disk_finding(store.path, room, is_low))
        if self.first_start is not None:
            self._operator.note(backup_finding(self.backups.look(), self.first_start))

    async def _count(self) -> None:
        store = self._store
        now = store.time()
        row = await store.one(COUNT_EXPIRING, (now, now + EXPIRING_SOON_DAYS * DAY, 0))
        self.keys_expiring = row["count"] if row else 0
        messages = self._messages  # of accounts' messages, some wait without a webhook as well
        self.messages_waiting = await messages.count_waiting() if messages.webhook else 0
        if store.healthy:
            await tell_of_expiring_keys(store, self._messages)
