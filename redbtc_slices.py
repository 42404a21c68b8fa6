"""Long work on the event loop, done in slices so that it holds up nobody.

Such work is a generator that yields between small steps and knows nothing of asyncio. Work that is
done within one slice of time is done at once. Longer work takes turns with other long work: in each
turn of the loop one slice is done. The accounts take turns, and of one account's works MAX_BEGUN:
the others are not begun before one of these is done, since work that has begun holds memory. (A
thread would not help: msgspec and re hold the interpreter's lock for as long as a call takes.)
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Generator, Iterable
from time import perf_counter
from typing import TypeVar

SLICE_SECONDS = 0.001
ITEMS_SECONDS = 0.00025  # of work on items that are many, between two turns of the loop
MAX_BEGUN = 4  # works of one account

T = TypeVar("T")


class Turns:
    """The work that waits for a slice, by account. Of each account's the first MAX_BEGUN go round;
    what comes later is behind them."""

    def __init__(self) -> None:
        self.taken = False  # the slice of this turn of the loop, or there is work that waits for it
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # the next account first

    async def wait(self, account_id: str, begun: bool) -> None:
        """Return when it is the caller's turn."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:  # that of an earlier loop waits for nothing any more
            self._loop, self._waiting, self.taken = loop, {}, False
        turn = loop.create_future()
        waiting = self._waiting.setdefault(account_id, deque())
        waiting.insert(MAX_BEGUN - 1 if begun else len(waiting), turn)
        if not self.taken:
            self.taken = True
            loop.call_soon(self._give, loop)
        await turn

    def _give(self, loop: asyncio.AbstractEventLoop) -> None:
        """Give the slice of the next turn of the loop to the next that still waits."""
        while self._waiting:
            account_id = next(iter(self._waiting))
            waiting = self._waiting.pop(account_id)
            turn = waiting.popleft()
            if waiting:
                self._waiting[account_id] = waiting
            if not turn.done():
                turn.set_result(None)
                loop.call_soon(self._give, loop)
                return
        self.taken = False


TURNS = Turns()


async def in_slices(steps: Generator[None, None, T], account_id: str, begun: bool = False) -> T:
    """Run a generator of small steps to its end and return its result. Raises what it raises; a
    caller that is cancelled closes it. `begun`: it goes on with what has been built already."""
    try:
        if TURNS.taken:
            await TURNS.wait(account_id, begun)
        next(steps)  # most is done in one step
        until = perf_counter() + SLICE_SECONDS
        while True:
            next(steps)
            if perf_counter() >= until:
                await TURNS.wait(account_id, begun=True)
                until = perf_counter() + SLICE_SECONDS
    except StopIteration as done:
        result: T = done.value
        return result
    finally:
        steps.close()


async def with_turns(items: Iterable[T]) -> AsyncIterator[T]:
    """Iterate over what may be many items, with turns of the loop in between."""
    began = perf_counter()
    for item in items:
        yield item
        if perf_counter() - began > ITEMS_SECONDS:
            await asyncio.sleep(0)
            began = perf_counter()
