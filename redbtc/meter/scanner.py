"""Keep the few members of a JSON text that matter, however large the rest of it is.

A Scanner reads a text in chunks, cut anywhere, and makes a shorter JSON text of it: the same value
without the members that no Node names. Its memory is bounded by the depth of what is named and by
MAX_OUTLINE, so neither long strings nor deep nesting nor a million members make the rest of a text
unreadable. Long strings of which only the length matters are replaced by that length, as a negative
number.

Values that are not named are skipped in bulk: strings are cut out of a piece of text, its brackets
are counted, and only where the value can end in the piece is it halved until the end is found. So
the work is done by C functions, some nanoseconds for each byte.

The scanner is forgiving: it does not check what it skips, and repairs or drops what a strict parser
would not accept in what it keeps.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Generator
from functools import cached_property
from itertools import accumulate

import msgspec

NOT_JSON = (msgspec.DecodeError, RecursionError, UnicodeDecodeError)

WINDOW = 4 << 10  # bytes in one step of `steps`
MAX_STRING = 1536  # bytes of a string that is kept: MAX_NAME characters, all of them escaped
MAX_TEXT = 32  # bytes of a text that is kept where only its length matters
MAX_HEAD = 512  # characters of a picture that are kept
MAX_NUMBER = 64  # characters
MAX_LEVELS = 24
MAX_CONTAINERS = 20_000  # lists and objects that are kept, and elements of lists
MAX_OUTLINE = 2 << 20  # bytes that are kept; beyond that, lists lose the rest of their elements
MIN_PIECE, MAX_PIECE = 256, 32 << 10  # bytes that are skipped at once

SPACE = rb"[\s,:]*+"
TEXT = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
STRING = re.compile(TEXT, re.DOTALL)
STRING_REST = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+("|\\?\Z)', re.DOTALL)
SEPARATORS = re.compile(SPACE)
NAME = re.compile(SPACE + rb"(" + TEXT + rb")\s*+:", re.DOTALL)
SCALAR = re.compile(rb'[^\s,:"\[\]{}]++')
BRACKET = re.compile(rb'[\[\]{}]|"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
PLAIN_STRING = re.compile(rb'"[\x20\x21\x23-\x5b\x5d-\x7e]*+"')
PLAIN_SCALAR = re.compile(rb"-?(?:0|[1-9]\d{0,17})|true|false|null")
BASE64 = re.compile(rb"[\w+/=-]{0,%d}" % MAX_HEAD, re.ASCII)
SIMPLE = TEXT + rb'|[^\s"\[\]{},:]++|[\[{][^"\[\]{}]*+(?:%b[^"\[\]{}]*+)*+[\]}]' % TEXT
RUN = rb'(?:[\s,]*+"(?!(?:%b)")[^"\\]*+"\s*+:\s*+(?:%b)(?=[\s,}]))*+'
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
DEPTHS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
CONTROLS = bytes.maketrans(bytes(range(32)), b" " * 32)
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")


class Node:
    """What is kept of a value: of an object the members that are named, of a list all elements as
    `elements` says, of a string at most MAX_STRING bytes ("short"), its length ("length") or its
    beginning ("head")."""

    def __init__(
        self,
        members: dict[str, Node] | None = None,
        elements: Node | None = None,
        strings: str = "short",
        recursive: bool = False,
        whole: bool = False,
    ) -> None:
        """`recursive`: it can contain itself. `whole`: it is worth nothing if it was cut off."""
        self.elements = elements
        self.strings = strings
        self.recursive = recursive
        self.whole = whole
        self.members: dict[bytes, Node] = {}
        self.name(members or {})

    def name(self, members: dict[str, Node]) -> None:
        """Keep these members, too."""
        self.members |= {name.encode(): node for name, node in members.items()}

    @cached_property
    def run(self) -> re.Pattern[bytes]:
        """A run of members that are not kept."""
        names = b"|".join(re.escape(name) for name in self.members)
        return re.compile(RUN % (names, SIMPLE), re.DOTALL)

    def keeps(self, bracket: int) -> bool:
        """Whether anything of a list or an object is kept."""
        return bool(self.members) if bracket == 0x7B else self.elements is not None


class OpenContainer:
    """A list or an object that is kept and has not ended."""

    __slots__ = ("elements", "members", "name", "node")

    def __init__(self, node: Node, bracket: int) -> None:
        self.node = node
        self.members: dict[bytes, bytes] = {}
        self.elements: list[bytes] | None = [] if bracket == 0x5B else None
        self.name: bytes | None = None  # of the member whose value comes next; b"" if not kept

    def text(self) -> bytes:
        if self.elements is not None:
            return b"[%b]" % b",".join(self.elements)
        return b"{%b}" % b",".join([b'"%b":%b' % each for each in self.members.items()])


class Scanner:
    """Reads a JSON text; see above."""

    def __init__(self, root: Node) -> None:
        self.found: bytes | None = None  # what is kept, once the value has ended
        self._root = root
        self._open: list[OpenContainer] = []
        self._rest = b""  # an incomplete token
        self._over = False  # the value has ended, or there is none
        self._depth = 0  # of a value that is skipped
        self._piece = MIN_PIECE  # how much of it is skipped at once
        self._nears_end = False
        self._in_string = False
        self._escaped = False  # the next byte of the string is escaped
        self._string: Node | None = None  # what is kept of it
        self._length = 0
        self._head = b""
        self._containers = 0
        self._size = 0

    def steps(self, chunk: bytes) -> Generator[None, None, None]:
        """Take a long chunk in small steps."""
        for at in range(0, len(chunk), WINDOW):
            self.feed(chunk[at : at + WINDOW])
            yield

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes, cut anywhere."""
        if self._over:
            return
        text, at = self._rest + chunk if self._rest else chunk, 0
        while at < len(text) and not self._over:
            before = at
            if self._in_string:
                at = self._read_string(text, at)
            elif self._depth:
                at = self._skip(text, at)
            else:
                at = self._take(text, at)
                if at == before:
                    break
        self._rest = text[at:]

    def close(self) -> bytes | None:
        """Return what is kept of a text that was cut off; None if there is no value."""
        if not self._open:
            return self.found
        if self._in_string and self._string and self._string.strings != "short":
            self._end_string()
        while self._open:
            if self._open[-1].node.whole and len(self._open) > 1:
                self._open.pop()
                self._put(b"null")
            else:
                self._close()
        return self.found

    # Values that are kept

    def _node(self) -> Node | None:
        """What is kept of the value that comes next."""
        if not self._open:
            return self._root
        frame = self._open[-1]
        if frame.elements is not None:
            return frame.node.elements
        return frame.node.members.get(frame.name or b"")

    def _take(self, text: bytes, at: int) -> int:
        """Take the next token; return its end, or `at` if it is incomplete."""
        if not self._open:
            return self._begin(text, at)
        frame = self._open[-1]
        if frame.elements is None and frame.name is None:
            return self._take_name(frame, text, at)
        start = SEPARATORS.match(text, at).end()  # type: ignore[union-attr]
        if start == len(text):
            return start
        if frame.elements is not None and self._is_full(text[start]):
            self._close()
            self._begin_skipping()
            return start
        return self._take_value(text, start)

    def _begin(self, text: bytes, at: int) -> int:
        start = len(text) - len(text[at:].lstrip(BYTE_ORDER_MARK + b" \t\r\n"))
        if start < len(text):
            bracket = text[start]
            self._over = bracket not in b"[{" or not self._root.keeps(bracket)
            if not self._over:
                self._open.append(OpenContainer(self._root, bracket))
            start += 1
        return start

    def _is_full(self, first: int) -> bool:
        full = self._size > MAX_OUTLINE or self._containers > MAX_CONTAINERS
        return full and first not in b"]}"

    def _take_name(self, frame: OpenContainer, text: bytes, at: int) -> int:
        run = frame.node.run.match(text, at)
        at = run.end() if run else at
        if match := NAME.match(text, at):
            name = match[1][1:-1]
            if b"\\" in name:
                name = msgspec.json.decode(repaired(match[1]), type=str).encode("utf-8", "replace")
            frame.name = name if name in frame.node.members else b""
            return match.end()
        start = SEPARATORS.match(text, at).end()  # type: ignore[union-attr]
        if start == len(text):
            return start
        if text[start] == 0x22:
            if len(text) - start <= MAX_STRING:
                return start  # the rest of the name, or the colon, is still to come
            frame.name = b""
            return self._begin_string(text, start, None, names=True)
        if text[start] in b"]}":
            self._close()
        elif text[start] in b"[{":
            self._begin_skipping()
        elif garbage := SCALAR.match(text, start):
            return garbage.end()
        return start + 1

    def _take_value(self, text: bytes, start: int) -> int:
        first, node = text[start], self._node()
        if first in b"[{":
            if node and node.keeps(first) and self._has_room(node):
                self._containers += 1
                self._open.append(OpenContainer(node, first))
            else:
                self._begin_skipping()
                self._put(b"null")
            return start + 1
        if first == 0x22:
            return self._begin_string(text, start, node)
        if first in b"]}":
            self._close()
            return start + 1
        scalar = SCALAR.match(text, start)
        end = scalar.end() if scalar else start + 1
        if end == len(text) and end - start <= MAX_NUMBER:
            return start
        self._put(repaired(text[start:end]) if node and end - start <= MAX_NUMBER else b"null")
        return end

    def _has_room(self, node: Node) -> bool:
        if len(self._open) >= MAX_LEVELS:
            return False
        return not node.recursive or self._containers <= MAX_CONTAINERS

    def _put(self, value: bytes) -> None:
        """The value that came next is complete."""
        frame = self._open[-1]
        if frame.elements is not None:
            frame.elements.append(value)
            self._containers += 1
        elif frame.name:
            frame.members[frame.name] = value
        frame.name = None
        self._size += len(value)

    def _close(self) -> None:
        """The innermost list or object has ended."""
        text = self._open.pop().text()
        if self._open:
            self._put(text)
        else:
            self.found, self._over = text, True

    # Strings

    def _begin_string(self, text: bytes, start: int, node: Node | None, names: bool = False) -> int:
        """Take a string that begins at `start`. `names`: it is a long name, whose value follows."""
        match = STRING.match(text, start)
        if match and not names:
            self._put(self._kept(node, match[0]) if node else b"null")
            return match.end()
        if match:
            return match.end()
        if node and node.strings == "short" and len(text) - start <= MAX_STRING:
            return start
        self._in_string, self._escaped, self._string = True, False, node
        self._length = -1 if names else 0
        self._head = b""
        return start + 1

    def _kept(self, node: Node, string: bytes) -> bytes:
        if node.strings == "head":
            return b'"%b"' % BASE64.match(string, 1)[0]  # type: ignore[index]
        if node.strings == "length" and len(string) - 2 > MAX_TEXT:
            return b"-%d" % (len(string) - 2)
        return repaired(string) if len(string) <= MAX_STRING else b'""'

    def _read_string(self, text: bytes, at: int) -> int:
        """Read on in a string that was cut; return where it ends or the text does."""
        start = min(at + self._escaped, len(text))
        end = STRING_REST.match(text, start)
        assert end is not None
        if self._string and len(self._head) < MAX_HEAD:
            self._head += text[at : min(end.end(), at + MAX_HEAD)]
        if self._length >= 0:
            self._length += end.end() - at
        self._escaped = end[1] == b"\\"
        if end[1] == b'"':
            self._length -= self._length > 0
            self._end_string()
        return end.end()

    def _end_string(self) -> None:
        node, self._in_string = self._string, False
        if self._depth or self._length < 0:  # it is in a value that is skipped, or a name
            return
        if node is None or node.strings == "short":
            self._put(b'""')
        elif node.strings == "head":
            self._put(b'"%b"' % BASE64.match(self._head)[0])  # type: ignore[index]
        else:
            self._put(b"-%d" % self._length)

    # Values that are skipped

    def _begin_skipping(self) -> None:
        """Skip up to the end of the list or object whose bracket was the last token."""
        self._depth, self._piece, self._nears_end = 1, MIN_PIECE, False

    def _skip(self, text: bytes, at: int) -> int:
        """Skip a piece of a value; return the end of the piece or of the value."""
        piece = text[at : at + self._piece]
        depth = self._depth + self._change(piece)
        if depth > 0:
            self._depth = depth
            if not self._nears_end:
                self._piece = min(2 * self._piece, MAX_PIECE)
            return at + len(piece)
        if len(piece) > MIN_PIECE:
            self._piece, self._nears_end = len(piece) // 2, True
            return at
        return self._find_end(text, at, at + len(piece))

    def _change(self, piece: bytes) -> int:
        """Return how a piece changes the depth, or -inf if the value can end in it. Unless it does,
        note whether the piece ends in a string."""
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
            self._in_string, self._escaped, self._string = True, escaped, None
        return change

    @staticmethod
    def _lowest(brackets: bytes) -> int:
        """Return the lowest depth within the brackets, relative to that before them."""
        for _ in range(4):
            brackets = brackets.replace(b"[]", b"").replace(b"{}", b"")
        return min(accumulate(map(DEPTHS.__getitem__, brackets)), default=0)

    def _find_end(self, text: bytes, at: int, end: int) -> int:
        for match in BRACKET.finditer(text, at, end):
            self._depth += DEPTHS.get(text[match.start()], 0)
            if self._depth == 0:
                return match.end()
        return end  # there is a backslash outside of strings: it is no JSON


def repaired(value: bytes) -> bytes:
    """Return a string or scalar as a strict parser accepts it: without control characters, halves
    of surrogate pairs, invalid UTF-8 and numbers out of range."""
    if PLAIN_STRING.fullmatch(value) or PLAIN_SCALAR.fullmatch(value):
        return value
    with contextlib.suppress(*NOT_JSON):
        return msgspec.json.encode(msgspec.json.decode(value))
    if not value.startswith(b'"'):
        return b"null"
    value = value.translate(CONTROLS).decode("utf-8", "replace").encode()
    with contextlib.suppress(*NOT_JSON):
        return msgspec.json.encode(msgspec.json.decode(SURROGATE.sub(rb"\\ufffd", value)))
    return b'""'
