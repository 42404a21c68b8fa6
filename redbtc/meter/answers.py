"""The parts of an answer that matter to the meter, and how they are read from its JSON."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Generator, Iterator
from functools import cached_property
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from redbtc.meter.scanner import NOT_JSON, Node, Scanner

MAX_NAME = 256  # of a model, an id, a tier
KEEP = 256 << 10
MAX_AT_ONCE = 16 << 10  # bytes that a meter takes without a turn of the loop
MAX_VALUES = 2000  # in a JSON text longer than MAX_AT_ONCE that is decoded in one step; approximate
MAX_NAMED = 256  # items or ids that are handled in one step
MAX_ITEMS = 4000  # items of an answer that are remembered by their ids
STEP = 4 << 10  # bytes of a longer chunk that it takes in one step
IMAGE_TOOL = "image_generation"  # stands for the model of that tool, which the answer doesn't name

T = TypeVar("T")

# Of what a model writes (items of an output, messages and deltas of chats), the members that hold
# its words or lead to them.
WORDS = re.findall(
    r"\w+",
    "text refusal name arguments input code summary content action query queries command commands "
    "operation diff path transcript audio message delta function custom function_call tool_calls "
    "reasoning reasoning_content",
)
SHORT, HEAD = Node(), Node(strings="head")
SAID = Node(strings="length", recursive=True)
SAID.elements = SAID
SAID.name(dict.fromkeys(WORDS, SAID))
SAYS = dict.fromkeys(WORDS, SAID)


def short(*names: str) -> dict[str, Node]:
    return dict.fromkeys(names, SHORT)


WRITES = Node(short("ttl_12h_tokens"))
DETAILS = Node(
    short(
        *("cached_tokens", "cache_write_tokens", "reasoning_tokens", "image_tokens"),
        *("cached_text_tokens",),
    )
    | {"cache_write_tokens_details": WRITES}
)
COUNTS = Node(
    short(
        *("input_tokens", "output_tokens", "prompt_tokens", "completion_tokens"),
        *("reasoning_tokens", "total_tokens", "num_requests", "model"),
    )
    | {f"{each}_tokens_details": DETAILS for each in ("input", "output", "prompt", "completion")}
    | {"cached_tokens_details": DETAILS},
    whole=True,
)
NOTES = Node(elements=Node(short("type", "container_id", "file_id")))
CONTENT = Node(
    elements=Node(SAYS | short("type") | {"annotations": NOTES}, SAID, strings="length"),
    strings="length",
)
ITEM_NODE = Node(
    SAYS
    | short("id", "type", "call_id", "container_id", "quality", "size")
    | {"environment": Node(short("container_id")), "content": CONTENT}
    | {"action": Node(SAYS | short("type")), "encrypted_content": Node(strings="length")}
    | {"result": HEAD, "b64_json": HEAD, "url": SHORT, "svg_usage": COUNTS}
)
ITEMS_NODE = Node(elements=ITEM_NODE)
CHOICES_NODE = Node(elements=Node(SAYS | {"usage": COUNTS}, SAID, strings="length"))
RESPONSE_NODES = (
    short(
        *("id", "type", "model", "status", "service_tier", "stream_id", "output_index"),
        *("quality", "size"),
    )
    | {"error": Node(short("message", "type", "code"))}
    | {"usage": COUNTS, "svg_usage": COUNTS, "x_groq": Node({"usage": COUNTS})}
    | {"tool_usage": Node({"image_gen": COUNTS, "web_search": COUNTS}, whole=True)}
    | {"conversation": Node(short("id")), "incomplete_details": Node(short("reason"))}
    | {"choices": CHOICES_NODE, "delta": SAID, "b64_json": HEAD}
    | {"output": ITEMS_NODE, "data": ITEMS_NODE, "item": ITEM_NODE}
)
ANSWER_NODE = Node(RESPONSE_NODES | {"response": Node(RESPONSE_NODES)})


class Answer(Struct, dict=True):
    """What matters in an answer's JSON, or in that of an event. `response` is the Response object
    within an event. Types are checked where a value is used: one odd field must not hide
    another."""

    id: Any = None
    type: Any = None
    model: Any = None
    status: Any = None
    service_tier: Any = None
    error: Any = None
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
    response: msgspec.Raw = msgspec.Raw()
    choices: msgspec.Raw = msgspec.Raw()
    output: msgspec.Raw = msgspec.Raw()
    data: msgspec.Raw = msgspec.Raw()
    item: msgspec.Raw = msgspec.Raw()
    delta: msgspec.Raw = msgspec.Raw()
    b64_json: msgspec.Raw = msgspec.Raw()

    @cached_property
    def inner(self) -> Answer | None:
        """The Response object, where there is one."""
        return decode_answer(self.response) if self.response else None

    @property
    def is_long(self) -> bool:
        """Whether the event is too large to be noted in one step."""
        return len(self.response) + len(self.item) + len(self.delta) > MAX_AT_ONCE


UNFINISHED = ("queued", "in_progress")  # a Response object's status

# Types of items that a client sends back with their whole content, so that an upstream need not
# look them up by their ids. (Encrypted ones, reasoning and compaction, are bound to their ids.)
# Items of all other types are made by the upstream's own tools.
OWN_WORDS = re.compile(
    r"|message|reasoning|(?:context_)?compaction|compaction_summary|.*_output|"
    r"(?:function|custom_tool|tool_search|computer|apply_patch|(?:local_)?shell)_call"
)
CITATIONS = ("container_file_citation", "file_path")  # annotations of files that code has made


class OutputItem(Struct):
    """Of the output: what names something that the upstream may have stored."""

    id: Any = None
    type: Any = None
    call_id: Any = None
    container_id: Any = None
    environment: Any = None
    content: Any = None
    action: Any = None
    svg_usage: Any = None

    @property
    def by_tool(self) -> bool:
        """Whether one of the upstream's own tools made the item: the upstream may look it up."""
        return isinstance(self.type, str) and not OWN_WORDS.fullmatch(self.type)

    def ran_in(self) -> Iterator[Any]:
        """The ids of the containers in which its code ran."""
        yield self.container_id
        if isinstance(self.environment, dict):
            yield self.environment.get("container_id")

    @property
    def searches(self) -> bool:
        """Whether it is a web search that costs: opening a page does not."""
        kind = self.action.get("type") if isinstance(self.action, dict) else None
        return self.type == "web_search_call" and kind in (None, "search")

    def containers(self) -> Iterator[Any]:
        """Ids of the containers in which code ran, and of files there. Only where the upstream
        itself names them: a tool's schema, which an item may hold as well, is its author's text."""
        if self.container_id or self.environment:
            yield from self.ran_in()
        for part in objects_in(self.content):
            for note in objects_in(part.get("annotations")):
                if note.get("type") in CITATIONS:
                    yield from (note.get("container_id"), note.get("file_id"))


ANSWER = msgspec.json.Decoder(Answer)
OUTPUT, ITEM = msgspec.json.Decoder(list[OutputItem]), msgspec.json.Decoder(OutputItem)
PARTS = msgspec.json.Decoder(list[msgspec.Raw])


def read(text: str | bytes | msgspec.Raw, decoder: msgspec.json.Decoder[T], node: Node) -> T | None:
    """Decode a JSON text; None for what is not one of the decoder's type, even with forbearance:
    half a character, NaN, a control character in a text, a mark before it all, or a depth that has
    no end must not make what was used unknown."""
    with contextlib.suppress(*NOT_JSON):
        return decoder.decode(text)
    scanner = Scanner(node)
    scanner.feed(text.encode("utf-8", "replace") if isinstance(text, str) else bytes(text))
    return read_kept(scanner.found, decoder)


def read_kept(kept: bytes | None, decoder: msgspec.json.Decoder[T]) -> T | None:
    """Decode what a scanner has kept."""
    with contextlib.suppress(*NOT_JSON):
        return decoder.decode(kept) if kept else None
    return None


def decode_answer(text: str | bytes | msgspec.Raw) -> Answer | None:
    """None for what is no JSON object."""
    return read(text, ANSWER, ANSWER_NODE)


def is_dense(text: str | bytes) -> bool:
    """Return whether a JSON text has so many values that decoding it at once would block the event
    loop."""
    marks = (",", "[", "{")
    if isinstance(text, str):
        return sum(map(text.count, marks)) > MAX_VALUES
    return sum(text.count(mark.encode()) for mark in marks) > MAX_VALUES


def answer_steps(text: str | bytes) -> Generator[None, None, Answer | None]:
    """Decode an answer or an event in small steps; return None if it is not a JSON object."""
    if len(text) <= MAX_AT_ONCE or (len(text) <= KEEP and not is_dense(text)):
        with contextlib.suppress(*NOT_JSON):
            return ANSWER.decode(text)
    scanner = Scanner(ANSWER_NODE)
    for at in range(0, len(text), MAX_AT_ONCE):
        part = text[at : at + MAX_AT_ONCE]
        yield from scanner.steps(part.encode("utf-8", "replace") if isinstance(part, str) else part)
    return read_kept(scanner.found, ANSWER)


def items_in(listed: msgspec.Raw) -> Generator[None, None, list[OutputItem]]:
    """Decode the items of an output in small steps, and skip elements that are not items."""
    with contextlib.suppress(*NOT_JSON):
        return OUTPUT.decode(listed)
    scanner = Scanner(ITEMS_NODE)
    yield from scanner.steps(bytes(listed))
    items = []
    parts = read_kept(scanner.found, PARTS)
    for number, part in enumerate(parts or []):
        if number % MAX_NAMED == 0:
            yield
        if item := read_kept(bytes(part), ITEM):
            items.append(item)
    return items


def result_of(steps: Generator[None, None, T]) -> T:
    """Run a generator of small steps to its end and return its result."""
    while True:
        try:
            next(steps)
        except StopIteration as done:
            result: T = done.value
            return result


class JSONText:
    """A JSON text that arrives in parts: whole while it is small, else what matters of it."""

    def __init__(self) -> None:
        self._whole = bytearray()
        self._scanner: Scanner | None = None
        self.is_cut = False  # its end is missing; known after `torn`

    @property
    def is_long(self) -> bool:
        """Whether its next bytes, or its end, take more than one step."""
        return len(self._whole) > MAX_AT_ONCE or self._scanner is not None

    def steps(self, chunk: bytes) -> Generator[None, None, None]:
        """Take the next bytes, cut anywhere, in small steps."""
        if self._scanner is None:
            self._whole += chunk
            if len(self._whole) <= KEEP:
                return
            chunk, self._whole = bytes(self._whole), bytearray()
            self._scanner = Scanner(ANSWER_NODE)
        yield from self._scanner.steps(chunk)

    def answer(self) -> Generator[None, None, Answer | None]:
        """Decode the text; return None if it is not a JSON object."""
        if self._scanner:
            return read_kept(self._scanner.found, ANSWER)
        return (yield from answer_steps(bytes(self._whole)))

    def torn(self) -> Generator[None, None, Answer | None]:
        """Decode what arrived of a text that was cut off."""
        if self._scanner is None:
            self._scanner = Scanner(ANSWER_NODE)
            yield from self._scanner.steps(bytes(self._whole))
        self.is_cut = self._scanner.found is None
        return read_kept(self._scanner.close(), ANSWER)


def objects_in(values: Any) -> list[dict[str, Any]]:
    listed = values if isinstance(values, list) else []
    return [value for value in listed if isinstance(value, dict)]


def name_in(value: Any) -> str | None:
    return value if isinstance(value, str) and 0 < len(value) <= MAX_NAME else None
