"""The events of the log and their fields, as docs/operating.md has them in tables."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).resolve().parents[2] / "docs" / "operating.md"
EVERY_LINE = {"time", "level", "event", "lines_dropped_before"}
ROW = re.compile(r"^\| `([^`]+)` \| ([a-z, ]+) \|(.*?)\|", re.MULTILINE)


class DocumentedEvent(NamedTuple):
    """The levels and fields that an event may have, and the fields that it always has. `is_open`
    is whether it may have any others."""

    levels: frozenset[str]
    always: frozenset[str]
    fields: frozenset[str]
    is_open: bool


@functools.cache
def documented_events() -> dict[str, DocumentedEvent]:
    section = PAGE.read_text().partition("\n## The log\n")[2].partition("\n## ")[0]
    return dict(_events(section))


def _events(section: str) -> Iterator[tuple[str, DocumentedEvent]]:
    names = ("debug", "info", "warning", "error", "critical")
    for event, levels, fields in ROW.findall(section):
        first, is_range, last = levels.partition(" to ")
        found = set(levels.split(", "))
        if is_range:
            found = set(names[names.index(first) : names.index(last) + 1])
        always = re.findall(r"`(\w+)`", re.sub(r"\(.*?\)", "", fields))
        every = re.findall(r"`(\w+)`", fields)
        yield (
            event,
            DocumentedEvent(frozenset(found), frozenset(always), frozenset(every), "…" in fields),
        )


def undocumented(log: str) -> list[str]:
    """Return what lines of a log have that the page does not say."""
    wrong = set()
    for text in log.splitlines():
        if not text.startswith('{"time":'):
            continue
        try:
            line = json.loads(text)
        except ValueError:  # the process was killed while it wrote
            continue
        event = documented_events().get(line["event"])
        if event is None:
            wrong.add(f"{line['event']}: no such event")
            continue
        fields = line.keys() - EVERY_LINE
        if line["level"] not in event.levels:
            wrong.add(f"{line['event']}: level {line['level']}")
        if fields - event.fields and not event.is_open:
            wrong.add(f"{line['event']}: also has {sorted(fields - event.fields)}")
        if missing := event.always - fields:
            wrong.add(f"{line['event']}: lacks {sorted(missing)}")
    return sorted(wrong)
