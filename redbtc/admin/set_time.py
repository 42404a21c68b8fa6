"""Repair a ledger with entries that are dated in the future, because the clock was ahead: the
command `db set-time`. Entries dated after a time are moved to that time, in one transaction, which
is recorded as a change. Costs are not computed again.

The dates that money depends on can't be changed in any other way. Triggers (schema.sql) refuse that
unless the table setting_time has a row, and it has one only during this transaction.
"""

from __future__ import annotations

import orjson
from msgspec import Struct

from redbtc.admin.users import LINK_LASTS
from redbtc.billing.billing import Billing
from redbtc.errors import UserError
from redbtc.store.database import Store
from redbtc.store.json_values import Moment, json_time
from redbtc.times import DAY, iso_time, month_of, now_ms, parse_time
from redbtc.usage import KINDS

MAX_SECONDS = 600  # for the transaction
AT = "(SELECT at FROM setting_time)"
THAT_MONTH = "(SELECT month FROM setting_time)"
THAT_DAY = "(SELECT at / 86400000 FROM setting_time)"
NOW = "(SELECT now_at FROM setting_time)"

# The condition for rows dated later than ?1 or in a later month than ?2, by table. Logins are
# compared with ?3, the present time, so that an operator who sets the time to last week stays
# logged in.
LATER = {
    "requests": "started_at > ?1 OR month > ?2",
    "payments": "created_at > ?1 OR month > ?2",
    "corrections": "created_at > ?1 OR month > ?2",
    "prices": "created_at > ?1",
    "notices": "max(created_at, ifnull(withdrawn_at, 0), ifnull(delivered_at, 0)) > ?1"
    " OR month > ?2",
    "webhook_messages": "max(created_at, ifnull(tried_at, 0), ifnull(delivered_at, 0)) > ?1",
    "told": "told_at > ?1",
    "upstream_changes": "changed_at > ?1",
    "upstream_rests": "began_at > ?1",
    "accounts": "max(created_at, ifnull(closing_asked_at, 0), ifnull(terminated_at, 0),"
    " ifnull(erased_at, 0)) > ?1",
    "keys": "max(created_at, ifnull(revoked_at, 0)) > ?1",
    "stored_objects": "created_at > ?1",
    "background": "admitted_at > ?1",
    "estimates": "admitted_at > ?1",
    "unsettled": "admitted_at > ?1",
    "documents": "published_at > ?1",
    "acceptances": "accepted_at > ?1",
    "changes": "changed_at > ?1",
    "runs": "started_at > ?1",
    "uptime": "ended_at > ?1",
    "unpriced_models": "max(last_at, ifnull(told_at, 0)) > ?1",
    "unpriced_model_accounts": "last_at > ?1",
    "reopened": "reopened_at > ?1",
    "users": "max(created_at, ifnull(password_set_at, 0),"
    f" ifnull(link_expires_at, 0) - {LINK_LASTS}) > ?3",
    "sessions": "max(created_at, seen_at) > ?3",
}
LATER_COUNTS = ", ".join(
    f"'{table}', nullif((SELECT count(*) FROM {table} WHERE {later}), 0)"
    for table, later in LATER.items()
)
COUNT_LATER = f"json_object({LATER_COUNTS})"
SET_TIME = f"""
    INSERT INTO setting_time (id, at, month, now_at, before_at, moved)
    SELECT 1, ?1, ?2, ?3, ?4, {COUNT_LATER}"""
TIME_IS_SET = "DELETE FROM setting_time"


def later(table: str) -> str:
    """Return the condition for the rows of a table that are moved."""
    condition = LATER[table].replace("?1", AT).replace("?2", THAT_MONTH)
    return condition.replace("?3", NOW)


def move(table: str, *columns: str, to: str = AT) -> str:
    """Return a statement that moves dates of a table which are later than `to`."""
    moved = ", ".join(f"{column} = min({column}, {to})" for column in columns)
    return f"UPDATE {table} SET {moved} WHERE {later(table)}"


def merge(table: str, names: tuple[str, ...], counts: tuple[str, ...], condition: str) -> list[str]:
    """Return statements that add the later sums of a table to those of the time that is set.
    `names` are the columns of its key; a column of `counts` can be NULL, where nothing is summed.
    """
    key = {"day": f"min(day, {THAT_DAY})", "month": f"min(month, {THAT_MONTH})"}
    keys = ", ".join(key.get(name, name) for name in names)
    sums = [
        f"{each} = coalesce({each} + excluded.{each}, {each}, excluded.{each})" for each in counts
    ]
    into = ", ".join([*names, *counts])
    return [
        f"""INSERT INTO {table} ({into}) SELECT {keys}, {", ".join(counts)} FROM {table}
             WHERE {condition} ON CONFLICT DO UPDATE SET {", ".join(sums)}""",
        f"DELETE FROM {table} WHERE {condition}",
    ]


MONEY = ("cost_units", "cost_nanos")
# A correction in a later month leaves its request counted as estimated. Now both are in one month.
# (A request whose row was erased stays counted so.)
CORRECTED_IN_TIME = f"""
    UPDATE usage_by_day SET estimated = estimated - (
        SELECT count(*) FROM corrections JOIN requests USING (request_id)
         WHERE corrections.account_id = usage_by_day.account_id
           AND corrections.month = usage_by_day.month
           AND requests.month < corrections.month AND requests.month >= {THAT_MONTH}
           AND (requests.started_at / 86400000, ifnull(requests.model, requests.requested_model),
                requests.requested_model, requests.key_id)
             = (usage_by_day.day, usage_by_day.model, usage_by_day.requested_model,
                usage_by_day.key_id))
     WHERE month > {THAT_MONTH}"""
# The progress of a background response moves with its request, so that its duration stays the same.
MOVE_PROGRESS = f"""
    UPDATE background SET seen = json_set(seen,
        '$.since', iif(started_at > {AT}, json_extract(seen, '$.since') - (started_at - {AT}),
                       min(json_extract(seen, '$.since'), {AT})),
        '$.until', iif(started_at > {AT}, json_extract(seen, '$.until') - (started_at - {AT}),
                       min(json_extract(seen, '$.until'), {AT})))
      FROM requests
     WHERE requests.request_id = background.request_id AND seen IS NOT NULL
       AND max(started_at, json_extract(seen, '$.until')) > {AT}"""
AT_ONCE = f"iif(effective_at <= created_at, min(effective_at, {AT}), effective_at)"
MOVES = (
    CORRECTED_IN_TIME,
    *merge(
        "usage_by_day",
        ("account_id", "month", "day", "model", "requested_model", "key_id"),
        ("requests", "estimated", "unreported", *KINDS, *MONEY),
        f"day > {THAT_DAY} OR month > {THAT_MONTH}",
    ),
    *merge(
        "usage_by_month",
        ("account_id", "month"),
        ("requests", "input_tokens", "output_tokens", *MONEY),
        f"month > {THAT_MONTH}",
    ),
    *merge("rolled_up", ("account_id", "month"), ("requests", *MONEY), f"month > {THAT_MONTH}"),
    *merge(
        "traffic_by_day",
        ("day", "upstream", "outcome"),
        ("requests", *MONEY),
        f"day > {THAT_DAY}",
    ),
    MOVE_PROGRESS,
    f"""UPDATE requests SET started_at = min(started_at, {AT}), month = min(month, {THAT_MONTH})
         WHERE {later("requests")}""",
    f"""UPDATE payments SET created_at = min(created_at, {AT}), month = min(month, {THAT_MONTH})
         WHERE {later("payments")}""",
    f"""UPDATE corrections SET created_at = min(created_at, {AT}), month = min(month, {THAT_MONTH}),
               request_started_at = min(request_started_at, {AT})
         WHERE {later("corrections")}""",
    f"""DELETE FROM webhook_messages WHERE id IN (
            SELECT id FROM notices WHERE kind = 'budget' AND month > {THAT_MONTH})""",
    # Notices of a later month's budget are sent again as soon as the true month's budget is spent.
    f"DELETE FROM notices WHERE kind = 'budget' AND month > {THAT_MONTH}",
    f"""UPDATE notices SET effective_at = {AT_ONCE}, created_at = min(created_at, {AT}),
               withdrawn_at = min(withdrawn_at, {AT}), delivered_at = min(delivered_at, {AT})
         WHERE {later("notices")}""",
    f"""UPDATE prices SET effective_at = {AT_ONCE}, created_at = min(created_at, {AT})
         WHERE {later("prices")}""",
    move("webhook_messages", "created_at", "tried_at", "delivered_at"),
    move("told", "told_at"),
    # A rest, and the time until which a change lasts, stay as long as they are.
    *(
        f"""UPDATE {table} SET {began} = {AT}, until = until - ({began} - {AT})
             WHERE {later(table)}"""
        for table, began in (("upstream_changes", "changed_at"), ("upstream_rests", "began_at"))
    ),
    # An account is erased as long after its termination as before.
    f"""UPDATE accounts SET erase_at = erase_at - (terminated_at - {AT})
         WHERE terminated_at > {AT}""",
    move("accounts", "created_at", "closing_asked_at", "terminated_at", "erased_at"),
    move("keys", "created_at", "revoked_at"),
    move("stored_objects", "created_at"),
    move("background", "admitted_at"),
    move("estimates", "admitted_at"),
    move("unsettled", "admitted_at"),
    # The dates on which documents take effect stay: they are written in the documents.
    move("documents", "published_at"),
    move("acceptances", "accepted_at"),
    move("runs", "started_at"),
    # Of the uptime, what began later never was; what ended later ends now.
    f"DELETE FROM uptime WHERE began_at > {AT}",
    f"UPDATE uptime SET ended_at = {AT} WHERE began_at <= {AT} AND ended_at > {AT}",
    move("unpriced_models", "first_at", "last_at", "told_at"),
    move("unpriced_model_accounts", "last_at"),
    # Requests that were erased are now in the sums of that day, of which no part can be reported.
    f"""UPDATE retention SET usage_before = min(usage_before, ({THAT_DAY} + 1) * {DAY}),
               clock_seen_at = min(clock_seen_at, {AT}), leapt_at = min(leapt_at, {AT})""",
    move("reopened", "reopened_at"),
    f"""UPDATE users SET created_at = min(created_at, {NOW}),
               password_set_at = min(password_set_at, {NOW}),
               link_expires_at = min(link_expires_at, {NOW} + {LINK_LASTS})
         WHERE {later("users")}""",
    move("sessions", "created_at", "seen_at", to=NOW),
    # The record of this change, and records that other triggers have made since, keep their time.
    f"""{move("changes", "changed_at")}
           AND id < (SELECT max(id) FROM changes WHERE kind = 'time')""",
)


async def count_later(store: Store, at: int, now: int) -> dict[str, int]:
    """Return how many rows are dated later than `at` (milliseconds), by table, where there are
    any."""
    row = await store.one(f"SELECT {COUNT_LATER} AS moved", (at, month_of(at), now))
    assert row is not None, "it counts"
    counts: dict[str, int | None] = orjson.loads(row["moved"])
    return {table: count for table, count in counts.items() if count}


def time_to_set(store: Store, text: str | None) -> tuple[int, int]:
    """Return the time to set (text None: now) and the present time, both in milliseconds. Raises
    UserError."""
    now = min(now_ms(), store.time())  # either of them may be ahead
    at = parse_time(text, now, relative_to_past=True) if text else now
    if at > now + DAY:
        raise UserError(
            f"{iso_time(at)} is more than a day from now ({iso_time(now)}); give an earlier time"
        )
    return at, now


async def preview(store: Store, at: int, now: int) -> TimeSet:
    """Return what `set_time` would move."""
    return time_set(at, store.time(), await count_later(store, at, now), done=False)


async def set_time(billing: Billing, at: int, now: int, by: str) -> TimeSet:
    """Set the ledger's time back to `at` and move all later entries to it. Return what was moved.
    Raises StorageUnavailable; the same call may then be repeated."""
    store, before = billing.store, billing.store.time()
    async with billing.changing_prices:
        await store.settle_time()  # entries that wait to be written have the old time
        billing.set_back(at)
        await store.settle_time()  # and so may entries that were added since, but no later ones
        if moved := await count_later(store, at, now):
            values = (at, month_of(at), now, before)
            moves = [(sql, ()) for sql in MOVES]
            changes = ((SET_TIME, values), *moves, (TIME_IS_SET, ()))
            await store.transact(*changes, by=by, seconds=MAX_SECONDS)
    await billing.notices.read_maintenances()
    return time_set(at, before, moved, done=True)


def time_set(at: int, before: int, moved: dict[str, int], *, done: bool) -> TimeSet:
    """Return the answer to a request to set the time."""
    return TimeSet(json_time(at), json_time(before), done, moved)


class TimeSet(Struct):
    """The time that was set, the ledger's time before, and how many rows were dated later, by
    table. If `done` is false, this was a preview."""

    time: Moment
    before: Moment
    done: bool
    moved: dict[str, int]
