"""The speeds at which models write, in output tokens a second, as the newest completed rows show
them.

A row is easily made slow on purpose, by reading slowly or with a tool that hangs. So each account
counts once, however many rows it has, and of two accounts the faster one counts: no account can
change the result alone. Its own rows make its estimates no lower than the rows of others
do, or than USUAL_SPEED if there are none, since a model that no other account uses is easily found.
This rule does not hold for the gateway's only account if it may spend without a limit.

Within an account each token counts once. Short answers show how long the first byte takes rather
than the model's pace, so they say little, and to outweigh honest rows, others have to be paid for,
token by token.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping

from redbtc.errors import StorageUnavailable
from redbtc.slices import with_turns
from redbtc.store.database import Store
from redbtc.times import month_of

USUAL_SPEED = 60.0  # of a model that has no rows
MIN_DURATION_MS = 1000  # a shorter row says nothing
MAX_ACCOUNTS, MAX_ACCOUNT_ROWS = 100, 100  # with most requests; the newest rows of each
SPEED_SECONDS = 60  # for which speeds are used before they are read again
UPPER = 0.75  # the share of an account's tokens that were written no faster than its speed
MONTH_MS = 31 * 86_400_000
ROWS_WITH_SPEED = f"""
    SELECT account_id, model, requested_model, output_tokens, duration_ms
      FROM (SELECT account_id AS id FROM usage_by_month WHERE month >= ? GROUP BY account_id
             ORDER BY sum(requests) DESC LIMIT {MAX_ACCOUNTS})
      JOIN requests ON request_id IN (
               SELECT request_id FROM requests AS newest WHERE newest.account_id = id
                ORDER BY started_at DESC LIMIT {MAX_ACCOUNT_ROWS})
     WHERE outcome = 'completed' AND usage_source = 'upstream'
       AND duration_ms >= {MIN_DURATION_MS} AND output_tokens > 0"""

COUNT_ACCOUNTS = "SELECT count(DISTINCT account_id) FROM usage_by_month"


class Speeds:
    """The speeds of all models. They are read when an estimate needs them, at most once in
    SPEED_SECONDS, and cost other requests nothing."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._speeds: Mapping[str, Mapping[str, float]] = {}  # by model and account
        self._accounts = 0  # that have used any model
        self._read_at = -math.inf
        self._reading = asyncio.Lock()

    async def of(self, model: str, account_id: str, limited: bool) -> float:
        """Return the speed of a model for an estimate of an account's request. `model` is the
        upstream's name of the model, or the name that clients use. `limited` says whether the
        account's spending has a limit."""
        async with self._reading:
            if time.monotonic() - self._read_at > SPEED_SECONDS:
                with contextlib.suppress(StorageUnavailable):  # use the old ones
                    self._speeds = await self._read()
                self._read_at = time.monotonic()
        speeds = self._speeds.get(model, {})
        if self._accounts == 1 and not limited:  # it could cheat only itself
            return speed_of_accounts(speeds.values())
        return speed_for(account_id, speeds)

    async def _read(self) -> dict[str, dict[str, float]]:
        since = month_of(self._store.time() - MONTH_MS)
        rows: defaultdict[str, defaultdict[str, list[tuple[float, int]]]]
        rows = defaultdict(lambda: defaultdict(list))
        async with self._store.snapshot() as snapshot:
            found = await snapshot.all(ROWS_WITH_SPEED, (since,))
            counted = await snapshot.one(COUNT_ACCOUNTS)
        self._accounts = counted[0] if counted else 0
        async for account_id, model, requested_model, tokens, duration_ms in with_turns(found):
            for name in {model or requested_model, requested_model}:
                rows[name][account_id].append((tokens * 1000 / duration_ms, tokens))
        return {
            name: {each: speed_of_rows(found) for each, found in accounts.items()}
            for name, accounts in rows.items()
        }


def speed_of_rows(rows: Iterable[tuple[float, int]]) -> float:
    """Return an account's speed, from pairs of a row's speed and its output tokens: UPPER of its
    tokens were written no faster."""
    ordered = sorted(rows)
    wanted = UPPER * sum(tokens for _, tokens in ordered)
    for speed, tokens in ordered:
        wanted -= tokens
        if wanted <= 0:
            return speed
    return ordered[-1][0]


def speed_for(account_id: str, speeds: Mapping[str, float]) -> float:
    """Return a model's speed for an estimate of an account's request, given the speeds by
    account."""
    others = [speed for each, speed in speeds.items() if each != account_id]
    return max(speed_of_accounts(others), speed_of_accounts(speeds.values()))


def speed_of_accounts(speeds: Iterable[float]) -> float:
    """Return the median of the accounts' speeds; of two in the middle, the faster one."""
    ordered = sorted(speeds) or [USUAL_SPEED]
    return ordered[len(ordered) // 2]
