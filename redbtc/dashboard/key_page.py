"""The page of an account's keys."""

from __future__ import annotations

from typing import NamedTuple

from redbtc.admin.api import API
from redbtc.dashboard.account_pages import account_base
from redbtc.dashboard.page_request import PageRequest
from redbtc.dashboard.parts import paginated
from redbtc.dashboard.rendering import PageVariables
from redbtc.errors import NotFound
from redbtc.slices import with_turns
from redbtc.store.accounts import KeyAdded, KeyInList
from redbtc.times import iso_time
from redbtc.usage import KINDS

KEY_FIELDS = (
    "label",
    "models",
    "expires",
    "monthly_budget",
    "concurrency",
    "requests_per_minute",
    "tokens_per_minute",
)


class KeyOnPage(NamedTuple):
    """A key, and whether it is active, expired or revoked."""

    key: KeyInList
    state: str

    @classmethod
    def of(cls, key: KeyInList, now: str) -> KeyOnPage:
        """Return the key with its state at a time."""
        expired = key.expires_at is not None and key.expires_at <= now
        return cls(key, "revoked" if key.revoked_at else "expired" if expired else "active")


async def keys_page(page: PageRequest) -> PageVariables:
    """Show active keys, then the others, newest first."""
    base = await account_base(page, "Keys")
    found = (await page.ask(API.list_keys, account=base["account"].id)).keys
    now = iso_time(page.now) or ""
    keys = [KeyOnPage.of(key, now) async for key in with_turns(reversed(found))]
    keys.sort(key=lambda each: each.state != "active")
    return {**base, **paginated(page, "keys", keys), "added": None, "compromised": None}


async def add_key(page: PageRequest) -> PageVariables:
    """Add a key to the account and show it."""
    body = page.fields(*KEY_FIELDS)
    return await show_new_key(page, await page.do(API.add_key, body, account=page.path["account"]))


async def rotate_key(page: PageRequest) -> PageVariables:
    """Replace a key by a new one and show that."""
    body = page.fields("overlap")
    return await show_new_key(
        page, await page.do(API.rotate_key, body, key=await selected_key(page))
    )


async def show_new_key(page: PageRequest, added: KeyAdded) -> PageVariables:
    """Return the variables that show a new key, which is possible only now, with code samples."""
    url, host = page.request.url, page.request.headers.get("host", "")
    base_url = f"{url.scheme}://{host}/v1"
    return {
        "added": added,
        "base_url": base_url,
        "model": await page.example_model(added.models),
        "codex_config": await page.codex_config(added.models, base_url),
    }


async def revoke_key(page: PageRequest) -> None:
    """Revoke the key that a form selects."""
    await page.do(API.revoke_key, {}, key=await selected_key(page))


async def report_compromised(page: PageRequest) -> PageVariables:
    """Revoke the leaked key that a form selects, and show the new key and what the old one did."""
    body = page.fields("since")
    found = await page.do(API.compromise_key, body, key=await selected_key(page))
    new = await show_new_key(page, found.new_key) if found.new_key else {}
    totals = found.activity.totals if found.activity else None
    used = [kind for kind in KINDS if getattr(totals, kind, None)]
    return {"compromised": found, "used_kinds": used, **new}


async def selected_key(page: PageRequest, field: str = "key") -> str:
    """Return the id of the key that a field of a form selects. Raises NotFound if the account has
    no such key."""
    found = (await page.ask(API.list_keys, account=page.path["account"])).keys
    key_id = page.form.get(field, "")
    if all(key.id != key_id for key in found):
        raise NotFound("this account has no such key")
    return key_id


KEY_ACTIONS = {
    "add": add_key,
    "rotate": rotate_key,
    "revoke": revoke_key,
    "compromised": report_compromised,
}
