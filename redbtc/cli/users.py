"""The command user."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import click

from redbtc.cli.main import CommandContext, Decorated, commands, given, json_option, show, table


@commands.group()
def user() -> None:
    """Manage dashboard logins."""


def link_text(added: dict[str, Any]) -> str:
    until = added["link_expires_at"]
    text = f"Send this link to {added['email']} to set a password. It works once, until {until}."
    return f"{added['link']}\n\n{text}"


@user.command("add")
@click.argument("email")
@click.option("--operator", is_flag=True, help="Full access to everything.")
@click.option("--account", metavar="NAME", help="Owner of this account.")
@click.option("--viewer", is_flag=True, help="Read-only member of the account.")
@json_option
@click.pass_obj
def user_add(
    context: CommandContext,
    email: str,
    operator: bool,
    account: str | None,
    viewer: bool,
    as_json: bool,
) -> None:
    """Add a login and print a one-time link to set its password."""
    if operator == bool(account) or (operator and viewer):
        raise click.UsageError("use --operator, or --account NAME, optionally with --viewer")
    role = "operator" if operator else "viewer" if viewer else "owner"
    body = given({"email": email, "role": role, "account": account})
    added = context.call("POST", "/admin/v1/users", body)
    show(added, as_json, lambda: link_text(added))


@user.command("list")
@json_option
@click.pass_obj
def user_list(context: CommandContext, as_json: bool) -> None:
    """List all logins, operators first."""
    found = context.call("GET", "/admin/v1/users")
    columns = ["email", "role", "account", "password_set_at", "link_expires_at", "id"]
    show(found, as_json, lambda: table(found["users"], columns))


def which_user(function: Decorated) -> Decorated:
    """Add the options that choose one of several logins of one address."""
    account = click.option(
        "--account", metavar="NAME", help="Which login: the one of this account."
    )
    operator = click.option("--operator", is_flag=True, help="Which login: the operator's.")
    return account(operator(function))


def _which(account: str | None, operator: bool) -> dict[str, str]:
    return given({"account": account, "operator": "true" if operator else None})


@user.command("remove")
@click.argument("email")
@which_user
@json_option
@click.pass_obj
def user_remove(
    context: CommandContext, email: str, account: str | None, operator: bool, as_json: bool
) -> None:
    """Remove a login and end its sessions."""
    path = f"/admin/v1/users/{quote(email, safe='')}"
    removed = context.call("DELETE", path, query=_which(account, operator))
    show(removed, as_json, lambda: f"User {removed['email']} removed.")


@user.command("reset")
@click.argument("email")
@which_user
@json_option
@click.pass_obj
def user_reset(
    context: CommandContext, email: str, account: str | None, operator: bool, as_json: bool
) -> None:
    """Reset a login. Its password and sessions end, and a new one-time link is printed."""
    path = f"/admin/v1/users/{quote(email, safe='')}/reset"
    added = context.call("POST", path, query=_which(account, operator))
    show(added, as_json, lambda: link_text(added))
