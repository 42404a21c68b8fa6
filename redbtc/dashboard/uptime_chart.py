"""The drawings of the uptime: a bar for each day, and a square for each minute of a day.

Colours are classes, as in charts.py. No state is marked by its colour alone: a bar has a gap where
the gateway was down, a minute that was down is larger, and a table says the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from markupsafe import Markup

from redbtc.admin.uptime_report import MinutesOfState, MinuteState, UptimeOfDay
from redbtc.times import MINUTE, parse_time

STATE_TEXTS: dict[MinuteState, str] = {
    "up": "Up",
    "no_data": "No data",
    "planned": "Announced maintenance",
    "stopped": "Not running",
    "ledger": "Ledger failed",
    "upstreams": "No upstream",
    "draining": "Shutting down",
    "maintenance": "Unannounced maintenance",
}
LOOK_OF_STATE = {"up": "up", "no_data": "none", "planned": "planned"}  # else down
BAR_HEIGHT, STUB_HEIGHT, GAP = 40, 6, 3
MIN_PART = 9  # the height of a part, so that a single minute is seen


class BarRows(NamedTuple):
    """A drawing of the days: its name, width, and number of days in a row."""

    name: str
    width: int
    days: int


DAYS_WIDE, DAYS_NARROW = BarRows("wide", 720, 90), BarRows("narrow", 330, 30)


def day_bars(days: Sequence[UptimeOfDay]) -> Markup:
    """Return a bar for each day that leads to the page of the day, drawn twice, as in charts.py.
    Assistive technology is given the table beside it instead."""
    return bars_in_rows(days, DAYS_WIDE) + bars_in_rows(days, DAYS_NARROW)


def bars_in_rows(days: Sequence[UptimeOfDay], rows: BarRows) -> Markup:
    """Return one of the drawings of the days."""
    slot, row_height = rows.width / rows.days, BAR_HEIGHT + 8
    height = row_height * -(-len(days) // rows.days) - 8
    drawn = []
    for number, day in enumerate(days):
        row, column = divmod(number, rows.days)
        x, y = round(column * slot, 2), row * row_height
        parts = "".join(
            f'<rect class="minutes-{look}" x="{x:g}" y="{y + top:g}" width="{slot * 0.76:.2f}"'
            f' height="{part:g}" rx="1"/>'
            for look, top, part in parts_of(day)
        )
        about = f"<title>{day.day}: {summary_of(day)}</title>"
        link = f'<a href="/status?day={day.day}" tabindex="-1">{about}{parts}</a>'
        drawn.append(link if has_data(day) else f"<g>{about}{parts}</g>")
    return Markup(
        f'<svg class="chart uptime {rows.name}" viewBox="0 0 {rows.width} {height}"'
        f' aria-hidden="true">{"".join(drawn)}</svg>'
    )


def has_data(day: UptimeOfDay) -> bool:
    """Return whether anything is known of a day."""
    return bool(day.up_minutes or day.down_minutes or day.planned_minutes)


def parts_of(day: UptimeOfDay) -> Iterator[tuple[str, float, float]]:
    """Yield the parts of a day's bar from the top: the look, the top and the height."""
    if not has_data(day):
        yield "none", BAR_HEIGHT - STUB_HEIGHT, STUB_HEIGHT
        return
    counts = {"down": day.down_minutes, "planned": day.planned_minutes, "up": day.up_minutes}
    present = {look: count for look, count in counts.items() if count}
    room = BAR_HEIGHT - GAP * (len(present) - 1) - MIN_PART * len(present)
    top, minutes = 0.0, sum(present.values())
    for look, count in present.items():
        part = round(MIN_PART + room * count / minutes, 2)
        yield look, round(top, 2), part
        top += part + GAP


def summary_of(day: UptimeOfDay) -> str:
    """Return a day's uptime in words."""
    if not has_data(day):
        return "no data"
    parts = [f"{percent_up(day.percent)} up"] if day.percent is not None else []
    for count, what in ((day.down_minutes, "down"), (day.planned_minutes, "planned")):
        if count:
            parts.append(f"{count} minute{'' if count == 1 else 's'} {what}")
    return ", ".join(parts)


def percent_up(percent: float | None) -> str:
    """Return a percentage with at most three decimals, or a dash for None."""
    return "–" if percent is None else f"{percent:.3f}".rstrip("0").rstrip(".") + " %"


# A day as a row for each hour, with a square for each minute.
SQUARE, HOUR_LABEL, MINUTE_LABEL = 5, 36, 12
HOUR_HEIGHT = SQUARE + 3


def minute_grid(periods: Iterable[MinutesOfState]) -> Markup:
    """Return the minutes of a day. Assistive technology is given the table beside it instead."""
    shapes: dict[str, list[str]] = {}
    for each in periods:
        first = parse_time(each.began_at, 0, relative_to_past=True) // MINUTE % 1440
        look = LOOK_OF_STATE.get(each.state, "down")
        for row, column, count in hours_of(first, each.minutes):
            x, y = HOUR_LABEL + column * SQUARE, MINUTE_LABEL + row * HOUR_HEIGHT
            high = SQUARE + 2 if look == "down" else SQUARE
            shapes.setdefault(look, []).append(f"M{x} {y}h{count * SQUARE - 0.75:g}v{high}H{x}z")
    drawn = "".join(
        f'<path class="minutes-{look}" d="{"".join(lines)}"/>' for look, lines in shapes.items()
    )
    labels = [
        f'<text x="0" y="{MINUTE_LABEL + hour * HOUR_HEIGHT + SQUARE}">{hour:02}:00</text>'
        for hour in range(0, 24, 3)
    ]
    labels += [
        f'<text x="{HOUR_LABEL + minute * SQUARE}" y="8">:{minute:02}</text>'
        for minute in range(0, 60, 15)
    ]
    size = f"{HOUR_LABEL + 60 * SQUARE} {MINUTE_LABEL + 24 * HOUR_HEIGHT}"
    return Markup(
        f'<svg class="chart uptime grid" viewBox="0 0 {size}" aria-hidden="true">'
        f'<g class="minute-label">{"".join(labels)}</g>{drawn}</svg>'
    )


def hours_of(first: int, minutes: int) -> Iterator[tuple[int, int, int]]:
    """Yield the parts of successive minutes of a day that are in one hour: the hour, the first
    minute in it, and how many there are."""
    while minutes > 0:
        hour, column = divmod(first, 60)
        count = min(minutes, 60 - column)
        yield hour, column, count
        first, minutes = first + count, minutes - count
