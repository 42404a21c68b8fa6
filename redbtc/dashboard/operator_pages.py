"""The pages of operators."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any
from urllib.parse import urlencode

from redbtc.admin.api import API
from redbtc.admin.users import UserShown
from redbtc.billing.notices import few, matches, told_of_prices
from redbtc.billing.overviews import TrafficOfDay
from redbtc.billing.records import Notice, PriceList
from redbtc.billing.reports import Group
from redbtc.dashboard.charts import Series, stacked
from redbtc.dashboard.rendering import PAGE, exact
from redbtc.dashboard.visit import PageRequest, PageVariables
from redbtc.errors import NotFound
from redbtc.rates import RATES, UNITS
from redbtc.slices import with_turns
from redbtc.store.changes import Change
from redbtc.times import DAY, day_of, iso_time

DAYS = 30  # that charts show
ON_A_PAGE = 50


def last_days(now: int) -> list[str]:
    """Return the days (UTC) that charts show, the one of `now` (milliseconds) last."""
    today = now // DAY
    return [day_of(day) for day in range(today - DAYS + 1, today + 1)]


def by_day(
    rows: Iterable[TrafficOfDay | Group], days: Sequence[str], name: str, value: str
) -> list[Series]:
    """One series for each `name` among the rows, of their `value` by day."""
    places = {day: place for place, day in enumerate(days)}
    series: dict[str | None, list[Decimal]] = {}
    for row in rows:
        if (place := places.get(str(row.day))) is not None:
            values = series.setdefault(getattr(row, name), [Decimal(0)] * len(days))
            values[place] += Decimal(getattr(row, value) or 0)
    return [Series(each, tuple(values)) for each, values in series.items()]


async def overview(visit: PageRequest) -> PageVariables:
    """What an operator looks at first."""
    found = await visit.ask(API.overview, query={"days": DAYS})
    days, currency = last_days(visit.now), found.spending.currency
    requests = [
        each._replace(name=str(each.name).replace("_", " "))
        for each in by_day(found.traffic, days, "outcome", "requests")
    ]
    costs = by_day(found.traffic, days, "upstream", "cost")
    return {
        "here": "Overview",
        "found": found,
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


def part_of(
    visit: PageRequest, name: str, rows: Sequence[Any], parameter: str = "page"
) -> PageVariables:
    """Those of so many rows that are on the page that is asked for, and how to ask for the one
    before and the next, with other parameters as they are."""
    asked = dict(visit.request.query_params)
    wanted = asked.get(parameter, "")
    last = max(1, -(-len(rows) // ON_A_PAGE))
    page = min(int(wanted), last) if PAGE.fullmatch(wanted) else 1
    shown = rows[(page - 1) * ON_A_PAGE : page * ON_A_PAGE]
    asked.pop("done", None)
    pages = {each: urlencode({**asked, parameter: each}) for each in (page - 1, page + 1)}
    return {
        name: shown,
        f"{name}_pages": {
            "page": page,
            "last": last,
            "before": pages[page - 1] if page > 1 else "",
            "next": pages[page + 1] if page < last else "",
        },
    }


async def accounts(visit: PageRequest) -> PageVariables:
    """All of them, or those that are searched for."""
    asked = visit.request.query_params
    search, after = asked.get("search", "")[:200], asked.get("after", "")[:200]
    query = {"search": search, "after": after, "limit": ON_A_PAGE + 1}
    found = (await visit.ask(API.list_accounts, query=query)).accounts
    return {
        "here": "Accounts",
        "accounts": found[:ON_A_PAGE],
        "search": search,
        "next": urlencode({"search": search, "after": found[ON_A_PAGE - 1].name})
        if len(found) > ON_A_PAGE
        else "",
        "blank": dict.fromkeys(ACCOUNT_FIELDS),
    }


ACCOUNT_FIELDS = (
    "email",
    "concurrency",
    "requests_per_minute",
    "tokens_per_minute",
    "credit_limit",
    "monthly_budget",
)


async def add_account(visit: PageRequest) -> None:
    """With the limits of the settings where none are filled in."""
    await visit.do(API.add_account, visit.fields("name", *ACCOUNT_FIELDS))


async def prices(visit: PageRequest) -> PageVariables:
    """All prices."""
    return {"here": "Prices", **await _prices(visit, await visit.ask(API.list_prices))}


async def _prices(visit: PageRequest, found: PriceList) -> PageVariables:
    """Those in force and coming, then the past ones; all, or those for a model or with such a name,
    a part at a time."""
    model = visit.request.query_params.get("model", "")[:256].strip()
    rows = [
        row
        async for row in with_turns(found.prices)
        if model in row.model or matches(model, {row.model})
    ]
    rows.sort(key=lambda row: row.status == "past")
    part = part_of(visit, "prices", rows, "prices")
    return {**part, "model": model, "any_prices": bool(found.prices), **ABOUT_RATES}


def label(rate: str) -> str:
    """Return what people call a rate."""
    return rate.replace("_", " ").capitalize()


ABOUT_RATES = {
    "rates": {rate: f"{label(rate)} (per {UNITS.get(rate, 'million tokens')})" for rate in RATES},
    "rate_columns": [f"#{label(rate)}" for rate in RATES],
    "few": few,
}
PRICE_FIELDS = ("model", "tier", "above_input_tokens", "effective", "max_output_tokens", "source")


async def add_price(visit: PageRequest) -> PageVariables:
    """Add a price and tell what that means."""
    price = visit.fields(*PRICE_FIELDS, *RATES)
    added = await visit.do(API.add_prices, {"prices": [price], **visit.fields("without_notice")})
    done = "Price added." if added.added else "Nothing added: this price already applies."
    return {"done": " ".join([done, *told_of_prices(added)])}


async def notices(visit: PageRequest) -> PageVariables:
    """Those that hold or will, and the last that are over; the newest first."""
    now = iso_time(visit.now) or ""
    held: list[Notice] = []
    over: list[Notice] = []
    for each in reversed((await visit.ask(API.list_notices)).notices):
        is_over = each.withdrawn_at or (each.until or now) < now
        (over if is_over else held).append(each)
    return {"here": "Notices", **part_of(visit, "notices", held), "over": over[:ON_A_PAGE]}


async def add_notice(visit: PageRequest) -> None:
    """And, of a maintenance, whether requests are refused meanwhile."""
    body = visit.fields("kind", "text", "effective", "until")
    refuses = "true" if visit.form.get("refuses_requests") else "false"
    await visit.do(API.add_notice, {**body, "refuses_requests": refuses})


async def end_notice(visit: PageRequest) -> None:
    """Nobody is told it any more."""
    await visit.do(API.withdraw_notice, {}, notice=visit.form.get("notice", ""))


async def log(visit: PageRequest) -> PageVariables:
    """Every administrative change, or those of one account."""
    asked = visit.request.query_params
    query = {name: asked[name] for name in ("before", "account") if asked.get(name)}
    limit = {"limit": str(ON_A_PAGE + 1)}
    found = (await visit.ask(API.list_changes, query={**query, **limit})).changes
    changes, more = found[:ON_A_PAGE], len(found) > ON_A_PAGE
    of = query.get("account")
    return {
        "here": "Log",
        "account": await visit.ask(API.show_account, account=of) if of else None,
        "changes": [(each, subject(each), differences(each)) for each in changes],
        "older": urlencode({**query, "before": changes[-1].id}) if more else "",
    }


def subject(change: Change) -> str:
    """What people call what was changed; empty where they call it nothing."""
    about = change.after or change.before or {}
    names = ("name", "email", "label", "model", "text", "reference")
    return next((str(about[name]) for name in names if about.get(name)), "")[:100]


def differences(change: Change) -> list[tuple[str, Any, Any]]:
    """Of a change, each column that is not as it was: its name, before and after."""
    before, after = change.before or {}, change.after or {}
    return [
        (name.replace("_", " "), before.get(name), after.get(name))
        for name in dict.fromkeys((*before, *after))
        if before.get(name) != after.get(name)
    ]


async def users(visit: PageRequest) -> PageVariables:
    """Who may do everything."""
    return {"here": "Users", **part_of(visit, "users", await _users(visit)), "added": None}


async def add_user(visit: PageRequest) -> PageVariables:
    """Shows the link with which a password is set."""
    body = visit.fields("email", "role")
    if account := visit.request.path_params.get("account"):
        body["account"] = (await visit.ask(API.show_account, account=account)).name
    return {"added": await visit.do(API.add_user, body)}


async def _users(visit: PageRequest) -> list[UserShown]:
    """Whom this page is about: an account's members, or the operators."""
    account = visit.request.path_params.get("account")
    query = {"account": account} if account else {"role": "operator"}
    found: list[UserShown] = (await visit.ask(API.list_users, query=query)).users
    return found


async def _user(visit: PageRequest) -> str:
    """The id of the one that a form names, where it is one of them."""
    user_id = visit.form.get("user", "")
    if all(user.id != user_id for user in await _users(visit)):
        raise NotFound("this page lists no such user")
    return user_id


async def reset_user(visit: PageRequest) -> PageVariables:
    """A new link; the password and the sessions end."""
    return {"added": await visit.do(API.reset_user, {}, user=await _user(visit))}


async def remove_user(visit: PageRequest) -> None:
    """And log them out."""
    await visit.do(API.remove_user, {}, user=await _user(visit))


async def you(visit: PageRequest) -> PageVariables:
    """One's own password and sessions."""
    return {"here": "You", "sessions": (await visit.ask(API.list_sessions)).sessions}


async def end_session(visit: PageRequest) -> None:
    """Log out there."""
    await visit.do(API.end_session, {}, session=visit.form.get("session", ""))
