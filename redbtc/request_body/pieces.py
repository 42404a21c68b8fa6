"""A JSON text of any size as pieces that are small enough to be parsed at once (see cutting.py)."""

from __future__ import annotations

import codecs
import sys
from bisect import bisect_right
from collections.abc import Iterator
from typing import Any

import msgspec

from redbtc.meter.answers import MAX_NAME
from redbtc.meter.scanner import NOT_JSON
from redbtc.refusals import Refusal
from redbtc.steps import Steps

Buffer = bytes | bytearray

MAX_PIECE = 64 << 10  # bytes: about 1 ms of the slowest work on a piece
STRING_WINDOW = 128 << 10  # bytes of a long string, which is fast to scan
MARK_SIZE = 40  # characters in a stand-in: 128 random bits in hexadecimal, and its number
# The stand-ins for a long list, object or string.
LIST_STAND_IN, OBJECT_STAND_IN = b'["%b"]', b'{"%b":0}'
STRING_STAND_IN = b'"%%b%b"' % (b"." * MAX_NAME)
STRING_STAND_IN_SIZE = len(STRING_STAND_IN % (b"0" * MARK_SIZE))


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
        self.is_cut = False
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
        return (self._stands_for(text, 2) if self.is_cut else None) or [text]

    def is_stand_in(self, value: msgspec.Raw) -> bool:
        """Return whether a value is the stand-in of a list or an object."""
        return self.is_cut and self._stands_for(bytes(memoryview(value)), 2) is not None

    def is_mark(self, string: bytes) -> bool:
        """Return whether a string is the mark in the stand-in of a list or an object."""
        return self.is_cut and self._stands_for(string, 1) is not None

    def _stands_for(self, text: bytes, start: int) -> list[Buffer] | None:
        """Return the pieces of the list or object whose stand-in has its mark at `start`. None for
        the stand-in of a long string, and for any other text."""
        if not text.startswith(self._mark, start):
            return None
        pieces = self._values_in(text)[0]
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
            for pieces in self._values_in(piece):
                if not isinstance(pieces, int):
                    waiting += [each for each in pieces if id(each) not in seen]
                    seen.update(map(id, pieces))

    def size(self, value: msgspec.Raw) -> int:
        """Return the length in bytes of a value, long strings that were cut out of it included."""
        cut = self._values_in(bytes(memoryview(value)))
        strings = [each for each in cut if isinstance(each, int)]
        return len(value) + sum(strings) - STRING_STAND_IN_SIZE * len(strings)

    def place(self, piece: int, offset: int) -> int:
        """Return the offset in the text of an offset in the root's piece number `piece`."""
        number = bisect_right(self._places, (piece, offset, sys.maxsize)) - 1
        _, start, at = self._places[number]
        return at + offset - start

    def _values_in(self, text: Buffer) -> list[int | list[Buffer]]:
        """Return the values of the stand-ins in a piece, as in `_values`."""
        if not self.is_cut:
            return []
        return [self._values[int(part[:8])] for part in text.split(self._mark)[1:]]
