"""The messages to the webhook in the settings: what it is told, and whether that arrived.

A message about a budget is added with its notice, by a trigger (schema.sql). One about an upstream
is added here, where there is a webhook. While the ledger can't commit, messages about the gateway
itself are also sent from memory: that the ledger fails must get out.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import orjson
from msgspec import Struct

from redbtc.config import BillingSettings
from redbtc.store.database import Store
from redbtc.store.json_values import Moment, by_name, json_time, new_id
from redbtc.store.writer import SQLStatement
from redbtc.times import DAY, iso_time

WEBHOOK_FOR = 3 * DAY  # milliseconds; schema.sql keeps what is to be sent for as long

ADD_MESSAGE = """
    INSERT OR IGNORE INTO webhook_messages (id, type, data, created_at) VALUES (?, ?, ?, ?)"""
MESSAGE = """
    SELECT id, type, data, created_at, tries, tried_at, status, error, delivered_at
      FROM webhook_messages"""
WAITING = MESSAGE + " WHERE delivered_at IS NULL AND created_at > ? ORDER BY number"
COUNT_WAITING = """
    SELECT count(*) AS count FROM webhook_messages WHERE delivered_at IS NULL AND created_at > ?"""
NEWEST_MESSAGES = MESSAGE + " ORDER BY number DESC LIMIT ?"
TRIED = """
    UPDATE webhook_messages SET tries = tries + 1, tried_at = ?1, status = ?2, error = ?3,
           delivered_at = iif(?4, ?1, NULL)
     WHERE id = ?5"""
NOTICE_DELIVERED = "UPDATE notices SET delivered_at = ? WHERE id = ?"
LAST_TOLD = "SELECT subject, type, told_at FROM told"
OUTAGES_SENT = """
    SELECT data ->> 'upstream' AS upstream, created_at FROM webhook_messages
     WHERE type = 'upstream.out' AND number IN (
        SELECT max(number) FROM webhook_messages WHERE type IN ('upstream.out', 'upstream.back')
         GROUP BY data ->> 'upstream')"""


class Webhook(NamedTuple):
    """The URL to which messages are posted, and the secret that they are signed with."""

    url: str
    secret: str


class WebhookAnswer(Struct):
    """The answer to a message: its HTTP status, or the type of the error if none came."""

    delivered: bool
    status: int | None
    error: str | None


MessageType = Literal[
    "budget.reached",
    "upstream.out",
    "upstream.back",
    "upstream.credentials",
    "account.closing",
    "ledger.unhealthy",
    "ledger.back",
    "disk.low",
    "disk.room",
    "backup.failed",
    "backup.overdue",
    "backup.made",
    "key.expiring",
    "model.unpriced",
]
ORDERED = ("upstream", "ledger", "disk", "backup")  # whose messages must arrive in their order


def subject_of(kind: str, data: Mapping[str, Any]) -> str | None:
    """Return what a message is about, if messages about it must not overtake one another."""
    prefix = kind.partition(".")[0]
    return f"{prefix} {data.get('upstream', '')}" if prefix in ORDERED else None


class UnstoredMessage(NamedTuple):
    """A message that is sent from memory, since the ledger can't commit now. `created_at` is in
    milliseconds of the ledger's time."""

    id: str
    kind: str
    data: Mapping[str, Any]
    created_at: int

    @property
    def statement(self) -> SQLStatement:
        """Return the statement that adds the message to the ledger."""
        return ADD_MESSAGE, (self.id, self.kind, orjson.dumps(self.data).decode(), self.created_at)


class Told(NamedTuple):
    """The last message about the ledger, the disk or the backups; its time in milliseconds."""

    kind: str
    at: int


class WebhookMessages:
    """The messages of a gateway. `wakeup` is set when there may be something to send."""

    def __init__(self, store: Store, settings: BillingSettings) -> None:
        """`settings` may be replaced by others."""
        self.settings = settings
        self.wakeup = asyncio.Event()
        self.unstored: list[UnstoredMessage] = []  # that are to be sent from memory
        self.sent_unstored: set[str] = set()  # ids of sent ones of which that is not written yet
        self.delivered = self.failed = 0  # tries since the start
        self._store = store

    @property
    def webhook(self) -> Webhook | None:
        """The webhook of the settings, None if there is none or its secret is not set."""
        return webhook_of(self.settings)

    def add(self, kind: str, data: Mapping[str, Any]) -> None:
        """Write a message with the next commit, and send it then."""
        sql, values = self.statement(kind, data)
        self.wake_up_after(self._store.record(sql, values, retry_until_written=True))

    def add_now(self, kind: str, data: Mapping[str, Any]) -> None:
        """Add a message as `add` does. If the ledger can't commit, also send it from memory."""
        message = self.message(kind, data)
        sql, values = message.statement
        self.wake_up_after(self._store.record(sql, values, retry_until_written=True))
        if not self._store.healthy:
            self.unstored.append(message)
            self.wakeup.set()

    def message(self, kind: str, data: Mapping[str, Any]) -> UnstoredMessage:
        """Return a new message."""
        return UnstoredMessage(new_id("msg"), kind, data, self._store.time())

    def statement(self, kind: str, data: Mapping[str, Any]) -> SQLStatement:
        """Return the statement that adds a message, for a transaction. Set `wakeup` after that."""
        return self.message(kind, data).statement

    def wake_up_after(self, written: asyncio.Future[None]) -> None:
        """Send what waits as soon as something is written."""
        written.add_done_callback(lambda _: self.wakeup.set())

    async def waiting(self) -> list[WebhookMessage]:
        """Return the messages that are to be sent, in their order: those of the last WEBHOOK_FOR
        that the webhook has not accepted."""
        since = self._store.time() - WEBHOOK_FOR
        return [WebhookMessage.of(row, since) async for row in self._store.rows(WAITING, (since,))]

    async def count_waiting(self) -> int:
        """Return how many messages are to be sent."""
        row = await self._store.one(COUNT_WAITING, (self._store.time() - WEBHOOK_FOR,))
        return row["count"] if row else 0

    async def newest(self, limit: int) -> list[WebhookMessage]:
        """Return the newest `limit` messages, newest first."""
        since = self._store.time() - WEBHOOK_FOR
        rows = self._store.rows(NEWEST_MESSAGES, (limit,))
        return [WebhookMessage.of(row, since) async for row in rows]

    async def note_answer(self, message_id: str, answer: WebhookAnswer) -> None:
        """Note what came of sending a message. Raises StorageUnavailable."""
        self._count(answer)
        now = self._store.time()
        notice = NOTICE_DELIVERED, (now if answer.delivered else None, message_id)
        await self._store.transact(tried(message_id, answer, now), notice)

    def note_answer_to_unstored(self, message: UnstoredMessage, answer: WebhookAnswer) -> None:
        """Note what came of sending a message from memory. One that was not accepted is sent again,
        from the ledger if that can commit by then."""
        self._count(answer)
        if answer.delivered:
            self.sent_unstored.add(message.id)
            sql, values = tried(message.id, answer, self._store.time())
            written = self._store.record(sql, values, retry_until_written=True)
            written.add_done_callback(lambda _: self.sent_unstored.discard(message.id))
        if answer.delivered or self._store.healthy:
            self.unstored.remove(message)

    async def store_sent(self, message: UnstoredMessage, answer: WebhookAnswer | None) -> None:
        """Add a message that was sent before the ledger was open, with the last answer to it.
        Raises StorageUnavailable."""
        statements = [message.statement]
        if answer:
            self._count(answer)
            statements.append(tried(message.id, answer, self._store.time()))
        await self._store.transact(*statements)
        self.wakeup.set()

    def _count(self, answer: WebhookAnswer) -> None:
        if answer.delivered:
            self.delivered += 1
        else:
            self.failed += 1

    async def told(self) -> dict[str, Told]:
        """Return the last messages about the ledger, the disk and the backups, by subject."""
        rows = self._store.rows(LAST_TOLD)
        return {row["subject"]: Told(row["type"], row["told_at"]) async for row in rows}

    async def outages_sent(self) -> dict[str, int]:
        """Return the upstreams whose last message was upstream.out, with its time in
        milliseconds."""
        rows = self._store.rows(OUTAGES_SENT)
        return {row["upstream"]: row["created_at"] async for row in rows}


def webhook_of(settings: BillingSettings) -> Webhook | None:
    """Return the webhook of the settings, None if there is none or its secret is not set."""
    secret = os.environ.get(settings.webhook_secret_env, "")
    return Webhook(settings.webhook_url, secret) if settings.webhook_url and secret else None


def tried(message_id: str, answer: WebhookAnswer, now: int) -> SQLStatement:
    """Return the statement that notes an answer at a time in milliseconds."""
    return TRIED, (now, answer.status, answer.error, answer.delivered, message_id)


class WebhookMessage(Struct):
    """A message to the webhook. `status` and `error` are the last answer: its HTTP status or, if
    none came, the type of the error. Messages are given up after three days."""

    id: str
    type: MessageType
    data: dict[str, Any]
    state: Literal["waiting", "delivered", "given_up"]
    created_at: Moment
    tries: int
    tried_at: Moment | None
    status: int | None
    error: str | None
    delivered_at: Moment | None

    @classmethod
    def of(cls, row: sqlite3.Row, since: int) -> WebhookMessage:
        """Return the message of a row. One that was created up to `since`, in milliseconds, and not
        delivered is given up."""
        old = row["created_at"] <= since
        columns = {
            **by_name(row),
            "data": orjson.loads(row["data"]),
            "created_at": json_time(row["created_at"]),
            "tried_at": iso_time(row["tried_at"]),
            "delivered_at": iso_time(row["delivered_at"]),
        }
        delivered = row["delivered_at"] is not None
        return cls(**columns, state="delivered" if delivered else "given_up" if old else "waiting")
