"""Until when upstreams rest. A restart goes on with what is still in the future."""

from __future__ import annotations

from typing import NamedTuple

from redbtc.store.database import Store

SAVE_REST = """
    INSERT OR REPLACE INTO upstream_rests (upstream, model, began_at, until, reason)
    VALUES (?, ?, ?, ?, ?)"""
DROP_PAST = "DELETE FROM upstream_rests WHERE until <= ?"
DROP_REST = "DELETE FROM upstream_rests WHERE upstream = ? AND model = ?"
DROP_ALL = "DELETE FROM upstream_rests WHERE upstream = ?"
RESTS = """
    SELECT upstream, model, until, reason FROM upstream_rests WHERE until > ?
     ORDER BY upstream, model"""


class UpstreamRest(NamedTuple):
    """A time during which a member is not used."""

    upstream: str  # the member's name
    model: str  # "" for all models
    until: int  # ledger time, in milliseconds
    reason: str  # a code


def save_rest(store: Store, upstream: str, model: str, times: tuple[int, int], reason: str) -> None:
    """Save with the next commit that a member rests from now on. `times` are its begin and its end,
    in milliseconds of the ledger's time. It takes the place of an earlier rest of the same model,
    and rests that are past are removed."""
    now, until = times
    store.record(DROP_PAST, (now,), retry_until_written=True, durable=False)
    if until > now:
        values = (upstream, model, now, until, reason)
        store.record(SAVE_REST, values, retry_until_written=True, durable=False)


def remove_rest(store: Store, upstream: str, model: str) -> None:
    """Remove the rest of a member for one model, or the one for all models if `model` is "". Rests
    of single models are not affected by the latter."""
    store.record(DROP_REST, (upstream, model), retry_until_written=True, durable=False)


def remove_rests(store: Store, upstream: str) -> None:
    """Remove all rests of a member."""
    store.record(DROP_ALL, (upstream,), retry_until_written=True, durable=False)


async def read_rests(store: Store) -> list[UpstreamRest]:
    """Return the rests that are still in the future. Raises StorageUnavailable."""
    return [
        UpstreamRest(
            upstream=row["upstream"],
            model=row["model"],
            until=row["until"],
            reason=row["reason"],
        )
        async for row in store.rows(RESTS, (store.time(),))
    ]
