"""Which owner has accepted which version of the operator's documents.

An owner accepts the newest version of each document that is shown, also one that is not in force
yet. Until then the dashboard and the admin API offer them little else. API keys are not affected.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping

from msgspec import Struct

from redbtc.billing.documents import Documents, Published
from redbtc.errors import Conflict
from redbtc.store.database import Store
from redbtc.store.json_values import Moment, by_name, json_time

ACCEPTED_BY = "SELECT document, version FROM acceptances WHERE user_id = ?"
ADD_ACCEPTANCE = """
    INSERT OR IGNORE INTO acceptances (document, version, user_id, account_id, accepted_at)
    SELECT ?, ?, id, account_id, ? FROM users WHERE id = ? AND role = 'owner'"""
ACCEPTANCES = """
    SELECT document, version, user_id, users.email AS user, accepted_at
      FROM acceptances LEFT JOIN users ON users.id = user_id
     WHERE acceptances.account_id = ? ORDER BY accepted_at, document, user_id"""
ACCEPTANCE_COUNTS = """
    SELECT document, version, count(*) AS owners FROM acceptances GROUP BY document, version"""


class Acceptance(Struct):
    """A version of a document that an owner has accepted. If `user` is null, the login was removed
    since."""

    document: str
    version: str
    user_id: str
    user: str | None
    accepted_at: Moment

    @classmethod
    def of(cls, row: sqlite3.Row) -> Acceptance:
        """Return the acceptance of a row."""
        return cls(**{**by_name(row), "accepted_at": json_time(row["accepted_at"])})


class Acceptances:
    """The acceptances of one gateway's documents."""

    def __init__(self, store: Store, documents: Documents) -> None:
        self._store = store
        self._documents = documents

    def missing(self, user_id: str) -> list[Published]:
        """Return the versions that an owner has yet to accept. Raises StorageUnavailable."""
        newest = self._documents.newest()
        if not newest:
            return []
        accepted = {(name, version) for name, version in self._accepted(user_id)}
        return [each for each in newest if (each.name, each.version) not in accepted]

    def _accepted(self, user_id: str) -> list[tuple[str, str]]:
        return [(row[0], row[1]) for row in self._store.look_up_all(ACCEPTED_BY, (user_id,))]

    async def accept(self, user_id: str, versions: Mapping[str, str], by: str) -> None:
        """Record that an owner accepts these versions, by document, each once. Raises Conflict if
        one is not the newest: a newer version was published after the owner was shown this one."""
        newest = {each.name: each.version for each in self._documents.newest()}
        for name, version in versions.items():
            if newest.get(name) != version:
                raise Conflict(
                    f"{name}: {version!r} is not the newest version any more; open the page again "
                    "to read the newest"
                )
        now = self._store.time()
        accepted = [(name, version, now, user_id) for name, version in versions.items()]
        await self._store.transact(*((ADD_ACCEPTANCE, values) for values in accepted), by=by)

    async def of_account(self, account_id: str) -> list[Acceptance]:
        """Return what the owners of an account have accepted, oldest first."""
        return [Acceptance.of(row) async for row in self._store.rows(ACCEPTANCES, (account_id,))]

    async def counts(self) -> dict[tuple[str, str], int]:
        """Return how many owners have accepted each version, by document and version."""
        rows = self._store.rows(ACCEPTANCE_COUNTS)
        return {(row["document"], row["version"]): row["owners"] async for row in rows}
