"""The pages of an account's usage and billing, also as CSV."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from datetime import date, timedelta
from urllib.parse import urlencode

from msgspec.structs import astuple
from starlette.responses import Response, StreamingResponse

from redbtc.admin.api import API
from redbtc.admin.http import response_in_parts
from redbtc.billing.csv import csv_line, csv_lines, statement_lines
from redbtc.billing.reports import RequestShown
from redbtc.dashboard.account_pages import account_base, statement_of
from redbtc.dashboard.page_request import PageRequest
from redbtc.dashboard.parts import PAGE_ROWS, paginated, price_table
from redbtc.dashboard.rendering import PageVariables, explanation
from redbtc.dashboard.sessions import PAGE_HEADERS
from redbtc.errors import NotFound, UserError
from redbtc.money import money
from redbtc.server.asgi import request_of
from redbtc.slices import with_turns

FILTERS = ("key", "model", "failed", "failure", "since", "until")
MAX_KEYS = 200  # that the filter offers
MAX_LINES = 500  # of a statement's usage


def filters_of(page: PageRequest, account_id: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return the filters of a page as its form shows them, and as a query of the admin API, in
    which the last day does not count."""
    filters = {name: page.query.get(name, "")[:256] for name in FILTERS}
    query = {name: value for name, value in filters.items() if value} | {"account": account_id}
    with contextlib.suppress(ValueError, OverflowError):
        query["until"] = str(date.fromisoformat(filters["until"]) + timedelta(days=1))
    return filters, query


async def usage_page(page: PageRequest) -> PageVariables:
    """Show the requests that match the filters, newest first, and their sums."""
    base = await account_base(page, "Usage")
    account_id = base["account"].id
    known = (await page.ask(API.list_keys, account=account_id)).keys
    filters, query = filters_of(page, account_id)
    offered = known[-MAX_KEYS:]
    used_filters = {name: value for name, value in filters.items() if value}
    base |= {
        "filters": filters,
        "keys": [key for key in known[:-MAX_KEYS] if key.id == filters["key"]] + offered,
        "csv": f"{base['path']}/usage.csv?{urlencode(used_filters)}",
        "totals": None,
    }
    part = {"limit": str(PAGE_ROWS + 1)}
    if before := page.query.get("before"):
        part["before"] = before
    try:
        summed = await page.do(API.usage, query)
        found = await page.do(API.requests, {**query, **part})
    except NotFound:
        raise
    except UserError as error:
        return {**base, **explanation(error)}
    rows = found.requests[::-1]
    last = rows[PAGE_ROWS - 1].request_id if len(rows) > PAGE_ROWS else ""
    used = {row.key_id for row in rows}
    return {
        **base,
        "totals": summed.totals,
        "erased_before": summed.erased_before,
        "labels": {key.id: key.label or key.id for key in known if key.id in used},
        "requests": rows[:PAGE_ROWS],
        "logged": found.logged or (),
        "older": urlencode({**used_filters, "before": last}) if last else "",
    }


async def usage_csv(page: PageRequest) -> Response:
    """Return all requests that match the filters as CSV, newest first. They are read 1,000 at a
    time, each time from another snapshot of the database, so that a slow client keeps none open."""
    account_id = (await account_base(page, "Usage"))["account"].id
    _, query = filters_of(page, account_id)
    query["limit"] = "1000"
    rows = (await page.do(API.requests, query)).requests[::-1]

    async def lines() -> AsyncIterator[str]:
        nonlocal rows
        yield csv_line(RequestShown.__struct_fields__)
        while rows:
            if not page.is_logged_in():
                # A normal end would make the file look complete.
                request_of(page.request.scope).client.abort()
                return
            text = "".join([csv_line(astuple(row)) async for row in with_turns(rows)])
            older = {**query, "before": rows[-1].request_id}
            rows = []  # takes ten times the memory of its text, while a client reads slowly
            yield text
            rows = (await page.do(API.requests, older)).requests[::-1]

    return StreamingResponse(lines(), headers=download("usage.csv"), media_type="text/csv")


def download(name: str) -> dict[str, str]:
    """Return the headers of a file that the browser saves under a name."""
    return {**PAGE_HEADERS, "content-disposition": f'attachment; filename="{name}"'}


async def billing_page(page: PageRequest) -> PageVariables:
    """Show the account's balance, statements, payments and prices."""
    base = await account_base(page, "Billing")
    account_id = base["account"].id
    months = (await page.ask(API.list_months, account=account_id)).months
    now = await statement_of(page, account_id, base["account"].month, 0)
    payments = (await page.ask(API.account_payments, account=account_id)).payments
    return {
        **base,
        "months": months,
        "paid": now.paid_last_three_months,
        "paid_by_month": ", ".join(
            f"{month}: {money(amount, now.currency)}" for month, amount in now.paid_by_month.items()
        ),
        **paginated(page, "payments", payments[::-1]),
        **await price_table(page, await page.ask(API.account_prices, account=account_id)),
    }


async def statement_page(page: PageRequest) -> PageVariables:
    """Show the statement of a month, with the first 500 lines of its usage."""
    base = await account_base(page, "Billing")
    found = await statement_of(page, base["account"].id, page.path["month"], MAX_LINES + 1)
    more = len(found.usage) > MAX_LINES
    return {**base, "found": found, "lines": found.usage[:MAX_LINES], "more": more}


async def statement_csv(page: PageRequest) -> Response:
    """Return the statement of a month as CSV, with all lines."""
    account, month = page.path["account"], page.path["month"]
    found = await page.do(API.statement, {}, account=account, month=month)
    lines = map(str.encode, csv_lines(statement_lines(found)))
    return await response_in_parts(lines, 200, download(f"statement-{found.month}.csv"), "text/csv")
