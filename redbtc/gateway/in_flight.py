"""The requests in flight: their number, and how they are aborted."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Protocol

from redbtc.deadlines import MAX_EXPIRED
from redbtc.gateway.progress import Running
from redbtc.store.keys import Key


class Elsewhere(Protocol):
    """The requests in flight in another process that this one has taken over from."""

    keys: dict[str, int]  # how much can be aborted, by key

    def abort(self, keys: Collection[str], owner_id: str) -> None:
        """Abort what is in flight for these keys, and the background responses of a key or an
        account."""


class InFlight:
    """The requests in flight. Each can be aborted, as can each WebSocket session."""

    def __init__(self) -> None:
        self.count = 0
        self.with_row: set[Running] = set()  # requests that have a row, or are about to
        self.elsewhere: list[Elsewhere] = []
        self._aborts: defaultdict[str, set[Callable[[], None]]] = defaultdict(set)  # by key

    @contextlib.contextmanager
    def abortable(self, key: Key, abort: Callable[[], None]) -> Iterator[None]:
        """Until the end of `with`, call `abort` when the key is reported as compromised, or the
        process is about to end."""
        self.add(key, abort)
        try:
            yield
        finally:
            self.discard(key, abort)

    def add(self, key: Key, abort: Callable[[], None]) -> None:
        """Call `abort` as `abortable` does, until `discard`."""
        self._aborts[key.id].add(abort)

    def discard(self, key: Key, abort: Callable[[], None]) -> None:
        """Don't call `abort` any more."""
        of_key = self._aborts[key.id]
        of_key.discard(abort)
        if not of_key:
            del self._aborts[key.id]

    def has_any(self, key_ids: Collection[str]) -> bool:
        """Return whether anything is in flight for one of these keys, in other processes as
        well."""
        if any(key_id in self._aborts for key_id in key_ids):
            return True
        return any(key_id in each.keys for each in self.elsewhere for key_id in key_ids)

    def by_key(self) -> dict[str, int]:
        """Return how much can be aborted for each key, in this process."""
        return {key_id: len(aborts) for key_id, aborts in self._aborts.items()}

    def abort_elsewhere(self, key_ids: Collection[str], owner_id: str) -> int:
        """Let other processes abort what is in flight in them, as Elsewhere.abort says. Return how
        much that is."""
        number = 0
        for each in self.elsewhere:
            number += sum(each.keys.get(key_id, 0) for key_id in key_ids)
            each.abort(key_ids, owner_id)
        return number

    def abort_key(self, key_id: str) -> int:
        """Abort what is in flight for a key. Return how much that was."""
        aborts = list(self._aborts.get(key_id, ()))
        for abort in aborts:
            abort()
        return len(aborts)

    async def abort_keys(self, key_ids: Iterable[str]) -> int:
        """Abort what is in flight for keys that are revoked, and give other requests turns
        meanwhile. Return how much that was."""
        number = 0
        for key_id in key_ids:
            for abort in list(self._aborts.get(key_id, ())):
                if abort in self._aborts.get(key_id, ()):  # it has not ended meanwhile
                    abort()
                    number += 1
                    if number % MAX_EXPIRED == 0:
                        await asyncio.sleep(0)
        return number

    def abort_all(self) -> None:
        """Abort all that is in flight."""
        for abort in [abort for of_key in self._aborts.values() for abort in of_key]:
            abort()
