"""The pages of an account, for its members and for operators."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from datetime import date, timedelta
from typing import NamedTuple
from urllib.parse import urlencode

from msgspec.structs import astuple
from starlette.responses import Response, StreamingResponse

from redbtc.admin.actors import RANKS, Rank
from redbtc.admin.api import API
from redbtc.admin.http import in_parts
from redbtc.billing.csv import csv_line, csv_lines, statement_lines
from redbtc.billing.reports import RequestShown
from redbtc.billing.statements import Statement
from redbtc.dashboard.charts import stacked
from redbtc.dashboard.operator_pages import (
    ACCOUNT_FIELDS,
    ON_A_PAGE,
    _prices,
    _users,
    by_day,
    last_days,
    part_of,
)
from redbtc.dashboard.rendering import counted, explanation
from redbtc.dashboard.sessions import SECURITY
from redbtc.dashboard.visit import PageRequest, PageVariables
from redbtc.errors import NotFound, UserError
from redbtc.money import money
from redbtc.server.asgi import request_of
from redbtc.slices import with_turns
from redbtc.store.accounts import KeyAdded, KeyInList
from redbtc.times import iso_time


# For its members, and for operators.
async def _account(visit: PageRequest, here: str) -> PageVariables:
    """What all of them show. Raises NotFound."""
    account = await visit.ask(API.show_account, account=visit.request.path_params["account"])
    rank = RANKS[visit.actor.rank]
    return {
        "here": "Accounts",
        "tab": here,
        "tabs": [tab for tab, least in TABS.items() if rank >= RANKS[least]],
        "account": account,
        "path": f"/dashboard/accounts/{account.id}",
        "may_change": rank >= RANKS["owner"],
    }


TABS: dict[str, Rank] = {
    "Overview": "viewer",
    "Keys": "viewer",
    "Usage": "viewer",
    "Billing": "viewer",
    "Members": "owner",
    "Notices": "viewer",
    "Manage": "operator",
}
MAX_TOLD = 5  # notices on the overview
MEASURES = {"cost": "Cost", "requests": "Requests", "output_tokens": "Output tokens"}


async def account_overview(visit: PageRequest) -> PageVariables:
    """Spent, used, left."""
    shown = await _account(visit, "Overview")
    account = shown["account"]
    account_id, month = account.id, account.month
    days = last_days(visit.now)
    query = {"account": account_id, "since": days[0], "group_by": "day,model", "top": "10"}
    used = await visit.ask(API.usage, query=query)
    measure = visit.request.query_params.get("show", "cost")
    measure = measure if measure in MEASURES else "cost"
    series = by_day(used.groups, days, "model", measure)
    notices = (await visit.ask(API.account_notices, account=account_id)).notices
    unit = account.currency if measure == "cost" else MEASURES[measure].lower()
    return {
        **shown,
        "month": (await _statement(visit, account_id, month, 0)).totals,
        "limits": await visit.ask(API.account_limits, account=account_id),
        "notices": notices[-MAX_TOLD:][::-1],
        "more_notices": max(0, len(notices) - MAX_TOLD),
        "groups": used.groups,
        "measure": measure,
        "measures": MEASURES,
        "chart": stacked(
            f"{unit} by day and model", "Last 30 days.", days, series, unit=unit, prefix="a"
        ),
    }


class KeyOnPage(NamedTuple):
    """A key, and whether it is active, expired or revoked."""

    key: KeyInList
    state: str

    @classmethod
    def of(cls, key: KeyInList, now: str) -> KeyOnPage:
        """Return the key with its state at a time."""
        expired = key.expires_at is not None and key.expires_at <= now
        return cls(key, "revoked" if key.revoked_at else "expired" if expired else "active")


async def keys(visit: PageRequest) -> PageVariables:
    """Show active keys, then the others, newest first."""
    shown = await _account(visit, "Keys")
    found = (await visit.ask(API.list_keys, account=shown["account"].id)).keys
    now = iso_time(visit.now) or ""
    on_page = [KeyOnPage.of(key, now) async for key in with_turns(reversed(found))]
    on_page.sort(key=lambda each: each.state != "active")
    return {**shown, **part_of(visit, "keys", on_page), "added": None}


KEY_FIELDS = (
    "label",
    "models",
    "expires",
    "monthly_budget",
    "concurrency",
    "requests_per_minute",
    "tokens_per_minute",
)


async def _new_key(visit: PageRequest, added: KeyAdded) -> PageVariables:
    """It is shown this once, and how to use it."""
    url, host = visit.request.url, visit.request.headers.get("host", "")
    model = await visit.example_model(added.models)
    return {"added": added, "base_url": f"{url.scheme}://{host}/v1", "model": model}


async def add_key(visit: PageRequest) -> PageVariables:
    """One more of this account."""
    body = visit.fields(*KEY_FIELDS)
    account = visit.request.path_params["account"]
    return await _new_key(visit, await visit.do(API.add_key, body, account=account))


async def _key(visit: PageRequest) -> str:
    """The id of the one that a form names, where it is of this page's account."""
    account = visit.request.path_params["account"]
    found = (await visit.ask(API.list_keys, account=account)).keys
    key_id = visit.form.get("key", "")
    if all(key.id != key_id for key in found):
        raise NotFound("this account has no such key")
    return key_id


async def rotate_key(visit: PageRequest) -> PageVariables:
    """A new one in its place."""
    body = visit.fields("overlap")
    return await _new_key(visit, await visit.do(API.rotate_key, body, key=await _key(visit)))


async def revoke_key(visit: PageRequest) -> PageVariables | None:
    """From the next request on; of a compromised one what runs is cut."""
    compromised = "true" if visit.form.get("compromised") else "false"
    done = await visit.do(API.revoke_key, {"compromised": compromised}, key=await _key(visit))
    return (
        {"done": f"Key revoked. {counted(done.cut, 'request')} in flight stopped."}
        if done.compromised
        else None
    )


def _filters(visit: PageRequest, account_id: str) -> tuple[dict[str, str], dict[str, str]]:
    """What is asked for, as it stands in the page's address and as the API has it: there the last
    day is one that counts."""
    asked = visit.request.query_params
    shown = {name: asked.get(name, "")[:256] for name in ("key", "model", "since", "until")}
    query = {name: value for name, value in shown.items() if value} | {"account": account_id}
    with contextlib.suppress(ValueError, OverflowError):
        query["until"] = str(date.fromisoformat(shown["until"]) + timedelta(days=1))
    return shown, query


MAX_OFFERED = 200  # keys, to choose one of


async def usage(visit: PageRequest) -> PageVariables:
    """Each request, the newest first, and sums of all that the filters let through."""
    shown = await _account(visit, "Usage")
    account_id = shown["account"].id
    known = (await visit.ask(API.list_keys, account=account_id)).keys
    filters, query = _filters(visit, account_id)
    offered = known[-MAX_OFFERED:]
    kept = {name: value for name, value in filters.items() if value}
    shown |= {
        "filters": filters,
        "keys": [key for key in known[:-MAX_OFFERED] if key.id == filters["key"]] + offered,
        "csv": f"{shown['path']}/usage.csv?{urlencode(kept)}",
        "totals": None,
    }
    part = {"limit": str(ON_A_PAGE + 1)}
    if before := visit.request.query_params.get("before"):
        part["before"] = before
    try:
        totals = (await visit.ask(API.usage, query=query)).totals
        found = await visit.ask(API.requests, query={**query, **part})
    except NotFound:
        raise
    except UserError as error:
        return {**shown, **explanation(error)}
    rows = found.requests[::-1]
    more = len(rows) > ON_A_PAGE
    used = {row.key_id for row in rows}
    return {
        **shown,
        "totals": totals,
        "labels": {key.id: key.label or key.id for key in known if key.id in used},
        "requests": rows[:ON_A_PAGE],
        "older": urlencode({**kept, "before": rows[ON_A_PAGE - 1].request_id}) if more else "",
    }


async def usage_csv(visit: PageRequest) -> Response:
    """The same as CSV, all of it, the newest first: read in parts, each of one instant, so that who
    reads slowly holds nothing up."""
    account_id = (await _account(visit, "Usage"))["account"].id
    _, query = _filters(visit, account_id)
    query["limit"] = "1000"
    rows = (await visit.ask(API.requests, query=query)).requests[::-1]

    async def lines() -> AsyncIterator[str]:
        nonlocal rows
        yield csv_line(RequestShown.__struct_fields__)
        while rows:
            if not visit.is_logged_in():
                # Ended normally, the file would be taken for the whole.
                request_of(visit.request.scope).client.abort()
                return
            text = "".join([csv_line(astuple(row)) async for row in with_turns(rows)])
            older = {**query, "before": rows[-1].request_id}
            rows = []  # takes ten times the memory of its text, while a client reads slowly
            yield text
            rows = (await visit.ask(API.requests, query=older)).requests[::-1]

    return StreamingResponse(lines(), headers=as_file("usage.csv"), media_type="text/csv")


def as_file(name: str) -> dict[str, str]:
    """Headers of what is to be kept."""
    return {**SECURITY, "content-disposition": f'attachment; filename="{name}"'}


async def billing(visit: PageRequest) -> PageVariables:
    """Statements, payments, prices."""
    shown = await _account(visit, "Billing")
    account_id = shown["account"].id
    months = (await visit.ask(API.list_months, account=account_id)).months
    now = await _statement(visit, account_id, shown["account"].month, 0)
    payments = (await visit.ask(API.account_payments, account=account_id)).payments
    return {
        **shown,
        "months": months,
        "paid": now.paid_last_three_months,
        "paid_by_month": ", ".join(
            f"{month}: {money(amount, now.currency)}" for month, amount in now.paid_by_month.items()
        ),
        **part_of(visit, "payments", payments[::-1]),
        **await _prices(visit, await visit.ask(API.account_prices, account=account_id)),
    }


async def statement(visit: PageRequest) -> PageVariables:
    """A month of it."""
    shown = await _account(visit, "Billing")
    month = visit.request.path_params["month"]
    found = await _statement(visit, shown["account"].id, month, MAX_LINES + 1)
    more = len(found.usage) > MAX_LINES
    return {**shown, "found": found, "lines": found.usage[:MAX_LINES], "more": more}


async def _statement(visit: PageRequest, account: str, month: str, lines: int) -> Statement:
    """With so many lines of its usage."""
    query = {"limit": lines}
    found: Statement = await visit.ask(API.statement, account=account, month=month, query=query)
    return found


MAX_LINES = 500


async def statement_csv(visit: PageRequest) -> Response:
    """As CSV."""
    account, month = (visit.request.path_params[name] for name in ("account", "month"))
    found = await visit.ask(API.statement, account=account, month=month)
    lines = map(str.encode, csv_lines(statement_lines(found)))
    return await in_parts(lines, 200, as_file(f"statement-{found.month}.csv"), "text/csv")


async def members(visit: PageRequest) -> PageVariables:
    """Who may log in to it."""
    shown = await _account(visit, "Members")
    return {**shown, **part_of(visit, "users", await _users(visit)), "added": None}


async def account_notices(visit: PageRequest) -> PageVariables:
    """What it is told."""
    shown = await _account(visit, "Notices")
    found = (await visit.ask(API.account_notices, account=shown["account"].id)).notices
    return {**shown, **part_of(visit, "notices", found[::-1])}


async def manage(visit: PageRequest) -> PageVariables:
    """What only operators change of an account."""
    return await _account(visit, "Manage")


async def set_account(visit: PageRequest) -> None:
    """What is left empty is the settings' again."""
    body = {name: visit.form.get(name, "").strip() or None for name in ACCOUNT_FIELDS}
    await visit.do(API.set_account, body, account=visit.request.path_params["account"])
