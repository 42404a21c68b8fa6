"""An event loop whose clock jumps to the next timer, so that hours pass in milliseconds."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine


class NoMoreTimers(Exception):
    """All tasks wait, and nothing will ever wake them."""


class JumpingSelector(selectors.SelectSelector):
    """A selector that never waits: it moves the clock instead. No file is ever ready."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise NoMoreTimers
        self.now += max(0.0, timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop that begins at 0 seconds and never waits."""

    def __init__(self) -> None:
        self._jumping = JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now


def run_in_virtual_time(main: Coroutine[None, None, None]) -> None:
    """Run a coroutine to its end. Raises NoMoreTimers if it never ends."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main)
