"""The mark of a database file of this program, and the versions of its tables."""

from __future__ import annotations

import re
from collections.abc import Iterable

from redbtc.config import shipped
from redbtc.rates import RATES
from redbtc.usage import KINDS

APPLICATION_ID = 0x52424343  # marks the file as ours
REQUEST_LOG = "request_log.db"  # the file with the bodies of requests, beside the ledger
REQUEST_LOG_ID = 0x52424C47  # marks it
SECTION = re.compile(r"^-- version (\d+)$", re.MULTILINE)
TRIGGERS = "\n-- triggers\n"
REPEATED = {"{kind}": KINDS, "{rate}": tuple(RATES)}


def schema() -> str:
    """Return the text of schema.sql."""
    return shipped("schema.sql").read_text(encoding="utf-8")


def migrations(text: str) -> dict[int, str]:
    """Return the sections of schema.sql by the version that each brings the database to. The
    newest one also makes the triggers at the end of the file."""
    sections, _, triggers = text.partition(TRIGGERS)
    parts = SECTION.split(sections)
    scripts = {int(number): script for number, script in zip(parts[1::2], parts[2::2], strict=True)}
    scripts[max(scripts)] += written_out(triggers)
    return scripts


def written_out(triggers: str) -> str:
    """Return the triggers with each line that has a word of REPEATED once for each of its names."""
    lines = triggers.split("\n")
    for word, names in REPEATED.items():
        lines = [each for line in lines for each in repeated(line, word, names)]
    return "\n".join(lines)


def repeated(line: str, word: str, names: Iterable[str]) -> list[str]:
    """Return the line with each name in place of the word, or just the line if it has no such
    word."""
    return [line.replace(word, name) for name in names] if word in line else [line]


def newest_version() -> int:
    """Return the version of the schema that this program writes."""
    return max(migrations(schema()))
