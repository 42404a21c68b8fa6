"""The work that the gateway does by itself once a day (UTC): it erases what is older than
[retention] allows, and terminated accounts whose time has come. Expired bodies of requests are
erased within a minute, by a task of their own: they don't wait for the ledger's rows, which can
take hours, nor the rows for a request log that can't be used.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable

from msgspec.structs import asdict

from redbtc.gateway.gateway import Gateway
from redbtc.store.erasure import ErasureEnd
from redbtc.store.retention import Erased, Retention
from redbtc.telemetry import log, shown_error
from redbtc.times import DAY, iso_time

FIRST_SECONDS = 3  # after the start
TURN_SECONDS = 60  # between two looks for work
CLOCK_LOOK_SECONDS = 3600  # between two looks at the clock
ACCOUNT_RETRY_SECONDS = 600  # before the erasure of an account that was not complete is repeated
# A pause is so many times as long as the step before it: fewer than one request in a hundred meets
# a step.
PAUSE_FACTOR = 100
GATEWAY_NAME = "gateway"  # in the log of changes


class DailyWork:
    """The state of the daily work. No failure ends it: the next turn tries again."""

    def __init__(
        self,
        gateway: Gateway,
        retention: Retention,
        erase_accounts: Callable[[], Awaitable[list[ErasureEnd]]],
    ) -> None:
        """`erase_accounts` erases the terminated accounts whose time has come."""
        self._gateway = gateway
        self._store = gateway.store
        self._retention = retention
        self._erase_accounts = erase_accounts
        self._accounts_at = -math.inf  # when to look for accounts again, by the monotonic clock
        self._erased = Erased()  # since the last record of it
        self._recording = asyncio.Lock()  # nothing is added between a record and its end
        self._looked_at = -math.inf
        self._trusted_at = 0
        self._done: object = None  # the day and the settings of the last run
        self._said: dict[str, object] = {}  # in the log, by event, so that it is said once

    async def do_for_ever(self) -> None:
        """Do what is due, now and whenever it is; at once when the settings have changed."""
        await self._repeat(self._do_what_is_due, "daily work failed")

    async def erase_bodies_for_ever(self) -> None:
        """Erase expired bodies, every minute and at once when the settings have changed."""
        await self._repeat(self._erase_bodies, "expired bodies not erased")

    async def _repeat(self, work: Callable[[], Awaitable[None]], failed: str) -> None:
        await asyncio.sleep(FIRST_SECONDS)
        while True:
            settings_applied = self._gateway.settings_applied
            try:
                if self._store.healthy:
                    await work()
                    self._say_once(failed, None)
            except Exception as error:  # whatever it is, it must not end the gateway
                shown = {**shown_error(error), "reason": "it is tried again every minute"}
                self._say_once(failed, type(error), **shown)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TURN_SECONDS):
                    await settings_applied.wait()

    async def _erase_bodies(self) -> None:
        purged = await self._retention.erase_expired_bodies()
        async with self._recording:
            self._erased.add_bodies(purged)

    async def _do_what_is_due(self) -> None:
        settings = self._gateway.settings.retention
        due = (self._store.time() // DAY, settings)
        if due != self._done or time.monotonic() - self._looked_at > CLOCK_LOOK_SECONDS:
            await self._look_at_clock()
        if due != self._done and not self._trusted_at:
            await self._retention.erase_old(settings, self._erased, PAUSE_FACTOR)
            await self._record()
            self._done = due
        if time.monotonic() >= self._accounts_at and not self._trusted_at:
            await self._erase_due_accounts()
        is_scrubbed = await self._retention.scrub(0, PAUSE_FACTOR)
        reason = "another program reads the database; erased data stays in its files until then"
        self._say_once("erased data not scrubbed", None if is_scrubbed else True, reason=reason)

    async def _record(self) -> None:
        async with self._recording:
            if self._erased:
                await self._retention.record(self._erased, GATEWAY_NAME)
                log(logging.INFO, "old data erased", **asdict(self._erased))
            self._erased = Erased()

    async def _erase_due_accounts(self) -> None:
        self._accounts_at = -math.inf
        for end in await self._erase_accounts():
            if end.missing:
                self._accounts_at = time.monotonic() + ACCOUNT_RETRY_SECONDS
                event = "account not erased"
                self._say_once(event, (end.account_id, end.missing), reason=end.missing)
            else:
                log(logging.INFO, "account erased", account=end.account_id)

    async def _look_at_clock(self) -> None:
        self._trusted_at = await self._retention.look_at_clock()
        self._looked_at = time.monotonic()
        reason = (
            "the ledger's time went ahead by more than a day; nothing old is erased before "
            f"{iso_time(self._trusted_at)}"
        )
        self._say_once("daily work waits", self._trusted_at or None, reason=reason)

    def _say_once(self, event: str, what: object, **fields: object) -> None:
        """Log an event unless it was the last that was said of it; None: it is over."""
        if what is not None and what != self._said.get(event):
            log(logging.WARNING, event, **fields)
        self._said[event] = what
