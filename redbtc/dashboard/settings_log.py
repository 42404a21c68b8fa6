"""Request logging on the page of an account's settings."""

from __future__ import annotations

from redbtc.admin.api import API
from redbtc.dashboard.formats import counted
from redbtc.dashboard.key_page import selected_key
from redbtc.dashboard.page_request import PageRequest
from redbtc.dashboard.rendering import PageVariables

MAX_OFFERED_KEYS = 200  # for which logging can be switched on


async def log_variables(page: PageRequest) -> PageVariables:
    """Return the variables of the part of the page about request logging."""
    account = page.path["account"]
    log = await page.ask(API.show_request_log, account=account)
    keys = (await page.ask(API.list_keys, account=account)).keys
    in_force = [key for key in keys if key.revoked_at is None]
    return {
        "log": log,
        "log_keys": in_force[-MAX_OFFERED_KEYS:],
        "may_switch_on": page.actor.rank == "owner" or not log.has_owner,
    }


async def switch_log_on(page: PageRequest) -> None:
    """Keep bodies of further requests, of the whole account or of one key."""
    body = page.fields("days")
    if page.form.get("of_key"):
        body["key"] = await selected_key(page, "of_key")
    await page.do(API.set_request_log, body, account=page.path["account"])


async def switch_log_off(page: PageRequest) -> PageVariables | None:
    """Keep no bodies of further requests. If that is asked for, erase those that are stored, and
    say of how many requests."""
    body = {"days": None, "purge": "true" if page.form.get("purge") else "false"}
    if page.form.get("of_key"):
        body["key"] = await selected_key(page, "of_key")
    done = await page.do(API.set_request_log, body, account=page.path["account"])
    if not isinstance(done.erased_requests, int):
        return None
    return {"done": f"Bodies of {counted(done.erased_requests, 'request')} erased."}


LOG_ACTIONS = {"log_on": switch_log_on, "log_off": switch_log_off}
