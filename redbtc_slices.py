"""Long work on the event loop, done in slices of time so that other requests are not held up.

The work is a generator that yields between small steps and does not use asyncio. Work that fits
into one slice is done at once. Longer work shares one queue: each turn of the loop runs one slice
of the work that has waited longest. (A thread would not help: msgspec and re hold the interpreter's
lock for as long as a call takes.)
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Generator, Iterable
from time import perf_counter
from typing import TypeVar

SLICE_SECONDS = 0.001
ITEMS_SECONDS = 0.00025  # of work in `with_turns` between two turns of the loop

T = TypeVar("T")


class Turns:
    """The queue of work that waits for a slice, first come, first served."""

    def __init__(self) -> None:
        self.taken = False  # this turn's slice is taken, or work is waiting for one
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def wait(self) -> None:
        """Return when it is the caller's turn."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:  # drop the queue of an earlier loop, which has ended
            self._loop, self._waiting, self.taken = loop, deque(), False
        turn = loop.create_future()
        self._waiting.append(turn)
        if not self.taken:
            self.taken = True
            loop.call_soon(self._give, loop)
        await turn

    def _give(self, loop: asyncio.AbstractEventLoop) -> None:
        """Give the next turn's slice to the first in the queue that still waits."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                loop.call_soon(self._give, loop)
                return
        self.taken = False


TURNS = Turns()


async def in_slices(steps: Generator[None, None, T]) -> T:
    """Run a generator of small steps to its end, in slices, and return its result. Raises what the
    generator raises. Cancelling the caller closes the generator."""
    try:
        if TURNS.taken:
            await TURNS.wait()
        next(steps)  # before reading the clock: most work has only one step
        until = perf_counter() + SLICE_SECONDS
        while True:
            next(steps)
            if perf_counter() >= until:
                await TURNS.wait()
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
