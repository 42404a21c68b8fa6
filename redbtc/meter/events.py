"""Read server-sent events, and tell cheaply which of them can matter to the meter."""

from __future__ import annotations

import re

from redbtc.meter.answers import MAX_AT_ONCE, MAX_WHOLE, STEP, Answer, JSONText
from redbtc.meter.scanner import BYTE_ORDER_MARK
from redbtc.steps import Steps

BLANK = BYTE_ORDER_MARK + b" \t\r\n"
# WHATWG HTML §9.2.6: lines end with LF, CR or CRLF, an event ends with an empty line.
EVENT_END = re.compile(rb"(?>\r\n|\n|\r)(?>\r\n|\n|\r)")
FIELDS = (b":", b"data", b"event", b"id", b"retry")  # WHATWG HTML §9.2.5


def is_stream(start: bytes, labelled: bool) -> bool | None:
    """Return whether an answer that begins with `start` consists of server-sent events: by its
    first bytes or, if these can be both, by its content type (`labelled`). None if it is blank so
    far."""
    begun = start[:256].lstrip(BLANK) or start.lstrip(BLANK)
    if not begun:
        return None
    if begun[0] in b"{[":
        return False
    return labelled or any(begun.startswith(field[: len(begun)]) for field in FIELDS)


# The value of a data line. (The lookbehind stands for the start of a line; ^ does not match after
# CR.)
DATA = re.compile(rb"data:(?<![^\r\n]data:) ?([^\r\n]*+)")
MARK = re.compile(rb'"(?:usage|error)"(?!\s*:\s*null)')
LAST = re.compile(
    rb"response\.(?:completed|incomplete|failed)|image_\w+\.completed|"
    rb"(?:transcript\.text|speech\.audio)\.done"
)
EVENT_START_SIZE = 256  # bytes of an incomplete event in which its type is searched for


def chat_may_matter(events: bytes) -> bool:
    """Return whether a chat's events can matter. Text can look as if it did."""
    return b"[DONE]" in events or MARK.search(events) is not None


def may_matter(events: bytes) -> bool:
    """Return whether the events of a response or of images can matter."""
    return (
        b"[DONE]" in events
        or b"complete" in events  # completed, incomplete
        or b'.failed"' in events
        or b"output_item." in events
        or b'partial_image"' in events
        or MARK.search(events) is not None
    )


def audio_may_matter(events: bytes) -> bool:
    """Return whether the events of a transcription or of speech can matter."""
    return (
        b"[DONE]" in events
        or b'.done"' in events
        or b'.segment"' in events
        or MARK.search(events) is not None
    )


def data_of(event: bytes) -> bytes:
    """Return the data of a whole event: its data lines, joined."""
    return b"\n".join(DATA.findall(event.removeprefix(BYTE_ORDER_MARK)))


LINE_REST = re.compile(rb"[^\r\n]*+")


class EventText:
    """An event that arrives in parts. An event of up to MAX_WHOLE bytes is kept whole. The data of
    a larger one is reduced to the members that matter."""

    def __init__(self) -> None:
        self.start = b""
        self.is_large = False
        self._whole = bytearray()
        self._text = JSONText()
        self._line = b""  # the start of a line, up to the name of its field
        self._in_data: bool | None = None  # None: at the start of a line
        self._lead = b""  # put before the next data: the newline that joins two data lines

    def steps(self, chunk: bytes) -> Steps[None]:
        """Take the next bytes, cut anywhere, in small steps."""
        if len(self.start) < EVENT_START_SIZE:
            self.start += chunk[: EVENT_START_SIZE - len(self.start)]
        if not self.is_large:
            self._whole += chunk
            if len(self._whole) <= MAX_WHOLE:
                return
            self.is_large = True
            chunk, self._whole = bytes(self._whole), bytearray()
            chunk = chunk.removeprefix(BYTE_ORDER_MARK)
        yield from self._read_lines(chunk)

    @property
    def is_long(self) -> bool:
        """Return whether the next bytes of the event, or its end, take more than one step."""
        return self.is_large or len(self._whole) > MAX_AT_ONCE

    def whole(self) -> bytes:
        """Return all of a small event."""
        return bytes(self._whole)

    def answer(self) -> Steps[Answer | None]:
        """Decode the data of a large event; return None if it is not a JSON object."""
        return self._text.answer()

    @property
    def is_cut_off(self) -> bool:
        """Return whether the end of the event's JSON is missing; known after `partial_answer`."""
        return self._text.is_cut_off

    def partial_answer(self) -> Steps[Answer | None]:
        """Decode what arrived of an event that was cut off."""
        if not self.is_large:
            yield from self._read_lines(self.whole().removeprefix(BYTE_ORDER_MARK))
        return (yield from self._text.partial_answer())

    def _read_lines(self, chunk: bytes) -> Steps[None]:
        at = 0
        for end in range(STEP, len(chunk) + STEP, STEP):
            while at < min(end, len(chunk)):
                at = yield from self._read_line(chunk, at)
            yield

    def _read_line(self, chunk: bytes, at: int) -> Steps[int]:
        """Read a line, the rest of a line, or a byte of its field name; return where that ends."""
        if self._in_data is None:
            return self._read_field(chunk, at)
        end = LINE_REST.match(chunk, at).end()  # type: ignore[union-attr]
        if self._in_data:
            yield from self._text.steps(self._lead + chunk[at:end])
            self._lead = b""
        if end < len(chunk):
            self._in_data, self._line = None, b""
        return end

    def _read_field(self, chunk: bytes, at: int) -> int:
        """Read up to the end of a field's name, or of the line."""
        byte = chunk[at : at + 1]
        if byte in (b"\r", b"\n"):
            self._line = b""
        else:
            self._line += byte
            if self._line == b"data:":
                self._in_data = True
                self._lead = b"\n"
            elif not b"data:".startswith(self._line):
                self._in_data = False
        return at + 1
