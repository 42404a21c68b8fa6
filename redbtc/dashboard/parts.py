"""Parts that several pages share: pages of a list, sums by day, the price table, users' logins."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any
from urllib.parse import urlencode

from redbtc.admin.api import API
from redbtc.admin.users import UserShown
from redbtc.billing.model_patterns import matches
from redbtc.billing.overviews import TrafficOfDay
from redbtc.billing.price_texts import few
from redbtc.billing.records import PriceList
from redbtc.billing.reports import Group
from redbtc.dashboard.charts import Series
from redbtc.dashboard.page_request import PageRequest
from redbtc.dashboard.rendering import PageVariables
from redbtc.errors import NotFound
from redbtc.rates import RATES, UNITS
from redbtc.slices import with_turns
from redbtc.times import DAY, day_of

PAGE_ROWS = 50
PAGE_NUMBER = re.compile("[1-9][0-9]{0,5}")
CHART_DAYS = 30
ACCOUNT_FIELDS = (
    "email",
    "concurrency",
    "requests_per_minute",
    "tokens_per_minute",
    "credit_limit",
    "monthly_budget",
)


def paginated(
    page: PageRequest, name: str, rows: Sequence[Any], parameter: str = "page"
) -> PageVariables:
    """Return the variables of a list that is shown in pages of 50 rows: as `name` the rows of the
    page that a query parameter asks for, as `name`_pages its number and the queries for the pages
    before and after it, which keep the other parameters."""
    query = dict(page.query)
    wanted = query.get(parameter, "")
    last = max(1, -(-len(rows) // PAGE_ROWS))
    number = min(int(wanted), last) if PAGE_NUMBER.fullmatch(wanted) else 1
    query.pop("done", None)
    pages = {each: urlencode({**query, parameter: each}) for each in (number - 1, number + 1)}
    return {
        name: rows[(number - 1) * PAGE_ROWS : number * PAGE_ROWS],
        f"{name}_pages": {
            "page": number,
            "last": last,
            "before": pages[number - 1] if number > 1 else "",
            "next": pages[number + 1] if number < last else "",
        },
    }


# Charts


def last_days(now: int) -> list[str]:
    """Return the days (UTC) that charts show, the one of `now` (milliseconds) last."""
    today = now // DAY
    return [day_of(day) for day in range(today - CHART_DAYS + 1, today + 1)]


def by_day(
    rows: Iterable[TrafficOfDay | Group], days: Sequence[str], name: str, value: str
) -> list[Series]:
    """Return a series for each `name` among the rows: the sums of their `value` by day."""
    places = {day: place for place, day in enumerate(days)}
    series: dict[str | None, list[Decimal]] = {}
    for row in rows:
        if (place := places.get(str(row.day))) is not None:
            values = series.setdefault(getattr(row, name), [Decimal(0)] * len(days))
            values[place] += Decimal(getattr(row, value) or 0)
    return [Series(each, tuple(values)) for each, values in series.items()]


# Prices


def rate_label(rate: str) -> str:
    """Return the name of a rate on pages."""
    return rate.replace("_", " ").capitalize()


RATE_VARIABLES = {
    "rates": {
        rate: f"{rate_label(rate)} (per {UNITS.get(rate, 'million tokens')})" for rate in RATES
    },
    "few": few,
}


async def price_table(page: PageRequest, found: PriceList) -> PageVariables:
    """Return the variables of the price table: current and upcoming prices, then past ones. A
    search shows those for a model, or with a pattern that contains the text. Rates that no price on
    the page has are left out."""
    model = page.query.get("model", "")[:256].strip()
    rows = [
        row
        async for row in with_turns(found.prices)
        if model in row.model or matches(model, {row.model})
    ]
    rows.sort(key=lambda row: row.status == "past")
    table = paginated(page, "prices", rows, "prices")
    shown = [rate for rate in RATES if any(getattr(row, rate) for row in table["prices"])]
    columns = {"shown_rates": shown, "rate_columns": [f"#{rate_label(rate)}" for rate in shown]}
    about = {"model": model, "any_prices": bool(found.prices)}
    return {**table, **about, **columns, **RATE_VARIABLES}


# Users: of an account, whose members are on a page of their own, or the operators


async def listed_users(page: PageRequest) -> list[UserShown]:
    """Return the users that a page is about: the members of its account, or the operators."""
    account = page.path.get("account")
    query = {"account": account} if account else {"role": "operator"}
    return (await page.do(API.list_users, query)).users


async def user_table(page: PageRequest) -> PageVariables:
    """Return the variables of the table of users."""
    return {**paginated(page, "users", await listed_users(page)), "added": None}


async def selected_user(page: PageRequest) -> str:
    """Return the id of the user that a form selects. Raises NotFound if the page does not list that
    user."""
    user_id = page.form.get("user", "")
    if all(user.id != user_id for user in await listed_users(page)):
        raise NotFound("this page lists no such user")
    return user_id


async def add_user(page: PageRequest) -> PageVariables:
    """Add a user and show the link for setting a password."""
    body = page.fields("email", "role")
    if account := page.path.get("account"):
        body["account"] = (await page.ask(API.show_account, account=account)).name
    return {"added": await page.do(API.add_user, body)}


async def reset_user(page: PageRequest) -> PageVariables:
    """End a user's sessions and password, and show a new link for setting a password."""
    return {"added": await page.do(API.reset_user, {}, user=await selected_user(page))}


async def remove_user(page: PageRequest) -> None:
    """Remove a user, which ends the user's sessions."""
    await page.do(API.remove_user, {}, user=await selected_user(page))


USER_ACTIONS = {"add": add_user, "reset": reset_user, "remove": remove_user}
