"""Leave background responses to another process: each is asked for by exactly one."""

from __future__ import annotations

import asyncio
import sqlite3

from redbtc.errors import StorageUnavailable
from redbtc.gateway.background_response import BackgroundResponse, Stage
from redbtc.gateway.background_responses import BackgroundResponses
from redbtc.store.health import RETRY_SECONDS


class LeftResponses:
    """The background responses that are left to another process, from `begin` on: those whose
    requests are over, and each of the others when its request is."""

    def __init__(self, background: BackgroundResponses) -> None:
        self._background = background
        self._ids: list[str] = []

    async def begin(self) -> None:
        """Leave all whose requests are over. The other process finds them in the ledger. Return
        when what ends here is written."""
        background = self._background
        background.left = self
        for task in background.tasks.difference(self._settling()):
            task.cancel()
        for response in list(background.responses.values()):
            if response.stage is Stage.ALONE:
                self._forget(response)
        if background.tasks:
            await asyncio.wait(set(background.tasks))

    def _settling(self) -> set[asyncio.Task[None]]:
        return {each.settling for each in self._background.responses.values() if each.settling}

    def _forget(self, response: BackgroundResponse) -> None:
        response.is_left = True
        response.hold.release()
        self._background.remove(response)

    def add(self, response: BackgroundResponse) -> None:
        """Leave a response, whose request is over, unless `begin` has."""
        if not response.is_left:
            self._forget(response)
            self._ids.append(response.row.response_id or "")

    def take_back(self) -> None:
        """Ask for all of them here again: no other process has taken over."""
        self._background.left = None
        self._background.start(self._resume())

    async def _resume(self) -> None:
        while True:
            try:
                await self._background.resume(self.followed())
                return
            except (StorageUnavailable, sqlite3.Error):
                await asyncio.sleep(RETRY_SECONDS)

    def followed(self) -> set[str]:
        """Return the ids of the responses whose requests are in flight."""
        return set(self._background.responses)

    def take_new(self) -> list[str]:
        """Return the ids of those that `add` was called with since the last call."""
        ids, self._ids = self._ids, []
        return ids
