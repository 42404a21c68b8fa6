"""Bill each container of a code interpreter once."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Collection, Iterable

from redbtc.errors import StorageUnavailable
from redbtc.store.database import Store
from redbtc.store.health import RETRY_SECONDS

BILLED_CONTAINER = "SELECT 1 FROM billed_containers WHERE id = ?"
BILL_CONTAINER = "INSERT OR IGNORE INTO billed_containers (id) VALUES (?)"


class Containers:
    """The containers that were billed. A container is billed to the first request that ends with
    the container in its response, or that is corrected when its response shows it. A request that
    was interrupted, or whose usage is not known, pays nothing until then."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._waiting: set[str] = set()  # those whose commit is not known yet

    async def unbilled(self, ids: Collection[str]) -> list[str]:
        """Return the containers that were not billed yet, however long the database takes. Bill
        them before waiting for anything else."""
        while True:
            try:
                return [each for each in ids if not self._is_billed(each)]
            except StorageUnavailable:
                await asyncio.sleep(RETRY_SECONDS)

    def _is_billed(self, container_id: str) -> bool:
        if container_id in self._waiting:
            return True
        return self._store.look_up(BILLED_CONTAINER, (container_id,)) is not None

    def mark_billed(self, ids: Iterable[str]) -> None:
        """Note that the containers are billed, in the same commit as the row that is settled next,
        before anything is waited for."""
        for each in ids:
            self._waiting.add(each)
            written = self._store.record(BILL_CONTAINER, (each,), retry_until_written=True)
            written.add_done_callback(functools.partial(self._written, each))

    def _written(self, container_id: str, _: asyncio.Future[None]) -> None:
        self._waiting.discard(container_id)
