"""The page of an account's settings, which its owner decides on: request logging, the export of its
data, and closing the account."""

from __future__ import annotations

from redbtc.dashboard.account_pages import account_base
from redbtc.dashboard.page_request import PageRequest
from redbtc.dashboard.rendering import PageVariables
from redbtc.dashboard.screens import Actions
from redbtc.dashboard.settings_closing import CLOSING_ACTIONS
from redbtc.dashboard.settings_export import download_export
from redbtc.dashboard.settings_log import LOG_ACTIONS, log_variables


async def settings_page(page: PageRequest) -> PageVariables:
    """Show what the owner can decide."""
    return {**await account_base(page, "Settings"), **await log_variables(page)}


SETTINGS_ACTIONS: Actions = {**LOG_ACTIONS, **CLOSING_ACTIONS, "export": download_export}
