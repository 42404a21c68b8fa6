"""Finish what an earlier process left behind: changes in the spill file, and rows of requests that
were in flight."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection

from redbtc.store.commits import Commits
from redbtc.store.entries import EntryKind
from redbtc.store.failures import LogFunction, is_about_a_value
from redbtc.store.request_rows import REQUEST_ROWS
from redbtc.store.request_sql import SETTLED
from redbtc.store.spill import OwedChange, Spill, line_of
from redbtc.store.writer import SQLStatement, Writer
from redbtc.times import month_of

ENTRY_KINDS: dict[str, EntryKind] = {REQUEST_ROWS.name: REQUEST_ROWS}

# What a request had used when it was last written to the table `unsettled` becomes its row.
TAKEN_OVER = [
    f"{name} = json_extract(settled, '$.{name}')"
    for name in ("upstream", *SETTLED)
    if name not in ("outcome", "month")
]
TAKE_OVER = f"""
    UPDATE requests SET {", ".join(TAKEN_OVER)} FROM unsettled
     WHERE requests.request_id = unsettled.request_id AND outcome = 'pending'"""
KEEP_ESTIMATES = """
    INSERT OR IGNORE INTO estimates (response_id, request_id, admitted_at, image_model, held)
    SELECT response_id, request_id, admitted_at, image_model, held
      FROM unsettled JOIN requests USING (request_id)
     WHERE outcome = 'pending' AND usage_source = 'estimated'
       AND response_id IS NOT NULL AND admitted_at IS NOT NULL"""
CLEAR_UNSETTLED = "DELETE FROM unsettled"
INTERRUPT = """
    UPDATE requests SET outcome = 'interrupted', month = ?
     WHERE outcome = 'pending' AND request_id NOT IN (SELECT request_id FROM background)"""
THESE = "request_id IN (SELECT value FROM json_each(?))"
LATEST = """
    SELECT max(ifnull((SELECT max(started_at) FROM requests), 0),
               ifnull((SELECT max(created_at) FROM payments), 0),
               ifnull((SELECT beat_at FROM heartbeat), 0),
               ifnull((SELECT max(ended_at) FROM uptime), 0))"""


async def latest_time(writer: Writer) -> int:
    """Return the latest time in the ledger, in milliseconds, 0 if it is empty."""
    latest: int = await writer.value(LATEST)
    return latest


async def write_owed(spill: Spill, writer: Writer, commits: Commits, log: LogFunction) -> None:
    """Commit the changes in the spill file. Those with a value that is refused are set aside."""
    changes, damaged = spill.read()
    if not changes and not damaged:
        return
    refused = []
    for change in changes:
        try:
            (changed,) = await writer.write([(change.sql, change.values)])
            kind = entry_kind_of(change)
            if kind and not changed:
                await commits.repair(kind, kind.completed(change.sql, change.values))
        except Exception as error:
            if not is_about_a_value(error):
                raise
            refused.append(change)
    spill.refuse([*map(line_of, refused), *damaged])
    spill.reserve()
    spill.close()
    log(
        logging.WARNING,
        "took up what was owed",
        changes=len(changes),
        refused=len(refused),
        damaged=len(damaged),
    )


def entry_kind_of(change: OwedChange) -> EntryKind | None:
    """Return the kind of a change, None if it has none. A line of an old version names no kind."""
    if not change.kind and REQUEST_ROWS.writes(change.sql):
        return REQUEST_ROWS
    return ENTRY_KINDS.get(change.kind)


def interruption(now: int) -> list[SQLStatement]:
    """Return the statements that close the rows of requests that were in flight, with what these
    are known to have used. The last one changes each of the rows. `now` is the ledger's time in
    milliseconds."""
    return [
        (TAKE_OVER, ()),
        (KEEP_ESTIMATES, ()),
        (CLEAR_UNSETTLED, ()),
        (INTERRUPT, (month_of(now),)),
    ]


def interruption_of(request_ids: Collection[str], now: int) -> list[SQLStatement]:
    """Return the statements that do what those of `interruption` do, for these requests alone."""
    ids = json.dumps(sorted(request_ids))
    return [
        (f"{TAKE_OVER} AND requests.{THESE}", (ids,)),
        (f"{KEEP_ESTIMATES} AND {THESE}", (ids,)),
        (f"{CLEAR_UNSETTLED} WHERE {THESE}", (ids,)),
        (f"{INTERRUPT} AND {THESE}", (month_of(now), ids)),
    ]
