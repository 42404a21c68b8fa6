"""Entries with a value that SQLite refuses. They must not hold up the others, and nothing is thrown
away."""

from __future__ import annotations

import logging
from typing import Any

from redbtc.store.entries import Entry
from redbtc.store.failures import LogFunction, is_about_a_value, reason_of
from redbtc.store.spill import Spill, line_of
from redbtc.store.writer import Writer


class RefusedValues:
    """Writes what can be written of an entry with a value that is refused."""

    def __init__(self, writer: Writer, spill: Spill, log: LogFunction) -> None:
        self._writer = writer
        self._spill = spill
        self._log = log

    async def write_reduced(self, entry: Entry, error: Exception) -> bool:
        """Write a row without the value that is refused. Return False if that is not possible.
        Raises whatever else fails."""
        if entry.kind is None:
            return False
        for left_out, values in entry.kind.reduced(entry.values):
            try:
                await self._writer.write([entry.kind.statement([values])])
            except Exception as again:
                if not is_about_a_value(again):
                    raise
            else:
                self._log_refused(entry, error, fields=left_out)
                return True
        return False

    def set_aside(self, entry: Entry, error: Exception) -> None:
        """Put an entry that can't be written at all into a file of its own. Raises OSError."""
        self._log_refused(entry, error, file=str(self._spill.refused))
        self._spill.refuse([line_of(entry.owed)])

    def _log_refused(self, entry: Entry, error: Exception, **more: Any) -> None:
        first = entry.values[0] if entry.values else None
        reason = reason_of(error)
        self._log(logging.ERROR, "value refused", of=str(first)[:64], reason=reason, **more)
