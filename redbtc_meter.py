"""The meter watches an answer's bytes pass and finds the usage in them. It does no I/O: feed()
takes bytes as they came, cut anywhere, and returns those that may be sent on now.

Rule 1. Nothing waits that need not. What ends the answer for the client is held back until its
row is committed; a part of an event that could still turn out to end the answer (or to be the
usage chunk that the gateway asked for and takes out) is held until the event is whole. All else
passes.

Rule 2. Memory is bounded. An event or answer is kept whole for parsing up to KEEP bytes. Of a
larger one only the members that matter are kept (see redbtc_scanner.py): usage, id, model, tier,
and what must be known of the items of its output. So nothing else in it can be so large that the
usage is unreadable.

Rule 3. Only a parser decides. A search for a few marks tells whether an event can matter; what it
says is then read from its JSON, at the place where it belongs, so that text cannot forge it.

Rule 4. What passes is counted as well, for the estimate of an answer that does not report usage.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Generator, Iterator
from functools import cached_property
from itertools import islice
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from redbtc_pictures import PARTIAL_TOKENS, picture_tokens
from redbtc_rows import Part, Usage
from redbtc_scanner import BYTE_ORDER_MARK, MAX_LEVELS, NOT_JSON, Node, Scanner
from redbtc_settings import MOST_TOKENS

MAX_NAME = 256  # of a model, an id, a tier
KEEP = 256 << 10
MAX_AT_ONCE = 16 << 10  # bytes that a meter takes without a turn of the loop
MAX_VALUES = 2000  # in a JSON text longer than MAX_AT_ONCE that is decoded in one step; approximate
MAX_NAMED = 256  # items or ids that are handled in one step
MAX_ITEMS = 4000  # items of an answer that are remembered by their ids
STEP = 4 << 10  # bytes of a longer chunk that it takes in one step
MOST_SEARCHES = 100_000  # the same of web searches
IMAGE_TOOL = "image_generation"  # stands for the model of that tool, which the answer doesn't name

T = TypeVar("T")


# ── What is read ─────────────────────────────────────────────────────────────────────────────────

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


# Items that cost more than their tokens, or run in containers that do.
COUNTED = (
    *("web_search_call", "file_search_call", "code_interpreter_call", "shell_call"),
    *("local_shell_call", "shell_call_output"),
)
# Items that hold nothing but what the model has written.
WORDS_ALONE = ("message", "reasoning", "function_call", "custom_tool_call")
CITATIONS = ("container_file_citation", "file_path")  # annotations of files that code has made


class Item(Struct):
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
OUTPUT, ITEM = msgspec.json.Decoder(list[Item]), msgspec.json.Decoder(Item)
PARTS = msgspec.json.Decoder(list[msgspec.Raw])
ANYTHING = msgspec.json.Decoder()


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


def items_in(listed: msgspec.Raw) -> Generator[None, None, list[Item]]:
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


# ── Usage ────────────────────────────────────────────────────────────────────────────────────────


def objects_in(values: Any) -> list[dict[str, Any]]:
    listed = values if isinstance(values, list) else []
    return [value for value in listed if isinstance(value, dict)]


def tokens_in(counts: Any, name: str, most: int = MOST_TOKENS) -> int | None:
    """The count of that name, or None where there is none: negative, fractional, absurd or no
    number."""
    count = counts.get(name) if isinstance(counts, dict) else None
    if type(count) is float and count.is_integer():
        count = int(count)
    return count if type(count) is int and 0 <= count <= most else None


def usage_elsewhere(answer: Answer, said: Answer) -> Any:
    """Return the usage object of an event whose response has none."""
    if isinstance(answer.usage, dict) or not isinstance(said.x_groq, dict):
        return answer.usage
    return said.x_groq.get("usage")


def usage_in_choices(choices: msgspec.Raw) -> Any:
    """Return the last usage object that is a member of a choice, where Moonshot has it."""
    if b'"usage"' not in bytes(choices):
        return None
    found = [each.get("usage") for each in objects_in(words_in(choices, CHOICES_NODE))]
    return next((usage for usage in reversed(found) if isinstance(usage, dict)), None)


def part_of(whole: int | None, parts: int) -> bool:
    return whole is not None and parts <= whole


INPUT_OUTPUT, PROMPT_COMPLETION = ("input", "output"), ("prompt", "completion")


def counts_in(usage: Any, names: tuple[str, str]) -> tuple[int | None, int | None]:
    """The tokens of the input and of the output, by their names in one shape."""
    return tokens_in(usage, f"{names[0]}_tokens"), tokens_in(usage, f"{names[1]}_tokens")


def read_usage(usage: Any, images: bool) -> Usage | None:
    """Usage from OpenAI's `usage` object in any of its shapes (chat, responses, images, the image
    tool's); None where it reports neither input nor output. Parts that exceed their whole are not
    believed. Reasoning that the total counts beside the output is added to the output."""
    if not isinstance(usage, dict):
        return None
    into, out = INPUT_OUTPUT
    tokens_input, tokens_output = counts_in(usage, INPUT_OUTPUT)
    # Some upstreams have both shapes, of which one is all zeros.
    if "prompt_tokens" in usage or "completion_tokens" in usage:
        of_chat = counts_in(usage, PROMPT_COMPLETION)
        if (tokens_input or 0) + (tokens_output or 0) <= sum(each or 0 for each in of_chat):
            into, out = PROMPT_COMPLETION
            tokens_input, tokens_output = of_chat
    if tokens_input is None and tokens_output is None:
        return None
    parts_input, parts_output = (
        usage.get(f"{into}_tokens_details"),
        usage.get(f"{out}_tokens_details"),
    )
    cached = tokens_in(parts_input, "cached_tokens")
    cache_write = tokens_in(parts_input, "cache_write_tokens")
    believed = part_of(tokens_input, (cached or 0) + (cache_write or 0))
    cache_write_12h = writes_for_12h(parts_input, cache_write) if believed and cache_write else None
    reasoning = tokens_in(parts_output, "reasoning_tokens")
    said = (tokens_input or 0) + (tokens_output or 0)
    if reasoning and tokens_in(usage, "total_tokens") == said + reasoning:  # not in the output yet
        tokens_output = (tokens_output or 0) + reasoning
    image_input = image_output = None
    if images:
        image_input = tokens_in(parts_input, "image_tokens")
        image_output = tokens_in(parts_output, "image_tokens")
        if image_output is None:  # without details all of the output is image
            image_output = tokens_output
    return Usage(
        input_tokens=tokens_input,
        cached_input_tokens=cached if believed else None,
        cache_write_tokens=cache_write if believed else None,
        output_tokens=tokens_output,
        reasoning_tokens=reasoning if part_of(tokens_output, reasoning or 0) else None,
        image_input_tokens=image_input,
        image_output_tokens=image_output,
        cache_write_12h_tokens=cache_write_12h,
    )


def writes_for_12h(details: Any, writes: int) -> int | None:
    """Of the tokens that were written to the cache, those that stay there for 12 hours."""
    tokens = tokens_in(details.get("cache_write_tokens_details"), "ttl_12h_tokens")
    return tokens if part_of(writes, tokens or 0) else None


def with_former(used: Usage, former: Usage) -> Usage:
    """Return a later usage with the input or the output of a former one where it has none, or 0:
    some streams report each in an event of its own, and what was used does not become less."""
    if former.input_tokens and not used.input_tokens:
        used = msgspec.structs.replace(
            used,
            input_tokens=former.input_tokens,
            cached_input_tokens=former.cached_input_tokens,
            cache_write_tokens=former.cache_write_tokens,
            cache_write_12h_tokens=former.cache_write_12h_tokens,
        )
    if former.output_tokens and not used.output_tokens:
        used = msgspec.structs.replace(
            used,
            output_tokens=former.output_tokens,
            reasoning_tokens=former.reasoning_tokens,
        )
    return used


def added(a: Usage, b: Usage) -> Usage:
    """The usage of two pictures of one stream, of which each reports its own."""
    return Usage(*[plus(*each) for each in zip(*map(msgspec.structs.astuple, (a, b)), strict=True)])


def plus(a: int | None, b: int | None) -> int | None:
    return a if b is None else (a or 0) + b


def with_svg(used: Usage | None, parts: list[Part], svg: Any) -> Usage | None:
    """Return an answer's usage with that of the model that wrote an SVG added, and append the
    latter to `parts`. OpenAI's reference says that it is reported separately."""
    wrote = read_usage(svg, images=False)
    if wrote is None:
        return used
    reasoning = tokens_in(svg, "reasoning_tokens")
    parts.append(Part(name_in(svg.get("model")), wrote, False))
    used = used or Usage()
    return msgspec.structs.replace(
        used,
        input_tokens=plus(used.input_tokens, wrote.input_tokens),
        output_tokens=plus(used.output_tokens, wrote.output_tokens),
        reasoning_tokens=plus(
            used.reasoning_tokens,
            reasoning if part_of(wrote.output_tokens, reasoning or 0) else None,
        ),
    )


def with_tools(used: Usage, parts: list[Part], tools: Any) -> Usage:
    """A response's usage with that of its tools, which is none of its own tokens."""
    if not isinstance(tools, dict):
        return used
    searches = tokens_in(tools.get("web_search"), "num_requests", MOST_SEARCHES)
    if searches is not None:
        used = msgspec.structs.replace(used, web_searches=searches)
    parts[0] = parts[0]._replace(usage=used)
    drawn = read_usage(tools.get("image_gen"), images=True)
    if drawn is None:
        return used
    details = tools["image_gen"].get("cached_tokens_details")
    text = (drawn.input_tokens or 0) - (drawn.image_input_tokens or 0)
    cached = tokens_in(details, "cached_text_tokens")
    drawn = msgspec.structs.replace(
        drawn, cached_input_tokens=cached if part_of(text, cached or 0) else None
    )
    parts.append(Part(IMAGE_TOOL, drawn, True))
    return msgspec.structs.replace(
        used,
        image_input_tokens=drawn.image_input_tokens,
        image_output_tokens=drawn.image_output_tokens,
        tool_input_tokens=max(0, text) if drawn.input_tokens is not None else None,
    )


# ── What passes ──────────────────────────────────────────────────────────────────────────────────


def size_of(words: Any, levels: int = MAX_LEVELS) -> int:
    """Return the bytes of what a model has written. A negative number is the length of a text that
    a scanner has left out."""
    if isinstance(words, str):
        return len(words) if words.isascii() else len(words.encode("utf-8", "replace"))
    if isinstance(words, dict) and levels:
        return sum(size_of(value, levels - 1) for name, value in words.items() if name in SAYS)
    if isinstance(words, list) and levels:
        return sum(size_of(value, levels - 1) for value in words)
    return max(0, -words) if type(words) is int else 0


def words_in(raw: msgspec.Raw, node: Node = SAID) -> Any:
    """Whatever stands there; None if it can't be read."""
    return read(raw, ANYTHING, node) if raw else None


class Made(Struct):
    """What an item of the output, or several, come to."""

    text_bytes: int = 0
    sealed_bytes: int = 0
    image_tokens: int = 0

    def grow(self, other: Made) -> None:
        """It is seen again, with more of it, or less."""
        self.text_bytes = max(self.text_bytes, other.text_bytes)
        self.sealed_bytes = max(self.sealed_bytes, other.sealed_bytes)
        self.image_tokens = max(self.image_tokens, other.image_tokens)

    def add(self, other: Made, sign: int = 1) -> None:
        """Add another's counts, or subtract them with a `sign` of -1."""
        self.text_bytes += sign * other.text_bytes
        self.sealed_bytes += sign * other.sealed_bytes
        self.image_tokens += sign * other.image_tokens


def measured(item: Any) -> Made:
    """Measure an item of the output."""
    if not isinstance(item, dict):
        return Made()
    made = Made(size_of(item), size_of(item.get("encrypted_content")))
    if item.get("type") == "image_generation_call" and item.get("result"):
        made.image_tokens = picture_tokens(item.get("quality"), item.get("size"), item["result"])
    return made


class Passed:
    """What has passed of an answer, for an estimate of what nobody reports. Text that is seen as
    deltas, in the event that ends its item, and in the whole response counts once."""

    def __init__(self) -> None:
        self.deltas = 0  # bytes
        self._delta_bytes_in_items = 0  # of the deltas, those before the last item's end
        self._items: dict[Any, Made] = {}  # by id or index, the newest MAX_ITEMS at most
        self._in_items = Made()  # the sum over all items, forgotten ones included
        self._whole = Made()  # of the whole response, or of all messages of a chat
        self._pictures = 0  # tokens of pictures that came as events of their own

    def made(self) -> Made:
        """Return the largest view of it."""
        items = Made()
        items.add(self._in_items)
        since = self.deltas - self._delta_bytes_in_items
        items.text_bytes = max(self.deltas, items.text_bytes + since)
        items.grow(self._whole)
        items.image_tokens += self._pictures
        return items

    def see(self, answer: Answer, said: Answer, images: bool) -> Generator[None, None, None]:
        """Measure an answer's or an event's JSON, in small steps."""
        kind = answer.type if isinstance(answer.type, str) else ""
        if kind.endswith("partial_image"):
            self._pictures += PARTIAL_TOKENS
        elif images:
            yield from self._see_pictures(answer)
        elif answer.item:
            self._see_item(answer, kind)
        elif said.output:
            yield from self._see_whole(words_in(said.output, ITEMS_NODE))
        elif said.choices and not kind:
            yield from self._see_whole(words_in(said.choices, CHOICES_NODE))

    def see_delta(self, answer: Answer, chat: bool) -> None:
        """Measure an event that is too large for a search."""
        self.deltas += size_of(words_in(answer.choices if chat else answer.delta))

    def _see_item(self, answer: Answer, kind: str) -> None:
        item = words_in(answer.item, ITEM_NODE)
        if isinstance(item, dict):
            known = name_in(item.get("id")) or name_in(item.get("call_id"))
            index = answer.output_index if isinstance(answer.output_index, int) else None
            made = self._items.setdefault(known or index, Made())
            self._in_items.add(made, -1)
            made.grow(measured(item))
            self._in_items.add(made)
            if len(self._items) > MAX_ITEMS:
                self._items = dict(islice(self._items.items(), MAX_ITEMS // 2, None))
        if kind.endswith("done"):
            self._delta_bytes_in_items = self.deltas

    def _see_whole(self, listed: Any) -> Generator[None, None, None]:
        whole = Made()
        for number, each in enumerate(objects_in(listed), 1):
            whole.add(measured(each))
            if number % MAX_NAMED == 0:
                yield
        self._whole.grow(whole)

    def _see_pictures(self, answer: Answer) -> Generator[None, None, None]:
        if answer.b64_json:
            head = words_in(answer.b64_json)
            self._pictures += picture_tokens(answer.quality, answer.size, head)
        for number, picture in enumerate(objects_in(words_in(answer.data, ITEMS_NODE)), 1):
            if picture.get("b64_json") or picture.get("url"):
                head = picture.get("b64_json")
                self._pictures += picture_tokens(answer.quality, answer.size, head)
            if number % MAX_NAMED == 0:
                yield


class Report:
    """What an answer has said so far."""

    def __init__(self, images: bool) -> None:
        self._images = images
        self.response_id: str | None = None
        self.model: str | None = None
        self.service_tier: str | None = None
        self.status: str | None = None  # of the Response object
        self.usage: Usage | None = None
        self.parts: list[Part] = []  # of the usage, by model
        # Ids of objects that the upstream made, in order, and whether to learn them if it does not
        # store the response.
        self.made: dict[str, bool] = {}
        self.words: set[str] = set()  # of these, items that hold nothing but output
        self.listed: dict[str, bool] = {}  # ids of listed input, and whether the upstream made them
        self.failed = False  # it says itself that it failed
        self.in_events = False  # the Response object came within an event
        self.passed = Passed()
        self._reported_at = 0  # bytes of deltas that had passed when the usage was reported last
        # The last usage had no output and came before the end of the answer. Some upstreams report
        # 0 with each event until they know the true number.
        self.is_provisional = False
        # The last usage of a streamed chat came with choices, so it may cover only those choices.
        self.is_of_choices = False
        self.is_of_one_choice = False  # the last usage was a member of a choice
        self._searches: dict[Any, bool] = {}  # by id: web searches, and whether they cost
        self._file_searches: set[Any] = set()  # ids
        self._svgs: dict[Any, Any] = {}  # by item id: usage of the author of an SVG
        # No usage reports these; they are counted by the items of the output.
        self.containers: dict[str, None] = {}  # ids of those in which code ran

    @property
    def is_outdated(self) -> bool:
        """Whether more text has passed since the usage was reported."""
        return self.usage is not None and self.passed.deltas > self._reported_at

    @property
    def has_output(self) -> bool:
        """Whether output was reported. Usage without any can be that of the answer's beginning."""
        return self.usage is not None and bool(self.usage.output_tokens)

    @property
    def is_of_beginning(self) -> bool:
        """Whether usage was reported before any output passed: without output, or with the little
        that Anthropic's message_start has, in an answer that goes on."""
        if self.usage is None or self._reported_at:
            return False
        return not self.has_output or self.is_of_choices or self.status in UNFINISHED

    @property
    def text_bytes(self) -> int:
        """Bytes of text, tool calls and their arguments that have passed."""
        return self.passed.made().text_bytes

    @property
    def sealed_bytes(self) -> int:
        """Bytes of encrypted reasoning that have passed, as it is written."""
        return self.passed.made().sealed_bytes

    @property
    def image_tokens(self) -> int:
        """Output tokens of the pictures that have passed."""
        return self.passed.made().image_tokens

    @property
    def web_searches(self) -> int:
        """Calls in the output; the usage may report its own number."""
        return sum(self._searches.values())

    @property
    def file_searches(self) -> int:
        """Calls in the output."""
        return len(self._file_searches)

    @property
    def authors(self) -> list[Part]:
        """The usage of the authors of SVGs, which the image tool's items report."""
        parts: list[Part] = []
        for svg in self._svgs.values():
            with_svg(None, parts, svg)
        return parts

    def note(self, answer: Answer, torn: bool = False) -> Generator[None, None, None]:
        """Take in the JSON of an answer or an event, in small steps: later values replace earlier
        ones. The status of one that was cut off (`torn`) is not believed, since it could have
        changed."""
        inner = answer.inner if answer.response else None
        said = inner or answer
        self.in_events = self.in_events or inner is not None
        self.response_id = name_in(said.id) or self.response_id
        self.model = name_in(said.model) or self.model
        self.service_tier = name_in(said.service_tier) or self.service_tier
        yield from self._name(answer, said)
        self._use(answer, said, torn)
        if self._images or not self.has_output:
            yield from self.passed.see(answer, said, self._images)
        if not torn:
            self.status = name_in(said.status) or self.status
            self.failed = self.failed or bool(
                said.error
                or answer.error
                or said.status == "failed"
                or answer.type in ("error", "response.failed")
            )

    def _use(self, answer: Answer, said: Answer, torn: bool) -> None:
        reported, of_choice = said.usage, None
        if not isinstance(reported, dict) and (said.x_groq or answer.usage or said.choices):
            reported = usage_elsewhere(answer, said)
            if not isinstance(reported, dict):
                reported = of_choice = usage_in_choices(said.choices)
        used = read_usage(reported, self._images)
        written = used.output_tokens if used else None
        if used and self.parts and not self._images:
            used = with_former(used, self.parts[0].usage)
        parts = [Part(None, used, self._images)] if used else []
        if self._images:
            used = with_svg(used, parts, said.svg_usage)
        elif used:
            if self._searches or self._file_searches:
                used = self._with_calls(used, parts)
            used = with_tools(used, parts, said.tool_usage)
            for svg in self._svgs.values():
                used = with_svg(used, parts, svg)
        if used and self.usage and self._images:
            used, parts = self._with_earlier(answer, used, parts)
        if used:
            if written or not used.output_tokens:  # else its output was reported before
                self._reported_at = self.passed.deltas
                self.is_of_one_choice = of_choice is not None
            self.usage, self.parts = used, parts
            self.is_provisional = not (torn or used.output_tokens) and (
                said.status in UNFINISHED or has_choices(said)
            )

    def _with_calls(self, used: Usage, parts: list[Part]) -> Usage:
        """A response's usage with the calls in its output that no usage reports."""
        used = msgspec.structs.replace(
            used,
            web_searches=self.web_searches or None,
            file_searches=self.file_searches or None,
        )
        parts[0] = parts[0]._replace(usage=used)
        return used

    def _with_earlier(
        self, answer: Answer, used: Usage, parts: list[Part]
    ) -> tuple[Usage, list[Part]]:
        """In a stream of pictures each `completed` event reports the usage of its own picture."""
        if self.usage is None or not str(answer.type).endswith("completed"):
            return used, parts
        sums = {(part.model, part.images): part for part in self.parts}
        for part in parts:  # the model of a picture has no name, and an SVG's author may have none
            if earlier := sums.get((part.model, part.images)):
                part = part._replace(usage=added(earlier.usage, part.usage))
            sums[part.model, part.images] = part
        return added(self.usage, used), list(sums.values())

    def _name(self, answer: Answer, said: Answer) -> Generator[None, None, None]:
        if self._images or answer.type == "error":  # an error makes nothing
            return
        named: list[tuple[Any, bool]] = [(said.id, False)]
        items: list[Item] = []
        if isinstance(said.conversation, dict):
            named.append((said.conversation.get("id"), False))
        if answer.item and (item := read(answer.item, ITEM, ITEM_NODE)):
            items.append(item)
        if said.output:
            items += yield from items_in(said.output)
        if said.data:
            yield from self._list(said.data)
        for item in items:
            named.append((item.id, item.type != "message" and item.by_tool))
            if item.type in WORDS_ALONE and name_in(item.id) and len(self.words) < MAX_ITEMS:
                self.words.add(item.id)
            named += [(each, True) for each in item.containers()]
            if item.type in COUNTED:
                self._count(item)
            if item.svg_usage is not None and len(self._svgs) < MAX_ITEMS:
                self._svgs[name_in(item.id) or len(self._svgs)] = item.svg_usage
            if len(named) >= MAX_NAMED:
                self._learn(named)
                named.clear()
                yield
        self._learn(named)

    def _list(self, data: msgspec.Raw) -> Generator[None, None, None]:
        """Note the ids of the input items that an answer lists."""
        items = yield from items_in(data)
        listed = [item for item in items if name_in(item.id)][:MAX_ITEMS]
        self.listed = {item.id: item.id != item.call_id for item in listed}

    def _learn(self, named: list[tuple[Any, bool]]) -> None:
        """Remember ids of what the answer made, MAX_ITEMS at most."""
        for each, always in named:
            if name_in(each) and (len(self.made) < MAX_ITEMS or each in self.made):
                self.made[each] = always

    def _count(self, item: Item) -> None:
        """Note a tool call that costs money, MAX_ITEMS at most. Without an id it is a new one."""
        if len(self._searches) + len(self._file_searches) + len(self.containers) >= MAX_ITEMS:
            return
        if item.type == "web_search_call":
            self._searches[name_in(item.id) or len(self._searches)] = item.searches
        elif item.type == "file_search_call":
            self._file_searches.add(name_in(item.id) or len(self._file_searches))
        else:
            self.containers.update((each, None) for each in item.ran_in() if name_in(each))


def name_in(value: Any) -> str | None:
    return value if isinstance(value, str) and 0 < len(value) <= MAX_NAME else None


# ── Meters ───────────────────────────────────────────────────────────────────────────────────────


class Meter:
    """Meters an answer. `ended` is True once the answer has ended for the client; then, and after
    `finish`, `rest` returns the bytes that wait for the row. While it is `ending`, the event that
    ends it has come, but more usage may follow. `steps`, `finishing` and `tearing` do long work in
    small steps; `feed`, `finish` and `tear` do the same at once."""

    report: Report
    ended = False
    ending = False
    # `feed` is fast enough for chunks of up to so many bytes; larger ones are for `steps`. 0: any
    # chunk may take long, and so may the end: use `steps`, `finishing` and `tearing`.
    at_once = MAX_AT_ONCE

    def steps(self, chunk: bytes) -> Generator[None, None, bytes]:
        """Take the next bytes of the answer; return what may be sent on now."""
        raise NotImplementedError

    def finishing(self) -> Generator[None, None, None]:
        """Note that the upstream has sent everything."""
        yield from ()

    def tearing(self) -> Generator[None, None, None]:
        """Note that the answer was cut off: what it has said so far counts."""
        yield from ()

    def feed(self, chunk: bytes) -> bytes:
        """Take the next bytes of the answer; return what may be sent on now."""
        return result_of(self.steps(chunk))

    def finish(self) -> None:
        """Note that the upstream has sent everything."""
        result_of(self.finishing())

    def tear(self) -> None:
        """Note that the answer was cut off: what it has said so far counts."""
        result_of(self.tearing())

    def rest(self) -> bytes:
        """Return the bytes that wait for the row, once."""
        return b""


class JSONMeter(Meter):
    """Meters an answer that is one JSON text. Its last byte is what ends it."""

    def __init__(self, images: bool) -> None:
        self.report = Report(images)
        self.ended = False
        self._text = JSONText()
        self._held = b""

    def steps(self, chunk: bytes) -> Generator[None, None, bytes]:
        """Take the next bytes, in small steps; return all but the last byte so far."""
        yield from self._text.steps(chunk)
        self.at_once = 0 if self._text.is_long else MAX_AT_ONCE
        passed, self._held = self._held + chunk[:-1], chunk[-1:]
        return passed

    def finishing(self) -> Generator[None, None, None]:
        answer = yield from self._text.answer()
        if answer:
            yield from self.report.note(answer)
        else:  # the upstream has ended it too early
            yield from self.tearing()
        self.ended = True

    def tearing(self) -> Generator[None, None, None]:
        answer = yield from self._text.torn()
        if answer:
            yield from self.report.note(answer, torn=True)

    def rest(self) -> bytes:
        held, self._held = self._held, b""
        return held


BLANK = BYTE_ORDER_MARK + b" \t\r\n"
FIELDS = (b":", b"data", b"event", b"id", b"retry")  # WHATWG HTML §9.2.5


def is_stream(start: bytes, labelled: bool) -> bool | None:
    """Return whether an answer that begins so is server-sent events: by its first bytes, or where
    they do not tell, by its label. None if all of it so far is blank."""
    begun = start[:256].lstrip(BLANK) or start.lstrip(BLANK)
    if not begun:
        return None
    if begun[0] in b"{[":
        return False
    return labelled or any(begun.startswith(field[: len(begun)]) for field in FIELDS)


# WHATWG HTML §9.2.6: lines end with LF, CR or CRLF, an event ends with an empty line.
EVENT_END = re.compile(rb"(?>\r\n|\n|\r)(?>\r\n|\n|\r)")
# The value of a data line. (The lookbehind means the start of a line, which ^ does not do for CR.)
DATA = re.compile(rb"data:(?<![^\r\n]data:) ?([^\r\n]*+)")
MARK = re.compile(rb'"(?:usage|error)"(?!\s*:\s*null)')
EVENT_TYPE = re.compile(rb'(?:event: ?([^\r\n]*)[\r\n]|data: ?\{"type": ?"([^"\\]*)")')
CHAT_CHUNK = re.compile(rb"data: ?\{")
STRING_VALUE = rb' ?"([^"\\]*+(?:\\.[^"\\]*+)*+)"'
CHAT_TEXT = re.compile(
    rb'"(?:content|arguments|refusal|reasoning(?:_content)?|name|input|text|transcript)":'
    + STRING_VALUE,
    re.DOTALL,
)
RESPONSE_TEXT = re.compile(rb'"delta":' + STRING_VALUE, re.DOTALL)
LAST = re.compile(rb"response\.(?:completed|incomplete|failed)|image_\w+\.completed")
PICTURE = re.compile(rb'image_\w+\.\w|"b64_json"')  # within an event that begins so
# By what is still to be found: events that can name it.
NAMING = {
    (True, True): re.compile(rb'"(?:id|model)"\s*+:\s*+"[^"]'),
    (True, False): re.compile(rb'"id"\s*+:\s*+"[^"]'),
    (False, True): re.compile(rb'"model"\s*+:\s*+"[^"]'),
    (False, False): None,
}
START = 256  # bytes of an incomplete event in which its type is looked for
HOLD = 64 << 10
HOLD_BACK = 64


def chat_marked(events: bytes) -> bool:
    """Whether there can be anything in a chat's events that matters. Text can look like it, too."""
    return b"[DONE]" in events or MARK.search(events) is not None


def marked(events: bytes) -> bool:
    """Whether there can be anything that matters in events of a response or of images."""
    return (
        b"[DONE]" in events
        or b"complete" in events  # completed, incomplete
        or b'.failed"' in events
        or b"output_item." in events
        or b'partial_image"' in events
        or MARK.search(events) is not None
    )


def data_of(event: bytes) -> bytes:
    """The data of a whole event: its data lines, joined."""
    return b"\n".join(DATA.findall(event.removeprefix(BYTE_ORDER_MARK)))


LINE_REST = re.compile(rb"[^\r\n]*+")


class EventText:
    """An event that arrives in parts: whole while it is small, else what matters of its data."""

    def __init__(self) -> None:
        self.start = b""
        self.is_large = False
        self._whole = bytearray()
        self._text = JSONText()
        self._line = b""  # the start of a line, up to the name of its field
        self._in_data: bool | None = None  # None: at the start of a line
        self._lead = b""  # put before the next data: the newline that joins two data lines

    def steps(self, chunk: bytes) -> Generator[None, None, None]:
        """Take the next bytes, cut anywhere, in small steps."""
        if len(self.start) < START:
            self.start += chunk[: START - len(self.start)]
        if not self.is_large:
            self._whole += chunk
            if len(self._whole) <= KEEP:
                return
            self.is_large = True
            chunk, self._whole = bytes(self._whole), bytearray()
            chunk = chunk.removeprefix(BYTE_ORDER_MARK)
        yield from self._read_lines(chunk)

    @property
    def is_long(self) -> bool:
        """Whether its next bytes, or its end, take more than one step."""
        return self.is_large or len(self._whole) > MAX_AT_ONCE

    def whole(self) -> bytes:
        """Return all of a small event."""
        return bytes(self._whole)

    def answer(self) -> Generator[None, None, Answer | None]:
        """Decode the data of a large event; return None if it is not a JSON object."""
        return self._text.answer()

    @property
    def is_cut(self) -> bool:
        """Whether the end of its JSON is missing; known after `torn`."""
        return self._text.is_cut

    def torn(self) -> Generator[None, None, Answer | None]:
        """Decode what arrived of an event that was cut off."""
        if not self.is_large:
            yield from self._read_lines(self.whole().removeprefix(BYTE_ORDER_MARK))
        return (yield from self._text.torn())

    def _read_lines(self, chunk: bytes) -> Generator[None, None, None]:
        at = 0
        for end in range(STEP, len(chunk) + STEP, STEP):
            while at < min(end, len(chunk)):
                at = yield from self._read_line(chunk, at)
            yield

    def _read_line(self, chunk: bytes, at: int) -> Generator[None, None, int]:
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


class StreamMeter(Meter):
    """Meters server-sent events. `take_out_usage`: the gateway asked for the chat's usage chunk,
    and removes it from what the client gets. `ends`: how many events end the response, one for each
    image that was asked for. `expects_usage`: a chat was asked to report its usage, so that it is
    waited for if it has not come before the end."""

    def __init__(
        self,
        *,
        images: bool,
        chat: bool,
        take_out_usage: bool,
        ends: int = 1,
        expects_usage: bool = False,
    ) -> None:
        self.report = Report(images)
        self.ended = False
        self.ending = False
        self._chat = chat
        self._images = images
        self._text = CHAT_TEXT if chat else RESPONSE_TEXT
        self._marked = chat_marked if chat else marked
        self._take_out_usage = take_out_usage
        self._expects_usage = expects_usage or take_out_usage
        self._ends = ends
        self._ends_seen = 0
        # Events in which the model or the id can be, while they are not known. Pictures have none.
        self._naming = None if images else NAMING[True, True]
        self._partial: EventText | None = None  # the event that is still incomplete
        self._tail = b""  # its last two bytes: an event's end may be cut
        self._begun = False  # some of it has been sent on
        self._held = b""  # what waits of it
        self._waiting = b""  # what waits for the row: from the event that ends the answer on
        self._cut_newline = ""  # what to do with the LF of a CRLF whose CR ended an event

    def feed(self, chunk: bytes) -> bytes:
        """Return what may be sent on now, in order."""
        if self.ended:
            return chunk
        if self.is_dull(chunk):
            self.count_text(chunk)
            return chunk
        return result_of(self._read(chunk))

    def steps(self, chunk: bytes) -> Generator[None, None, bytes]:
        passed: list[bytes] = []
        for at in range(0, len(chunk), STEP):
            if self.ended:
                self._held += chunk[at:]
                break
            passed.append((yield from self._read(chunk[at : at + STEP])))
            yield
        return b"".join(passed)

    def _read(self, chunk: bytes) -> Generator[None, None, bytes]:
        """Take a chunk of at most MAX_AT_ONCE bytes; return what may be sent on now."""
        passed: list[bytes] = []
        if self._cut_newline and chunk:
            if chunk.startswith(b"\n"):
                self._pass(b"\n" if self._cut_newline == "pass" else b"", passed)
                chunk = chunk[1:]
            self._cut_newline = ""
        start, shift = 0, len(self._tail)
        for match in EVENT_END.finditer(self._tail + chunk):
            end = match.end() - shift
            yield from self._complete(chunk[start:end], passed)
            start = end
        if start < len(chunk):
            yield from self._grow(chunk[start:], passed)
        return b"".join(passed)

    def is_dull(self, chunk: bytes) -> bool:
        """Whether these are whole events in the usual form, none of which can matter: nearly every
        chunk. There is nothing to be done with it but to count its text."""
        return (
            self._partial is None
            and (self._naming is None or not self._naming.search(chunk))
            and not self.ending
            and not self._cut_newline
            and chunk.endswith(b"\n\n")
            and not self._marked(chunk)
        )

    def finishing(self) -> Generator[None, None, None]:
        """Note that the upstream has sent everything. A last event without its empty line counts,
        what arrived of one that is cut off as well, and fewer images than were asked for are
        complete, unless one is cut off."""
        is_cut = False
        if self._partial is not None and not self.ended:
            answer = yield from self._partial.torn()
            if answer and self._partial.is_cut:
                is_cut = True
                yield from self._take_torn(answer)
            else:
                rest: list[bytes] = []
                yield from self._complete(b"", rest)
                self._waiting += b"".join(rest)
        self.ended = self.ended or self.ending or (self._ends_seen > 0 and not is_cut)

    def tearing(self) -> Generator[None, None, None]:
        answer = (yield from self._partial.torn()) if self._partial else None
        if answer:
            yield from self._take_torn(answer)

    def _take_torn(self, answer: Answer) -> Generator[None, None, None]:
        """Take in, once, what arrived of an event that was cut off."""
        self._partial = None
        self.report.passed.see_delta(answer, self._chat)
        yield from self.report.note(answer, torn=True)

    def rest(self) -> bytes:
        waiting = self._waiting + self._held
        self._waiting = self._held = b""
        return waiting

    def count_text(self, events: bytes) -> None:
        """For an estimate."""
        for text in self._text.findall(events):
            self.report.passed.deltas += len(text)

    def _complete(self, segment: bytes, passed: list[bytes]) -> Generator[None, None, None]:
        """The event that `segment` ends is whole: judge it."""
        event, begun = self._partial, self._begun
        if event is not None:
            yield from event.steps(segment)
        self._partial, self._tail, self._begun = None, b"", False
        self.at_once = MAX_AT_ONCE
        verdict = "pass"
        held, self._held = self._held + segment, b""
        if not self.ended:
            verdict = yield from self._judge(event, segment)
            self._go_on(event.start if event else segment, len(held), passed)
            if begun and verdict == "take out":  # too late for that
                verdict = "pass"
            if verdict == "last":
                self.ending, verdict = True, "pass"
            self.ended = self.ending and not self._expects_more()
            self._cut_newline = verdict if held.endswith(b"\r") else ""
        if verdict == "pass":
            self._pass(held, passed)

    def _pass(self, held: bytes, passed: list[bytes]) -> None:
        """Send on, or let wait for the row what comes from the event on that ends the answer."""
        if self.ending:
            self._waiting += held
        else:
            passed.append(held)

    def _go_on(self, start: bytes, size: int, passed: list[bytes]) -> None:
        """After an event that seemed to end a stream of pictures, another event with this start has
        come, of `size` bytes so far. If it is a picture, and too large to be held back, the stream
        goes on: send on what was held back."""
        too_large = self._images and len(self._waiting) + size > HOLD
        if self.ending and too_large and PICTURE.search(start[:START]):
            passed.append(self._waiting)
            self.ending, self._waiting = False, b""

    def _expects_more(self) -> bool:
        """Whether more usage may follow the event that ends the answer. A picture is not the last
        one before the stream ends."""
        report = self.report
        expected = self._expects_usage and not (report.usage or report.failed)
        # What is taken for the end can be HOLD bytes itself; as much may follow.
        return (self._images or expected) and len(self._waiting) <= 2 * HOLD

    def _grow(self, chunk: bytes, passed: list[bytes]) -> Generator[None, None, None]:
        """The incomplete event grows. Send on what can't turn out to matter."""
        if self.ended:
            self._held += chunk
            return
        if self._partial is None:
            self._partial = EventText()
        yield from self._partial.steps(chunk)
        if self._partial.is_long:
            self.at_once = 0
        self._tail = (self._tail + chunk)[-2:]
        self._held += chunk
        self._go_on(self._partial.start, len(self._held), passed)
        if self.ending:
            self.ended = len(self._held) > HOLD
            return
        keep = 0
        if self._may_matter(self._partial.start):
            keep = len(self._held) if len(self._held) <= HOLD else HOLD_BACK
        sent = len(self._held) - keep
        self._begun = self._begun or sent > 0
        passed.append(self._held[:sent])
        self._held = self._held[sent:]

    def _may_matter(self, start: bytes) -> bool:
        """Whether an event that starts so may end the answer, or may have to be taken out."""
        start = start.removeprefix(BYTE_ORDER_MARK).lstrip(b"\r\n")
        if self._chat:
            return self._take_out_usage or not CHAT_CHUNK.match(start)
        named = EVENT_TYPE.match(start)
        return not named or bool(LAST.fullmatch(named[1] or named[2] or b""))

    def _judge(self, event: EventText | None, segment: bytes) -> Generator[None, None, str]:
        """Return 'pass', 'last', or 'take out' for an event, which is all in `segment` if it did
        not come in parts."""
        if event is not None and event.is_large:
            answer = yield from event.answer()
            if answer:
                self.report.passed.see_delta(answer, self._chat)
            return (yield from self._note(answer))
        whole = event.whole() if event else segment
        self.count_text(whole)
        if not self._marked(whole) and not (self._naming and self._naming.search(whole)):
            return "pass"
        data = data_of(whole)
        if not data:
            return "pass"
        if data.strip() == b"[DONE]":
            return "last"
        return (yield from self._note((yield from answer_steps(data))))

    def _note(self, answer: Answer | None) -> Generator[None, None, str]:
        """Take in what an event says."""
        if answer is None:
            return "pass"
        report = self.report
        yield from report.note(answer)
        # If text has passed since output was reported, this usage has none of its own.
        if self._chat and isinstance(answer.usage, dict) and not report.is_outdated:
            report.is_of_choices = has_choices(answer)
        if self._naming:
            self._naming = NAMING[report.response_id is None, report.model is None]
        if isinstance(answer.type, str) and LAST.fullmatch(answer.type.encode()):
            self._ends_seen += not self._chat
            return "last" if self._ends_seen >= self._ends else "pass"
        return "take out" if self._take_out_usage and is_usage_chunk(answer) else "pass"


def is_usage_chunk(answer: Answer) -> bool:
    """Whether a chat's chunk is the one that only reports the usage."""
    return isinstance(answer.usage, dict) and not has_choices(answer) and not answer.error


def has_choices(answer: Answer) -> bool:
    """Return whether a chat's answer or chunk has any choices."""
    return bytes(answer.choices).translate(None, b" \t\r\n") not in NO_CHOICES


NO_CHOICES = (b"", b"null", b"[]")
