"""Long jobs on the event loop, done in slices of time so that other requests are not held up.

A job consists of small steps (redbtc/steps.py). A job that fits into one slice is done at once. For
longer jobs each turn of the loop runs one slice: accounts take turns, and so do the first
MAX_STARTED jobs of an account. Its other jobs are not started before one of these is done, since a
started job holds memory. (A thread would not help: msgspec and re hold the interpreter's lock for
as long as a call takes.)
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable
from time import perf_counter
from typing import TypeVar

from redbtc.steps import Steps

SLICE_SECONDS = 0.001
ITEMS_SECONDS = 0.00025  # of work on a long list of items between two turns of the loop
MAX_STARTED = 4  # jobs of one account

T = TypeVar("T")

Queue = deque[asyncio.Future[None]]


class Turns:
    """The queues of jobs that wait for a slice, one for each account."""

    def __init__(self) -> None:
        self.taken = False  # this turn's slice is taken, or a job is waiting for one
        self._loop: asyncio.AbstractEventLoop | None = None
        # By account, the next one first: the jobs that may continue, and those not yet started.
        self._waiting: dict[str, tuple[Queue, Queue]] = {}

    async def wait(self, account_id: str, started: bool) -> None:
        """Wait for the caller's turn."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:  # drop the queues of an earlier loop, which has ended
            self._loop, self._waiting, self.taken = loop, {}, False
        turn = loop.create_future()
        started_jobs, new_jobs = self._waiting.setdefault(account_id, (deque(), deque()))
        (started_jobs if started else new_jobs).append(turn)
        if not self.taken:
            self.taken = True
            loop.call_soon(self._give, loop)
        await turn

    def _give(self, loop: asyncio.AbstractEventLoop) -> None:
        """Give the next turn's slice to the first job of the next account that still waits."""
        while self._waiting:
            account_id = next(iter(self._waiting))
            started_jobs, new_jobs = self._waiting.pop(account_id)
            while new_jobs and len(started_jobs) < MAX_STARTED:
                started_jobs.append(new_jobs.popleft())
            turn = started_jobs.popleft()
            if started_jobs or new_jobs:
                self._waiting[account_id] = started_jobs, new_jobs
            if not turn.done():
                turn.set_result(None)
                loop.call_soon(self._give, loop)
                return
        self.taken = False


TURNS = Turns()


def answer_queue(account_id: str) -> str:
    """Return the name under which an account's answers wait for slices. Answers have a queue of
    their own, so that request bodies don't wait for large answers, nor answers for bodies."""
    return f"answers {account_id}"


async def in_slices(steps: Steps[T], account_id: str, started: bool = False) -> T:
    """Run a generator of small steps to its end, in slices, and return its result. Raises what the
    generator raises. Cancelling the caller closes the generator. `started`: the job continues an
    earlier job of the request and uses what that has built, so it waits among the started ones."""
    try:
        if TURNS.taken:
            await TURNS.wait(account_id, started)
        next(steps)  # before reading the clock: most jobs have only one step
        until = perf_counter() + SLICE_SECONDS
        while True:
            next(steps)
            if perf_counter() >= until:
                await TURNS.wait(account_id, started=True)
                until = perf_counter() + SLICE_SECONDS
    except StopIteration as done:
        result: T = done.value
        return result
    finally:
        steps.close()


async def with_turns(items: Iterable[T]) -> AsyncIterator[T]:
    """Iterate over a list of any length, giving other tasks a turn of the loop in between."""
    began = perf_counter()
    for item in items:
        yield item
        if perf_counter() - began > ITEMS_SECONDS:
            await asyncio.sleep(0)
            began = perf_counter()
