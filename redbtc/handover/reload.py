"""Reload the process: hand over to a new one, on a signal or a command, one at a time."""

from __future__ import annotations

import asyncio
import logging
from typing import NamedTuple, Protocol

from redbtc.errors import Conflict
from redbtc.handover.child import NotTakenOver
from redbtc.handover.successor import Parts, Successor
from redbtc.telemetry import log

RESTART_SECONDS = 30.0  # for requests in flight, where the ledger has to be migrated


class Reloadable(Protocol):
    """The process, as far as a reload needs it."""

    def parts(self) -> Parts:
        """Return what is handed over. Raises Conflict if the process does not serve now."""

    def end_after(self, successor: Successor, seconds: float | None) -> None:
        """Finish what is in flight, within so many seconds (None: as the settings say), and end:
        another process serves."""


class Reloaded(NamedTuple):
    """How a reload ended. If the ledger is migrated, the new process serves as soon as this one has
    ended, for which requests in flight have `seconds`."""

    pid: int
    version: str
    schema_before: int | None = None
    schema_after: int | None = None
    seconds: float | None = None


class Reload:
    """The reloads of a process."""

    def __init__(self, process: Reloadable) -> None:
        self._process = process
        self._reloading: asyncio.Task[Reloaded] | None = None
        self._on_signal: asyncio.Task[None] | None = None

    def cancel(self) -> asyncio.Task[Reloaded] | None:
        """Give up a reload that is under way, since the process ends. Return its task."""
        if self._reloading and not self._reloading.done():
            self._reloading.cancel()
            return self._reloading
        return None

    def on_signal(self) -> None:
        """Reload. How that ends is in the log."""
        self._on_signal = asyncio.create_task(self._try(), name="reload")

    async def _try(self) -> None:
        try:
            await self.reload()
        except (NotTakenOver, Conflict) as error:
            log(logging.ERROR, "reload refused", reason=str(error))

    async def reload(self) -> Reloaded:
        """Let a new process take over. Raises NotTakenOver, and Conflict if a reload is under way,
        or the process ends; then this process goes on as before."""
        if self._reloading and not self._reloading.done():
            raise Conflict("another reload is under way; wait until it has ended")
        self._reloading = asyncio.create_task(self._reload(), name="reload")
        return await asyncio.shield(self._reloading)

    async def _reload(self) -> Reloaded:
        successor = Successor(self._process.parts())
        await successor.start()
        if restart := successor.needs_restart:
            before, after = restart.schema_before, restart.schema_after
            log(logging.WARNING, "restarting", schema_before=before, schema_after=after)
            await successor.hand_over_at_the_end()
            self._process.end_after(successor, RESTART_SECONDS)
            return Reloaded(successor.pid, "", before, after, RESTART_SECONDS)
        await successor.hand_over()
        log(logging.INFO, "handed over", pid=successor.pid)
        self._process.end_after(successor, None)
        return Reloaded(successor.pid, successor.version)
