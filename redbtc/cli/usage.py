"""The commands usage and statement."""

from __future__ import annotations

import sys
from typing import Any
from urllib.parse import quote

import click
from msgspec import convert

from redbtc.billing.csv import csv_lines, statement_lines
from redbtc.billing.statements import Statement
from redbtc.cli.accounts import path_of_account
from redbtc.cli.main import CommandContext, commands, details, given, json_option, show, table
from redbtc.money import decimal, digits_of, parse_amount
from redbtc.usage import failure_text

USAGE_COLUMNS = [
    "started_at",
    "account",
    "requested_model",
    "status",
    "outcome",
    "usage_source",
    "input_tokens",
    "cached_input_tokens",
    "output_tokens",
    "cost",
    "duration_ms",
]
ERASED_NOTE = (
    "The requests before {} were erased (retention.usage_days). Only their sums by day are left, "
    "without failures."
)
OF_FAILURE = ("outcome", "attempts", "upstream_status", "upstream_error_code")
SUM_COLUMNS = [
    "requests",
    "estimated",
    "unreported",
    "input_tokens",
    "cached_input_tokens",
    "output_tokens",
    "cost",
]


@commands.group(invoke_without_command=True)
@click.option("--account", help="Filter by account.")
@click.option("--key", help="Filter by key id.")
@click.option("--model", help="Filter by model (shell pattern).")
@click.option(
    "--since", metavar="TIME", help="Start time: ISO 8601, or a duration ago, such as 24h."
)
@click.option("--until", metavar="TIME", help="End time (exclusive).")
@click.option(
    "--failed",
    is_flag=True,
    default=None,
    help="Only requests whose upstream failed or answered with an error.",
)
@click.option(
    "--failure",
    metavar="CODE",
    help="Only those that failed with this error code, cause or HTTP status, such as 429.",
)
@click.option("--limit", type=click.IntRange(1), help="Show the newest N requests.")
@click.option(
    "--group-by", metavar="NAMES", help="Sum by day, model, key or account, such as day,model."
)
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
@json_option
@click.pass_context
def usage(click_context: click.Context, /, as_csv: bool, as_json: bool, **filters: Any) -> None:
    """List requests or, with --group-by, sums of them.

    These are the requests that reached an upstream, oldest first. Totals cover the whole range,
    whatever the limit."""
    if click_context.invoked_subcommand:
        if as_csv or as_json or given(filters):
            raise click.UsageError("put the options after the name of the command")
        return
    context: CommandContext = click_context.obj
    one_form(as_csv, as_json)
    grouped = filters["group_by"] is not None
    if grouped and filters["limit"]:
        raise click.UsageError("--limit can't be used with --group-by")
    path = "/admin/v1/usage" if grouped else "/admin/v1/requests"
    if as_json:
        context.copy(path, given(filters), sys.stdout.buffer)
        click.echo()
        return
    found = context.call("GET", path, query=given(filters))
    rows = found["groups" if grouped else "requests"]
    labels = [name for name in rows[0] if name not in found["totals"]] if rows else []
    columns = [*labels, *SUM_COLUMNS] if grouped else USAGE_COLUMNS
    totals = {name: value for name, value in found["totals"].items() if value is not None}
    if as_csv:
        click.echo("".join(csv_lines(rows)), nl=False)
    else:
        if not grouped:
            rows, columns = with_failures(rows, columns)
        click.echo(f"{table(rows, columns)}\n\nTotals\n{details(totals)}")
    if erased := found["erased_before"]:
        click.echo(ERASED_NOTE.format(erased), err=True)


def with_failures(
    rows: list[dict[str, Any]], columns: list[str]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the rows and columns of the table of requests with a column `failure`, if one of them
    failed at its upstream or was tried more than once."""
    failures = [failure_text(*(row[name] for name in OF_FAILURE)) or None for row in rows]
    if not any(failures):
        return rows, columns
    at = columns.index("outcome") + 1
    shown = [{**row, "failure": found} for row, found in zip(rows, failures, strict=True)]
    return shown, [*columns[:at], "failure", *columns[at:]]


def one_form(as_csv: bool, as_json: bool) -> None:
    if as_csv and as_json:
        raise click.UsageError("use either --csv or --json, not both")


@commands.command("statement")
@click.argument("account")
@click.argument("month", metavar="YYYY-MM")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
@json_option
@click.pass_obj
def show_statement(
    context: CommandContext, account: str, month: str, as_csv: bool, as_json: bool
) -> None:
    """Show an account's statement for a month.

    It has the opening balance, usage by day and model, payments, the closing balance, and payments
    in the last three months."""
    one_form(as_csv, as_json)
    found = context.call("GET", path_of_account(account, f"/statements/{quote(month, safe='')}"))
    if as_csv:
        click.echo("".join(csv_lines(statement_lines(convert(found, Statement)))), nl=False)
    else:
        show(found, as_json, lambda: statement_text(found))


CORRECTION_AMOUNTS = ("before", "after", "difference")


def statement_text(found: dict[str, Any]) -> str:
    totals, currency = found["totals"], found["currency"]
    lately = [
        f"{month} {full_amount(paid, currency)}" for month, paid in found["paid_by_month"].items()
    ]
    paid_lately = full_amount(found["paid_last_three_months"], currency)
    summary = {
        "opening balance": full_amount(found["opening_balance"], currency),
        "payments": full_amount(totals["paid"], currency),
        "usage": full_amount(totals["cost"], currency),
        "closing balance": full_amount(found["closing_balance"], currency),
        "requests": totals["requests"],
        "requests estimated": totals["estimated"],
        "requests without usage": totals["unreported"],
        "paid, last 3 months": f"{paid_lately} ({', '.join(lately)})",
    }
    used = [{**row, "cost": full_amount(row["cost"], currency)} for row in found["usage"]]
    paid = [{**row, "amount": full_amount(row["amount"], currency)} for row in found["payments"]]
    state = "closed" if found["closed"] else "in progress"
    parts = [f"{found['account']}, {found['month']}, {state}, in {currency}"]
    parts.append(details(summary))
    parts += [table(used, ["day", "model", *SUM_COLUMNS])] if used else []
    right = [
        {**row, **{name: full_amount(row[name], currency) for name in CORRECTION_AMOUNTS}}
        for row in found["corrections"]
    ]
    parts += [table(right, ["request_id", "day", *CORRECTION_AMOUNTS])] if right else []
    parts += [table(paid, ["created_at", "amount", "reference", "reason"])] if paid else []
    return "\n\n".join(parts)


def full_amount(amount: str, currency: str) -> str:
    """Return an amount with at least as many digits after the point as the currency has."""
    return decimal(parse_amount(amount), digits_of(currency))
