"""Draw templates, and show numbers, times and browsers."""

from __future__ import annotations

import re
import secrets
import shlex
from collections.abc import Mapping, MutableMapping
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import jinja2.meta
import orjson

from redbtc.admin.actors import Invalid
from redbtc.errors import UserError
from redbtc.money import digits_of, money
from redbtc.slices import with_turns

PAGE = re.compile("[1-9][0-9]{0,5}")


HERE = Path(__file__).resolve().parent


def exact(amount: str | None, currency: str) -> str:
    """All its digits, and at least the currency's; a dash where it is not known."""
    if amount is None:
        return "–"
    whole, _, fraction = amount.partition(".")
    fraction = fraction.ljust(digits_of(currency), "0")
    sign, whole = ("-", whole[1:]) if whole.startswith("-") else ("", whole)
    return f"{sign}{int(whole):,}{'.' * bool(fraction)}{fraction}"


def aligned(amount: str | None, currency: str) -> str:
    """The same, so that the points of a column stand below each other: filled up with spaces as
    wide as a digit."""
    digits = exact(amount, currency)
    _, point, fraction = digits.partition(".")
    return digits + "\u2007" * (9 - len(fraction) + (not point)) if amount else digits


def count(number: int | None) -> str:
    """Return a number with thousands separators, or a dash for None."""
    return "–" if number is None else f"{number:,}"


def counted(number: int, noun: str) -> str:
    """Return a number and its noun: 1 account, 2 accounts."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def percent(fraction: str) -> str:
    """Return a fraction as a percentage: 25 % for 0.25."""
    return f"{(Decimal(fraction) * 100).normalize():f} %"


def month_name(month: str) -> str:
    """Return a month for people: November 2026 for 2026-11."""
    return f"{date.fromisoformat(f'{month}-01'):%B %Y}"


def size(number: int) -> str:
    """Of bytes."""
    amount, unit = float(number), "B"
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if amount < 1000 or unit == "TB":
            break
        amount /= 1000
    return f"{amount:.3g} {unit}"


MOMENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


def duration(seconds: int) -> str:
    """Return a duration in its two largest units: 2 days 3 hours."""
    minutes, hours, days = seconds // 60 % 60, seconds // 3600 % 24, seconds // 86400
    units = (days, "day"), (hours, "hour"), (minutes, "minute")
    parts = [counted(number, unit) for number, unit in units if number]
    return " ".join(parts[:2]) or "less than a minute"


def utc(moment: str, digits: int = 16) -> str:
    """As it stands on a page before a script puts it into the reader's zone: to the minute, or with
    19 to the second."""
    return f"{moment[:10]} {moment[11:digits]} UTC"


BROWSERS = {"Edg/": "Edge", "OPR/": "Opera", "Firefox": "", "Chrome": "", "Safari": ""}
SYSTEMS = {"Android": "", "iPhone": "", "iPad": "", "Windows": "", "Mac OS": "macOS", "Linux": ""}


def browser(agent: str) -> str:
    """What a User-Agent header tells people: Firefox on Linux; else its first word."""
    name, system = (
        next((called or mark for mark, called in known.items() if mark in agent), "")
        for known in (BROWSERS, SYSTEMS)  # of the names that it goes by, the first here
    )
    return f"{name} on {system}" if name and system else agent.partition(" ")[0] or "unknown"


def literal(text: str) -> str:
    """A string as JSON has it, which Python, JavaScript and TOML read as the same."""
    return orjson.dumps(text).decode()


class Loader(jinja2.FileSystemLoader):
    """Compiles with a template those that it names, so that none is while it is drawn."""

    def load(
        self,
        environment: jinja2.Environment,
        name: str,
        globals: MutableMapping[str, Any] | None = None,
    ) -> jinja2.Template:
        source, path, _ = self.get_source(environment, name)
        parsed = environment.parse(source, name, path)
        for other in filter(None, jinja2.meta.find_referenced_templates(parsed)):
            environment.get_template(other)
        code = environment.compile(parsed, name, path)
        return environment.template_class.from_code(environment, code, globals or {})


def environment() -> jinja2.Environment:
    """The templates; what they print is escaped."""
    found = jinja2.Environment(
        loader=Loader(HERE / "templates"),
        autoescape=True,
        auto_reload=False,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters.update(
        money=money, exact=exact, count=count, size=size, utc=utc, duration=duration
    )
    found.filters.update(counted=counted, percent=percent, month_name=month_name)
    found.filters.update(aligned=aligned, literal=literal, shell=shlex.quote, browser=browser)
    found.tests["moment"] = lambda value: isinstance(value, str) and bool(MOMENT.fullmatch(value))
    found.globals["once"] = lambda: secrets.token_hex(8)
    return found


async def draw(template: jinja2.Template, context: Mapping[str, Any]) -> bytes:
    """A page."""
    parts = [part async for part in with_turns(template.generate(context))]
    return "".join(parts).encode("utf-8", "replace")


def sentence(text: str) -> str:
    """A message as pages show it; a name that it begins with stays as it is."""
    first = text.partition(" ")[0]
    return f"{text[:1].upper() if first.isalpha() else text[:1]}{text[1:]}."


def explanation(error: UserError) -> dict[str, Any]:
    """Why a form was refused, and which of its fields was wrong, where it was one."""
    if isinstance(error, Invalid) and error.field:
        what = error.what.removesuffix(", got `str`")
        if what.startswith("Object missing"):
            what = f"{error.field} is required"
        return {"problem": sentence(what), "wrong": error.field}
    return {"problem": sentence(str(error))}
