"""Values that a Scanner steps over: lists and objects of which nothing is kept, and strings that do
not end in the text so far."""

from __future__ import annotations

import re
from itertools import accumulate

from redbtc.meter.nodes import Node

MAX_HEAD = 512  # characters of a picture that are kept
MIN_SKIP, MAX_SKIP = 256, 32 << 10  # bytes that are skipped at once

STRING_REST = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+("|\\?\Z)', re.DOTALL)
BRACKET = re.compile(rb'[\[\]{}]|"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
BASE64 = re.compile(rb"[\w+/=-]{0,%d}" % MAX_HEAD, re.ASCII)
NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
DEPTHS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}


class LongString:
    """A string whose end is not in the text so far. `kept` is what is kept of it, as JSON, once it
    has ended; it stays None for a long name of a member."""

    def __init__(self, node: Node | None, is_name: bool = False) -> None:
        self.ended = False
        self.kept: bytes | None = None
        self._node = node
        self._is_name = is_name
        self._length = 0
        self._head = b""
        self._is_escaped = False  # the next byte is escaped

    def read(self, text: bytes, at: int) -> int:
        """Read on from `at`; return where the string or the text ends."""
        rest = STRING_REST.match(text, at + self._is_escaped)
        assert rest is not None, "it may be empty"
        end = rest.end()
        if self._node and len(self._head) < MAX_HEAD:
            self._head += text[at : min(end, at + MAX_HEAD)]
        self._length += end - at
        self._is_escaped = rest[1] == b"\\"
        if rest[1] == b'"':
            self.ended = True
            self._length -= 1
            self.kept = None if self._is_name else self.cut_off() or b'""'
        return end

    def cut_off(self) -> bytes | None:
        """Return what is kept of a string whose end is missing: its length or its beginning. None
        if only a whole string would be kept."""
        if self._node is None or self._node.strings == "short":
            return None
        if self._node.strings == "head":
            return b'"%b"' % BASE64.match(self._head)[0]  # type: ignore[index]
        return b"-%d" % self._length


class SkippedValue:
    """A list or an object of which nothing is kept, from behind its first bracket on."""

    kept = None

    def __init__(self) -> None:
        self.ended = False
        self._depth = 1
        self._piece_size = MIN_SKIP
        self._nears_end = False
        self._in_string = False  # the last piece ended within a string
        self._is_escaped = False  # the next byte of that string is escaped

    def read(self, text: bytes, at: int) -> int:
        """Skip the rest of a string, or a piece of the value; return the end of what was skipped,
        which is the end of the value if it has `ended`."""
        if self._in_string:
            rest = STRING_REST.match(text, at + self._is_escaped)
            assert rest is not None, "it may be empty"
            self._in_string, self._is_escaped = rest[1] != b'"', rest[1] == b"\\"
            return rest.end()
        piece = text[at : at + self._piece_size]
        depth = self._depth + self._change(piece)
        if depth > 0:
            self._depth = depth
            if not self._nears_end:
                self._piece_size = min(2 * self._piece_size, MAX_SKIP)
            return at + len(piece)
        if len(piece) > MIN_SKIP:
            self._piece_size, self._nears_end = len(piece) // 2, True
            return at
        return self._find_end(text, at, at + len(piece))

    def _change(self, piece: bytes) -> int:
        """Return by how much a piece changes the depth: the negative depth if the value can end in
        the piece. If it can't, note whether the piece ends within a string."""
        plain, escaped = piece, False
        if b"\\" in piece:
            plain = piece.replace(b"\\\\", b"")
            escaped = plain.endswith(b"\\")
            plain = plain.replace(b'\\"', b"")
        parts = plain.split(b'"')
        brackets = b"".join(parts[::2]).translate(None, NOT_BRACKETS)
        change = 0
        if brackets:
            closing = brackets.count(b"]") + brackets.count(b"}")
            change = len(brackets) - 2 * closing
            if closing >= self._depth and self._lowest(brackets) <= -self._depth:
                return -self._depth
        if len(parts) % 2 == 0:
            self._in_string, self._is_escaped = True, escaped
        return change

    @staticmethod
    def _lowest(brackets: bytes) -> int:
        """Return the lowest depth within the brackets, relative to the depth before them."""
        for _ in range(4):
            brackets = brackets.replace(b"[]", b"").replace(b"{}", b"")
        return min(accumulate(map(DEPTHS.__getitem__, brackets)), default=0)

    def _find_end(self, text: bytes, at: int, end: int) -> int:
        for match in BRACKET.finditer(text, at, end):
            self._depth += DEPTHS.get(text[match.start()], 0)
            if self._depth == 0:
                self.ended = True
                return match.end()
        return end  # there is a backslash outside of strings, so this is not JSON
