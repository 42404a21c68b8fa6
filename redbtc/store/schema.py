"""What marks a database file as one of this program, and the versions of its tables."""

from __future__ import annotations

import re

from redbtc.config import shipped

APPLICATION_ID = 0x52424343  # marks the file as ours
SECTION = re.compile(r"^-- version (\d+)$", re.MULTILINE)


def schema() -> str:
    """The text of schema.sql."""
    return shipped("schema.sql").read_text(encoding="utf-8")


def migrations(text: str) -> dict[int, str]:
    """The sections of schema.sql by the version that each brings the database to."""
    parts = SECTION.split(text)
    return {int(number): script for number, script in zip(parts[1::2], parts[2::2], strict=True)}


def newest_version() -> int:
    """Return the version of the schema that this program writes."""
    return max(migrations(schema()))
