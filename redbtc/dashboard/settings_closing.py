"""The forms that close an account: an owner asks for it, and an operator does it."""

from __future__ import annotations

from redbtc.admin.actors import Invalid
from redbtc.admin.api import API
from redbtc.dashboard.formats import counted
from redbtc.dashboard.page_request import PageRequest
from redbtc.dashboard.rendering import PageVariables
from redbtc.dashboard.screens import Actions


async def require_name(page: PageRequest) -> None:
    """Raise Invalid unless the account's name was typed into the form."""
    account = await page.ask(API.show_account, account=page.path["account"])
    if page.form.get("name", "").strip() != account.name:
        raise Invalid(f"type the account's name to confirm: {account.name}", "$.name")


async def ask_on_page(page: PageRequest) -> None:
    """Ask for the account to be closed."""
    await require_name(page)
    await page.ask(API.ask_for_closing, account=page.path["account"])


async def keep_open(page: PageRequest) -> None:
    """Withdraw the wish to close the account."""
    await page.ask(API.withdraw_closing, account=page.path["account"])


async def terminate_account(page: PageRequest) -> PageVariables:
    """Terminate the account, and say how many of its requests were cut."""
    await require_name(page)
    done = await page.do(API.terminate_account, {}, account=page.path["account"])
    cut = counted(done.cut, "request")
    return {"done": f"Account terminated. {cut} in flight stopped."}


CLOSING_ACTIONS: Actions = {"close": ask_on_page, "keep": keep_open}
TERMINATING_ACTIONS: Actions = {"terminate": terminate_account}
