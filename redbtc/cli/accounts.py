"""The commands account and key."""

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
from redbtc.usage import KINDS


@commands.group()
def account() -> None:
    """Manage accounts."""


@account.command("add")
@click.argument("name")
@click.option("--email", help="Contact email.")
@limit_options(ACCOUNT_LIMITS)
@json_option
@click.pass_obj
def account_add(context: CommandContext, /, name: str, as_json: bool, **options: Any) -> None:
    """Create an account. Unset limits fall back to config.toml."""
    added = context.call("POST", "/admin/v1/accounts", {"name": name, **given(options)})
    show(added, as_json, lambda: f"Account {added['name']} created ({added['id']}).")


@account.command("list")
@json_option
@click.pass_obj
def account_list(context: CommandContext, as_json: bool) -> None:
    """List all accounts."""
    found = context.call("GET", "/admin/v1/accounts")
    columns = ["name", "id", "status", "balance", "spent_this_month", *ACCOUNT_LIMITS]
    columns += ["throttle_factor", "keys_in_force", "created_at"]
    columns += ["closing_asked_at", "terminated_at", "erase_at", "erased_at"]
    show(found, as_json, lambda: table(found["accounts"], columns))


def path_of_account(name: str, action: str = "") -> str:
    """Return the path of an account in the admin API, or of an action on it."""
    return f"/admin/v1/accounts/{quote(name, safe='')}{action}"


@account.command("show")
@click.argument("name")
@json_option
@click.pass_obj
def account_show(context: CommandContext, name: str, as_json: bool) -> None:
    """Show an account, by name or id. "-" means the default from config.toml."""
    found = context.call("GET", path_of_account(name))
    show(found, as_json, lambda: details(found))


@account.command("set")
@click.argument("name")
@click.option("--email", help="Contact email.")
@limit_options(ACCOUNT_LIMITS)
@json_option
@click.pass_obj
def account_set(context: CommandContext, /, name: str, as_json: bool, **options: Any) -> None:
    """Change an account. Takes effect on its next request. Use `default` to go back to the value
    from config.toml."""
    if not given(options):
        raise click.UsageError("nothing to change: give at least one option (see --help)")
    changed = context.call("PATCH", path_of_account(name), given(options))
    show(changed, as_json, lambda: details(changed))


@account.command("suspend")
@click.argument("name")
@click.option("--reason", help="Why. Visible to operators only.")
@json_option
@click.pass_obj
def account_suspend(context: CommandContext, name: str, reason: str | None, as_json: bool) -> None:
    """Suspend an account: refuse its requests and log its members out."""
    changed = context.call("POST", path_of_account(name, "/suspend"), {"reason": reason})
    show(changed, as_json, lambda: f"Account {changed['name']} suspended.")


@account.command("resume")
@click.argument("name")
@json_option
@click.pass_obj
def account_resume(context: CommandContext, name: str, as_json: bool) -> None:
    """Resume a suspended account."""
    changed = context.call("POST", path_of_account(name, "/resume"))
    show(changed, as_json, lambda: f"Account {changed['name']} resumed.")


@account.command("throttle")
@click.argument("name")
@click.option(
    "--factor", required=True, help="Fraction of the limits, such as 0.25. 1 removes the throttle."
)
@click.option("--until", metavar="TIME", help="End time.  [default: until removed]")
@json_option
@click.pass_obj
def account_throttle(context: CommandContext, /, name: str, as_json: bool, **options: Any) -> None:
    """Temporarily reduce an account's limits."""
    changed = context.call("POST", path_of_account(name, "/throttle"), given(options))

    def text() -> str:
        factor, until = changed["throttle_factor"], changed["throttled_until"]
        if factor is None:
            return f"Account {changed['name']} is no longer throttled."
        end = f"until {until}" if until else "until removed"
        return f"Account {changed['name']} throttled to {factor} of its limits {end}."

    show(changed, as_json, text)


@commands.group()
def key() -> None:
    """Manage API keys. A key is shown once and stored as a hash."""


def shown_once(added: dict[str, Any]) -> str:
    return f"{added['key']}\n\nKey {added['id']} created. Copy it now: it won't be shown again."


@key.command("add")
@click.argument("account")
@click.option("--label", help="A name to recognise the key by.")
@click.option(
    "--expires",
    metavar="TIME",
    help="Expiry time, such as 2026-12-31T00:00:00Z or 90d.  [default: never]",
)
@click.option(
    "--models", metavar="PATTERNS", help='Allowed models, such as "gpt-5*,codex*".  [default: all]'
)
@limit_options(KEY_LIMITS)
@json_option
@click.pass_obj
def key_add(context: CommandContext, /, account: str, as_json: bool, **options: Any) -> None:
    """Create a key for an account and print it. It is shown only once."""
    added = context.call("POST", path_of_account(account, "/keys"), given(options))
    show(added, as_json, lambda: shown_once(added))


@key.command("list")
@click.argument("account")
@json_option
@click.pass_obj
def key_list(context: CommandContext, account: str, as_json: bool) -> None:
    """List an account's keys."""
    found = context.call("GET", path_of_account(account, "/keys"))
    times = ["created_at", "expires_at", "revoked_at", "last_used_on"]
    columns = ["id", "label", "models", *KEY_LIMITS, "budget_id", *times]
    show(found, as_json, lambda: table(found["keys"], columns))


@key.command("revoke")
@click.argument("key_id")
@click.option(
    "--compromised", is_flag=True, help="The key was leaked: also stop its requests in flight."
)
@json_option
@click.pass_obj
def key_revoke(context: CommandContext, key_id: str, compromised: bool, as_json: bool) -> None:
    """Revoke a key. Takes effect on its next request."""
    path = f"/admin/v1/keys/{quote(key_id, safe='')}/revoke"
    changed = context.call("POST", path, {"compromised": compromised})
    cut = f" Requests in flight stopped: {changed['cut']}." if compromised else ""
    show(changed, as_json, lambda: f"Key {changed['id']} revoked.{cut}")


@key.command("rotate")
@click.argument("key_id")
@click.option(
    "--overlap", default="24h", show_default=True, help="How long the old key keeps working."
)
@json_option
@click.pass_obj
def key_rotate(context: CommandContext, key_id: str, overlap: str, as_json: bool) -> None:
    """Replace a key with a new one and print it.

    The new key has the same options. The old key stops working after the overlap. Both keys share
    the old key's monthly budget."""
    path = f"/admin/v1/keys/{quote(key_id, safe='')}/rotate"
    added = context.call("POST", path, {"overlap": overlap})
    show(added, as_json, lambda: shown_once(added))


@key.command("compromised")
@click.argument("key_id")
@click.option(
    "--since",
    metavar="TIME",
    default="24h",
    show_default=True,
    help="List what the key did since then: ISO 8601, or a duration ago.",
)
@click.option("--no-new-key", is_flag=True, help="Do not replace the key.")
@json_option
@click.pass_obj
def key_compromised(
    context: CommandContext, key_id: str, since: str, no_new_key: bool, as_json: bool
) -> None:
    """Revoke a leaked key, stop its requests, print a new one, and list what it did.

    The new key has the same options and budget. If the key was not in force any more, there is no
    new one: give the command as often as you like."""
    path = f"/admin/v1/keys/{quote(key_id, safe='')}/compromised"
    found = context.call("POST", path, {"since": since, "new_key": not no_new_key})
    show(found, as_json, lambda: compromised_text(found))


def compromised_text(found: dict[str, Any]) -> str:
    """Return what was done about a leaked key, and what the key did."""
    parts = [f"Key {found['key']['id']} revoked as compromised. Requests stopped: {found['cut']}."]
    if not found["was_in_force"]:
        parts.append("It was not in force any more, so there is no new key.")
    if added := found["new_key"]:
        parts.append(shown_once(added))
    parts += [f"Key {each} is a related key, still in force." for each in found["also_in_force"]]
    activity = found["activity"]
    if activity is None:
        return "\n\n".join([*parts, "What it did could not be read in time. Give a later --since."])
    outcomes = ", ".join(f"{count} {name}" for name, count in activity["outcomes"].items())
    facts = {
        "since": activity["since"],
        "first request": activity["first_request_at"],
        "last request": activity["last_request_at"],
        "requests": activity["totals"]["requests"],
        "outcomes": outcomes or None,
        "cost": f"{activity['totals']['cost']} {activity['totals']['currency']}",
    }
    parts.append(details(facts))
    if erased := activity["erased_before"]:
        what = f"Requests that started before {erased} were erased"
        parts.append(f"{what}: they are only in the sums.")
    used = [kind for kind in KINDS if activity["totals"][kind]]
    if models := activity["models"]:
        parts.append(table(models, ["model", "requests", *used, "cost"]))
    if latest := activity["latest"]:
        columns = ["started_at", "requested_model", "outcome", *used, "cost"]
        parts.append(f"Latest requests\n{table(latest, columns)}")
    return "\n\n".join(parts)
