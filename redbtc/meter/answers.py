"""The parts of an answer that matter to the meter, and how they are read from its JSON. An answer
is the body of an upstream's response: one JSON text, or events that each have one."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from redbtc.meter.answer_nodes import ANSWER_NODE, ITEMS_NODE
from redbtc.meter.nodes import Node
from redbtc.meter.scanner import NOT_JSON, Scanner
from redbtc.steps import Steps

MAX_NAME = 256  # characters of a model, an id or a tier
MAX_WHOLE = 256 << 10  # bytes of an answer or an event that is kept whole for parsing
MAX_AT_ONCE = 16 << 10  # bytes that a meter takes without giving the event loop a turn
MAX_VALUES = 2000  # values (about) in a text longer than MAX_AT_ONCE that is decoded in one step
MAX_NAMED = 256  # items or ids that are handled in one step
MAX_OUTPUT_ITEMS = 4000  # items of an answer that are remembered by their ids
STEP = 4 << 10  # bytes of a longer chunk that are taken in one step
IMAGE_TOOL = "image_generation"  # stands for the model of that tool, which the answer doesn't name

T = TypeVar("T")


class Answer(Struct, dict=True):
    """The members that matter in the JSON of an answer or an event. `response` is the Response
    object within an event. Types are checked where a value is used, so that a member of a wrong
    type does not hide the others."""

    id: Any = None
    type: Any = None
    model: Any = None
    status: Any = None
    service_tier: Any = None
    error: Any = None
    code: Any = None
    usage: Any = None
    tool_usage: Any = None
    svg_usage: Any = None
    x_groq: Any = None
    conversation: Any = None
    incomplete_details: Any = None
    stream_id: Any = None
    output_index: Any = None
    quality: Any = None
    size: Any = None
    duration: Any = None
    response: msgspec.Raw = msgspec.Raw()
    choices: msgspec.Raw = msgspec.Raw()
    output: msgspec.Raw = msgspec.Raw()
    data: msgspec.Raw = msgspec.Raw()
    item: msgspec.Raw = msgspec.Raw()
    delta: msgspec.Raw = msgspec.Raw()
    audio: msgspec.Raw = msgspec.Raw()  # the delta of speech
    text: msgspec.Raw = msgspec.Raw()  # of a transcription
    b64_json: msgspec.Raw = msgspec.Raw()

    @cached_property
    def inner(self) -> Answer | None:
        """The Response object within an event, or None."""
        return decode_answer(self.response) if self.response else None

    @property
    def is_long(self) -> bool:
        """Return whether the event is too large to be noted in one step."""
        return len(self.response) + len(self.item) + len(self.delta) > MAX_AT_ONCE


UNFINISHED = ("queued", "in_progress")  # a Response object's status

# Types of items that a client sends back with their whole content, so that an upstream need not
# look them up by their ids. (Encrypted items, reasoning and compaction, are bound to their ids.)
# Items of all other types are made by the upstream's own tools.
SELF_CONTAINED = re.compile(
    r"|message|reasoning|(?:context_)?compaction|compaction_summary|.*_output|"
    r"agent_message|additional_tools|configuration_update|"
    r"(?:function|custom_tool|tool_search|computer|apply_patch|(?:local_)?shell)_call"
)
CITATIONS = ("container_file_citation", "file_path")  # annotations of files made by code


class OutputItem(Struct):
    """The members of an output item that name objects which the upstream may have stored, or that
    tell what it costs."""

    id: Any = None
    type: Any = None
    call_id: Any = None
    container_id: Any = None
    environment: Any = None
    content: Any = None
    action: Any = None
    svg_usage: Any = None

    @property
    def is_made_by_tool(self) -> bool:
        """Return whether one of the upstream's own tools made the item. If a client sends such an
        item back, the upstream may look it up."""
        return isinstance(self.type, str) and not SELF_CONTAINED.fullmatch(self.type)

    def used_containers(self) -> Iterator[Any]:
        """Yield the ids of the containers in which the item's code ran."""
        yield self.container_id
        if isinstance(self.environment, dict):
            yield self.environment.get("container_id")

    @property
    def is_paid_search(self) -> bool:
        """Return whether the item is a web search that costs money. Opening a page does not."""
        kind = self.action.get("type") if isinstance(self.action, dict) else None
        return self.type == "web_search_call" and kind in (None, "search")

    def container_objects(self) -> Iterator[Any]:
        """Yield the ids of the containers in which code ran, and of files in containers. Look for
        them only where the upstream itself names them: an item can also contain a tool's schema,
        which is free text of its author."""
        if self.container_id or self.environment:
            yield from self.used_containers()
        for part in objects_in(self.content):
            for note in objects_in(part.get("annotations")):
                if note.get("type") in CITATIONS:
                    yield from (note.get("container_id"), note.get("file_id"))


ANSWER_DECODER = msgspec.json.Decoder(Answer)
OUTPUT_DECODER = msgspec.json.Decoder(list[OutputItem])
ITEM_DECODER = msgspec.json.Decoder(OutputItem)
RAW_PARTS_DECODER = msgspec.json.Decoder(list[msgspec.Raw])


def decode_leniently(
    text: str | bytes | msgspec.Raw, decoder: msgspec.json.Decoder[T], node: Node
) -> T | None:
    """Decode a JSON text; return None if it does not have the decoder's type. What a strict parser
    refuses is read with a scanner: half a character, NaN, a control character in a string, a byte
    order mark or very deep nesting must not make the usage unknown."""
    with contextlib.suppress(*NOT_JSON):
        return decoder.decode(text)
    scanner = Scanner(node)
    scanner.feed(text.encode("utf-8", "replace") if isinstance(text, str) else bytes(text))
    return decode_kept(scanner.found, decoder)


def decode_kept(kept: bytes | None, decoder: msgspec.json.Decoder[T]) -> T | None:
    """Decode what a scanner has kept; return None if that does not have the decoder's type."""
    with contextlib.suppress(*NOT_JSON):
        return decoder.decode(kept) if kept else None
    return None


def decode_answer(text: str | bytes | msgspec.Raw) -> Answer | None:
    """Decode the JSON of an answer or an event; return None if it is not a JSON object."""
    return decode_leniently(text, ANSWER_DECODER, ANSWER_NODE)


def is_dense(text: str | bytes) -> bool:
    """Return whether a JSON text has so many values that decoding it at once would block the event
    loop."""
    marks = (",", "[", "{")
    if isinstance(text, str):
        return sum(map(text.count, marks)) > MAX_VALUES
    return sum(text.count(mark.encode()) for mark in marks) > MAX_VALUES


def answer_steps(text: str | bytes) -> Steps[Answer | None]:
    """Decode an answer or an event in small steps; return None if it is not a JSON object."""
    if len(text) <= MAX_AT_ONCE or (len(text) <= MAX_WHOLE and not is_dense(text)):
        with contextlib.suppress(*NOT_JSON):
            return ANSWER_DECODER.decode(text)
    scanner = Scanner(ANSWER_NODE)
    for at in range(0, len(text), MAX_AT_ONCE):
        part = text[at : at + MAX_AT_ONCE]
        yield from scanner.steps(part.encode("utf-8", "replace") if isinstance(part, str) else part)
    return decode_kept(scanner.found, ANSWER_DECODER)


def items_in(listed: msgspec.Raw) -> Steps[list[OutputItem]]:
    """Decode the items of an output in small steps, and skip elements that are not items."""
    with contextlib.suppress(*NOT_JSON):
        return OUTPUT_DECODER.decode(listed)
    scanner = Scanner(ITEMS_NODE)
    yield from scanner.steps(bytes(listed))
    items = []
    parts = decode_kept(scanner.found, RAW_PARTS_DECODER)
    for number, part in enumerate(parts or []):
        if number % MAX_NAMED == 0:
            yield
        if item := decode_kept(bytes(part), ITEM_DECODER):
            items.append(item)
    return items


class JSONText:
    """A JSON text that arrives in parts. A text of up to MAX_WHOLE bytes is kept whole. A longer
    one is reduced to the members that matter."""

    def __init__(self) -> None:
        self._whole = bytearray()
        self._scanner: Scanner | None = None
        self.is_cut_off = False  # its end is missing; known after `partial_answer`

    @property
    def is_long(self) -> bool:
        """Return whether the next bytes of the text, or its end, take more than one step."""
        return len(self._whole) > MAX_AT_ONCE or self._scanner is not None

    def steps(self, chunk: bytes) -> Steps[None]:
        """Take the next bytes, cut anywhere, in small steps."""
        if self._scanner is None:
            self._whole += chunk
            if len(self._whole) <= MAX_WHOLE:
                return
            chunk, self._whole = bytes(self._whole), bytearray()
            self._scanner = Scanner(ANSWER_NODE)
        yield from self._scanner.steps(chunk)

    def answer(self) -> Steps[Answer | None]:
        """Decode the whole text; return None if it is not a JSON object."""
        if self._scanner:
            return decode_kept(self._scanner.found, ANSWER_DECODER)
        return (yield from answer_steps(bytes(self._whole)))

    def partial_answer(self) -> Steps[Answer | None]:
        """Decode what arrived of a text that was cut off."""
        if self._scanner is None:
            self._scanner = Scanner(ANSWER_NODE)
            yield from self._scanner.steps(bytes(self._whole))
        self.is_cut_off = self._scanner.found is None
        return decode_kept(self._scanner.close(), ANSWER_DECODER)


def objects_in(values: Any) -> list[dict[str, Any]]:
    """Return the objects in a decoded list; an empty list for a value of any other type."""
    listed = values if isinstance(values, list) else []
    return [value for value in listed if isinstance(value, dict)]


def name_in(value: Any) -> str | None:
    """Return a decoded id, model or the like; None if it is not a string of up to MAX_NAME
    characters, or empty."""
    return value if isinstance(value, str) and 0 < len(value) <= MAX_NAME else None
