"""Notices to accounts about prices, terms, maintenance, incidents, budgets and keys that expire."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from redbtc.billing.records import Notice
from redbtc.billing.spending import Spending
from redbtc.billing.webhook_messages import WebhookMessages
from redbtc.config import BillingSettings
from redbtc.errors import NotFound, UserError
from redbtc.money import decimal, money
from redbtc.store.database import Store
from redbtc.store.json_values import by_name, new_id
from redbtc.store.keys import Key
from redbtc.times import DAY, MINUTE, iso_time

BUDGET_PERCENTS = (50, 80, 100)

ADD_NOTICE = """
    INSERT INTO notices (id, kind, text, effective_at, until, created_at, added_by,
                         refuses_requests)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?)"""
BUDGET_NOTICE = """
    INSERT OR IGNORE INTO notices (id, kind, account_id, key_id, month, percent, text, effective_at,
                                   created_at)
    VALUES (?, 'budget', ?, ?, ?, ?, ?, ?, ?)"""
NOTICE = """
    SELECT notices.id, kind, accounts.name AS account, key_id, month, percent, text, effective_at,
           until, refuses_requests, notices.created_at, added_by, withdrawn_at, delivered_at
      FROM notices LEFT JOIN accounts ON accounts.id = account_id"""
NOTICES = NOTICE + " ORDER BY effective_at, notices.created_at, notices.rowid"
NOTICE_BY_ID = NOTICE + " WHERE notices.id = ?"
CURRENT_NOTICES = f"""{NOTICE}
     WHERE (account_id IS NULL OR account_id = ?1) AND withdrawn_at IS NULL
       AND ifnull(until, ?2 + 1) > ?2 AND (kind <> 'key' OR EXISTS (
            SELECT 1 FROM keys
             WHERE keys.id = key_id AND revoked_at IS NULL AND expires_at = until))
     ORDER BY effective_at, notices.created_at, notices.rowid"""
NOTICES_TO = f"""{NOTICE}
     WHERE (account_id IS NULL OR account_id = ?1) AND withdrawn_at IS NULL
     ORDER BY notices.created_at, notices.rowid"""
MAINTENANCES = f"""
    SELECT effective_at AS since, ifnull(until, {1 << 62}) AS until, text FROM notices
     WHERE refuses_requests AND withdrawn_at IS NULL AND ifnull(notices.until, ?1 + 1) > ?1"""
# What was announced before it began, as long as it was not withdrawn.
PLANNED_TIMES = f"""
    SELECT effective_at AS since,
           min(ifnull(until, {1 << 62}), ifnull(withdrawn_at, {1 << 62})) AS until
      FROM notices WHERE kind = 'maintenance' AND created_at < effective_at
       AND ifnull(withdrawn_at, effective_at + 1) > effective_at ORDER BY effective_at"""
PAST_EVENTS = f"""{NOTICE}
     WHERE kind IN ('incident', 'maintenance') AND account_id IS NULL AND withdrawn_at IS NULL
       AND until BETWEEN ?1 AND ?2 ORDER BY effective_at DESC, notices.rowid DESC LIMIT ?3"""
NEWEST_NOTICE = "SELECT max(rowid) FROM notices"
WITHDRAW = "UPDATE notices SET withdrawn_at = ifnull(withdrawn_at, ?) WHERE id = ?"


class Maintenance(NamedTuple):
    """A time during which new requests are refused. Times are in milliseconds."""

    since: int
    until: int
    text: str


class PlannedTime(NamedTuple):
    """The time of a maintenance that was announced before it began, in milliseconds."""

    since: int
    until: int


class Notices:
    """The notices of the gateway. Those of budgets are messages to the webhook, too."""

    def __init__(self, store: Store, settings: BillingSettings, messages: WebhookMessages) -> None:
        """`settings` may be replaced by others of the same currency."""
        self.settings = settings
        self._store = store
        self._messages = messages
        self._maintenances: list[Maintenance] = []
        self._read = 0  # how often these were read

    async def add(
        self,
        kind: str,
        text: str,
        effective_at: int,
        until: int | None,
        by: str,
        refuses_requests: bool = False,
    ) -> Notice:
        """Add a notice and return it. With `refuses_requests`, which only a maintenance can have,
        the gateway refuses new requests between `effective_at` and `until`. Raises UserError if new
        terms would take effect before the end of their notice period."""
        now, days = self._store.time(), self.settings.terms_notice_days
        if kind == "terms" and effective_at < now + days * DAY - MINUTE:
            raise UserError(
                f"new terms need {days} days of notice (billing.terms_notice_days); "
                f"{iso_time(effective_at)} is too early"
            )
        if until is not None and until <= effective_at:
            raise UserError("until must be later than effective")
        if refuses_requests and kind != "maintenance":
            raise UserError("only a notice of the kind maintenance can refuse requests")
        notice = new_id("ntc")
        values = (notice, kind, text, effective_at, until, now, by, refuses_requests)
        await self._store.transact((ADD_NOTICE, values), by=by)
        await self.read_maintenances()
        return await self.get(notice)

    async def withdraw(self, notice_id: str, by: str) -> Notice:
        """Withdraw a notice, so that no account is shown it any more. Raises NotFound."""
        await self.get(notice_id)
        await self._store.transact((WITHDRAW, (self._store.time(), notice_id)), by=by)
        await self.read_maintenances()
        return await self.get(notice_id)

    async def get(self, notice_id: str) -> Notice:
        """Return a notice by its id. Raises NotFound."""
        row = await self._store.one(NOTICE_BY_ID, (notice_id,))
        if row is None:
            raise NotFound(f"notice {notice_id!r} does not exist")
        return Notice.of(row)

    async def all(self) -> list[Notice]:
        """Return all notices, past and withdrawn ones included, by when they take effect."""
        return [Notice.of(row) async for row in self._store.rows(NOTICES)]

    async def current(self, account_id: str | None = None) -> list[Notice]:
        """Return the notices for all accounts that are in force or will be, and those for one
        account."""
        rows = self._store.rows(CURRENT_NOTICES, (account_id, self._store.time()))
        return [Notice.of(row).for_account() async for row in rows]

    async def to_account(self, account_id: str) -> list[Notice]:
        """Return all notices for all accounts and for one account, past ones included, oldest
        first."""
        rows = self._store.rows(NOTICES_TO, (account_id,))
        return [Notice.of(row).for_account() async for row in rows]

    async def past_events(self, since: int, limit: int) -> list[Notice]:
        """Return the newest `limit` incidents and maintenances that have ended since a time, newest
        first."""
        rows = self._store.rows(PAST_EVENTS, (since, self._store.time(), limit))
        return [Notice.of(row).for_account() async for row in rows]

    @property
    def version(self) -> tuple[int, int]:
        """A value that differs after a notice was added or withdrawn. Raises StorageUnavailable."""
        newest = self._store.look_up(NEWEST_NOTICE, ())
        return self._read, (newest and newest[0]) or 0

    # Maintenance

    async def planned(self) -> list[PlannedTime]:
        """Return the times of the maintenances that were announced before they began."""
        return [PlannedTime(**by_name(row)) async for row in self._store.rows(PLANNED_TIMES)]

    async def read_maintenances(self) -> None:
        """Read from the ledger when requests are to be refused."""
        rows = self._store.rows(MAINTENANCES, (self._store.time(),))
        self._maintenances = [Maintenance(**by_name(row)) async for row in rows]
        self._read += 1

    def maintenance(self) -> Maintenance | None:
        """Return the maintenance for which requests are refused now, None if there is none."""
        if not self._maintenances:
            return None
        now = self._store.time()
        in_force = (each for each in self._maintenances if each.since <= now < each.until)
        return next(in_force, None)

    # Budgets

    def notify_of_budget(
        self, key: Key, spending: Spending, budget: int, budget_id: str | None
    ) -> None:
        """Write a notice for each percentage of a budget that has been reached since the last call.
        `budget_id` is None for the account's budget. The notice names it, so that keys which
        replaced one another share one notice."""
        for percent in BUDGET_PERCENTS:
            if percent > spending.notified_percent and spending.spent * 100 >= budget * percent:
                spending.notified_percent = percent
                text = self._budget_text(key, spending, budget, budget_id, percent)
                now = self._store.time()
                values = (key.account_id, budget_id, spending.month, percent, text, now, now)
                written = self._store.record(
                    BUDGET_NOTICE, (new_id("ntc"), *values), retry_until_written=True
                )
                self._messages.wake_up_after(written)

    def _budget_text(
        self, key: Key, spending: Spending, budget: int, budget_id: str | None, percent: int
    ) -> str:
        whose, currency = "monthly budget", self.settings.currency
        if budget_id:
            whose += f" of key {key.id}"
        if budget_id not in (None, key.id):
            whose += " (shared with the keys it replaced)"
        spent, whole = (money(decimal(each), currency) for each in (spending.spent, budget))
        return (
            f"{percent} % of the {whose} has been spent: {spent} of {whole} {currency} in "
            f"{spending.month}."
        )


def price_notice(text: str, at: int, until: int, now: int, by: str) -> tuple[str, Sequence[Any]]:
    """Return the statement that adds a notice of a price increase, and its values."""
    return ADD_NOTICE, (new_id("ntc"), "price", text, at, until, now, by, False)


def document_notice(
    text: str, at: int, until: int, now: int, by: str
) -> tuple[str, tuple[str, Sequence[Any]]]:
    """Return the id of a notice of a new version of a document, and the statement that adds it."""
    notice_id = new_id("ntc")
    return notice_id, (ADD_NOTICE, (notice_id, "terms", text, at, until, now, by, False))
