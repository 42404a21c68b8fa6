"""Run long work on the event loop in slices of time, so that other requests are not held up.

The work is a generator that yields between small steps and does not use asyncio. Work that fits
into one slice is done at once. For longer work, each turn of the loop runs one slice: accounts take
turns, and so do the first MAX_BEGUN works of an account. Its other works don't begin before one of
these is done, since work that has begun holds memory. A thread would not help: msgspec and re hold
the interpreter's lock for as long as a call takes.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Generator, Iterable
from time import perf_counter
from typing import TypeVar

SLICE_SECONDS = 0.001
ITEMS_SECONDS = 0.00025  # of work on many items, between two turns of the loop
MAX_BEGUN = 4  # works of one account that have begun

T = TypeVar("T")

Queue = deque[asyncio.Future[None]]


class Turns:
    """The queues of work that waits for a slice, two for each account."""

    def __init__(self) -> None:
        self.taken = False  # this turn's slice is taken, or work is waiting for one
        self._loop: asyncio.AbstractEventLoop | None = None
        # By account, the next one first: works that may go on, in turn, and those not begun.
        self._waiting: dict[str, tuple[Queue, Queue]] = {}

    async def wait(self, account_id: str, begun: bool) -> None:
        """Wait until it is the caller's turn."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:  # drop the queues of an earlier loop, which has ended
            self._loop, self._waiting, self.taken = loop, {}, False
        turn = loop.create_future()
        going_on, new = self._waiting.setdefault(account_id, (deque(), deque()))
        (going_on if begun else new).append(turn)
        if not self.taken:
            self.taken = True
            loop.call_soon(self._give, loop)
        await turn

    def _give(self, loop: asyncio.AbstractEventLoop) -> None:
        """Give the slice of this turn to the next account's first work that still waits."""
        while self._waiting:
            account_id = next(iter(self._waiting))
            going_on, new = self._waiting.pop(account_id)
            while new and len(going_on) < MAX_BEGUN:
                going_on.append(new.popleft())
            turn = going_on.popleft()
            if going_on or new:
                self._waiting[account_id] = going_on, new
            if not turn.done():
                turn.set_result(None)
                loop.call_soon(self._give, loop)
                return
        self.taken = False


TURNS = Turns()


def answers_of(account_id: str) -> str:
    """Return the name under which the account's answers are metered. They have turns of their own,
    so that the account's request bodies don't wait for large answers, nor answers for bodies."""
    return f"answers {account_id}"


async def in_slices(steps: Generator[None, None, T], account_id: str, begun: bool = False) -> T:
    """Run a generator of small steps to its end, in slices, and return its result. Raises what the
    generator raises. Cancelling the caller closes the generator. `begun`: the work goes on with
    what earlier work of the request has built, so it does not wait to be begun."""
    try:
        if TURNS.taken:
            await TURNS.wait(account_id, begun)
        next(steps)  # before reading the clock: most work has only one step
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
    """Iterate over items that may be many, giving other tasks a turn of the loop in between."""
    began = perf_counter()
    for item in items:
        yield item
        if perf_counter() - began > ITEMS_SECONDS:
            await asyncio.sleep(0)
            began = perf_counter()
