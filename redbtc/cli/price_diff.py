"""The command price diff."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click
import msgspec
from msgspec import UNSET, convert

from redbtc.admin.api_money import prices_of
from redbtc.admin.inputs import NewPrices
from redbtc.admin.validation import invalid
from redbtc.billing.price_diff import ChangedPrice, Comparison, ListProblem, PriceDiff, ToCompare
from redbtc.billing.price_lists import (
    LIST_CURRENCY,
    ListedModel,
    PriceListing,
    read_json_list,
)
from redbtc.billing.price_table import PriceTable
from redbtc.billing.price_texts import few, json_rates, slot_name
from redbtc.billing.prices import Price
from redbtc.billing.records import ModelsInUse, PriceList, PriceShown, PriceSlot
from redbtc.cli.main import CommandContext, json_option, plain, show, table
from redbtc.cli.money import price, prices_in_toml
from redbtc.cli.price_sources import LITELLM_URL, read_price_list
from redbtc.codex.config_toml import toml_string
from redbtc.errors import UserError
from redbtc.money import parse_amount
from redbtc.rates import DEFAULT_TIER, RATES
from redbtc.times import parse_time

DIFFERENCES = 3  # the exit status with --exit-code
MAX_SHOWN_PROBLEMS = 20
MAX_SOURCE = 500  # characters


@price.command("diff")
@click.argument("source", metavar="[FILE|URL]", default=LITELLM_URL)
@click.option(
    "--provider",
    default="openai",
    show_default=True,
    help="The provider whose prices are read, as the list names it.",
)
@click.option(
    "--all", "every_model", is_flag=True, help="Also show models without a price that nobody used."
)
@click.option("--toml", "as_toml", is_flag=True, help="Print TOML for `price import` instead.")
@click.option(
    "--to",
    "file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write TOML for `price import` to this file, which must not exist.",
)
@click.option(
    "--exit-code", is_flag=True, help=f"Exit with {DIFFERENCES} if there are differences."
)
@json_option
@click.pass_obj
def price_diff(
    context: CommandContext,
    source: str,
    provider: str,
    every_model: bool,
    as_toml: bool,
    file: Path | None,
    exit_code: bool,
    as_json: bool,
) -> None:
    """Show what a list of prices would change. Nothing is changed.

    The list is LiteLLM's price map, models.dev's api.json or a TOML file for `price import`, from a
    file, an https URL or standard input ("-"). Without one, LiteLLM's price map is fetched from
    GitHub. Only models that have a price or were requested in the last 90 days are compared.
    """
    if as_toml and as_json:
        raise click.UsageError("use either --toml or --json, not both")
    compared = compare_with(context, source, provider, every_model)
    toml = toml_of(compared.comparison.changed, compared)
    if file:
        write_list(file, toml)
    found = compared.result()
    if as_toml:
        click.echo(toml, nl=False)
    else:
        show(msgspec.to_builtins(found), as_json, lambda: "\n".join(lines_of(found, file)))
    if exit_code and found.changes:
        raise SystemExit(DIFFERENCES)


class ComparedList(msgspec.Struct):
    """A comparison, with what its output names. `at` is the ledger's time in milliseconds."""

    comparison: Comparison
    source: str
    currency: str
    notice_days: int
    at: int

    def result(self) -> PriceDiff:
        """Return the result, for JSON."""
        return self.comparison.result(self.source, self.currency)


def compare_with(
    context: CommandContext, source: str, provider: str, every_model: bool
) -> ComparedList:
    """Compare the gateway's prices with a list. Raises UserError."""
    text = read_price_list(source)
    in_use = convert(context.call("GET", "/admin/v1/prices/in-use"), ModelsInUse)
    rows = convert(context.call("GET", "/admin/v1/prices"), PriceList).prices
    at = parse_time(in_use.at, 0, relative_to_past=True)
    listing = read_listing(text, source, provider, in_use.currency, at)
    comparison = Comparison(known_prices(rows, in_use), listing, every_model)
    return ComparedList(comparison, source, in_use.currency, in_use.notice_days, at)


def known_prices(rows: Sequence[PriceShown], in_use: ModelsInUse) -> ToCompare:
    """Return what to compare with a list, from answers of the admin API."""
    current, coming = (
        [price_shown(row) for row in rows if row.status == status]
        for status in ("current", "coming")
    )
    return ToCompare(
        PriceTable(current),
        coming,
        frozenset(in_use.models),
        in_use.unpriced_models == "free",
        parse_time(in_use.at, 0, relative_to_past=True),
        in_use.notice_days,
    )


def read_listing(text: str, source: str, provider: str, currency: str, at: int) -> PriceListing:
    """Return the prices of a list of any kind. Raises UserError."""
    if text.lstrip().startswith("{"):
        if currency != LIST_CURRENCY:
            raise UserError(
                f"the list is in {LIST_CURRENCY}, but billing.currency is {currency}, so they "
                "can't be compared"
            )
        return read_json_list(text, provider)
    return toml_listing(prices_in_toml(text, source), source, currency, at)


def toml_listing(tables: dict[str, Any], source: str, currency: str, at: int) -> PriceListing:
    """Return the prices of a file for `price import`. Its times are ignored. Raises UserError."""
    try:
        given = convert(tables, NewPrices)
    except msgspec.ValidationError as error:
        raise UserError(f"{source}: {invalid(error)}") from None
    if given.currency not in (None, currency):
        raise UserError(
            f"the list is in {given.currency}, but billing.currency is {currency}, so they can't "
            "be compared"
        )
    models: dict[str, ListedModel] = {}
    maxima: dict[str, int] = {}
    for each in prices_of(given, at):
        slots = models.setdefault(each.model, {})
        slot = each.slot[1:]
        if slot in slots:
            name = slot_name(PriceSlot(*each.slot))
            raise UserError(f"{source}: there are two prices of {name}; leave one of them")
        slots[slot] = {name: value for name, value in each.given.items() if name in RATES}
        if slot == (DEFAULT_TIER, 0) and each.max_output_tokens:
            maxima[each.model] = each.max_output_tokens
    return PriceListing("TOML", models, maxima, {}, {}, is_complete=True)


def price_shown(row: PriceShown) -> Price:
    """Return a price of the admin API, in force since the beginning of time."""
    rates: dict[str, Any] = {
        name: parse_amount(found)
        for name in RATES
        if (found := getattr(row, name)) not in (None, UNSET)
    }
    shown = Price(
        row.model, row.tier, row.above_input_tokens, max_output_tokens=row.max_output_tokens
    )
    return msgspec.structs.replace(shown, **rates)


# Output


DIFF_COLUMNS = ["model", "tier", "above_input_tokens", "rate", "now", "then", "change"]


def lines_of(found: PriceDiff, file: Path | None) -> list[str]:
    """Return the result for people."""
    rows = [
        {
            **msgspec.structs.asdict(each),
            "rate": rate.rate,
            "now": rate.now,
            "then": rate.then,
            "change": "new" if each.is_new else rate.change_percent and f"{rate.change_percent} %",
        }
        for each in found.changes
        for rate in each.rates
    ]
    lines = [table(rows, DIFF_COLUMNS), ""] if rows else []
    counts = f"{len(found.changes)} prices differ from those of the list, {found.unchanged} do not."
    lines += [f"Compared with {plain(found.source)} ({found.kind}).", counts]
    for each in found.changes:
        if each.needs_notice:
            why = "; ".join(each.rises) or "takes effect together with the others of its model"
            lines.append(
                f"{plain(slot_name(each))}: needs a notice ({why}). It can be in force from "
                f"{each.in_force_from} on."
            )
    if found.announced:
        lines.append(f"Announced already: {plain(few([*map(slot_name, found.announced)]))}.")
    if found.not_in_list:
        lines.append(f"Not in the list, and left as they are: {plain(few(found.not_in_list))}.")
    lines += [f"Left out {shown_problem(each)}." for each in found.problems[:MAX_SHOWN_PROBLEMS]]
    if (more := len(found.problems) - MAX_SHOWN_PROBLEMS) > 0:
        lines.append(f"Left out {more} more; --json lists them.")
    if file:
        name = shlex.quote(str(file))
        lines.append(f"Wrote {file}. Check it, then run: redbtc-proxy price import {name}")
    elif found.changes:
        lines.append("Nothing was changed. To get a file for price import, add --to FILE.")
    return lines


def shown_name(name: str) -> str:
    """Return a name of a list for the terminal."""
    return name if name.isprintable() else repr(name)


def shown_problem(problem: ListProblem) -> str:
    """Return what is left out, and why."""
    slot = PriceSlot(
        shown_name(problem.model), problem.tier or DEFAULT_TIER, problem.above_input_tokens or 0
    )
    return f"{slot_name(slot)}: {plain(problem.problem)}"


def toml_of(changed: list[ChangedPrice], compared: ComparedList) -> str:
    """Return a file for `price import` that makes these changes. A price that needs a notice takes
    effect at a midnight that leaves a day for the import."""
    today = datetime.fromtimestamp(compared.at / 1000, UTC)
    later = today + timedelta(days=compared.notice_days + 2)
    effective = f"{later:%Y-%m-%d}T00:00:00Z"
    name = plain(compared.source.encode(errors="replace").decode())
    source = f"{name}, {today:%Y-%m-%d}"[-MAX_SOURCE:]
    lines = [
        f"# What changes with the prices of {name}",
        f"# (price diff, {today:%Y-%m-%d}). Check it, then run redbtc-proxy price import FILE.",
        "# A price with `effective` is an increase for a model in use, which needs a notice.",
        "",
        f"currency = {toml_string(compared.currency)}",
        f"source = {toml_string(source)}",
        "",
        "prices = [",
        *(f"  {inline_table(each, effective)}," for each in changed),
        "]",
    ]
    return "\n".join(lines) + "\n"


def inline_table(changed: ChangedPrice, effective: str) -> str:
    """Return a price as a table of TOML in one line. Amounts have all their digits."""
    new = changed.price
    parts = [f"model = {toml_string(new.model)}"]
    if new.tier != DEFAULT_TIER:
        parts.append(f"tier = {toml_string(new.tier)}")
    if new.above_input_tokens:
        parts.append(f"above_input_tokens = {new.above_input_tokens}")
    if changed.difference.needs_notice:
        parts.append(f"effective = {toml_string(effective)}")
    parts += [f"{name} = {value}" for name, value in json_rates(new.given).items()]
    return f"{{ {', '.join(parts)} }}"


def write_list(path: Path, text: str) -> None:
    """Write a file that does not exist. Raises UserError."""
    content = text.encode()
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        with open(file, "wb") as opened:
            opened.write(content)
    except FileExistsError:
        raise UserError(f"{path} exists; choose another file, or remove it") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
