"""Commands: price, payment, notice."""

from __future__ import annotations

import tomllib
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import quote

import click
from msgspec import convert

from redbtc.billing.notices import few, slot_name, told_of_prices
from redbtc.billing.records import OtherPrice, PricesAdded
from redbtc.cli.accounts import _account
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


@commands.group()
def price() -> None:
    """What models cost, from when on. Prices are added, never changed."""


def notice_options(function: Decorated) -> Decorated:
    reason = click.option("--reason", help="Why, for the record.")
    without = click.option(
        "--without-notice", is_flag=True, help="Let a rise take effect early; needs --reason."
    )
    return without(reason(function))


def add_prices(
    context: CommandContext,
    prices: dict[str, Any],
    without_notice: bool,
    reason: str | None,
    as_json: bool,
) -> None:
    if without_notice != bool(reason):
        raise click.UsageError("--without-notice and --reason need each other")
    body = {**prices, **given({"without_notice": reason})}
    added = context.call("POST", "/admin/v1/prices", body)

    def text() -> str:
        counts = f"{added['added']} added, {added['unchanged']} unchanged."
        rows = [price_table(added["prices"]), ""] if added["added"] else []
        return "\n".join([*rows, counts, *map(plain, told_of_prices(convert(added, PricesAdded)))])

    show(added, as_json, text)


def rate_options(function: Decorated) -> Decorated:
    for name, rate in reversed(RATES.items()):
        option = "--" + name.replace("_", "-")
        function = click.option(option, name, metavar="AMOUNT", help=rate.help)(function)
    return function


@price.command("add")
@click.argument("model")
@rate_options
@click.option("--tier", help="Of responses that report this service tier.  [default: default]")
@click.option("--above-input-tokens", type=int, help="Of requests with more input than that.")
@click.option("--max-output-tokens", type=int, help="The most that the model says at once.")
@click.option("--effective", metavar="TIME", help="From then on; left out: now.")
@click.option("--source", help="Where it was read.")
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
    """Add the price of MODEL, a name or a shell pattern.

    To a model applies the most specific name or pattern that means it, and only that. Rates that
    are left out are those of the price that this one supersedes, or else of the one that applied
    to that name or pattern before. The output says what was taken over, which known models the
    price applies to, which later price will supersede it, and which notice was published.
    """
    add_prices(context, {"prices": [given(options)]}, without_notice, reason, as_json)


@price.command("import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@notice_options
@json_option
@click.pass_obj
def price_import(
    context: CommandContext, file: Path, as_json: bool, without_notice: bool, reason: str | None
) -> None:
    """Add the prices of a TOML file, all or none. Prices that are in force anyway are left out.

    The file says all: a rate that it leaves out is not given any more, whatever was in force.
    """
    prices = {**read_prices(file), "take_over": False}
    add_prices(context, prices, without_notice, reason, as_json)


def read_prices(file: Path) -> dict[str, Any]:
    """The tables of a price file as the API takes them: amounts as decimal strings, exactly as they
    stand in it. Raises UserError."""
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"), parse_float=Decimal)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not TOML: {error}") from None
    prices = tables.get("prices")
    if not isinstance(prices, list) or not all(isinstance(price, dict) for price in prices):
        raise UserError(f"{file}: needs an array 'prices' of tables")
    for price in prices:
        for name, value in price.items():
            if type(value) in (int, Decimal) and not name.endswith("_tokens"):
                price[name] = format(Decimal(value), "f")
    return tables


PRICE_COLUMNS = [
    "model",
    "tier",
    "above_input_tokens",
    "status",
    "effective_at",
    *RATES,
    "shadowed_by",
]


def price_table(rows: list[dict[str, Any]]) -> str:
    shadowed = ({**row, "shadowed_by": few(row["shadowed_by"]) or None} for row in rows)
    return table(shadowed, PRICE_COLUMNS)


@price.command("list")
@json_option
@click.pass_obj
def price_list(context: CommandContext, as_json: bool) -> None:
    """Past, current and coming prices.

    A rate of - was not given. `shadowed_by` are more specific names and patterns, whose prices
    apply to the models that they mean instead of this one.
    """
    found = context.call("GET", "/admin/v1/prices")
    show(found, as_json, lambda: price_table(found["prices"]))


@price.command("which")
@click.argument("model")
@click.option("--tier", help="Of a response that reports this service tier.  [default: default]")
@click.option("--input-tokens", type=int, help="Of a request with so many.  [default: 0]")
@click.option("--at", metavar="TIME", help="At that time; left out: now.")
@json_option
@click.pass_obj
def price_which(context: CommandContext, /, as_json: bool, **options: Any) -> None:
    """Show which price applies to MODEL, which others match it, and why they don't apply."""
    found = context.call("GET", "/admin/v1/prices/which", query=given(options))

    def text() -> str:
        lines = [price_table([found["applies"]])] if found["applies"] else []
        lines.append(found["why"])
        for each in found["others"]:
            other = convert(each, OtherPrice)
            since = "at" if other.status == "coming" else "since"
            about = f"{slot_name(other)}, {other.status} {since} {other.effective_at}"
            lines.append(f"Not {about}: {other.because}.")
        return "\n".join(lines)

    show(found, as_json, text)


@commands.group()
def payment() -> None:
    """What accounts have paid."""


# A negative amount must not be taken for an option.
@payment.command("add", context_settings={"ignore_unknown_options": True})
@click.argument("account")
@click.argument("amount")
@click.option("--reference", help="Sent again with the same reference, it is added once.")
@click.option("--reason", help="Of a refund or correction, which are negative.")
@json_option
@click.pass_obj
def payment_add(context: CommandContext, /, account: str, as_json: bool, **options: Any) -> None:
    """Write down a payment of an account, such as 25.00; a refund is negative."""
    added = context.call("POST", _account(account, "/payments"), given(options))
    money = "Payment of {amount} {currency} for {account} ({id}); the balance is {balance}."
    show(added, as_json, lambda: money.format(**added))


@payment.command("list")
@click.argument("account", required=False)
@json_option
@click.pass_obj
def payment_list(context: CommandContext, account: str | None, as_json: bool) -> None:
    """All payments, or an account's, oldest first."""
    path = _account(account, "/payments") if account else "/admin/v1/payments"
    found = context.call("GET", path)
    columns = ["created_at", "account", "amount", "currency", "reference", "reason", "id"]
    show(found, as_json, lambda: table(found["payments"], columns))


@commands.group()
def notice() -> None:
    """What users are told, on /status and by the API."""


@notice.command("add")
@click.argument("text")
@click.option(
    "--kind",
    type=click.Choice(["price", "terms", "maintenance", "incident"]),
    required=True,
    help="What it is about.",
)
@click.option("--effective", metavar="TIME", help="From when it holds; left out: now.")
@click.option("--until", metavar="TIME", help="Until when; left out: it has no end.")
@click.option(
    "--refuse-requests",
    "refuses_requests",
    is_flag=True,
    help="Of a maintenance: answer new requests with 503 while it lasts.",
)
@json_option
@click.pass_obj
def notice_add(context: CommandContext, /, as_json: bool, **options: Any) -> None:
    """Add a notice. New terms need billing.terms_notice_days of notice."""
    added = context.call("POST", "/admin/v1/notices", given(options))
    show(added, as_json, lambda: f"Notice {added['id']} added.")


@notice.command("list")
@json_option
@click.pass_obj
def notice_list(context: CommandContext, as_json: bool) -> None:
    """All notices."""
    found = context.call("GET", "/admin/v1/notices")
    columns = ["id", "kind", "account", "effective_at", "until", "withdrawn_at", "text"]
    show(found, as_json, lambda: table(found["notices"], columns))


@notice.command("withdraw")
@click.argument("notice_id")
@json_option
@click.pass_obj
def notice_withdraw(context: CommandContext, notice_id: str, as_json: bool) -> None:
    """Show a notice to nobody any more."""
    path = f"/admin/v1/notices/{quote(notice_id, safe='')}/withdraw"
    changed = context.call("POST", path)
    show(changed, as_json, lambda: f"Notice {changed['id']} is withdrawn.")
