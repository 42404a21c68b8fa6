"""The log has the events and fields that docs/operating.md names. (Gateway.close of the tests looks
at each line that a gateway of any test has logged.)"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import NamedTuple

from redbtc.telemetry import NOTED, UNEXPECTED, Telemetry
from redbtc.usage import RequestRow
from tests.helpers.gateway import ROOT
from tests.helpers.log_events import documented_events, undocumented

LEVELS = re.compile(r"logging\.(DEBUG|INFO|WARNING|ERROR|CRITICAL)")
# Functions and methods that log, with the place of the event among their arguments.
LOGGING = {"log": 1, "_log": 1, "_say_once": 0, "_log_once": 0, "_repeat": 1}


class Logged(NamedTuple):
    """A place in the code that logs. `level` and `fields` are None if they are not constants; then
    `some_fields` are known."""

    place: str
    event: str
    level: str | None
    fields: frozenset[str] | None
    some_fields: frozenset[str]


def texts_in(node: ast.expr, constants: dict[str, list[str]]) -> list[str]:
    """Return the texts that an expression may be."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.Name):
        return constants.get(node.id, [])
    return []


def logged_in(path: str, tree: ast.Module) -> Iterator[Logged]:
    constants: dict[str, list[str]] = {"UNEXPECTED": [UNEXPECTED]}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            for target in node.targets:
                if isinstance(target, ast.Name) and isinstance(node.value.value, str):
                    constants.setdefault(target.id, []).append(node.value.value)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "id", None) or getattr(node.func, "attr", "")
        place = f"{path}:{node.lineno}"
        if name == "Condition":
            for each in node.args:
                for event in texts_in(each, constants):
                    yield Logged(place, event, None, None, frozenset())
        elif name in LOGGING and len(node.args) > LOGGING[name]:
            known = frozenset(each.arg for each in node.keywords if each.arg)
            is_whole = name in ("log", "_log") and all(each.arg for each in node.keywords)
            match = LEVELS.fullmatch(ast.unparse(node.args[0]))
            level = match[1].lower() if match else None
            for event in texts_in(node.args[LOGGING[name]], constants):
                yield Logged(place, event, level, known if is_whole else None, known)


FILES = [*sorted((ROOT / "redbtc").rglob("*.py")), ROOT / "redbtc_proxy.py"]
LOGGED = [
    each
    for path in FILES
    for each in logged_in(path.relative_to(ROOT).as_posix(), ast.parse(path.read_text()))
]


def test_the_page_names_every_event() -> None:
    assert {each.event for each in LOGGED} | {"request"} == documented_events().keys()


def test_the_page_names_the_fields_of_every_event() -> None:
    events, wrong = documented_events(), []
    for each in LOGGED:
        event = events[each.event]
        if each.level and each.level not in event.levels:
            wrong.append(f"{each.place}: {each.event}: level {each.level}")
        if each.fields is not None and not event.always <= each.fields:
            wrong.append(f"{each.place}: {each.event} lacks {event.always - each.fields}")
        if unknown := each.some_fields - event.fields:
            wrong.append(f"{each.place}: {each.event} has {unknown}")
    assert not wrong


def test_the_page_names_no_field_that_no_event_has() -> None:
    """Where all fields of an event are constants in the code."""
    for name, event in documented_events().items():
        places = [each for each in LOGGED if each.event == name]
        if places and all(each.fields is not None for each in places):
            had = frozenset[str]().union(*(each.some_fields for each in places))
            assert event.fields == had, name


def test_the_fields_of_a_request_are_those_of_its_row() -> None:
    extra = {"code", "error", "places", "request_id", "route", "status"}
    row = {*RequestRow.__struct_fields__, "input_tokens", "output_tokens"}
    assert documented_events()["request"].fields - extra <= row


def test_a_line_that_the_page_does_not_describe_is_found() -> None:
    line = '{"time":"…","level":"info","event":"draining","in_flight":0}'
    assert undocumented(line) == []
    assert undocumented(line.replace("draining", "drained"))
    assert undocumented(line.replace("info", "error"))
    assert undocumented(line.replace('"in_flight":0', '"in_flight":0,"also":1'))
    assert undocumented(line.replace(',"in_flight":0', ""))


def test_the_log_of_a_process_before_is_counted() -> None:
    """What it has logged, and what it logs until it ends."""
    before, telemetry = dict(NOTED), Telemetry()
    assert telemetry.numbers["log events", "50"] == [NOTED[50]]
    telemetry.add({("log events", "50"): [2.0], ("log events", "30"): [1.0]})
    assert {30: before[30] + 1, 40: before[40], 50: before[50] + 2} == NOTED
    NOTED.update(before)
