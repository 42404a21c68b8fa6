"""Read JSON objects strictly: duplicate keys, and names in a different case, are errors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Set

import msgspec

from redbtc.meter.nodes import TEXT
from redbtc.meter.scanner import NOT_JSON, SURROGATE
from redbtc.refusals import Refusal
from redbtc.request_body.pieces import Buffer, Pieces, read_json
from redbtc.steps import Steps

# The members of an object by name, each with the text of its value: values are not built.
Members = dict[str, msgspec.Raw]
MEMBERS, OBJECT_LIST = msgspec.json.Decoder(Members), msgspec.json.Decoder(list[Members])
RAW_LIST = msgspec.json.Decoder(list[msgspec.Raw])
NO_VALUE, NULL = msgspec.Raw(), msgspec.Raw(b"null")
MEMBER_NAME = re.compile(rb"\s*+,?\s*+(" + TEXT + rb")\s*+:\s*+", re.DOTALL)
OBJECT_END = re.compile(rb"\s*+\}")
MAX_MEMBERS = 1000  # of each object that is parsed; no request of OpenAI's API has 100
TOO_WIDE = f"An object in the body has more than {MAX_MEMBERS} members."
TWICE = "Duplicate key in the JSON body."
PACE = 32  # objects that are checked in one step
BRACKETS = re.compile(rb"[\[{]|[\]}]|" + TEXT, re.DOTALL)


def string_in(text: Buffer | msgspec.Raw) -> str:
    """Return the value of a JSON string; "" for any other value."""
    try:
        return msgspec.json.decode(text, type=str)
    except NOT_JSON:
        return ""


def is_text(raw: msgspec.Raw) -> bool:
    """Return whether a value is a string that is not empty."""
    return len(raw) > 2 and bytes(memoryview(raw)[:1]) == b'"'


def is_list(raw: msgspec.Raw) -> bool:
    """Return whether a value is a list."""
    return bytes(memoryview(raw)[:1]) == b"["


def read_members(text: Buffer) -> Members:
    """Return the members of a JSON object by name, with the text of their values. Raises Refusal
    for a text that can't be parsed, or that could be read in more than one way."""
    members: Members = read_json(text, MEMBERS)
    if len(members) > MAX_MEMBERS:
        raise Refusal("invalid_request", TOO_WIDE)
    if len(text) != shortest_length(members):
        check_once(text, members)
    return members


def read_short(text: Buffer) -> tuple[Pieces, Members]:
    """Read a text that is one piece. An unpaired surrogate escape, as in text that was cut within a
    character, is replaced by another of the same length. Raises Refusal as `read_members` does."""
    try:
        return Pieces(text), read_members(text)
    except Refusal:
        text = SURROGATE.sub(rb"\\ufffd", text)
        return Pieces(text), read_members(text)


def members_in(parts: list[Buffer]) -> Steps[Members]:
    """Return the members of an object, given its pieces. Raises Refusal as `read_members` does."""
    members = read_members(parts[0])
    for part in parts[1:]:
        yield
        more = read_members(part)
        if not members.keys().isdisjoint(more):
            raise Refusal("invalid_request", TWICE)
        members |= more
        if len(members) > MAX_MEMBERS:
            raise Refusal("invalid_request", TOO_WIDE)
    return members


def check_letters(members: Iterable[str], known: Set[str]) -> None:
    """Raise Refusal for a known name with letters of another case, or look-alike letters: the
    upstream may take it for the known name."""
    for name in members:
        if name not in known and name.casefold() in known:
            message = f"The key '{name}' must be written '{name.casefold()}'."
            raise Refusal("invalid_request", message, param=name)


def read_list(
    pieces: Pieces, part: Buffer, known: Set[str], checked_members: Set[str] | None
) -> Steps[list[Members]]:
    """Return the objects in a piece of a list. Raises Refusal for an object that could be read in
    more than one way, but checks only those with a member in `checked_members` (None: all)."""
    objects: list[Members] = read_json(part, OBJECT_LIST)
    checked = [
        number
        for number, each in enumerate(objects)
        if checked_members is None or not checked_members.isdisjoint(each)
    ]
    raws = read_json(part, RAW_LIST) if checked else ()
    for number in checked:
        each, raw = objects[number], raws[number]
        if len(each) > MAX_MEMBERS:
            raise Refusal("invalid_request", TOO_WIDE)
        if len(raw) != shortest_length(each):
            check_once(bytes(memoryview(raw)), each)
        check_letters(each, known)
        if number % PACE == 0:
            yield
    if pieces.is_cut:
        for number, each in enumerate(objects):
            if long := pieces.taken_out(each):
                objects[number] = yield from members_in(long)
                check_letters(objects[number], known)
                yield
    return objects


def shortest_length(members: Members) -> int:
    """Return the length of an object that is written as '{"name":value,…}', without white space or
    escapes in names. A text of this length has no room for a duplicate key, so only texts that are
    longer must be checked (`check_once`)."""
    return 1 + 4 * len(members) + sum(map(len, members)) + sum(map(len, members.values()))


def check_once(text: Buffer, members: Members) -> None:
    """Raise Refusal for an object with duplicate keys: the upstream may read the other value."""
    seen: set[str] = set()
    at = text.index(b"{") + 1
    while match := MEMBER_NAME.match(text, at):
        name = string_in(match[1])
        if name in seen or not text.startswith(memoryview(members[name]), match.end()):
            break
        seen.add(name)
        at = match.end() + len(members[name])
    if len(seen) < len(members) or not OBJECT_END.match(text, at):
        raise Refusal("invalid_request", TWICE)


def start_of(text: Buffer, members: Members, wanted: str) -> int:
    """Return the offset of the value of the member `wanted` in the text of its object."""
    at = text.index(b"{") + 1
    for name, value in members.items():
        match = MEMBER_NAME.match(text, at)
        if match is None or name == wanted:
            break
        at = match.end() + len(value)
    assert match is not None, "`wanted` is one of the members, and those were checked"
    return match.end()


def end_of(text: Buffer, start: int) -> Steps[int]:
    """Return the end of the object or list that begins at `start`."""
    depth = 0
    for number, match in enumerate(BRACKETS.finditer(text, start)):
        first = text[match.start()]
        if first != 0x22:
            depth += 1 if first in b"[{" else -1
            if not depth:
                return match.end()
        if number % 1024 == 0:
            yield
    return len(text)
