"""The dashboard's pages: their names, and how to read a table and fill in a form."""

from __future__ import annotations

import re
from collections.abc import Callable

from playwright.sync_api import Page

PAGES = [
    *("", "/keys", "/usage", "/billing", "/billing/2026-11", "/members", "/notices", "/settings"),
    "/manage",
]
OPERATORS_PAGES = ["overview", "accounts", "prices", "notices", "log", "users", "webhook"]


def cells(text: str, caption: str) -> list[list[str]]:
    """Return the rows of the table with a caption, as text."""
    table = text.partition(f"<caption>{caption}")[2].partition("</table>")[0]
    rows = table.partition("<tbody>")[2].split("</tr>")[:-1]
    found = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in rows]
    return [[re.sub(r"<[^>]+>", "", cell).strip() for cell in row] for row in found]


def fill_in(button: str, **fields: str) -> Callable[[Page], None]:
    """Return what fills in a form, which may be closed, and sends it. Fields are named by ids."""

    def then(page: Page) -> None:
        wanted = page.get_by_role("button", name=button, exact=True, include_hidden=True)
        for closed in page.locator("details:not([open])").filter(has=wanted).all():
            closed.locator("summary").click()
        for name, text in fields.items():
            page.locator(f"#{name.replace('__', '-')}").fill(text)
        page.get_by_role("button", name=button, exact=True).click()

    return then
