"""The dashboard's charts, read back as a browser would: XML first, then shapes and numbers."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from datetime import date, timedelta
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redbtc.dashboard.charts import Chart, Series, axis_ticks, short, stacked
from tests.helpers.speed import cost

WIDE, NARROW = (720, 240), (340, 220)
BAR = re.compile(r"M([\d.]+) ([\d.]+)V([\d.]+)h([\d.]+)V([\d.]+)")
ROUNDING = 0.011  # two edges, each within half a hundredth
NASTY = [
    "<script>alert(1)</script>",
    "\"' onload='x' style=\"fill:red\" & &amp; ]]> -->",
    "x" * 256,
    "مرحبا \u202eevil\u2066",
    "nul\x00 bell\x07 escape\x1b next\x85 half\ud800 last\ufffe\uffff",
    "{{ 7 * 7 }} url(#a) href",
    "",
    "line\r\nbreak\u2028",
]
names = st.one_of(st.sampled_from(NASTY), st.text(max_size=60))
amounts = st.one_of(
    st.just(Decimal(0)),
    st.decimals(0, 10**12, places=9),
    st.integers(0, 10**15).map(Decimal),
    st.decimals(Decimal("1e-9"), Decimal("1e-6"), places=9),
    st.sampled_from([Decimal("1e-40"), Decimal("1e30"), Decimal("0E+5"), Decimal("1E+3")]),
)


@st.composite
def charted(draw: st.DrawFn) -> tuple[list[str], list[Series]]:
    count = draw(st.integers(1, 92))
    row = st.one_of(
        st.lists(amounts, min_size=count, max_size=count),
        amounts.map(lambda amount: [amount] * count),
    ).map(tuple)
    rows = draw(st.lists(st.builds(Series, names, row), max_size=10))
    start = draw(st.dates(date(1970, 1, 1), date(2990, 1, 1)))
    return days(count, start), rows


def days(count: int, start: date = date(2026, 10, 24)) -> list[str]:
    return [(start + timedelta(day)).isoformat() for day in range(count)]


def row(name: str, *values: int | str) -> Series:
    return Series(name, tuple(Decimal(value) for value in values))


def chart_of(
    dates: Sequence[str], series: Sequence[Series], *, unit: str = "USD", prefix: str = "spend"
) -> Chart:
    return stacked("Spend", "By day and model", dates, series, unit=unit, prefix=prefix)


def parsed(chart: Chart) -> list[tuple[ET.Element, tuple[int, int]]]:
    return [(ET.fromstring(chart.wide), WIDE), (ET.fromstring(chart.narrow), NARROW)]


def every_element(chart: Chart) -> Iterator[ET.Element]:
    for entry in chart.legend:
        yield from ET.fromstring(entry.swatch).iter()
        yield from ET.fromstring(entry.label).iter()
    for drawing, _ in parsed(chart):
        yield from drawing.iter()


def bars_by_look(drawing: ET.Element) -> dict[str, list[tuple[float, float, float, float]]]:
    """Left, width, lower and upper edge of each bar."""
    found = {}
    for group in drawing.iter("g"):
        look = group.get("class", "").removeprefix("series-")
        if group.get("class", "").startswith("series-"):
            shape = group[0].get("d", "")
            assert BAR.sub("", shape) == ""
            assert all(match[2] == match[5] for match in BAR.finditer(shape))
            found[look] = [
                (float(match[1]), float(match[4]), float(match[2]), float(match[3]))
                for match in BAR.finditer(shape)
            ]
    return found


def heights(drawing: ET.Element, count: int) -> dict[str, list[float]]:
    """Return for each look the height of its bar on each day, found by the column it stands in."""
    columns = [column_middle(path) for path in drawing.findall("g[@class='days']/path")]
    assert len(columns) == count
    result = {}
    for look, bars in bars_by_look(drawing).items():
        result[look] = [0.0] * count
        for left, width, lower, upper in bars:
            middle = left + width / 2
            nearest = min(range(count), key=lambda day: abs(columns[day] - middle))
            assert abs(columns[nearest] - middle) < 0.02
            result[look][nearest] = lower - upper
    return result


def column_middle(path: ET.Element) -> float:
    return float(path.get("d", "").removeprefix("M").split()[0])


def texts(drawing: ET.Element, group: str) -> list[str]:
    found = drawing.find(f"g[@class='{group}']")
    assert found is not None
    return [text.text or "" for text in found.iter("text")]


def axis_top(drawing: ET.Element) -> tuple[float, float]:
    """The places of 0 and of the last mark."""
    gridline = drawing.find("path[@class='gridline']")
    baseline = drawing.find("g[@class='axis']/path")
    assert gridline is not None
    assert baseline is not None
    marks = [float(y) for y in re.findall(r"M\d+ ([\d.]+)H", gridline.get("d", ""))]
    return float(re.findall(r"M\d+ ([\d.]+)H", baseline.get("d", ""))[0]), min(marks)


# ── Safe on a page ───────────────────────────────────────────────────────────────────────────────


@settings(max_examples=60, deadline=None)
@given(charted(), names, names, names)
def test_a_chart_needs_nothing_that_the_page_forbids(
    content: tuple[list[str], list[Series]], title: str, summary: str, unit: str
) -> None:
    chart = stacked(title, summary, *content, unit=unit, prefix="a-1")
    for element in every_element(chart):
        assert element.tag in {
            *("svg", "title", "desc", "g", "defs", "pattern", "path", "use", "rect", "text", "bdi")
        }
        for attribute, value in element.attrib.items():
            assert attribute != "style"
            assert not attribute.startswith("on")
            assert "xlink" not in attribute
            if attribute == "href":
                assert re.fullmatch(r"#a-1-[a-z0-9-]+", value)
            if "url(" in value and attribute != "title":
                assert re.fullmatch(r"url\(#a-1-[a-z0-9-]+\)", value)


@settings(max_examples=60, deadline=None)
@given(names, names)
def test_no_name_leaves_its_place(name: str, unit: str) -> None:
    """A text that comes back from the XML as it is has been escaped, not cut or dropped."""
    chart = stacked(name, name, days(1), [row(name, 1)], unit=unit, prefix="a")
    printable = "".join(
        "\ufffd" if unicodedata.category(character)[0] in "C" else character
        for character in " ".join(name.split())
    )
    wide = ET.fromstring(chart.wide)
    (entry,) = chart.legend
    label = ET.fromstring(entry.label)
    assert entry.name == printable
    assert label.get("title", label.text or "") == printable
    assert (wide.findtext("title"), wide.findtext("desc")) == (printable, printable)
    assert len(label.text or "") <= 40
    assert (label.text or "").endswith("…") == (len(printable) > 40 or printable.endswith("…"))
    for text in (chart.svg, entry.label, entry.swatch, entry.name):
        assert all(unicodedata.category(character)[0] != "C" for character in text)


def test_a_script_for_a_name_is_text() -> None:
    chart = stacked("<b>", "&", days(1), [row("<script>", 1)], unit="<i>", prefix="a")
    assert "&lt;script&gt;" in chart.legend[0].label
    assert not re.search("<(script|b|i)>", chart.svg + chart.legend[0].label)


def test_two_charts_of_a_page_share_no_id() -> None:
    rows = [row(f"model {number}", number) for number in range(1, 9)]
    charts = [chart_of(days(1), rows, prefix=prefix) for prefix in ("spend", "requests")]
    elements = [element for chart in charts for element in every_element(chart)]
    ids = [element.get("id") for element in elements if element.get("id")]
    used = {
        reference
        for element in elements
        for value in element.attrib.values()
        for reference in re.findall(r"url\(#([^)]+)\)", value) + re.findall(r"^#(.+)", value)
    }
    patterns = {entry.pattern for chart in charts for entry in chart.legend if entry.look != "1"}
    assert len(ids) == len(set(ids))
    assert used <= set(ids)
    assert patterns <= set(ids)


def test_a_screen_reader_finds_one_drawing_with_a_name_and_a_description() -> None:
    wide, narrow = (drawing for drawing, _ in parsed(chart_of(days(3), [row("m", 1, 2, 3)])))
    named = [wide.find(f"*[@id='{name}']") for name in wide.get("aria-labelledby", "").split()]
    assert [element.text for element in named if element is not None] == [
        "Spend",
        "By day and model",
    ]
    assert (wide.get("role"), narrow.get("aria-hidden")) == ("img", "true")
    for path in ("g[@class='days']", ".//g[@class='series-1']/.."):
        group = wide.find(path)
        assert group is not None
        assert group.get("aria-hidden") == "true"


# ── True to the numbers ──────────────────────────────────────────────────────────────────────────


def looks_of(series: Sequence[Series]) -> list[list[Fraction]]:
    """The values of each look, exactly, by a way that shares nothing with the module's."""
    rows = [[Fraction(value) for value in one.values] for one in series if any(one.values)]
    rows.sort(key=lambda values: -sum(values))
    others = [sum(column, Fraction(0)) for column in zip(*rows[6:], strict=True)]
    return [*rows[:6], *([others] if others else [])]


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(charted())
def test_every_bar_is_as_high_as_its_share(content: tuple[list[str], list[Series]]) -> None:
    """A bar's share of the axis up to the last label is its value's, in both drawings."""
    chart, expected = chart_of(*content), looks_of(content[1])
    assert [entry.look for entry in chart.legend] == [*"123456", "other"][: len(expected)]
    for drawing, _ in parsed(chart):
        shown = heights(drawing, len(content[0]))
        assert list(shown) == [entry.look for entry in chart.legend]
        if not expected:
            continue
        bottom, top = axis_top(drawing)
        end = number(texts(drawing, "axis")[-1])
        for found, values in zip(shown.values(), expected, strict=True):
            share = [float(value / end) * (bottom - top) for value in values]
            assert found == pytest.approx(share, abs=ROUNDING)


def number(label: str) -> Fraction:
    """The value that an axis' label stands for."""
    thousands = "kMGTPE".find(label[-1]) + 1
    return Fraction(label.rstrip("kMGTPE")) * Fraction(1000**thousands)


@settings(max_examples=100, deadline=None)
@given(charted())
def test_bars_stand_on_each_other_and_leave_gaps(content: tuple[list[str], list[Series]]) -> None:
    for drawing, _ in parsed(chart_of(*content)):
        stacks: dict[float, list[tuple[float, float]]] = {}
        widths = set()
        for bars in bars_by_look(drawing).values():
            for left, width, lower, upper in bars:
                stacks.setdefault(left, []).append((lower, upper))
                widths.add(width)
        for stack in stacks.values():
            assert stack[0][0] == axis_top(drawing)[0]
            assert all(below[1] == above[0] for below, above in pairwise(stack))
        assert all(right - left > max(widths) + 0.5 for left, right in pairwise(sorted(stacks)))


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(charted())
def test_nothing_is_outside_of_the_drawing(content: tuple[list[str], list[Series]]) -> None:
    for drawing, (width, height) in parsed(chart_of(*content)):
        assert drawing.get("viewBox") == f"0 0 {width} {height}"
        assert drawing.get("width") is drawing.get("height") is None
        for bars in bars_by_look(drawing).values():
            for left, bar, lower, upper in bars:
                assert 0 < left < left + bar < width
                assert 0 < upper < lower < height
        for group in ("axis", "bar-label"):
            for left, right, y in text_boxes(drawing, group):
                assert 0 <= left < right <= width
                assert 10 < y < height - 4


@settings(max_examples=60, deadline=None)
@given(charted())
def test_numbers_are_plain_and_short(content: tuple[list[str], list[Series]]) -> None:
    """Coordinates contain no NaN, no exponent, and two decimals at most."""
    for drawing, _ in parsed(chart_of(*content)):
        for element in drawing.iter():
            for attribute in {"x", "y", "d", "width", "height", "stroke-width"} & set(
                element.keys()
            ):
                value = element.get(attribute, "")
                assert re.fullmatch(r"[MVHhlvz\d. -]*", value)
                assert not re.search(r"\.\d{3}", value)


def text_boxes(drawing: ET.Element, group: str) -> Iterator[tuple[float, float, float]]:
    """Left, right and baseline of each text, with digits of 7 units: more than any font needs."""
    parents = {child: parent for parent in drawing.iter() for child in parent}
    found = drawing.find(f"g[@class='{group}']")
    assert found is not None
    for text in found.iter("text"):
        anchor = text.get("text-anchor") or parents[text].get("text-anchor")
        width, x = 7 * len(text.text or ""), float(text.get("x", ""))
        left = x - {None: 0, "middle": width / 2, "end": width}[anchor]
        yield left, left + width, float(text.get("y", ""))


def test_the_six_biggest_have_their_own_look_and_the_rest_is_other() -> None:
    rows = [row(f"model {number}", number, 2 * number) for number in (3, 9, 1, 7, 5, 2, 8, 6, 4)]
    chart = chart_of(days(2), [row("none", 0, 0), *rows])
    assert [(entry.name, entry.look) for entry in chart.legend] == [
        *((f"model {10 - look}", str(look)) for look in range(1, 7)),
        ("Other", "other"),
    ]
    for drawing, _ in parsed(chart):
        bottom, top = axis_top(drawing)
        by_value = [height / (bottom - top) * 100 for height in heights(drawing, 2)["other"]]
        assert by_value == pytest.approx([1 + 2 + 3, 2 + 4 + 6], abs=0.02)


def test_what_has_no_name_is_other_whatever_its_size() -> None:
    for names in (2, 7):
        rows = [row(f"model {number}", number + 1) for number in range(names)]
        chart = chart_of(days(1), [Series(None, (Decimal(100),)), *rows])
        assert [(entry.name, entry.look) for entry in chart.legend][-1:] == [("Other", "other")]
        assert len(chart.legend) == min(names, 6) + 1
        drawing = parsed(chart)[0][0]
        bottom, top = axis_top(drawing)
        (other,) = heights(drawing, 1)["other"]
        assert other / (bottom - top) * 150 == pytest.approx(100 + (names > 6), abs=0.3)


def test_equal_series_keep_their_order() -> None:
    chart = chart_of(days(1), [row(name, 5) for name in "zay"])
    assert [entry.name for entry in chart.legend] == [*"zay"]


def test_every_look_has_lines_of_its_own_in_both_drawings_and_the_legend() -> None:
    chart = chart_of(days(1), [row("m", 1)] * 8)
    sources = [drawing for drawing, _ in parsed(chart)]
    swatches = ET.fromstring(f"<g>{''.join(entry.swatch for entry in chart.legend)}</g>")
    for source in [*sources, swatches]:
        lines = [path.get("d") for path in source.iter("path") if path.get("class")]
        assert len(lines) - len(source.findall("path[@class='gridline']")) == 6
        assert len(set(lines)) == len(lines)
        classes = {element.get("class", "") for element in source.iter()}
        assert {f"series-{look}" for look in [*"123456", "other"]} <= classes


@pytest.mark.parametrize(
    ("total", "shown"),
    [
        ("0.000000001", "0.000000001 USD"),
        ("1234567.50", "1,234,567.5 USD"),
        ("1E+3", "1,000 USD"),
        ("1E-40", "1e-40 USD"),
    ],
)
def test_a_day_tells_its_exact_sum(total: str, shown: str) -> None:
    for drawing, _ in parsed(chart_of(["2026-11-03"], [row("m", total)])):
        assert drawing.findtext("g[@class='days']/path/title") == f"3 Nov 2026: {shown}"


def test_sums_do_not_round() -> None:
    rows = [row("a", "123456789012345678.123456789"), row("b", "0.000000002")]
    title = ET.fromstring(chart_of(days(1), rows).wide).findtext("g[@class='days']/path/title")
    assert title == "24 Oct 2026: 123,456,789,012,345,678.123456791 USD"


@pytest.mark.parametrize("rows", [[], [row("m", 0, 0)], [row("m", "0E-9", 0)] * 9])
def test_nothing_is_said_to_be_nothing(rows: list[Series]) -> None:
    chart = chart_of(days(2), rows)
    assert chart.legend == ()
    for drawing, _ in parsed(chart):
        assert texts(drawing, "axis") == ["USD", "0", "No usage in this period"]
        assert texts(drawing, "bar-label") == ["24 Oct", "25 Oct"]
        assert bars_by_look(drawing) == {}


# ── Axes ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("largest", "labels"),
    [
        ("0.000000001", "0 0.00000000025 0.0000000005 0.00000000075 0.000000001"),
        ("0.0071", "0 0.002 0.004 0.006 0.008"),
        ("0.3", "0 0.1 0.2 0.3"),
        ("1.01", "0 0.5 1 1.5"),
        ("80.5", "0 25 50 75 100"),
        ("4100.5", "0 2k 4k 6k"),
        ("5000.1", "0 2k 4k 6k"),
        ("5999999.5", "0 2M 4M 6M"),
        ("2000000001.5", "0 1G 2G 3G"),
        ("1000.5", "0 500 1k 1.5k"),
        ("1", "0 1 2"),
        ("3", "0 1 2 3"),
        ("9", "0 5 10"),
        ("10", "0 5 10"),
        ("100", "0 25 50 75 100"),
        ("1e18", "0 250P 500P 750P 1E"),
        ("1e-40", "0 2.5e-41 5e-41 7.5e-41 1e-40"),
    ],
)
def test_marks_are_exact_and_short(largest: str, labels: str) -> None:
    for drawing, _ in parsed(chart_of(days(2), [row("m", largest, 0)])):
        assert texts(drawing, "axis") == ["USD", *labels.split()]


@settings(max_examples=60, deadline=None)
@given(charted())
def test_labels_stand_at_their_gridlines(content: tuple[list[str], list[Series]]) -> None:
    for drawing, _ in parsed(chart_of(*content)):
        labels = drawing.findall("g[@class='axis']/g/text")
        for label in labels if content_is_shown(drawing) else []:
            bottom, top = axis_top(drawing)
            part = number(label.text or "") / number(labels[-1].text or "")
            place = bottom - float(part) * (bottom - top)
            assert float(label.get("y", "")) - 4 == pytest.approx(place, abs=ROUNDING)


def content_is_shown(drawing: ET.Element) -> bool:
    return drawing.find("path[@class='gridline']") is not None


@given(amounts.filter(bool), st.booleans())
def test_three_to_five_marks_hold_any_value(largest: Decimal, whole: bool) -> None:
    largest = largest.to_integral_value() + 1 if whole else largest
    exact = axis_ticks(largest, whole=whole)
    ticks = [Fraction(tick) for tick in exact]
    step = ticks[1]
    assert 3 <= len(ticks) <= 5
    assert ticks == [step * count for count in range(len(ticks))]
    assert Fraction(largest) <= ticks[-1]
    assert ticks[-2] < largest or largest == 1
    assert f"{exact[1]:e}".partition("e")[0].replace(".", "").rstrip("0") in {"1", "2", "25", "5"}
    assert not whole or step.denominator == 1


@pytest.mark.parametrize(
    ("value", "label"),
    [
        *[("0", "0"), ("0E+3", "0"), ("0.0020", "0.002"), ("1.5", "1.5"), ("20.00", "20")],
        *[("999", "999"), ("1000", "1k"), ("1E+3", "1k"), ("1500", "1.5k"), ("250000", "250k")],
        *[("2000000", "2M"), ("3000000000", "3G"), ("2.5E+12", "2.5T"), ("1E+21", "1e+21")],
    ],
)
def test_labels_are_short(value: str, label: str) -> None:
    assert short(Decimal(value)) == label


@settings(max_examples=100, deadline=None)
@given(st.dates(date(1970, 1, 1), date(2990, 1, 1)), st.integers(1, 100))
def test_day_labels_never_touch(start: date, count: int) -> None:
    """There is at least one label, and the first of a month has one if there is room."""
    for drawing, _ in parsed(chart_of(days(count, start), [row("m", *[1] * count)])):
        labels = texts(drawing, "bar-label")
        boxes = list(text_boxes(drawing, "bar-label"))
        assert labels
        assert all(left[1] + 3 < right[0] for left, right in pairwise(boxes))
        firsts = [day for day in days(count, start) if day.endswith("-01")]
        assert len(firsts) == sum(label.startswith("1 ") for label in labels)


def test_a_month_is_labelled_from_its_first_day_on() -> None:
    chart = chart_of(days(30, date(2026, 11, 1)), [row("m", *range(30))])
    wide, narrow = (texts(drawing, "bar-label") for drawing, _ in parsed(chart))
    assert wide == [f"{day} Nov" for day in range(1, 30, 3)]
    assert narrow == ["1 Nov", "8 Nov", "15 Nov", "22 Nov"]


# ── What a caller gets wrong, and what a chart costs ─────────────────────────────────────────────


@pytest.mark.parametrize(
    ("dates", "rows", "prefix"),
    [
        ([], [], "a"),
        (["3 Nov"], [], "a"),
        (days(2), [row("m", 1)], "a"),
        (days(2), [row("m", "-0.1", 1)], "a"),
        (days(1), [row("m", "NaN")], "a"),
        (days(1), [row("m", "Infinity")], "a"),
        (days(1), [], ""),
        (days(1), [], "1a"),
        (days(1), [], 'a"><script>'),
        (days(1), [], "a\n"),
    ],
)
def test_what_makes_no_chart_is_refused(dates: list[str], rows: list[Series], prefix: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        chart_of(dates, rows, prefix=prefix)


def test_a_month_of_seven_looks_is_small_and_quick() -> None:
    """Under 25 KB for both drawings, about 3 ms of processor time on an ordinary machine."""
    rows = [
        Series(
            f"m{number}", tuple(Decimal(7919 * (day + number) % 1009) / 997 for day in range(31))
        )
        for number in range(9)
    ]
    rows = [Series(name, tuple(round(value, 9) for value in values)) for name, values in rows]
    dates = days(31)
    assert len(chart_of(dates, rows).svg.encode()) < 25_000
    assert cost(lambda: chart_of(dates, rows), tries=10) < 4.3
