"""The dashboard's charts: bars stacked by day and series, drawn as SVG. No I/O, no global state.

The Content-Security-Policy forbids inline scripts and styles (default-src 'none'; style-src
'self'). So a drawing has presentation attributes for its shape and class names for its colours:
`series-1` … `series-6`, `series-other`, `pattern-line`, `axis`, `gridline`, `bar-label`, and `days`
for the columns that show a day's sum. No series is marked by its colour alone: each has a pattern.

On a phone of 360 pixels, the text of a drawing 720 units wide is too small to read. So there are
two drawings, and the style sheet shows one of them. A browser does not apply a pattern that is
defined in an element that is not displayed, so each drawing and each swatch of the legend defines
its own patterns, with their own ids.
"""

from __future__ import annotations

import calendar
import re
from collections.abc import Iterable, Iterator, Sequence
from datetime import date
from decimal import Context, Decimal, localcontext
from itertools import accumulate
from math import ceil
from typing import NamedTuple

from markupsafe import Markup, escape


class Series(NamedTuple):
    """A value for each day of the chart, none below zero. The name may be any text; None stands for
    the sum of several series without names."""

    name: str | None
    values: tuple[Decimal, ...]


class LegendEntry(NamedTuple):
    """The legend's entry for a series: its name, the name as HTML (shortened to 40 characters, with
    the whole name in a title attribute), its look ("1" … "6" or "other", as in the class series-…),
    and a swatch, whose pattern, unless it is solid, has the id `pattern`. Neither name nor HTML
    contains control characters."""

    name: str
    label: Markup
    look: str
    pattern: str
    swatch: Markup


class Chart(NamedTuple):
    """A chart drawn twice, 720×240 and 340×220, of which a page shows one, and the legend in the
    order of the stacks, from the bottom. Assistive technology is given only `wide`."""

    wide: Markup
    narrow: Markup
    legend: tuple[LegendEntry, ...]

    @property
    def svg(self) -> Markup:
        return self.wide + self.narrow


DIGITS = 50  # of every sum; amounts in the database have 27
ID_PREFIX = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


def stacked(
    title: str,
    summary: str,
    days: Sequence[str],
    series: Sequence[Series],
    *,
    unit: str,
    prefix: str,
) -> Chart:
    """Return the chart of `series` over `days` (ISO dates in order, up to about 100).

    The six largest series each have their own look, the largest at the bottom, equal ones in the
    order given. The others, and series without a name, are summed up as "Other", on top. Series of
    zeros are left out. `title` and `summary` are the drawing's name and description; `unit` ("USD")
    stands at the axis and after each day's sum. All ids start with `prefix`, which must be unique
    among the charts of a page.

    Raises ValueError if there is no day, a day is not a date, a series does not have one value for
    each day, a value is negative or not finite, or the prefix can't start an id.
    """
    dates = [date.fromisoformat(day) for day in days]
    _check(dates, series, prefix)
    with localcontext(Context(prec=DIGITS)):
        content = _content(dates, series, unit)
        wide, narrow = (_drawing(content, size, f"{prefix}-{size.name}") for size in (WIDE, NARROW))
    legend = tuple(
        _legend_entry(look, row.name or "", prefix) for look, row in content.looks.items()
    )
    return Chart(
        wide=Markup(
            f'<svg class="chart wide" viewBox="0 0 {WIDE.width} {WIDE.height}" font-size="12"'
            f' role="img" aria-labelledby="{prefix}-title {prefix}-summary">'
            f'<title id="{prefix}-title">{escape(_clean(title))}</title>'
            f'<desc id="{prefix}-summary">{escape(_clean(summary))}</desc>{wide}</svg>'
        ),
        narrow=Markup(
            f'<svg class="chart narrow" viewBox="0 0 {NARROW.width} {NARROW.height}" font-size="12"'
            f' aria-hidden="true">{narrow}</svg>'
        ),
        legend=legend,
    )


def _check(dates: Sequence[date], series: Sequence[Series], prefix: str) -> None:
    if not dates:
        raise ValueError("a chart needs at least one day")
    if not ID_PREFIX.fullmatch(prefix):
        raise ValueError(f"{prefix!r} can't start an id")
    for row in series:
        if len(row.values) != len(dates):
            raise ValueError(f"{len(row.values)} values for {len(dates)} days")
        if not all(value.is_finite() and value >= 0 for value in row.values):
            raise ValueError("a value is negative or not finite")


def _content(dates: list[date], series: Iterable[Series], unit: str) -> ChartContent:
    looks = _looks(series)
    columns = list(zip(*(row.values for row in looks.values()), strict=True))
    sums = [sum(column, Decimal(0)) for column in columns] or [Decimal(0)] * len(dates)
    whole = all(value == value.to_integral_value() for column in columns for value in column)
    return ChartContent(
        dates, looks, columns, sums, axis_ticks(max(sums), whole=whole), _clean(unit)
    )


# Names come from clients: a model's name may be any text. Characters that are not printable
# (control, format and direction characters, lone surrogates, unassigned code points) are invalid in
# XML or could make a name look like another, so they become U+FFFD. markupsafe escapes all text.
LABEL_CHARACTERS = 40


class Pattern(NamedTuple):
    """A pattern of lines on a square tile; a line without length is a dot."""

    tile: int
    line_width: float
    lines: str


PATTERNS = {
    "1": None,  # solid
    "2": Pattern(6, 1.2, "M-1 1l2-2M-1 7l8-8M5 7l2-2"),  # diagonal, rising
    "3": Pattern(4, 1.6, "M2 2h0"),  # dots
    "4": Pattern(4, 1, "M-1 2h6"),  # horizontal
    "5": Pattern(6, 0.9, "M-1 1l2-2M-1 7l8-8M5 7l2-2M-1 5l2 2M-1-1l8 8M5-1l2 2"),  # crosshatch
    "6": Pattern(4, 1, "M2-1v6"),  # vertical
    "other": Pattern(6, 1.2, "M-1 5l2 2M-1-1l8 8M5-1l2 2"),  # diagonal, falling
}
LOOKS = tuple(PATTERNS)


def _looks(series: Iterable[Series]) -> dict[str, Series]:
    """Return the six largest series by their look, then the sum of all others."""
    totals = [(sum(row.values, Decimal(0)), row) for row in series]
    ranked = sorted((one for one in totals if one[0]), key=lambda one: one[0], reverse=True)
    named = [row for _, row in ranked if row.name is not None]
    *own, other = LOOKS
    looks = dict(zip(own, named, strict=False))
    if others := named[len(own) :] + [row for _, row in ranked if row.name is None]:
        columns = zip(*(row.values for row in others), strict=True)
        looks[other] = Series("Other", tuple(sum(column, Decimal(0)) for column in columns))
    return looks


def _clean(text: str) -> str:
    """Return the text on one line, with U+FFFD for characters that are not printable."""
    line = " ".join(text.split())
    if line.isprintable():
        return line
    return "".join(character if character.isprintable() else "\ufffd" for character in line)


def _shortened(line: str) -> str:
    return line if len(line) <= LABEL_CHARACTERS else line[: LABEL_CHARACTERS - 1] + "…"


def _legend_entry(look: str, untrusted_name: str, prefix: str) -> LegendEntry:
    name, pattern = _clean(untrusted_name), f"{prefix}-swatch-{look}"
    label = Markup("<bdi>{}</bdi>").format(name)
    if len(name) > LABEL_CHARACTERS:
        label = Markup('<bdi title="{}">{}</bdi>').format(name, _shortened(name))
    return LegendEntry(name, label, look, pattern, _swatch(look, pattern))


def _swatch(look: str, pattern: str) -> Markup:
    square = 'width="14" height="14" rx="3"'
    drawn = f'<rect class="series-{look}" {square}/>'
    if PATTERNS[look]:
        drawn += f'{_definition(look, pattern)}<rect fill="url(#{pattern})" {square}/>'
    return Markup(f'<svg class="swatch" viewBox="0 0 14 14" aria-hidden="true">{drawn}</svg>')


def _definition(look: str, pattern: str) -> str:
    """Return the definition of a pattern, with its lines only: the fill below them is one shape,
    since tiles of it would show seams."""
    found = PATTERNS[look]
    if not found:
        return ""
    return (
        f'<pattern id="{pattern}" width="{found.tile}" height="{found.tile}"'
        ' patternUnits="userSpaceOnUse"><path class="pattern-line" fill="none"'
        f' stroke-linecap="round" stroke-width="{found.line_width:g}" d="{found.lines}"/></pattern>'
    )


# Values stay Decimal until they become coordinates. A coordinate has at most two decimals and is
# below a thousand, so that the format `g` never writes an exponent.
STEPS = [Decimal(step) for step in ("0.25", "0.5", "1", "2", "2.5", "5")]
SUFFIXES = ["", "k", "M", "G", "T", "P", "E"]


def axis_ticks(largest: Decimal, *, whole: bool = False) -> list[Decimal]:
    """Return three to five marks from 0 on, the last at or above `largest`. Their distance is 1, 2,
    2.5 or 5 times a power of ten; with `whole` they are whole numbers. For 0, return only 0."""
    if not largest:
        return [Decimal(0)]
    if whole:
        largest = max(largest, Decimal(2))
    steps = (step.scaleb(largest.adjusted()) for step in STEPS)
    allowed = (step for step in steps if not whole or step == step.to_integral_value())
    step = next(step for step in allowed if step * 4 >= largest)
    return [step * count for count in range(ceil(largest / step) + 1)]


def short(value: Decimal) -> str:
    """Return an exact, short label: 0, 0.002, 1.5, 20, 1.5k, 2M, 3G."""
    if value and value.adjusted() >= 3 * len(SUFFIXES):
        return _scientific(value)
    thousands = max(0, value.adjusted() // 3) if value else 0
    return _plain(value.scaleb(-3 * thousands)) + SUFFIXES[thousands]


def _plain(value: Decimal) -> str:
    """Return all digits in groups of three, or an exponent for very small and large values."""
    if value and not -12 <= value.adjusted() <= 30:
        return _scientific(value)
    return f"{value.normalize():,f}"


def _scientific(value: Decimal) -> str:
    return f"{value.normalize():e}"


def _place(place: float) -> str:
    return f"{round(place, 2):g}"


# The layers from back to front: gridlines, a column for each day with the day's sum as its tooltip,
# bars, text. All bars of a series are one path, drawn in its colour and once more (`use`) in its
# pattern, which takes half the bytes of one shape for each bar. Bars ignore the pointer, so that it
# reaches the columns below them. A column is a line as broad as a day, so even a day without a bar
# has a tooltip.
TOP, RIGHT, BOTTOM, LEFT = 32, 22, 28, 44  # margins; the left one grows with its labels
CHARACTER = 7  # the width of a digit of 12 units, amply
DAY_LABEL = 52  # the width that "30 Nov" needs, with a gap
DAY_STEPS = (1, 2, 3, 5, 7, 10, 15)
WIDEST_BAR = 44
MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]


class ChartSize(NamedTuple):
    """The name of a drawing and the size of its viewBox."""

    name: str
    width: int
    height: int


WIDE, NARROW = ChartSize("wide", 720, 240), ChartSize("narrow", 340, 220)


class ChartContent(NamedTuple):
    """The content of both drawings: the days, the series by their look, for each day its values in
    that order and their sum, the axis' marks and unit."""

    dates: list[date]
    looks: dict[str, Series]
    columns: list[tuple[Decimal, ...]]
    sums: list[Decimal]
    ticks: list[Decimal]
    unit: str


class ChartFrame(NamedTuple):
    """The layout of one drawing: axes, width of a day and of a bar, units per value."""

    left: int
    right: int
    bottom: int
    slot: float
    bar: float
    scale: Decimal

    def middle(self, index: int) -> float:
        return self.left + self.slot * (index + 0.5)

    def height(self, value: Decimal) -> str:
        return _place(self.bottom - float(value * self.scale))


def _frame(content: ChartContent, size: ChartSize) -> ChartFrame:
    longest = max(len(short(tick)) for tick in content.ticks)
    left = max(LEFT, 14 + CHARACTER * longest)
    right, bottom = size.width - RIGHT, size.height - BOTTOM
    slot = (right - left) / len(content.dates)
    scale = (bottom - TOP) / (content.ticks[-1] or Decimal(1))
    return ChartFrame(left, right, bottom, slot, min(WIDEST_BAR, slot * 0.72), scale)


def _drawing(content: ChartContent, size: ChartSize, prefix: str) -> str:
    frame = _frame(content, size)
    drawn = [_gridlines(content, frame), _days(content, frame)]
    if content.looks:
        drawn.append(_all_bars(content, frame, prefix))
    drawn += [_axis(content, frame), _day_labels(content, frame)]
    return "".join(drawn)


def _gridlines(content: ChartContent, frame: ChartFrame) -> str:
    lines = "".join(
        f"M{frame.left} {frame.height(tick)}H{frame.right}" for tick in content.ticks[1:]
    )
    return f'<path class="gridline" d="{lines}"/>' if lines else ""


def _days(content: ChartContent, frame: ChartFrame) -> str:
    unit = escape(content.unit)
    columns = "".join(
        f'<path d="M{_place(frame.middle(index))} {TOP}V{frame.bottom}">'
        f"<title>{_day_and_month(day)} {day.year}: {_plain(total)} {unit}</title></path>"
        for index, (day, total) in enumerate(zip(content.dates, content.sums, strict=True))
    )
    return (
        f'<g class="days" stroke="transparent" stroke-width="{_place(frame.slot)}"'
        f' aria-hidden="true">{columns}</g>'
    )


def _all_bars(content: ChartContent, frame: ChartFrame, prefix: str) -> str:
    definitions = "".join(_definition(look, f"{prefix}-{look}") for look in content.looks)
    drawn = "".join(
        _one_look(look, bars, prefix)
        for look, bars in zip(content.looks, _bars(content, frame), strict=True)
    )
    return f'<defs>{definitions}</defs><g pointer-events="none" aria-hidden="true">{drawn}</g>'


def _one_look(look: str, bars: str, prefix: str) -> str:
    """Return the bars of one series. The group has the class, so that the path itself takes the
    fill of the `use` element."""
    path = f'<g class="series-{look}"><path id="{prefix}-bars-{look}" d="{bars}"/></g>'
    if not PATTERNS[look]:
        return path
    return f'{path}<use href="#{prefix}-bars-{look}" fill="url(#{prefix}-{look})"/>'


def _bars(content: ChartContent, frame: ChartFrame) -> Iterator[str]:
    """Yield a path for each series. A bar ends at exactly the coordinate where the next starts."""
    width = _place(frame.bar)
    lefts = [_place(frame.middle(index) - frame.bar / 2) for index in range(len(content.dates))]
    stacks = [
        [frame.height(edge) for edge in accumulate(column, initial=Decimal(0))]
        for column in content.columns
    ]
    for level in range(len(content.looks)):
        edges = [(stack[level], stack[level + 1]) for stack in stacks]
        yield "".join(
            f"M{left} {lower}V{upper}h{width}V{lower}"
            for left, (lower, upper) in zip(lefts, edges, strict=True)
            if lower != upper
        )


def _axis(content: ChartContent, frame: ChartFrame) -> str:
    end = frame.left - 8
    labels = "".join(
        f'<text x="{end}" y="{_place(float(frame.height(tick)) + 4)}">{short(tick)}</text>'
        for tick in content.ticks
    )
    return (
        f'<g class="axis"><path d="M{frame.left} {frame.bottom}H{frame.right}"/>'
        f'<text x="{frame.left}" y="14">{escape(_shortened(content.unit))}</text>'
        f'<g text-anchor="end">{labels}</g>{"" if content.looks else _nothing(frame)}</g>'
    )


def _nothing(frame: ChartFrame) -> str:
    x, y = (frame.left + frame.right) // 2, (TOP + frame.bottom) // 2
    return f'<text x="{x}" y="{y}" text-anchor="middle">No usage in this period</text>'


def _day_labels(content: ChartContent, frame: ChartFrame) -> str:
    labels = "".join(
        f'<text x="{_place(frame.middle(index))}" y="{frame.bottom + 19}">'
        f"{_day_and_month(content.dates[index])}</text>"
        for index in _labelled_days(content.dates, frame.slot)
    )
    return f'<g class="bar-label" text-anchor="middle">{labels}</g>'


def _day_and_month(day: date) -> str:
    return f"{day.day} {MONTHS[day.month - 1]}"


def _labelled_days(dates: Sequence[date], slot: float) -> Iterator[int]:
    """Yield the indexes of the days whose labels have room, counted from the first of each month:
    1, 6, 11 …"""
    needed = ceil(DAY_LABEL / slot)
    step = next((step for step in DAY_STEPS if step >= needed), needed)
    free = 0
    for index, day in enumerate(dates):
        days_in_month = calendar.monthrange(day.year, day.month)[1]
        room = day.day == 1 or day.day - 1 + step <= days_in_month
        if (day.day - 1) % step == 0 and room and index >= free:
            yield index
            free = index + needed
