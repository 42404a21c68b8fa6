"""What a key has been used for, as its owner needs to know once the key was leaked."""

from __future__ import annotations

from msgspec import Struct

from redbtc.billing.reports import (
    Group,
    Range,
    RequestShown,
    Sums,
    erased_in,
    requests_in,
    usage_by,
)
from redbtc.store.json_values import Moment, json_time
from redbtc.store.readers import Reader
from redbtc.times import iso_time
from redbtc.usage import Outcome

MAX_LATEST = 20
OUTCOMES_OF_KEY = """
    SELECT outcome, count(*) AS requests, min(started_at) AS first, max(started_at) AS last
      FROM requests WHERE account_id = :account AND key_id = :key AND started_at >= :since
     GROUP BY outcome ORDER BY outcome"""


class KeyActivity(Struct):
    """The requests of a key that started at `since` or later: their number by outcome, the time of
    the first and the last, sums by model and in total, and the latest 20, oldest first. If rows of
    the account were erased in this range, `erased_before` is the time before which: such requests
    are only in the sums, of whole days."""

    since: Moment
    first_request_at: Moment | None
    last_request_at: Moment | None
    outcomes: dict[Outcome, int]
    models: list[Group]
    totals: Sums
    latest: list[RequestShown]
    erased_before: Moment | None


async def activity_of_key(
    snapshot: Reader, account_id: str, key_id: str, since: int, currency: str
) -> KeyActivity:
    """Return what a key of an account has been used for since a time in milliseconds."""
    wanted = Range(account=account_id, key=key_id, since=since)
    rows = await snapshot.all(OUTCOMES_OF_KEY, wanted.values())
    (totals,) = await usage_by(snapshot, wanted, [], currency)
    newest = Range(account=account_id, key=key_id, since=since, limit=MAX_LATEST)
    return KeyActivity(
        since=json_time(since),
        first_request_at=iso_time(min((row["first"] for row in rows), default=None)),
        last_request_at=iso_time(max((row["last"] for row in rows), default=None)),
        outcomes={row["outcome"]: row["requests"] for row in rows},
        models=await usage_by(snapshot, wanted, ["model"], currency),
        totals=totals,
        latest=await requests_in(snapshot, newest, currency),
        erased_before=iso_time(await erased_in(snapshot, wanted)),
    )
