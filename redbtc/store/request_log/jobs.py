"""What the event loop asks of the log's thread."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Generator
from typing import Any, Generic, TypeVar

from redbtc.errors import StorageUnavailable
from redbtc.store.request_log.file import LogFile

T = TypeVar("T")

# Work in small steps, between which parts of bodies are written. Each step yields the seconds after
# which the next one should come.
Work = Generator[float, None, T]


class Job(Generic[T]):
    """A piece of work for the thread. The event loop awaits `done`. All parts that were queued
    before it are written first."""

    def __init__(self, work: Callable[[LogFile], Work[T]], without_file: T) -> None:
        """`without_file` is the result if there is no file."""
        self._loop = asyncio.get_running_loop()
        self.done: asyncio.Future[T] = self._loop.create_future()
        self._work = work
        self._without_file = without_file
        self._file: LogFile | None = None
        self._steps: Work[T] | None = None

    def step(self, file: LogFile | None) -> float | None:
        """Do the next step in the open file. Return the seconds until the next one, None if the
        work is done. Raises StorageUnavailable, and what the work raises."""
        if self._steps is None:
            if file is None:
                self._call(self._set_result, self._without_file)
                return None
            self._file, self._steps = file, self._work(file)
        if file is not self._file:
            raise StorageUnavailable("the request log was closed meanwhile; try again")
        try:
            return next(self._steps)
        except StopIteration as end:
            self._call(self._set_result, end.value)
            return None

    def fail(self, error: Exception) -> None:
        """Let the event loop raise the error."""
        self._call(self._set_error, error)

    def _call(self, function: Callable[[Any], None], value: object) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop has ended
            self._loop.call_soon_threadsafe(function, value)

    def _set_result(self, result: T) -> None:
        if not self.done.done():
            self.done.set_result(result)

    def _set_error(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)
