"""The pages of operators, and the page on which users manage their own login."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlencode

from redbtc.admin.api import API
from redbtc.billing.price_texts import summary_of_added
from redbtc.billing.records import Notice
from redbtc.dashboard.charts import stacked
from redbtc.dashboard.formats import exact
from redbtc.dashboard.page_request import PageRequest
from redbtc.dashboard.parts import (
    ACCOUNT_FIELDS,
    CHART_DAYS,
    PAGE_ROWS,
    by_day,
    last_days,
    paginated,
    price_table,
    user_table,
)
from redbtc.dashboard.rendering import PageVariables
from redbtc.errors import Conflict
from redbtc.rates import RATES
from redbtc.store.changes import Change
from redbtc.times import iso_time

LISTED_CHANGES = 10  # of upstreams


async def overview_page(page: PageRequest) -> PageVariables:
    """Show traffic and spend, upstreams, latency and refusals of the whole gateway."""
    found = await page.do(API.overview, {"days": CHART_DAYS})
    recent = await page.do(API.list_upstream_changes, {"limit": LISTED_CHANGES})
    days, currency = last_days(page.now), found.spending.currency
    requests = [
        each._replace(name=str(each.name).replace("_", " "))
        for each in by_day(found.traffic, days, "outcome", "requests")
    ]
    costs = by_day(found.traffic, days, "upstream", "cost")
    return {
        "here": "Overview",
        "found": found,
        "upstream_changes": recent.changes,
        "columns": [
            "Day",
            *(f"#Requests: {each.name}" for each in requests),
            *(f"#{currency}: {each.name}" for each in costs),
        ],
        "table": {
            day: [
                *(f"{each.values[place]:,}" for each in requests),
                *(exact(f"{each.values[place]:f}", currency) for each in costs),
            ]
            for place, day in enumerate(days)
        },
        "traffic": stacked(
            "Requests by day and outcome",
            "All accounts, last 30 days.",
            days,
            requests,
            unit="requests",
            prefix="r",
        ),
        "spend": stacked(
            "Spend by day and upstream",
            "All accounts, last 30 days.",
            days,
            costs,
            unit=currency,
            prefix="s",
        ),
    }


async def rest_upstream(page: PageRequest) -> PageVariables | None:
    """Let the upstream that a form selects rest, and say so if no other one serves its models."""
    name = page.form.get("upstream", "")
    rested = await page.do(API.rest_upstream, {"for": "10m"}, upstream=name)
    if not rested.unserved_models:
        return None
    models = ", ".join(rested.unserved_models)
    return {"done": f"{name} rests. No other upstream serves these models meanwhile: {models}"}


async def resume_upstream(page: PageRequest) -> None:
    """End the rests and the outage of the upstream that a form selects."""
    await page.ask(API.resume_upstream, upstream=page.form.get("upstream", ""))


# The webhook


async def webhook_page(page: PageRequest) -> PageVariables:
    """Show the newest messages to the webhook, and whether they arrived."""
    found = await page.do(API.list_webhook_messages, {"limit": PAGE_ROWS})
    return {"here": "Overview", "configured": found.configured, "messages": found.messages}


async def send_test_message(page: PageRequest) -> PageVariables:
    """Send a test message to the webhook, and say what it answered."""
    answer = await page.ask(API.test_webhook)
    said = f"status {answer.status}" if answer.status else f"no answer ({answer.error})"
    if not answer.delivered:
        raise Conflict(f"the webhook did not accept the test message: {said}")
    return {"done": f"The webhook accepted the test message: {said}."}


# Accounts


async def accounts_page(page: PageRequest) -> PageVariables:
    """Show the accounts by name, or those that match a search."""
    search, after = page.query.get("search", "")[:200], page.query.get("after", "")[:200]
    query = {"search": search, "after": after, "limit": PAGE_ROWS + 1}
    found = (await page.do(API.list_accounts, query)).accounts
    return {
        "here": "Accounts",
        "accounts": found[:PAGE_ROWS],
        "search": search,
        "next": urlencode({"search": search, "after": found[PAGE_ROWS - 1].name})
        if len(found) > PAGE_ROWS
        else "",
        "blank": dict.fromkeys(ACCOUNT_FIELDS),
    }


async def add_account(page: PageRequest) -> None:
    """Add an account with the limits of the form, else with those of the settings."""
    await page.do(API.add_account, page.fields("name", *ACCOUNT_FIELDS))


# Prices

PRICE_FIELDS = ("model", "tier", "above_input_tokens", "effective", "max_output_tokens", "source")


async def prices_page(page: PageRequest) -> PageVariables:
    """Show the price list of the gateway."""
    return {"here": "Prices", **await price_table(page, await page.ask(API.list_prices))}


async def add_price(page: PageRequest) -> PageVariables:
    """Add a price, and say what follows from it."""
    price = page.fields(*PRICE_FIELDS, *RATES)
    added = await page.do(API.add_prices, {"prices": [price], **page.fields("without_notice")})
    done = "Price added." if added.added else "Nothing added: this price already applies."
    return {"done": " ".join([done, *summary_of_added(added)])}


# Notices


async def notices_page(page: PageRequest) -> PageVariables:
    """Show current and upcoming notices, and the latest past ones, newest first."""
    now = iso_time(page.now) or ""
    current: list[Notice] = []
    past: list[Notice] = []
    for each in reversed((await page.ask(API.list_notices)).notices):
        is_past = each.withdrawn_at or (each.until or now) < now
        (past if is_past else current).append(each)
    return {"here": "Notices", **paginated(page, "notices", current), "past": past[:PAGE_ROWS]}


async def add_notice(page: PageRequest) -> None:
    """Publish a notice to all accounts."""
    body = page.fields("kind", "text", "effective", "until")
    refuses = "true" if page.form.get("refuses_requests") else "false"
    await page.do(API.add_notice, {**body, "refuses_requests": refuses})


async def withdraw_notice(page: PageRequest) -> None:
    """Withdraw the notice that a form selects."""
    await page.ask(API.withdraw_notice, notice=page.form.get("notice", ""))


# The log


async def log_page(page: PageRequest) -> PageVariables:
    """Show the administrative changes, all or those to one account, newest first."""
    query = {name: page.query[name] for name in ("before", "account") if page.query.get(name)}
    limit = {"limit": str(PAGE_ROWS + 1)}
    found = (await page.do(API.list_changes, {**query, **limit})).changes
    changes, more = found[:PAGE_ROWS], len(found) > PAGE_ROWS
    account = query.get("account")
    return {
        "here": "Log",
        "account": await page.ask(API.show_account, account=account) if account else None,
        "changes": [(each, subject(each), differences(each)) for each in changes],
        "older": urlencode({**query, "before": changes[-1].id}) if more else "",
    }


def subject(change: Change) -> str:
    """Return a name for the object of a change; "" if it has none."""
    values = change.after or change.before or {}
    names = ("name", "email", "label", "model", "text", "reference")
    return next((str(values[name]) for name in names if values.get(name)), "")[:100]


def differences(change: Change) -> list[tuple[str, Any, Any]]:
    """Return the name of each column that differs, with its values before and after."""
    before, after = change.before or {}, change.after or {}
    return [
        (name.replace("_", " "), before.get(name), after.get(name))
        for name in dict.fromkeys((*before, *after))
        if before.get(name) != after.get(name)
    ]


# Users


async def users_page(page: PageRequest) -> PageVariables:
    """Show the users with the role operator."""
    return {"here": "Users", **await user_table(page)}


async def own_login_page(page: PageRequest) -> PageVariables:
    """Show the form for a new password, and the user's sessions."""
    return {"here": "You", "sessions": (await page.ask(API.list_sessions)).sessions}


async def end_session(page: PageRequest) -> None:
    """End another session of the user."""
    await page.ask(API.end_session, session=page.form.get("session", ""))
