"""The pages of an account: overview, members, notices, and what operators manage."""

from __future__ import annotations

from redbtc.admin.actors import RANKS, Rank
from redbtc.admin.api import API
from redbtc.billing.document_files import DOCUMENT_TITLES
from redbtc.billing.statements import Statement
from redbtc.dashboard.charts import stacked
from redbtc.dashboard.page_request import PageRequest
from redbtc.dashboard.parts import ACCOUNT_FIELDS, by_day, last_days, paginated, user_table
from redbtc.dashboard.rendering import PageVariables

# The pages of an account in the order of their tabs, with the lowest role that may see each.
TABS: dict[str, Rank] = {
    "Overview": "viewer",
    "Keys": "viewer",
    "Usage": "viewer",
    "Billing": "viewer",
    "Members": "owner",
    "Notices": "viewer",
    "Settings": "owner",
    "Manage": "operator",
}


async def account_base(page: PageRequest, tab: str) -> PageVariables:
    """Return the variables that all pages of an account need (account_base.html). Raises
    UserError."""
    account = await page.ask(API.show_account, account=page.path["account"])
    rank = RANKS[page.actor.rank]
    return {
        "here": "Accounts",
        "tab": tab,
        "tabs": [each for each, min_rank in TABS.items() if rank >= RANKS[min_rank]],
        "account": account,
        "path": f"/dashboard/accounts/{account.id}",
        "may_change": rank >= RANKS["owner"],
    }


async def statement_of(page: PageRequest, account: str, month: str, lines: int) -> Statement:
    """Return a month's statement with at most `lines` lines of usage. Raises UserError."""
    query = {"limit": lines}
    return await page.do(API.statement, query, account=account, month=month)


# The overview

MAX_NOTICES = 5
MEASURES = {"cost": "Cost", "requests": "Requests", "output_tokens": "Output tokens"}


async def account_overview_page(page: PageRequest) -> PageVariables:
    """Show the account's balance, usage, limits and latest notices."""
    base = await account_base(page, "Overview")
    account = base["account"]
    account_id, month = account.id, account.month
    days = last_days(page.now)
    query = {"account": account_id, "since": days[0], "group_by": "day,model", "top": "10"}
    used = await page.do(API.usage, query)
    measure = page.query.get("show", "cost")
    measure = measure if measure in MEASURES else "cost"
    series = by_day(used.groups, days, "model", measure)
    notices = (await page.ask(API.account_notices, account=account_id)).notices
    unit = account.currency if measure == "cost" else MEASURES[measure].lower()
    return {
        **base,
        "month": (await statement_of(page, account_id, month, 0)).totals,
        "limits": await page.ask(API.account_limits, account=account_id),
        "notices": notices[-MAX_NOTICES:][::-1],
        "more_notices": max(0, len(notices) - MAX_NOTICES),
        "groups": used.groups,
        "measure": measure,
        "measures": MEASURES,
        "chart": stacked(
            f"{unit} by day and model", "Last 30 days.", days, series, unit=unit, prefix="a"
        ),
    }


# Members and notices


async def members_page(page: PageRequest) -> PageVariables:
    """Show the account's members, and the documents that its owners have accepted."""
    base = await account_base(page, "Members")
    found = await page.ask(API.list_acceptances, account=base["account"].id)
    accepted = paginated(page, "accepted", found.acceptances, "accepted")
    return {**base, **await user_table(page), **accepted, "titles": DOCUMENT_TITLES}


async def account_notices_page(page: PageRequest) -> PageVariables:
    """Show the notices to the account, newest first."""
    base = await account_base(page, "Notices")
    found = (await page.ask(API.account_notices, account=base["account"].id)).notices
    return {**base, **paginated(page, "notices", found[::-1])}


# What operators manage


async def manage_page(page: PageRequest) -> PageVariables:
    """Show the forms with which operators change the account."""
    return await account_base(page, "Manage")


async def set_account(page: PageRequest) -> None:
    """Set the account's address, limits and budgets. A limit that is left empty is the one of the
    settings."""
    body = {name: page.form.get(name, "").strip() or None for name in ACCOUNT_FIELDS}
    await page.do(API.set_account, body, account=page.path["account"])


async def suspend_account(page: PageRequest) -> None:
    """Suspend the account for a reason that operators see."""
    await page.do(API.suspend_account, page.fields("reason"), account=page.path["account"])


async def resume_account(page: PageRequest) -> None:
    """Resume the account after a suspension."""
    await page.ask(API.resume_account, account=page.path["account"])


async def throttle_account(page: PageRequest) -> None:
    """Throttle the account to a fraction of its limits."""
    await page.do(
        API.throttle_account, page.fields("factor", "until"), account=page.path["account"]
    )


async def record_payment(page: PageRequest) -> None:
    """Record a payment or a refund."""
    body = page.fields("amount", "reference", "reason")
    await page.do(API.add_payment, body, account=page.path["account"])


MANAGE_ACTIONS = {
    "set": set_account,
    "suspend": suspend_account,
    "resume": resume_account,
    "throttle": throttle_account,
    "pay": record_payment,
}
