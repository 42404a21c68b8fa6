"""Keep the few members of a JSON text that matter, however large the rest of it is.

A Scanner reads a text in chunks, cut anywhere, and makes a shorter JSON text of it: the same value
without the members that no Node names. Its memory is bounded by the depth of what is named and by
MAX_OUTLINE, so neither long strings nor deep nesting nor a million members make the rest of a text
unreadable. Long strings of which only the length matters are replaced by that length, as a negative
number.

Values that are not named are skipped in bulk (skipping.py): strings are cut out of a piece of text
and its brackets are counted; only where the value can end in the piece, the piece is halved until
the end is found. So C functions do the work, in a few nanoseconds for each byte.

The scanner is lenient: it does not check what it skips. In what it keeps, it repairs or drops what
a strict parser would not accept.
"""

from __future__ import annotations

import contextlib
import re

import msgspec

from redbtc.meter.nodes import TEXT, Node
from redbtc.meter.skipping import BASE64, LongString, SkippedValue
from redbtc.steps import Steps

NOT_JSON = (msgspec.DecodeError, RecursionError, UnicodeDecodeError)

SCAN_STEP = 4 << 10  # bytes in one step of `steps`
MAX_STRING = 1536  # bytes of a string that is kept whole: MAX_NAME characters, all escaped
MAX_TEXT = 32  # bytes of a string that is kept whole although only its length matters
MAX_NUMBER_LENGTH = 64  # characters
MAX_LEVELS = 24  # of lists and objects that are kept
MAX_CONTAINERS = 20_000  # lists and objects that are kept, and elements of lists
MAX_OUTLINE = 2 << 20  # bytes that are kept; beyond that, lists lose the rest of their elements

SEPARATOR_RUN = rb"[\s,:]*+"
STRING = re.compile(TEXT, re.DOTALL)
SEPARATORS = re.compile(SEPARATOR_RUN)
NAME = re.compile(SEPARATOR_RUN + rb"(" + TEXT + rb")\s*+:", re.DOTALL)
SCALAR = re.compile(rb'[^\s,:"\[\]{}]++')
PLAIN_STRING = re.compile(rb'"[\x20\x21\x23-\x5b\x5d-\x7e]*+"')
PLAIN_SCALAR = re.compile(rb"-?(?:0|[1-9]\d{0,17})|true|false|null")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
CONTROLS_TO_SPACES = bytes.maketrans(bytes(range(32)), b" " * 32)
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")


class OpenContainer:
    """A list or an object of which something is kept, and which has not ended."""

    __slots__ = ("elements", "members", "name", "node")

    def __init__(self, node: Node, bracket: int) -> None:
        self.node = node
        self.members: dict[bytes, bytes] = {}
        self.elements: list[bytes] | None = [] if bracket == 0x5B else None
        # The name of the member whose value comes next; b"" if that is not kept.
        self.name: bytes | None = None

    def text(self) -> bytes:
        """Return what is kept of it so far, as JSON."""
        if self.elements is not None:
            return b"[%b]" % b",".join(self.elements)
        return b"{%b}" % b",".join([b'"%b":%b' % each for each in self.members.items()])


class Scanner:
    """Reads a JSON text in chunks, and keeps of it what the root node names."""

    def __init__(self, root: Node) -> None:
        self.found: bytes | None = None  # what is kept, once the value has ended
        self._root = root
        self._open: list[OpenContainer] = []
        self._rest = b""  # an incomplete token
        self._ended = False  # the value has ended, or there is none
        self._long: LongString | SkippedValue | None = None  # what is being read across chunks
        self._containers = 0
        self._size = 0

    def steps(self, chunk: bytes) -> Steps[None]:
        """Take a long chunk in small steps."""
        for at in range(0, len(chunk), SCAN_STEP):
            self.feed(chunk[at : at + SCAN_STEP])
            yield

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes, cut anywhere."""
        if self._ended:
            return
        text, at = self._rest + chunk if self._rest else chunk, 0
        while at < len(text) and not self._ended:
            before = at
            if self._long:
                at = self._long.read(text, at)
                if self._long.ended:
                    kept, self._long = self._long.kept, None
                    if kept is not None:
                        self._put(kept)
            else:
                at = self._take(text, at)
                if at == before:
                    break
        self._rest = text[at:]

    def close(self) -> bytes | None:
        """Return what is kept of a text that was cut off; None if there is no value."""
        if not self._open:
            return self.found
        if isinstance(self._long, LongString) and (kept := self._long.cut_off()):
            self._put(kept)
        while self._open:
            if self._open[-1].node.whole and len(self._open) > 1:
                self._open.pop()
                self._put(b"null")
            else:
                self._close()
        return self.found

    # Values that are kept

    def _node(self) -> Node | None:
        """Return the node of the value that comes next, or None if nothing is kept of it."""
        if not self._open:
            return self._root
        container = self._open[-1]
        if container.elements is not None:
            return container.node.elements
        return container.node.members.get(container.name or b"")

    def _take(self, text: bytes, at: int) -> int:
        """Take the next token; return its end, or `at` if it is incomplete."""
        if not self._open:
            return self._begin(text, at)
        container = self._open[-1]
        if container.elements is None and container.name is None:
            return self._take_name(container, text, at)
        start = SEPARATORS.match(text, at).end()  # type: ignore[union-attr]
        if start == len(text):
            return start
        if container.elements is not None and self._is_full(text[start]):
            self._close()
            self._long = SkippedValue()
            return start
        return self._take_value(text, start)

    def _begin(self, text: bytes, at: int) -> int:
        start = len(text) - len(text[at:].lstrip(BYTE_ORDER_MARK + b" \t\r\n"))
        if start < len(text):
            bracket = text[start]
            self._ended = bracket not in b"[{" or not self._root.keeps(bracket)
            if not self._ended:
                self._open.append(OpenContainer(self._root, bracket))
            start += 1
        return start

    def _is_full(self, first: int) -> bool:
        full = self._size > MAX_OUTLINE or self._containers > MAX_CONTAINERS
        return full and first not in b"]}"

    def _take_name(self, container: OpenContainer, text: bytes, at: int) -> int:
        run = container.node.run.match(text, at)
        at = run.end() if run else at
        if match := NAME.match(text, at):
            name = match[1][1:-1]
            if b"\\" in name:
                name = msgspec.json.decode(repaired(match[1]), type=str).encode("utf-8", "replace")
            container.name = name if name in container.node.members else b""
            return match.end()
        start = SEPARATORS.match(text, at).end()  # type: ignore[union-attr]
        if start == len(text):
            return start
        if text[start] == 0x22:
            if len(text) - start <= MAX_STRING:
                return start  # the rest of the name, or the colon, has not come yet
            container.name = b""
            return self._begin_string(text, start, None, is_name=True)
        if text[start] in b"]}":
            self._close()
        elif text[start] in b"[{":
            self._long = SkippedValue()
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
                self._long = SkippedValue()
                self._put(b"null")
            return start + 1
        if first == 0x22:
            return self._begin_string(text, start, node)
        if first in b"]}":
            self._close()
            return start + 1
        scalar = SCALAR.match(text, start)
        end = scalar.end() if scalar else start + 1
        if end == len(text) and end - start <= MAX_NUMBER_LENGTH:
            return start
        self._put(
            repaired(text[start:end]) if node and end - start <= MAX_NUMBER_LENGTH else b"null"
        )
        return end

    def _has_room(self, node: Node) -> bool:
        if len(self._open) >= MAX_LEVELS:
            return False
        return not node.recursive or self._containers <= MAX_CONTAINERS

    def _put(self, value: bytes) -> None:
        """Add a value, of which `value` is kept, to the innermost list or object."""
        container = self._open[-1]
        if container.elements is not None:
            container.elements.append(value)
            self._containers += 1
        elif container.name:
            container.members[container.name] = value
        container.name = None
        self._size += len(value)

    def _close(self) -> None:
        """End the innermost list or object."""
        text = self._open.pop().text()
        if self._open:
            self._put(text)
        else:
            self.found, self._ended = text, True

    # Strings

    def _begin_string(
        self, text: bytes, start: int, node: Node | None, is_name: bool = False
    ) -> int:
        """Take a string that begins at `start`; return its end, or `start` if it is incomplete and
        short. `is_name`: it is the long name of a member."""
        match = STRING.match(text, start)
        if match and not is_name:
            self._put(self._kept(node, match[0]) if node else b"null")
            return match.end()
        if match:
            return match.end()
        if node and node.strings == "short" and len(text) - start <= MAX_STRING:
            return start
        self._long = LongString(node, is_name)
        return start + 1

    def _kept(self, node: Node, string: bytes) -> bytes:
        if node.strings == "head":
            return b'"%b"' % BASE64.match(string, 1)[0]  # type: ignore[index]
        if node.strings == "length" and len(string) - 2 > MAX_TEXT:
            return b"-%d" % (len(string) - 2)
        return repaired(string) if len(string) <= MAX_STRING else b'""'


def repaired(value: bytes) -> bytes:
    """Return a string or a scalar as a strict parser accepts it: without control characters,
    unpaired surrogates, invalid UTF-8 and numbers out of range."""
    if PLAIN_STRING.fullmatch(value) or PLAIN_SCALAR.fullmatch(value):
        return value
    with contextlib.suppress(*NOT_JSON):
        return msgspec.json.encode(msgspec.json.decode(value))
    if not value.startswith(b'"'):
        return b"null"
    value = value.translate(CONTROLS_TO_SPACES).decode("utf-8", "replace").encode()
    with contextlib.suppress(*NOT_JSON):
        return msgspec.json.encode(msgspec.json.decode(SURROGATE.sub(rb"\\ufffd", value)))
    return b'""'
