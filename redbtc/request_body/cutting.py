"""Cut a JSON text of any size into pieces that are small enough to be parsed at once.

A call of msgspec or re takes time in proportion to the text, and nothing else can run meanwhile. So
a long text is scanned once, in windows, and cut up:

- A string that is longer than a window (a picture, a file, a long document) is cut out. No rule
  depends on the contents of such a string; only its length is kept.
- A list or an object that is longer than a window is taken out of the one that holds it, which gets
  a stand-in: a value of the same kind with a mark that can't be guessed. The long value itself is
  cut after commas into pieces, each a list or an object of the same kind with a part of the
  elements or members.

msgspec checks every piece when it is complete, and every part of a long string. Together that is
the same as checking the whole text. A short text is one piece and is left as it is.
"""

from __future__ import annotations

import re
import secrets

import msgspec

from redbtc.meter.nodes import TEXT
from redbtc.meter.scanner import NOT_JSON, SURROGATE
from redbtc.refusals import Refusal
from redbtc.request_body.pieces import (
    LIST_STAND_IN,
    MAX_PIECE,
    OBJECT_STAND_IN,
    STRING_STAND_IN,
    STRING_WINDOW,
    Buffer,
    Pieces,
    check_utf8,
    read_json,
)
from redbtc.steps import Steps

WINDOW = MAX_PIECE // 2
MAX_GAP = 6 * WINDOW  # bytes between two commas: names, numbers and white space
MAX_STRUCTURE = 32 << 20  # bytes beside long strings; a context of 1,000,000 tokens is about 5 MB
MAX_OPEN = 1000  # levels of nested lists and objects, about as many as msgspec parses
# Lists and objects that are long, or hold more levels than PLAIN_LEVELS: each costs about 2 µs.
# 4 MB of an MCP server's schemas have 4,000.
MAX_DEEP = 30_000
PLAIN_LEVELS = 8

RAW = msgspec.json.Decoder(msgspec.Raw)
LONG_TEXT = re.compile(rb'[^"\\]*+(?:\\(?:u[0-9a-fA-F]{4}|[^u])[^"\\]*+)*+', re.DOTALL)
OPENING = {ord("["): b"]", ord("{"): b"}"}
CLOSING = {ord("]"), ord("}")}
EMPTY = re.compile(rb"[\[{]\s*+[\]}]")
WHITE_SPACE = b" \t\n\r"


def run_pattern(levels: int) -> re.Pattern[bytes]:
    """Return a pattern for a run of elements or members. It stops before a list or object that
    holds more than `levels` levels or does not end in the window, before the end of one that began
    earlier, and before a string that does not end. Group 1 is the run up to its last comma."""
    within, between = rb'[^"\[\]{}]*+', rb'[^"\[\]{},]*+'
    value = TEXT
    for _ in range(levels):
        value = rb"(?:%b|[\[{]%b(?:%b%b)*+[\]}])" % (TEXT, within, value, within)
    element = rb"%b(?:%b%b)*+" % (between, value, between)
    return re.compile(rb"((?:%b,)*+)%b" % (element, element), re.DOTALL)


RUN = run_pattern(PLAIN_LEVELS)


def checked(text: Buffer) -> Buffer:
    """Return the text if it is JSON, else raise Refusal. An unpaired surrogate escape, as in text
    that was cut within a character, is replaced by another escape of the same length."""
    try:
        RAW.decode(text)
    except NOT_JSON:
        text = SURROGATE.sub(rb"\\ufffd", text)
        read_json(text, RAW)
    return text


class Cutter(Pieces):
    """Cuts a long JSON text into pieces."""

    def __init__(self, text: Buffer) -> None:
        super().__init__(b"")
        self.is_cut = True
        self._text = text
        self._mark = secrets.token_hex(16).encode()
        self._places.clear()
        self._rest = bytearray()  # text that is in no piece yet
        # Each list and object that has not ended: its start in the rest, and its pieces so far.
        self._open: list[tuple[int, list[Buffer]]] = []
        self._kept, self._deep = 0, 0

    def steps(self) -> Steps[Pieces]:
        """Cut the text in small steps; return the pieces. Raises Refusal for a text that is not
        JSON, or that would cost too much to parse."""
        yield from check_utf8(self._text)
        text, at = self._text, 0
        while at < len(text):
            run = RUN.match(text, at, at + WINDOW)
            assert run is not None, "it may be empty"
            self._keep(at, run.end(1), run.end())
            start, at = at, run.end()
            first = text[at] if at < len(text) else 0
            if first in OPENING:
                self._begin(first, at)
                at += 1
            elif first in CLOSING:
                self._end(first)
                at += 1
            elif at == start:
                at = yield from self._cut_string(at)
            yield
        if self._open:
            raise Refusal("invalid_json")
        self.root = bytes(checked(self._rest))
        return self

    def _keep(self, at: int, comma: int, end: int) -> None:
        """Add the text from `at` to `end` to the rest. `comma` is the end of its last comma. If
        there is more than a window of rest up to there, complete a piece."""
        start, pieces = self._open[-1] if self._open else (0, [])
        if self._open and comma > at and len(self._rest) - start + comma - at > WINDOW:
            self._append(at, comma - 1)
            self._complete(pieces, self._rest[start:] + OPENING[self._rest[start]])
            del self._rest[start + 1 :]
            at = comma
        self._append(at, end)
        if len(self._rest) - start > MAX_GAP:
            message = f"The body has more than {MAX_GAP} bytes between two commas."
            raise Refusal("invalid_request", message)

    def _append(self, at: int, end: int) -> None:
        run = self._text[at:end]
        if not self._rest and not self._open:  # white space before the JSON value
            run = run.lstrip(WHITE_SPACE)
        elif len(run) > WINDOW // 2 and not run.strip(WHITE_SPACE):
            run = b" "
        self._note_place(end - len(run))
        self._rest += run
        self._kept += len(run)
        if self._kept > MAX_STRUCTURE:
            message = f"The body has more than {MAX_STRUCTURE} bytes outside long strings."
            raise Refusal("invalid_request", message)

    def _note_place(self, at: int) -> None:
        if len(self._open) == 1 or not self._rest:  # in the outermost value, or before it
            pieces = self._open[0][1] if self._open else []
            self._places.append((len(pieces), len(self._rest), at))

    def _complete(self, pieces: list[Buffer], piece: Buffer) -> None:
        if EMPTY.fullmatch(piece):  # two commas in a row, or a comma before the end
            raise Refusal("invalid_json")
        pieces.append(bytes(checked(piece)))

    def _begin(self, bracket: int, at: int) -> None:
        self._deep += 1
        if self._deep > MAX_DEEP:
            message = f"The body has more than {MAX_DEEP} long or deeply nested lists and objects."
            raise Refusal("invalid_request", message)
        if len(self._open) >= MAX_OPEN:
            raise Refusal("invalid_json")
        self._note_place(at)
        self._open.append((len(self._rest), []))
        self._rest.append(bracket)

    def _end(self, bracket: int) -> None:
        """End a list or an object. Take it out if it is long; otherwise leave it in the one that
        holds it."""
        if not self._open:
            raise Refusal("invalid_json")
        self._rest.append(bracket)
        start, pieces = self._open.pop()
        if pieces or len(self._rest) - start > WINDOW:
            self._complete(pieces, self._rest[start:])
            del self._rest[start:]
            stand_in = LIST_STAND_IN if bracket == ord("]") else OBJECT_STAND_IN
            self._rest += stand_in % self._mark_for(pieces)

    def _mark_for(self, cut: int | list[Buffer]) -> bytes:
        self._values.append(cut)
        return b"%b%08d" % (self._mark, len(self._values) - 1)

    def _cut_string(self, start: int) -> Steps[int]:
        """Cut out the long string that begins at `start`; return its end. Raises Refusal."""
        text, at = self._text, start + 1
        while True:
            end = text.find(b'"', at, at + STRING_WINDOW)
            end = end if end >= 0 else min(at + STRING_WINDOW, len(text))
            if text.find(b"\\", at, end) >= 0:
                match = LONG_TEXT.match(text, at, at + STRING_WINDOW)
                end = match.end() if match else at
            checked(b'"%b"' % bytes(text[at:end]))
            if text[end : end + 1] == b'"':
                break
            if end == at:  # the text has ended, or an escape is invalid
                raise Refusal("invalid_json")
            at = end
            yield
        self._rest += STRING_STAND_IN % self._mark_for(end + 1 - start)
        return end + 1
