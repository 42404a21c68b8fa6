"""Cut a JSON text of any size into pieces that are small enough to be parsed at once.

A call of msgspec or re takes time in proportion to the text, and nothing else can run meanwhile. So
a long text is scanned once, in windows, and cut up:

- A string that is longer than a window (a picture, a file, a long document) is cut out. No rule
  looks into such a string; only its length is kept.
- A list or an object that is longer than a window is taken out of the one that holds it. A stand-in
  is left in its place: a value of the same kind that contains a number which nobody can guess. The
  long value itself is cut after commas into pieces, each a list or an object of the same kind with
  a part of the elements or members.

msgspec checks every piece when it is complete, and every part of a long string. Together that is
the same as checking the whole text. A short text is one piece and is left as it is.
"""

from __future__ import annotations

import codecs
import re
import secrets
import sys
from bisect import bisect_right
from collections.abc import Generator, Iterator
from typing import Any, TypeVar

import msgspec

from redbtc.meter.answers import MAX_NAME
from redbtc.meter.scanner import NOT_JSON, SURROGATE
from redbtc.refusals import Refusal

Buffer = bytes | bytearray
T = TypeVar("T")
Steps = Generator[None, None, T]  # small steps of work: see redbtc/slices.py

MAX_PIECE = 64 << 10  # bytes: about 1 ms of the slowest work on a piece
WINDOW = MAX_PIECE // 2
STRING_WINDOW = 128 << 10  # bytes of a long string, which is fast to scan
MAX_GAP = 6 * WINDOW  # bytes between two commas: names, numbers and white space
MAX_STRUCTURE = 32 << 20  # bytes beside long strings; a context of 1,000,000 tokens is about 5 MB
MAX_OPEN = 1000  # levels of nested lists and objects, about as many as msgspec parses
# Lists and objects that are long, or hold more levels than PLAIN_LEVELS: each costs about 2 µs.
# 4 MB of an MCP server's schemas have 4,000.
MAX_DEEP = 30_000
PLAIN_LEVELS = 8

RAW = msgspec.json.Decoder(msgspec.Raw)
TEXT = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
LONG_TEXT = re.compile(rb'[^"\\]*+(?:\\(?:u[0-9a-fA-F]{4}|[^u])[^"\\]*+)*+', re.DOTALL)
OPENING = {ord("["): b"]", ord("{"): b"}"}
CLOSING = {ord("]"), ord("}")}
MARK_SIZE = 40  # characters in a stand-in: 128 random bits in hexadecimal, and its number
LIST, OBJECT, STRING = b'["%b"]', b'{"%b":0}', b'"%%b%b"' % (b"." * MAX_NAME)
STRING_SIZE = len(STRING % (b"0" * MARK_SIZE))
EMPTY = re.compile(rb"[\[{]\s*+[\]}]")
SPACE = b" \t\n\r"


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


def read_json(text: Buffer | msgspec.Raw, decoder: msgspec.json.Decoder[Any]) -> Any:
    """Decode a JSON text. Raises Refusal if it is not JSON or does not have the decoder's type."""
    try:
        return decoder.decode(text)
    except msgspec.ValidationError as error:
        place = str(error).partition("`$.")[2].rstrip("`")
        message = str(error).partition(" - at")[0]
        raise Refusal("invalid_request", message, param=place or None) from None
    except NOT_JSON:
        raise Refusal("invalid_json") from None


def checked(text: Buffer) -> Buffer:
    """Return the text if it is JSON, else raise Refusal. An unpaired surrogate escape, as in text
    that was cut within a character, is replaced by another of the same length."""
    try:
        RAW.decode(text)
    except NOT_JSON:
        text = SURROGATE.sub(rb"\\ufffd", text)
        read_json(text, RAW)
    return text


def check_utf8(text: Buffer) -> Steps[None]:
    """Raise Refusal for a text that is not UTF-8 (RFC 8259 §8.1): msgspec does not check strings
    that it skips, and a lenient reader would drop invalid bytes from a name."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for at in range(0, len(text), STRING_WINDOW):
            part = text[at : at + STRING_WINDOW]
            if decoder.getstate()[0] or not part.isascii():
                decoder.decode(part)
            yield
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        raise Refusal("invalid_json") from None


class Pieces:
    """A JSON text in pieces: `root` is the outermost value, with stand-ins for long values."""

    def __init__(self, root: Buffer) -> None:
        self.root = root
        self.cut = False
        self._mark = b""  # the random text in its stand-ins
        # By a stand-in's number: the length of a long string, or the pieces of a list or an object.
        self._values: list[int | list[Buffer]] = []
        self._places = [(0, 0, 0)]  # a piece of the root, an offset in it, and that in the text

    def all(self) -> Iterator[Buffer]:
        """Yield every piece, in no particular order."""
        yield self.root
        for pieces in self._values:
            if not isinstance(pieces, int):
                yield from pieces

    def parts(self, value: Buffer | msgspec.Raw) -> list[Buffer]:
        """Return the pieces of a list or an object: each is a value of the same kind, and together
        they have all its elements or members."""
        text = bytes(memoryview(value))
        return (self._stands_for(text, 2) if self.cut else None) or [text]

    def is_stand_in(self, value: msgspec.Raw) -> bool:
        """Return whether a value is the stand-in of a list or an object."""
        return self.cut and self._stands_for(bytes(memoryview(value)), 2) is not None

    def is_mark(self, string: bytes) -> bool:
        """Return whether a string is the one within the stand-in of a list or an object."""
        return self.cut and self._stands_for(string, 1) is not None

    def _stands_for(self, text: bytes, start: int) -> list[Buffer] | None:
        """Return the pieces of the list or object whose stand-in has its mark at `start`; None for
        the stand-in of a long string and for any other text."""
        if not text.startswith(self._mark, start):
            return None
        pieces = self._cut_from(text)[0]
        return None if isinstance(pieces, int) else pieces

    def taken_out(self, members: dict[str, msgspec.Raw]) -> list[Buffer] | None:
        """Return the pieces of an object if `members` are those of its stand-in, else None."""
        if len(members) != 1:
            return None
        (name,) = members
        return self._stands_for(name.encode(), 0)

    def within(self, text: Buffer, seen: set[int]) -> Iterator[Buffer]:
        """Yield the text and the pieces of all values that were taken out of it, at any depth.
        Skip pieces whose `id()` is in `seen`, and add those of the others."""
        waiting = [text]
        while waiting:
            yield (piece := waiting.pop())
            for pieces in self._cut_from(piece):
                if not isinstance(pieces, int):
                    waiting += [each for each in pieces if id(each) not in seen]
                    seen.update(map(id, pieces))

    def size(self, value: msgspec.Raw) -> int:
        """Return the length in bytes of a value, long strings that were cut out of it included."""
        cut = self._cut_from(bytes(memoryview(value)))
        return len(value) + sum(each - STRING_SIZE for each in cut if isinstance(each, int))

    def place(self, piece: int, offset: int) -> int:
        """Return the offset in the text of an offset in the root's piece number `piece`."""
        number = bisect_right(self._places, (piece, offset, sys.maxsize)) - 1
        _, start, at = self._places[number]
        return at + offset - start

    def _cut_from(self, text: Buffer) -> list[int | list[Buffer]]:
        """Return the values of the stand-ins in a piece, as in `_values`."""
        if not self.cut:
            return []
        return [self._values[int(part[:8])] for part in text.split(self._mark)[1:]]


class Cutter(Pieces):
    """Cuts a long text into pieces."""

    def __init__(self, text: Buffer) -> None:
        super().__init__(b"")
        self.cut = True
        self._text = text
        self._mark = secrets.token_hex(16).encode()
        self._places.clear()
        self._rest = bytearray()  # text that is in no piece yet
        # Of each list and object that has not ended: its start in the rest, and its pieces so far.
        self._open: list[tuple[int, list[Buffer]]] = []
        self._kept, self._deep = 0, 0

    def steps(self) -> Steps[Pieces]:
        """Cut the text, in small steps. Raises Refusal for a text that is not JSON, or that would
        cost too much to parse."""
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
        """Add the text from `at` to `end` to the rest. If there is more than a window of it up to
        `comma`, the end of its last comma, complete a piece there."""
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
            run = run.lstrip(SPACE)
        elif len(run) > WINDOW // 2 and not run.strip(SPACE):
            run = b" "
        self._note_place(end - len(run))
        self._rest += run
        self._kept += len(run)
        if self._kept > MAX_STRUCTURE:
            message = f"The body has more than {MAX_STRUCTURE} bytes outside long strings."
            raise Refusal("invalid_request", message)

    def _note_place(self, at: int) -> None:
        if len(self._open) == 1 or not self._rest:  # in the whole, or before it
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
        """End a list or an object. Take it out if it is long, else leave it as a part of the one
        that holds it."""
        if not self._open:
            raise Refusal("invalid_json")
        self._rest.append(bracket)
        start, pieces = self._open.pop()
        if pieces or len(self._rest) - start > WINDOW:
            self._complete(pieces, self._rest[start:])
            del self._rest[start:]
            self._rest += (LIST if bracket == ord("]") else OBJECT) % self._stand_in(pieces)

    def _stand_in(self, cut: int | list[Buffer]) -> bytes:
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
        self._rest += STRING % self._stand_in(end + 1 - start)
        return end + 1
