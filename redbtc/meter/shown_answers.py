"""Answers and events as the client is shown them: an error about the operator's credentials has the
gateway's own text. Only the bytes of the error are exchanged; all others stay as they came."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import orjson

from redbtc.meter.error_codes import CREDENTIAL_STATUSES, REJECTED_STATUSES, code_in, kept_code
from redbtc.meter.events import DATA, EVENT_END
from redbtc.meter.operator_errors import (
    loaded,
    names_operator,
    own_error,
    own_headers,
    own_message,
    status_of_error,
)
from redbtc.meter.scanner import BYTE_ORDER_MARK, NAME, SCALAR, STRING
from redbtc.meter.skipping import SkippedValue

# Is in each text that reports an error. Most texts, even of long events, don't have it.
ERROR = re.compile(rb'"error"(?!\s*:\s*null)')
BEGINNING = re.compile(rb"(?:%b)?[ \t\r\n]*+(?=\{)" % BYTE_ORDER_MARK)
BLANKS = re.compile(rb"[ \t\r\n]*+(?=[^ \t\r\n])")
# The members of an answer or an event that are exchanged, or that tell whether they must be.
ERROR_MEMBERS = (b"error", b"message", b"code", b"type", b"status", b"headers")
# A line within an event that is not data: its type can stand between two lines of data.
OTHER_LINE = re.compile(rb"(?>\r\n|\n|\r)(?!data:)[^\r\n]+")


def shown_json(text: bytes, *, is_cut_off: bool = False) -> bytes:
    """Return the JSON of an answer or an event as the client is shown it; `text` itself if it
    reports no error about the operator's credentials. The end of the text can be missing.
    `is_cut_off`: it never comes, so an error that is incomplete is left out."""
    if not ERROR.search(text):
        return text
    members: dict[bytes, Any] = {}
    spans: list[tuple[bytes, int, int]] = []
    for name, start in error_members(text):
        if end := value_end(text, start):
            members[name] = loaded(text[start:end]) or members.get(name)
            spans.append((name, start, end))
        elif is_cut_off and name in (b"error", b"message"):
            text = text[:start]
    status = status_of_error(members)
    is_rejected = status in REJECTED_STATUSES  # its text may quote the key in any form
    is_operators = is_rejected or (status in CREDENTIAL_STATUSES and names_operator(repr(members)))
    if not is_operators:
        return text
    pieces, at = [], 0
    for name, start, end in spans:
        new = own_member(name, loaded(text[start:end]), members, status)
        if new is not None:
            pieces += [text[at:start], orjson.dumps(new)]
            at = end
    return b"".join([*pieces, text[at:]])


def shown_event(event: bytes, *, is_cut_off: bool = False) -> bytes:
    """Return a server-sent event as the client is shown it, as `shown_json` does. If it is changed,
    data of several lines becomes one line."""
    mark = BYTE_ORDER_MARK if event.startswith(BYTE_ORDER_MARK) else b""
    rest = event[len(mark) :]
    lines = list(DATA.finditer(rest))
    text = b" ".join([line[1] for line in lines])
    shown = shown_json(text, is_cut_off=is_cut_off)
    if shown is text or shown == text:
        return event
    between = rest[lines[0].end() : lines[-1].end()]
    kept = b"".join(OTHER_LINE.findall(between))
    return mark + rest[: lines[0].start(1)] + shown + kept + rest[lines[-1].end() :]


def shown_events(events: bytes) -> bytes:
    """Return several server-sent events as the client is shown them."""
    ends = [match.end() for match in EVENT_END.finditer(events)]
    pairs = zip([0, *ends], [*ends, len(events)], strict=True)
    return b"".join([shown_event(events[start:end]) for start, end in pairs])


def shown_message(message: str | bytes) -> str | bytes:
    """Return an event of a WebSocket as the client is shown it, as `shown_json` does."""
    if isinstance(message, bytes):
        return shown_json(message)
    text = message.encode()
    shown = shown_json(text)
    return message if shown is text else shown.decode()


def own_member(name: bytes, value: Any, members: dict[bytes, Any], status: int) -> Any:
    """Return what the client is shown in place of a member; None if the member stays."""
    if name == b"error" and isinstance(value, dict):
        return own_error(value, status)
    if name == b"headers":
        return own_headers(value)
    if name in (b"error", b"message") and isinstance(value, str):
        return own_message(status, (code_in(members.get(b"code")),), value)
    if name == b"code" and isinstance(value, str):
        return kept_code(status, code_in(value)) or str(status)
    return None


def error_members(text: bytes) -> Iterator[tuple[bytes, int]]:
    """Yield the names of the members of an answer or an event that matter, and where their values
    begin. Those of a Response object within an event are its `error` alone. What follows that is
    not looked at."""
    begin = BEGINNING.match(text)
    for name, start in member_starts(text, begin.end()) if begin else ():
        if name == b"response" and text[start] == 0x7B:
            for inner, at in member_starts(text, start):
                if inner == b"error" and not text.startswith(b"null", at):
                    yield inner, at
                    return
        elif name in ERROR_MEMBERS:
            yield name, start


def member_starts(text: bytes, at: int) -> Iterator[tuple[bytes, int]]:
    """Yield the name of each member of the object that begins at `at`, and where its value begins,
    as far as the text goes."""
    end: int | None = at + 1
    while end and (match := NAME.match(text, end)) and (value := BLANKS.match(text, match.end())):
        yield match[1][1:-1], value.end()
        end = value_end(text, value.end())


def value_end(text: bytes, start: int) -> int | None:
    """Return where the JSON value ends that begins at `start`; None if its end is missing."""
    if text[start] in b"[{":
        skipped, at = SkippedValue(), start + 1
        while not skipped.ended and at < len(text):
            at = skipped.read(text, at)
        return at if skipped.ended else None
    match = (STRING if text[start] == 0x22 else SCALAR).match(text, start)
    return match.end() if match else None
