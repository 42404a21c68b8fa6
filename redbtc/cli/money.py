"""The commands price, payment and notice."""

from __future__ import annotations

import tomllib
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import quote

import click
from msgspec import convert

from redbtc.billing.price_texts import few, slot_name, summary_of_added
from redbtc.billing.records import OtherPrice, PricesAdded
from redbtc.cli.accounts import path_of_account
from redbtc.cli.main import (
    CommandContext,
    Decorated,
    commands,
    given,
    json_option,
    plain,
    show,
    table,
)
from redbtc.errors import UserError
from redbtc.rates import RATES

MAX_RATE_DIGITS = 40


@commands.group()
def price() -> None:
    """Manage prices. Prices are added, never changed."""


def notice_options(function: Decorated) -> Decorated:
    reason = click.option(
        "--reason", help="Reason for --without-notice, kept in the log of changes."
    )
    without = click.option(
        "--without-notice",
        is_flag=True,
        help="Skip the notice period for price increases; requires --reason.",
    )
    return without(reason(function))


def post_prices(
    context: CommandContext,
    prices: dict[str, Any],
    without_notice: bool,
    reason: str | None,
    as_json: bool,
) -> None:
    if without_notice != bool(reason):
        raise click.UsageError("--without-notice and --reason must be used together")
    body = {**prices, **given({"without_notice": reason})}
    added = context.call("POST", "/admin/v1/prices", body)

    def text() -> str:
        counts = f"{added['added']} added, {added['unchanged']} unchanged."
        rows = [prices_text(added["prices"]), ""] if added["added"] else []
        return "\n".join(
            [*rows, counts, *map(plain, summary_of_added(convert(added, PricesAdded)))]
        )

    show(added, as_json, text)


def rate_options(function: Decorated) -> Decorated:
    for name, rate in reversed(RATES.items()):
        option = "--" + name.replace("_", "-")
        function = click.option(option, name, metavar="AMOUNT", help=rate.help)(function)
    return function


@price.command("add")
@click.argument("model")
@rate_options
@click.option("--tier", help="For responses that report this service tier.  [default: default]")
@click.option(
    "--above-input-tokens",
    type=int,
    help="Apply only to requests with more input tokens than this.",
)
@click.option(
    "--max-output-tokens", type=int, help="Maximum output tokens of the model per request."
)
@click.option("--effective", metavar="TIME", help="Start time.  [default: now]")
@click.option("--source", help="Where the price was found, such as a URL.")
@notice_options
@json_option
@click.pass_obj
def price_add(
    context: CommandContext,
    /,
    as_json: bool,
    without_notice: bool,
    reason: str | None,
    **options: Any,
) -> None:
    """Add a price for MODEL, a name or a shell pattern.

    For each model, only the most specific matching name or pattern applies. Rates that you leave
    out are copied from the price that this one replaces, or else from the one that applied to this
    name or pattern before; the defaults below count where there is none. The output says which
    rates were copied, which known models the price applies to, which later price will replace it,
    and which notice was published.
    """
    post_prices(context, {"prices": [given(options)]}, without_notice, reason, as_json)


@price.command("import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@notice_options
@json_option
@click.pass_obj
def price_import(
    context: CommandContext, file: Path, as_json: bool, without_notice: bool, reason: str | None
) -> None:
    """Add the prices in a TOML file, all or none. Unchanged prices are skipped.

    Rates that the file leaves out are not copied from earlier prices.
    """
    prices = {**read_prices(file), "take_over": False}
    post_prices(context, prices, without_notice, reason, as_json)


def read_prices(file: Path) -> dict[str, Any]:
    """Return the tables of a price file as the API takes them. Raises UserError."""
    try:
        return prices_in_toml(file.read_text(encoding="utf-8"), str(file))
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not valid TOML: {error}") from None


def prices_in_toml(text: str, name: str) -> dict[str, Any]:
    """Return the tables of a price file as the API takes them. Each rate is a decimal string, with
    exactly the digits in the file. `name` is the file's in messages. Raises UserError."""
    try:
        tables = tomllib.loads(text, parse_float=Decimal)
    except RecursionError:
        raise UserError(f"{name}: nested too deeply") from None
    except (ValueError, ArithmeticError) as error:
        raise UserError(f"{name}: not valid TOML: {error}") from None
    prices = tables.get("prices")
    if not isinstance(prices, list) or not all(isinstance(price, dict) for price in prices):
        raise UserError(f"{name}: no prices found; write each one as a [[prices]] table")
    for price in prices:
        for rate, value in price.items():
            if type(value) in (int, Decimal) and not rate.endswith("_tokens"):
                price[rate] = plain_decimal(Decimal(value))
    return tables


def plain_decimal(value: Decimal) -> str:
    """Return all digits of a number. One that has too many to be a rate is written with an
    exponent, which is refused later."""
    return format(value, "f") if abs(value.adjusted()) < MAX_RATE_DIGITS else str(value)


SLOT_COLUMNS = ["model", "tier", "above_input_tokens", "status", "effective_at"]


def prices_text(rows: list[dict[str, Any]]) -> str:
    """Return a table of prices, without the rates that none of them has."""
    shadowed = ({**row, "shadowed_by": few(row["shadowed_by"]) or None} for row in rows)
    rates = [name for name in RATES if any(row[name] is not None for row in rows)]
    return table(shadowed, [*SLOT_COLUMNS, *rates, "shadowed_by"])


@price.command("list")
@json_option
@click.pass_obj
def price_list(context: CommandContext, as_json: bool) -> None:
    """List past, current and coming prices.

    "-" means that a rate was not given; a rate that no price has is left out. `shadowed_by` lists
    more specific names and patterns: their prices apply to the models that they match, not this
    one.
    """
    found = context.call("GET", "/admin/v1/prices")
    show(found, as_json, lambda: prices_text(found["prices"]))


@price.command("which")
@click.argument("model")
@click.option("--tier", help="The service tier that the response reports.  [default: default]")
@click.option("--input-tokens", type=int, help="The number of input tokens.  [default: 0]")
@click.option("--at", metavar="TIME", help="The time of the request.  [default: now]")
@json_option
@click.pass_obj
def price_which(context: CommandContext, /, as_json: bool, **options: Any) -> None:
    """Show which price applies to MODEL. Says why other matching prices don't."""
    found = context.call("GET", "/admin/v1/prices/which", query=given(options))

    def text() -> str:
        lines = [prices_text([found["applies"]])] if found["applies"] else []
        lines.append(found["why"])
        for each in found["others"]:
            other = convert(each, OtherPrice)
            since = "at" if other.status == "coming" else "since"
            about = f"{slot_name(other)}, {other.status} {since} {other.effective_at}"
            lines.append(f"Does not apply: {about}: {other.because}.")
        return "\n".join(lines)

    show(found, as_json, text)


@price.command("missing")
@json_option
@click.pass_obj
def price_missing(context: CommandContext, as_json: bool) -> None:
    """List models that were asked for and refused since they have no price.

    Only names that an upstream offers are listed. A model disappears once it has a price."""
    found = context.call("GET", "/admin/v1/prices/missing")

    def text() -> str:
        rows = [
            {**each, "accounts": few([one["account"] for one in each["accounts"]])}
            for each in found["models"]
        ]
        columns = ["model", "requests", "first_at", "last_at", "accounts"]
        return table(rows, columns) if rows else "No model was refused since it has no price."

    show(found, as_json, text)


@commands.group()
def payment() -> None:
    """Manage payments."""


# A negative amount must not be taken for an option.
@payment.command("add", context_settings={"ignore_unknown_options": True})
@click.argument("account")
@click.argument("amount")
@click.option(
    "--reference",
    help="Optional ID. A payment with the same reference and amount is recorded once.",
)
@click.option("--reason", help="Required for a negative amount (a refund or correction).")
@json_option
@click.pass_obj
def payment_add(context: CommandContext, /, account: str, as_json: bool, **options: Any) -> None:
    """Record a payment, such as 25.00. Use a negative amount for a refund."""
    added = context.call("POST", path_of_account(account, "/payments"), given(options))
    money = "Recorded {amount} {currency} for {account} ({id}). Balance: {balance} {currency}."
    show(added, as_json, lambda: money.format(**added))


@payment.command("list")
@click.argument("account", required=False)
@json_option
@click.pass_obj
def payment_list(context: CommandContext, account: str | None, as_json: bool) -> None:
    """List all payments, or one account's, oldest first."""
    path = path_of_account(account, "/payments") if account else "/admin/v1/payments"
    found = context.call("GET", path)
    columns = ["created_at", "account", "amount", "currency", "reference", "reason", "id"]
    show(found, as_json, lambda: table(found["payments"], columns))


@commands.group()
def notice() -> None:
    """Manage notices. Users see them on /status, in the dashboard and in the API."""


@notice.command("add")
@click.argument("text")
@click.option(
    "--kind",
    type=click.Choice(["price", "terms", "maintenance", "incident"]),
    required=True,
    help="Kind of notice.",
)
@click.option("--effective", metavar="TIME", help="Start time.  [default: now]")
@click.option("--until", metavar="TIME", help="End time.  [default: no end]")
@click.option(
    "--refuse-requests",
    "refuses_requests",
    is_flag=True,
    help="Maintenance only: reject new requests with 503 during the window.",
)
@json_option
@click.pass_obj
def notice_add(context: CommandContext, /, as_json: bool, **options: Any) -> None:
    """Publish a notice. New terms need billing.terms_notice_days days of notice."""
    added = context.call("POST", "/admin/v1/notices", given(options))
    show(added, as_json, lambda: f"Notice {added['id']} published.")


@notice.command("list")
@json_option
@click.pass_obj
def notice_list(context: CommandContext, as_json: bool) -> None:
    """List all notices."""
    found = context.call("GET", "/admin/v1/notices")
    columns = ["id", "kind", "account", "effective_at", "until", "withdrawn_at", "text"]
    show(found, as_json, lambda: table(found["notices"], columns))


@notice.command("withdraw")
@click.argument("notice_id")
@json_option
@click.pass_obj
def notice_withdraw(context: CommandContext, notice_id: str, as_json: bool) -> None:
    """Withdraw a notice."""
    path = f"/admin/v1/notices/{quote(notice_id, safe='')}/withdraw"
    changed = context.call("POST", path)
    show(changed, as_json, lambda: f"Notice {changed['id']} withdrawn.")
