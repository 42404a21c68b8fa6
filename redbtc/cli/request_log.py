"""The commands account log and usage show."""

from __future__ import annotations

import sys
from typing import Any
from urllib.parse import quote

import click

from redbtc.cli.accounts import account, path_of_account
from redbtc.cli.main import CommandContext, cell, details, json_option, show, table
from redbtc.cli.usage import usage
from redbtc.errors import UserError

READING_COLUMNS = ["at", "by", "request_id", "body"]
LOGGED_KEY_COLUMNS = ["id", "label", "log_days", "set_at", "set_by"]


@account.command("log")
@click.argument("name")
@click.option("--days", type=click.IntRange(1), help="Keep bodies of requests for N days.")
@click.option("--off", is_flag=True, help="Keep no bodies of further requests.")
@click.option("--key", metavar="KEY_ID", help="Only for the requests of this key.")
@click.option("--purge", is_flag=True, help="With --off: also erase the stored bodies.")
@json_option
@click.pass_obj
def account_log(
    context: CommandContext,
    name: str,
    days: int | None,
    off: bool,
    key: str | None,
    purge: bool,
    as_json: bool,
) -> None:
    """Show or change whether bodies of an account's requests are kept.

    Takes effect on the next request. If the account has an owner, only the owner can switch this
    on, on the settings page. What is stored stays until it expires, unless --purge erases it."""
    if days and off:
        raise click.UsageError("use either --days or --off, not both")
    if purge and not off:
        raise click.UsageError("--purge can be used only with --off")
    if key and not (days or off):
        raise click.UsageError("--key can be used only with --days or --off")
    path = path_of_account(name, "/request-log")
    if days or off:
        found = context.call("PATCH", path, {"days": days, "key": key, "purge": purge})
    else:
        found = context.call("GET", path)
    show(found, as_json, lambda: log_text(found))


def log_text(found: dict[str, Any]) -> str:
    days = found["log_days"]
    lines = {
        "account": found["account"],
        "request logging": f"on, for {days} days" if days else "off",
        "since": found["set_at"],
        "by": found["set_by"],
        "maximum days": found["max_days"],
        "requests stored": found["requests"],
        "oldest": found["oldest"],
    }
    if "erased_requests" in found:
        lines["requests erased"] = found["erased_requests"]
    parts = [details(lines)]
    parts += ["Keys\n" + table(found["keys"], LOGGED_KEY_COLUMNS)] if found["keys"] else []
    readings = found["readings"]
    parts += ["Last readings\n" + table(readings, READING_COLUMNS)] if readings else []
    return "\n\n".join(parts)


@usage.command("show")
@click.argument("request_id")
@click.option("--request", "body", flag_value="request", help="Print the stored request body.")
@click.option("--response", "body", flag_value="response", help="Print the stored response body.")
@json_option
@click.pass_obj
def usage_show(context: CommandContext, request_id: str, body: str | None, as_json: bool) -> None:
    """Show a request, and whether its bodies are stored.

    --request and --response print a stored body exactly, and nothing else, on standard output. Each
    reading is in the log of changes, and its account's owner sees it."""
    path = f"/admin/v1/requests/{quote(request_id, safe='')}"
    if body and as_json:
        raise click.UsageError("a body is printed as it is: leave out --json")
    found = context.call("GET", path)
    if body is None:
        show(found, as_json, lambda: request_text(found))
        return
    stored = (found["bodies"] or {}).get(body)
    if stored is None:
        raise UserError(f"nothing is stored of the {body} body of {request_id}")
    context.copy(f"{path}/bodies/{body}", None, sys.stdout.buffer)
    sys.stdout.buffer.flush()
    if note := missing_text(stored):
        click.echo(f"Note: the {body} body is {note}.", err=True)


def request_text(found: dict[str, Any]) -> str:
    """Return a request's row, and what is stored of it, for the terminal."""
    bodies = found["bodies"]
    lines = dict(found["request"])
    if bodies is None:
        lines["bodies"] = "not stored"
    else:
        incomplete = "" if bodies["is_complete"] else "; parts are missing, or it has not ended"
        lines["bodies"] = f"stored until {bodies['expires_at']}{incomplete}"
        lines["request body"] = body_text(bodies["request"])
        lines["response body"] = body_text(bodies["response"])
    return details(lines)


def body_text(stored: dict[str, Any] | None) -> str:
    if stored is None:
        return "not stored"
    missing, encoding = missing_text(stored), stored["encoding"]
    parts = [f"{stored['bytes']} bytes", encoding and f"compressed with {encoding}", missing]
    return cell(", ".join(filter(None, parts)))


def missing_text(stored: dict[str, Any]) -> str:
    """Return what is missing of a stored body, an empty text if nothing is."""
    if stored["withheld"]:
        return "withheld, since a key or a credential is in it"
    if stored["stored_bytes"] < stored["bytes"]:
        return f"cut off: the first {stored['stored_bytes']} of {stored['bytes']} bytes are stored"
    return ""
