"""Commands: account, key."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import click

from redbtc.cli.main import (
    CommandContext,
    commands,
    details,
    given,
    json_option,
    limit_options,
    show,
    table,
)
from redbtc.store.accounts import ACCOUNT_LIMITS, KEY_LIMITS


@commands.group()
def account() -> None:
    """Who may use the gateway."""


@account.command("add")
@click.argument("name")
@click.option("--email", help="Whom to write to.")
@limit_options(ACCOUNT_LIMITS)
@json_option
@click.pass_obj
def account_add(context: CommandContext, /, name: str, as_json: bool, **options: Any) -> None:
    """Add an account. Limits that are left out are the settings'."""
    added = context.call("POST", "/admin/v1/accounts", {"name": name, **given(options)})
    show(added, as_json, lambda: f"Account {added['name']} added ({added['id']}).")


@account.command("list")
@json_option
@click.pass_obj
def account_list(context: CommandContext, as_json: bool) -> None:
    """All accounts."""
    found = context.call("GET", "/admin/v1/accounts")
    columns = ["name", "id", "status", "balance", "spent_this_month", *ACCOUNT_LIMITS]
    columns += ["throttle_factor", "keys_in_force", "created_at"]
    show(found, as_json, lambda: table(found["accounts"], columns))


def _account(name: str, action: str = "") -> str:
    return f"/admin/v1/accounts/{quote(name, safe='')}{action}"


@account.command("show")
@click.argument("name")
@json_option
@click.pass_obj
def account_show(context: CommandContext, name: str, as_json: bool) -> None:
    """One account, by its name or id. A limit of - is the settings'."""
    found = context.call("GET", _account(name))
    show(found, as_json, lambda: details(found))


@account.command("set")
@click.argument("name")
@click.option("--email", help="Whom to write to.")
@limit_options(ACCOUNT_LIMITS)
@json_option
@click.pass_obj
def account_set(context: CommandContext, /, name: str, as_json: bool, **options: Any) -> None:
    """Change an account, from its next request on. `default`: what the settings say."""
    if not given(options):
        raise click.UsageError("say what to change; --help lists what can be")
    changed = context.call("PATCH", _account(name), given(options))
    show(changed, as_json, lambda: details(changed))


@account.command("suspend")
@click.argument("name")
@click.option("--reason", help="Why; shown to operators.")
@json_option
@click.pass_obj
def account_suspend(context: CommandContext, name: str, reason: str | None, as_json: bool) -> None:
    """Refuse an account's requests from the next one on."""
    changed = context.call("POST", _account(name, "/suspend"), {"reason": reason})
    show(changed, as_json, lambda: f"Account {changed['name']} is suspended.")


@account.command("resume")
@click.argument("name")
@json_option
@click.pass_obj
def account_resume(context: CommandContext, name: str, as_json: bool) -> None:
    """Serve a suspended account again."""
    changed = context.call("POST", _account(name, "/resume"))
    show(changed, as_json, lambda: f"Account {changed['name']} is active.")


@account.command("throttle")
@click.argument("name")
@click.option("--factor", required=True, help="The part of its limits that is left; 1 lifts it.")
@click.option("--until", metavar="TIME", help="Until then; left out: until it is lifted.")
@json_option
@click.pass_obj
def account_throttle(context: CommandContext, /, name: str, as_json: bool, **options: Any) -> None:
    """Hold an account to a part of its limits, from its next request on."""
    changed = context.call("POST", _account(name, "/throttle"), given(options))

    def text() -> str:
        factor, until = changed["throttle_factor"], changed["throttled_until"]
        if factor is None:
            return f"Account {changed['name']} has all of its limits."
        return f"Account {changed['name']} has {factor} of its limits until {until or 'lifted'}."

    show(changed, as_json, text)


@commands.group()
def key() -> None:
    """API keys: shown once, stored as hashes."""


def shown_once(added: dict[str, Any]) -> str:
    return f"{added['key']}\n\nKey {added['id']}, shown this once: store it now."


@key.command("add")
@click.argument("account")
@click.option("--label", help="What its owner calls it.")
@click.option("--expires", metavar="TIME", help="2026-12-31T00:00:00Z, or 90d from now.")
@click.option("--models", metavar="PATTERNS", help='Only these: "gpt-5*,codex*".')
@limit_options(KEY_LIMITS)
@json_option
@click.pass_obj
def key_add(context: CommandContext, /, account: str, as_json: bool, **options: Any) -> None:
    """Add a key to an account and print it, once."""
    added = context.call("POST", _account(account, "/keys"), given(options))
    show(added, as_json, lambda: shown_once(added))


@key.command("list")
@click.argument("account")
@json_option
@click.pass_obj
def key_list(context: CommandContext, account: str, as_json: bool) -> None:
    """An account's keys."""
    found = context.call("GET", _account(account, "/keys"))
    times = ["created_at", "expires_at", "revoked_at", "last_used_on"]
    columns = ["id", "label", "models", *KEY_LIMITS, "budget_id", *times]
    show(found, as_json, lambda: table(found["keys"], columns))


@key.command("revoke")
@click.argument("key_id")
@click.option("--compromised", is_flag=True, help="Somebody else has it: cut what runs, too.")
@json_option
@click.pass_obj
def key_revoke(context: CommandContext, key_id: str, compromised: bool, as_json: bool) -> None:
    """Refuse a key from the next request on."""
    path = f"/admin/v1/keys/{quote(key_id, safe='')}/revoke"
    changed = context.call("POST", path, {"compromised": compromised})
    cut = f" Requests cut: {changed['cut']}." if compromised else ""
    show(changed, as_json, lambda: f"Key {changed['id']} is revoked.{cut}")


@key.command("rotate")
@click.argument("key_id")
@click.option("--overlap", default="24h", show_default=True, help="How long the old key goes on.")
@json_option
@click.pass_obj
def key_rotate(context: CommandContext, key_id: str, overlap: str, as_json: bool) -> None:
    """Print a new key like the old one, which ends after the overlap.

    The new key goes on with the old one's monthly budget: what both spend counts together.
    """
    path = f"/admin/v1/keys/{quote(key_id, safe='')}/rotate"
    added = context.call("POST", path, {"overlap": overlap})
    show(added, as_json, lambda: shown_once(added))
