"""Increases of rates when prices are added, and the notices of them.

Models in use must not become more expensive without notice, so the prices before and after are
compared for each model at each time at which one of its prices takes effect. Accounts can read the
notices; a model that has no price of its own is named by the pattern that matches it, because what
one account has asked for is not for others to read.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from redbtc.billing.model_patterns import matches, specificity
from redbtc.billing.model_prices import FREE, risen_rates
from redbtc.billing.price_table import PriceTable
from redbtc.billing.records import NOTICE_TEXT
from redbtc.errors import UserError
from redbtc.slices import with_turns
from redbtc.times import iso_time


class Compared(NamedTuple):
    """The models and times to compare when prices are added."""

    models: list[str]  # names and patterns, the most specific first
    times: list[int]  # in milliseconds, the earliest first
    used: set[str]  # the models in use
    named: set[str]  # the names and patterns that have prices
    added: set[str]  # the names and patterns of the added prices

    def public_name(self, model: str) -> str:
        """Return the name of a model in a notice."""
        if model in self.named or model in self.added:
            return model
        return min((each for each in self.added if matches(model, {each})), key=specificity)


class Rise(NamedTuple):
    """Rates of a model that are higher from a time on than they would be otherwise."""

    at: int  # milliseconds
    model: str
    public_name: str
    rates: str  # such as "input from 5 to 6"
    in_use: bool


async def rising_models(
    before: PriceTable, after: PriceTable, compared: Compared, unpriced_are_free: bool
) -> list[Rise]:
    """Return what costs more with the prices `after` than with those `before`, by time."""
    rises = []
    for at in compared.times:
        async for model in with_turns(compared.models):
            in_use = model in compared.used
            old = before.model_prices(model, at)
            if old is None and in_use and unpriced_are_free:
                old = FREE
            if rates := risen_rates(old, after.model_prices(model, at), unpriced_are_free):
                name = compared.public_name(model)
                rises.append(Rise(at, model, name, "; ".join(rates), in_use))
    return rises


def refuse_early(rises: Iterable[Rise], due: int, notice_days: int) -> None:
    """Raise UserError if a model in use would cost more before `due` (milliseconds)."""
    for rise in rises:
        if rise.in_use and rise.at < due:
            raise UserError(
                f"{rise.model} is in use and would cost more from {iso_time(rise.at)}: "
                f"{rise.rates}. A price increase needs {notice_days} days of notice "
                "(billing.price_notice_days), or a reason to skip the notice period"
            )


def texts_of(rises: Iterable[Rise], times: Iterable[int], currency: str) -> list[tuple[int, str]]:
    """Return the texts of notices about price increases, each after the time from which on it
    holds. A rise that still holds at the next one of the `times` is not repeated."""
    lines_at: dict[int, dict[str, str]] = {at: {} for at in times}
    for rise in rises:
        line = f"{rise.public_name}: {rise.rates}"
        lines_at[rise.at].setdefault(rise.public_name, line)
    texts, published = [], dict[str, str]()
    for at, lines in lines_at.items():
        new = [line for name, line in lines.items() if published.get(name) != line]
        texts += [(at, text) for text in _joined(new, currency)]
        published = lines
    return texts


def _joined(lines: Iterable[str], currency: str) -> list[str]:
    """Return as few texts as hold all the lines, in at most NOTICE_TEXT characters each."""
    texts: list[str] = []
    for line in lines:
        if texts and len(texts[-1]) + len(line) + 3 <= NOTICE_TEXT:
            texts[-1] += f" {line}."
        else:
            texts.append(f"Price increase ({currency} per million tokens). {line}.")
    return [text[:NOTICE_TEXT] for text in texts]
