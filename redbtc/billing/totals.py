"""Running totals of what accounts and keys have paid and spent.

They are read from the database once, before the first request that needs them, and then kept up to
date in memory: a cost counts as spent before it is committed.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator

from redbtc.billing.spending import Spending
from redbtc.errors import StorageUnavailable
from redbtc.store.database import Store
from redbtc.store.json_values import nanos_of
from redbtc.times import month_of

# The ledger has months later than the current one only while its time is set back: they are about
# to be moved into the current one.
SPENT_IN_ALL = """
    SELECT ifnull(sum(cost_units), 0), ifnull(sum(cost_nanos), 0),
           ifnull(sum(cost_units) FILTER (WHERE month >= ?2), 0),
           ifnull(sum(cost_nanos) FILTER (WHERE month >= ?2), 0)
      FROM usage_by_month WHERE account_id = ?1"""
SPENT_BY_KEY = """
    SELECT 0, 0, ifnull(sum(cost_units), 0), ifnull(sum(cost_nanos), 0)
      FROM usage_by_day WHERE account_id = ?1 AND month >= ?2
       AND key_id IN (SELECT id FROM keys WHERE id = ?3 OR budget_id = ?3)"""
SPENT_BETWEEN = """
    SELECT ifnull(sum(cost_units), 0), ifnull(sum(cost_nanos), 0)
      FROM usage_by_month WHERE account_id = ?1 AND month >= ?2 AND month < ?3"""
SPENT_BETWEEN_BY_KEY = """
    SELECT ifnull(sum(cost_units), 0), ifnull(sum(cost_nanos), 0)
      FROM usage_by_day WHERE account_id = ?1 AND month >= ?2 AND month < ?3
       AND key_id IN (SELECT id FROM keys WHERE id = ?4 OR budget_id = ?4)"""
PAID = """
    SELECT ifnull(sum(units), 0), ifnull(sum(nanos), 0) FROM payments WHERE account_id = ?"""


class RunningTotals:
    """The Spending of each account, and of each key by its `budget_id`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._totals: dict[tuple[str, str | None], Spending] = {}

    async def of(self, account_id: str, budget_id: str | None) -> Spending:
        """Return the totals of an account, or of one of its keys. Their month may be past; see
        `Spending.begin_month`. Raises StorageUnavailable."""
        name = account_id, budget_id
        while name not in self._totals:
            month = self._month()
            sql, values = (
                (SPENT_BY_KEY, (account_id, month, budget_id))
                if budget_id
                else (SPENT_IN_ALL, (account_id, month))
            )
            try:
                found = await self._store.one(sql, values) or (0, 0, 0, 0)
            except sqlite3.Error as error:
                raise StorageUnavailable(f"the ledger can't be read: {error}") from None
            # No request was settled since: settling one needs these totals.
            totals = Spending(month, nanos_of(*found[:2]), nanos_of(*found[2:]))
            totals.paid = 0 if budget_id else self.paid(account_id)
            if month <= self._month():  # else the time was set back during the query
                self._totals.setdefault(name, totals)
        return self._totals[name]

    # What another process tells, from which this one takes over

    def known(self) -> Iterator[tuple[tuple[str, str], Spending]]:
        """Return the totals that are in memory, by account and budget ("" for the account
        itself)."""
        for (account_id, budget_id), totals in self._totals.items():
            yield (account_id, budget_id or ""), totals

    def begin(self, payer: tuple[str, str], month: str, cost: int, spent: int) -> Spending:
        """Begin with totals that another process has kept. Return them."""
        account_id, budget_id = payer
        totals = self._totals[account_id, budget_id or None] = Spending(month, cost, spent)
        return totals

    def spend(self, payer: tuple[str, str], cost: int) -> None:
        """Add what another process's request has cost, in nanos, if the totals are in memory."""
        if totals := self._totals.get((payer[0], payer[1] or None)):
            totals.begin_month(self._month())
            totals.cost += cost
            totals.spent += cost

    def hold(self, payer: tuple[str, str], by: int) -> None:
        """Change what another process holds, by so many nanos, if the totals are in memory."""
        if totals := self._totals.get((payer[0], payer[1] or None)):
            totals.held += by

    def read_payments(self) -> None:
        """Read what accounts have paid anew. Raises StorageUnavailable."""
        for (account_id, budget_id), totals in self._totals.items():
            if not budget_id:
                totals.paid = self.paid(account_id)

    def paid(self, account_id: str) -> int:
        """Read from the ledger what an account has paid, in nanos."""
        return nanos_of(*(self._store.look_up(PAID, (account_id,)) or (0, 0)))

    def set_back(self, at: int) -> None:
        """Count what is dated later than the month of `at` as spent in that month. All that was
        settled since must be committed. Raises StorageUnavailable, and then has no effect."""
        month = month_of(at)
        later = [each for each in self._totals.items() if each[1].month > month]
        between = [self._spent_between(*name, month, totals.month) for name, totals in later]
        for (_, totals), spent in zip(later, between, strict=True):
            totals.set_back(month, spent)

    def _spent_between(self, account_id: str, budget_id: str | None, since: str, until: str) -> int:
        values = (account_id, since, until)
        found = (
            self._store.look_up(SPENT_BETWEEN_BY_KEY, (*values, budget_id))
            if budget_id
            else self._store.look_up(SPENT_BETWEEN, values)
        )
        return nanos_of(*(found or (0, 0)))

    def _month(self) -> str:
        return month_of(self._store.time())
