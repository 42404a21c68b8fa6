"""Count the places that can be taken at the same time, and queue for them."""

from __future__ import annotations

import asyncio
from collections import OrderedDict


class Places:
    """A counter of places of which `limit` can be taken at the same time (0: no limit), first come,
    first served. A request takes one place; for memory, each byte is a place."""

    def __init__(self) -> None:
        self.limit = 0
        self.taken = 0
        self._queue: OrderedDict[asyncio.Future[None], int] = OrderedDict()

    def take_now(self, limit: int, amount: int = 1, ahead: bool = False) -> bool:
        """Set the limit, take `amount` places if they are free, and return whether they were taken.
        Take none if others are waiting, unless the caller goes `ahead` of them."""
        self.limit = limit
        if self._queue:
            self._let_in()
        if (self._queue and not ahead) or 0 < limit < self.taken + amount:
            return False
        self.taken += amount
        return True

    async def take_in_turn(self, amount: int = 1) -> None:
        """Wait for `amount` places and take them. Cancelling the wait takes none."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue[turn] = amount
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give_back(amount)  # the turn came in the same instant
            self._queue.pop(turn, None)
            self._let_in()  # the next in the queue may want less
            raise

    def give_back(self, amount: int = 1) -> None:
        """Free `amount` places for the next in the queue."""
        self.taken -= amount
        self._let_in()

    def change(self, by: int) -> None:
        """Take more places, free or not, or free some: another process has done that, whose
        requests count here."""
        self.give_back(-by)

    def _let_in(self) -> None:
        while self._queue:
            turn, amount = next(iter(self._queue.items()))
            if 0 < self.limit < self.taken + amount:
                return
            del self._queue[turn]
            if not turn.done():  # else the wait was cancelled a moment ago
                self.taken += amount
                turn.set_result(None)
