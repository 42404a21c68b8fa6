"""The meter watches an answer's bytes pass and finds the usage in them. It does no I/O: feed()
takes bytes as they came, cut anywhere, and returns those that may be sent on now.

Rule 1. Nothing waits that need not. What ends the answer for the client is held back until its
row is committed; a part of an event that could still turn out to end the answer (or to be the
usage chunk that the gateway asked for and takes out) is held until the event is whole. All else
passes.

Rule 2. Memory is bounded. An event or answer is kept whole for parsing up to KEEP bytes. Beyond
that it is reduced to its skeleton: long strings lose their text, and where that is not enough,
arrays their elements. What matters (usage, id, model, tier) stands in short values outside arrays,
in every shape of OpenAI's, so parsing the skeleton gives the same result as parsing the whole. Only
the ids of what was made (a picture, a message) stand in an array: they are known while all that is
beside the long strings is no more than KEEP.

Rule 3. Only a parser decides. A search for a few marks tells whether an event can matter; what it
says is then read from its JSON, at the place where it belongs, so that text cannot forge it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any, Protocol

import msgspec
from msgspec import Struct

from redbtc_ledger import Part, Usage
from redbtc_settings import MOST_TOKENS

MAX_NAME = 256  # of a model, an id, a tier
KEEP = 256 << 10
MOST_SKELETON = 4 << 20
SHORT_STRING = 256
MOST_SEARCHES = 100_000  # the same of web searches
IMAGE_TOOL = "image_generation"  # stands for the model of that tool, which the answer doesn't name
STRUCTURE = re.compile(rb'[\[\]]|"[^"\\]*+(?:\\.[^"\\]*+)*+("|\\?\Z)', re.DOTALL)
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
STRING_REST = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+("|\\?\Z)', re.DOTALL)


class Skeleton:
    """JSON text in bounded memory: whole while it is small, without long strings when it is large,
    and without what is in arrays when it is large even so. `text` parses to the same values outside
    of those."""

    def __init__(self, keep: int = KEEP) -> None:
        self.text = bytearray()
        self.reduced = False
        self._keep = keep
        self._raw = 0  # from here on `text` is as it came
        self._bound = keep
        self._drops_arrays = False
        self._depth = 0  # of arrays open at _raw, where those are dropped
        self._in_string = False  # what comes next belongs to a string that was dropped
        self._escaped = False  # and its first byte is escaped

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes, cut anywhere."""
        if self._in_string:
            chunk = self._skip_string(chunk)
        self.text += chunk
        if len(self.text) > self._bound:
            self._reduce()

    def _skip_string(self, chunk: bytes) -> bytes:
        start = 1 if self._escaped and chunk else 0
        end = STRING_REST.match(chunk, start)
        assert end is not None
        self._escaped = end[1] == b"\\" or (self._escaped and not chunk)
        self._in_string = end[1] != b'"'
        return chunk[end.end() :]

    def whole(self) -> bytes:
        """All of the text, to be parsed."""
        if self.reduced:
            self._reduce()
        return bytes(self.text)

    def _reduce(self) -> None:
        self.reduced = True
        self._shorten()
        if len(self.text) > self._keep and not self._drops_arrays:
            self._drops_arrays, self._raw = True, 0
            self._shorten()

    def _shorten(self) -> None:
        """Bring the raw text to its reduced form."""
        raw = bytes(self.text[self._raw :])
        kept: list[bytes] = []
        position = 0  # up to here `raw` is kept or dropped
        open_string = b""
        for token in STRUCTURE.finditer(raw):
            start, end = token.span()
            if raw[start] in b"[]" and not self._drops_arrays:
                continue
            if raw[start] == 0x5B:  # [
                kept += [] if self._depth else [raw[position:end]]
                position = end
                self._depth += 1
            elif raw[start] == 0x5D:  # ]
                self._depth = max(0, self._depth - 1)
                position = position if self._depth else start
            elif token[1] != b'"':  # a string that goes on in the next chunk
                if self._depth or end - start > SHORT_STRING:
                    kept += [] if self._depth else [raw[position:start], b'""']
                    self._in_string, self._escaped = True, token[1] == b"\\"
                else:
                    kept.append(raw[position:start])
                    open_string = raw[start:]
                position = len(raw)
            elif not self._depth and end - start > SHORT_STRING:
                kept += [raw[position:start], b'""']
                position = end
        kept += [] if self._depth else [raw[position:]]
        self._replace(b"".join(kept), open_string)

    def _replace(self, stable: bytes, open_string: bytes) -> None:
        self.text[self._raw :] = stable
        self._raw = len(self.text)
        self.text += open_string
        if len(self.text) > MOST_SKELETON:
            self.text = bytearray(b"?")  # no JSON: whoever parses it learns that nothing is known
            self._raw = 1
        self._bound = max(self._keep, 2 * len(self.text))


class Answer(Struct):
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
    conversation: Any = None
    incomplete_details: Any = None
    stream_id: Any = None
    response: msgspec.Raw = msgspec.Raw()
    choices: msgspec.Raw = msgspec.Raw()
    output: msgspec.Raw = msgspec.Raw()
    data: msgspec.Raw = msgspec.Raw()
    item: msgspec.Raw = msgspec.Raw()
    delta: msgspec.Raw = msgspec.Raw()


# Types of items that a client sends back with their whole content, so that an upstream need not
# look them up by their ids. (Encrypted ones, reasoning and compaction, are bound to their ids.)
# Items of all other types are made by the upstream's own tools.
OWN_WORDS = re.compile(
    r"|message|reasoning|(?:context_)?compaction|compaction_summary|.*_output|"
    r"(?:function|custom_tool|tool_search|computer|apply_patch|(?:local_)?shell)_call"
)


# Of those, what holds nothing but the model's output.
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

    @property
    def by_tool(self) -> bool:
        """Whether one of the upstream's own tools made the item: the upstream may look it up."""
        return isinstance(self.type, str) and not OWN_WORDS.fullmatch(self.type)

    def containers(self) -> Iterator[Any]:
        """Ids of the containers in which code ran, and of files there. Only where the upstream
        itself names them: a tool's schema, which an item may hold as well, is its author's text."""
        yield self.container_id
        if isinstance(self.environment, dict):
            yield self.environment.get("container_id")
        for part in objects_in(self.content):
            for note in objects_in(part.get("annotations")):
                if note.get("type") in CITATIONS:
                    yield from (note.get("container_id"), note.get("file_id"))


ANSWER, OUTPUT = msgspec.json.Decoder(Answer), msgspec.json.Decoder(list[Item])
ITEM = msgspec.json.Decoder(Item)
NOT_JSON = (msgspec.DecodeError, RecursionError, UnicodeDecodeError)


def decode_answer(text: str | bytes | msgspec.Raw) -> Answer | None:
    """None for what is no JSON object, even with forbearance: half a character, NaN, a control
    character in a text, a mark before it all, or a depth that has no end must not make what was
    used unknown."""
    with contextlib.suppress(*NOT_JSON):
        return ANSWER.decode(text)
    plain = in_plain_words(text.encode() if isinstance(text, str) else bytes(text))
    with contextlib.suppress(*NOT_JSON):
        return ANSWER.decode(plain)
    with contextlib.suppress(*NOT_JSON):
        return ANSWER.decode(shallow(plain))
    return None


MOST_DEPTH = 16  # more than twice that of any usage
CONTROLS = bytes.maketrans(bytes(range(32)), b" " * 32)
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")
NO_NUMBER = re.compile(rb":\s*(?:NaN|-?Infinity)\b")
BRACES = re.compile(rb'[{}]|"[^"\\]*+(?:\\.[^"\\]*+)*+"')


def in_plain_words(text: bytes) -> bytes:
    """An answer without what a strict parser doesn't take."""
    text = text.removeprefix(BYTE_ORDER_MARK).translate(CONTROLS)
    return NO_NUMBER.sub(b":null", SURROGATE.sub(rb"\\ufffd", text))


def shallow(text: bytes) -> bytes:
    """An answer without what is in arrays, long strings and deep objects."""
    skeleton = Skeleton(keep=0)
    skeleton.feed(text)
    text, kept, depth, position = skeleton.whole(), [], 0, 0
    for match in BRACES.finditer(text):
        if text[match.start()] == 0x7B:  # {
            depth += 1
            if depth == MOST_DEPTH:
                kept.append(text[position : match.end()])
        elif text[match.start()] == 0x7D:  # }
            if depth == MOST_DEPTH:
                position = match.start()
            depth -= 1
    return b"".join([*kept, text[position:]])


def objects_in(values: Any) -> list[dict[str, Any]]:
    listed = values if isinstance(values, list) else []
    return [value for value in listed if isinstance(value, dict)]


def tokens_in(counts: Any, name: str, most: int = MOST_TOKENS) -> int | None:
    """The count of that name, or None where there is none: negative, fractional, absurd or no
    number."""
    count = counts.get(name) if isinstance(counts, dict) else None
    return count if type(count) is int and 0 <= count <= most else None


def part_of(whole: int | None, parts: int) -> bool:
    return whole is not None and parts <= whole


def read_usage(usage: Any, images: bool) -> Usage | None:
    """Usage from OpenAI's `usage` object in any of its shapes (chat, responses, images, the image
    tool's); None where it reports neither input nor output. Parts that exceed their whole are not
    believed."""
    if not isinstance(usage, dict):
        return None
    chat = "prompt_tokens" in usage
    into, out = ("prompt", "completion") if chat else ("input", "output")
    tokens_input, tokens_output = (
        tokens_in(usage, f"{into}_tokens"),
        tokens_in(usage, f"{out}_tokens"),
    )
    if tokens_input is None and tokens_output is None:
        return None
    parts_input, parts_output = (
        usage.get(f"{into}_tokens_details"),
        usage.get(f"{out}_tokens_details"),
    )
    cached = tokens_in(parts_input, "cached_tokens")
    cache_write = tokens_in(parts_input, "cache_write_tokens")
    believed = part_of(tokens_input, (cached or 0) + (cache_write or 0))
    reasoning = tokens_in(parts_output, "reasoning_tokens")
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
    )


def plus(a: int | None, b: int | None) -> int | None:
    return a if b is None else (a or 0) + b


def with_svg(used: Usage | None, parts: list[Part], svg: Any) -> Usage | None:
    """An image endpoint's usage with that of the model which wrote an SVG: separate, says OpenAI's
    reference, so that it comes on top."""
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
        reasoning_tokens=reasoning if part_of(wrote.output_tokens, reasoning or 0) else None,
    )


def with_tools(used: Usage, parts: list[Part], tools: Any) -> Usage:
    """A response's usage with that of its tools, which is none of its own tokens."""
    if not isinstance(tools, dict):
        return used
    searches = tokens_in(tools.get("web_search"), "num_requests", MOST_SEARCHES)
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
        # What has passed, for an estimate of what nobody reports:
        self.text_bytes = 0  # of text, tool calls and their arguments
        self.sealed_bytes = 0  # of encrypted reasoning, as it is written
        self.image_tokens = 0  # of output, in the pictures
        self.web_searches = 0  # calls in the output; the usage may report its own number
        # No usage reports these; they are counted by the items of the output.
        self.file_searches = 0
        self.containers: dict[str, None] = {}  # ids of those in which code ran

    def note(self, answer: Answer) -> None:
        """Take in an answer's or an event's JSON: the last that is said counts."""
        inner = decode_answer(answer.response) if answer.response else None
        said = inner or answer
        self.response_id = name_in(said.id) or self.response_id
        self.model = name_in(said.model) or self.model
        self.service_tier = name_in(said.service_tier) or self.service_tier
        self.status = name_in(said.status) or self.status
        self._use(said)
        self._name(answer, said)
        self.failed = self.failed or bool(
            said.error
            or answer.error
            or said.status == "failed"
            or answer.type in ("error", "response.failed")
        )

    def _use(self, said: Answer) -> None:
        used = read_usage(said.usage, self._images)
        parts = [Part(None, used, self._images)] if used else []
        if self._images:
            used = with_svg(used, parts, said.svg_usage)
        elif used:
            used = with_tools(used, parts, said.tool_usage)
        if used:
            self.usage, self.parts = used, parts

    def _name(self, answer: Answer, said: Answer) -> None:
        if self._images or answer.type == "error":  # an error makes nothing
            return
        named, items = [(said.id, False)], []
        if isinstance(said.conversation, dict):
            named.append((said.conversation.get("id"), False))
        with contextlib.suppress(*NOT_JSON):
            if answer.item:
                items.append(ITEM.decode(answer.item))
            if said.output:
                items += OUTPUT.decode(said.output)
            if said.data:
                self.listed = {
                    item.id: item.id != item.call_id
                    for item in OUTPUT.decode(said.data)
                    if name_in(item.id)
                }
        for item in items:
            named.append((item.id, item.type != "message" and item.by_tool))
            if item.type in WORDS_ALONE and name_in(item.id):
                self.words.add(item.id)
            named += [(each, True) for each in item.containers()]
        self.made.update((each, always) for each, always in named if name_in(each))


def name_in(value: Any) -> str | None:
    return value if isinstance(value, str) and 0 < len(value) <= MAX_NAME else None


class Meter(Protocol):
    """`feed` returns what may be sent on now. `ended` is True once the answer has ended for the
    client; then, and after `finish`, `rest` are the bytes that wait for the row."""

    report: Report
    ended: bool

    def feed(self, chunk: bytes) -> bytes: ...
    def finish(self) -> None: ...
    def rest(self) -> bytes: ...


class JSONMeter:
    """Meters an answer that is one JSON text. Its last byte is what ends it."""

    def __init__(self, images: bool) -> None:
        self.report = Report(images)
        self.ended = False
        self._skeleton = Skeleton()
        self._held = b""

    def feed(self, chunk: bytes) -> bytes:
        """All but the last byte so far."""
        self._skeleton.feed(chunk)
        passed, self._held = self._held + chunk[:-1], chunk[-1:]
        return passed

    def finish(self) -> None:
        """The upstream has sent all of it."""
        answer = decode_answer(self._skeleton.whole())
        if answer:
            self.report.note(answer)
        self.ended = True

    def rest(self) -> bytes:
        held, self._held = self._held, b""
        return held


# WHATWG HTML §9.2.6: lines end with LF, CR or CRLF, an event ends with an empty line.
EVENT_END = re.compile(rb"(?>\r\n|\n|\r)(?>\r\n|\n|\r)")
LINE_END = re.compile(rb"\r\n|\n|\r")
MARK = re.compile(rb'"(?:usage|error)"(?!\s*:\s*null)')
EVENT_TYPE = re.compile(rb'(?:event: ?([^\r\n]*)[\r\n]|data: ?\{"type": ?"([^"\\]*)")')
CHAT_CHUNK = re.compile(rb"data: ?\{")
CHAT_TEXT = re.compile(rb'"(?:content|arguments)": ?"([^"\\]*+(?:\\.[^"\\]*+)*+)"', re.DOTALL)
RESPONSE_TEXT = re.compile(rb'"delta": ?"([^"\\]*+(?:\\.[^"\\]*+)*+)"', re.DOTALL)
LAST = re.compile(rb"response\.(?:completed|incomplete|failed)|image_\w+\.completed")
NAMING_EVENTS = 3  # an answer's id and model are looked for in its first events
HOLD = 64 << 10
HOLD_BACK = 64


def marked(events: bytes) -> bool:
    """Whether there can be anything in them that matters. Text can look like it, too."""
    return (
        b"[DONE]" in events
        or b'.completed"' in events
        or b'.incomplete"' in events
        or b'.failed"' in events
        or b"output_item." in events
        or MARK.search(events) is not None
    )


def data_of(event: bytes) -> bytes:
    """The data of a whole event: its data lines, joined."""
    lines = LINE_END.split(event.removeprefix(BYTE_ORDER_MARK))
    return b"\n".join(line[5:].removeprefix(b" ") for line in lines if line.startswith(b"data:"))


class StreamMeter:
    """Meters server-sent events. `take_out_usage`: the gateway asked for the chat's usage chunk,
    and removes it from what the client gets. `ends`: how many events end the response, one for each
    image that was asked for."""

    def __init__(self, *, images: bool, chat: bool, take_out_usage: bool, ends: int = 1) -> None:
        self.report = Report(images)
        self.ended = False
        self._chat = chat
        self._text = CHAT_TEXT if chat else RESPONSE_TEXT
        self._take_out_usage = take_out_usage
        self._ends = ends
        self._ends_seen = 0
        self._events = 0
        self._partial: Skeleton | None = None  # the event that is still incomplete
        self._tail = b""  # its last two bytes: an event's end may be cut
        self._begun = False  # some of it has been sent on
        self._held = b""  # what waits: of the incomplete event, or all since the end
        self._cut_newline = ""  # what to do with the LF of a CRLF whose CR ended an event

    def feed(self, chunk: bytes) -> bytes:
        """What may be sent on now, in order."""
        if self.ended:
            return chunk
        if self.is_dull(chunk):
            self.count_text(chunk)
            return chunk
        passed: list[bytes] = []
        if self._cut_newline and chunk:
            if chunk.startswith(b"\n"):
                passed += [b"\n"] if self._cut_newline == "pass" else []
                chunk = chunk[1:]
            self._cut_newline = ""
        start, shift = 0, len(self._tail)
        for match in EVENT_END.finditer(self._tail + chunk):
            end = match.end() - shift
            self._complete(chunk[start:end], passed)
            start = end
        if start < len(chunk):
            self._grow(chunk[start:], passed)
        return b"".join(passed)

    def is_dull(self, chunk: bytes) -> bool:
        """Whether these are whole events in the usual form, none of which can matter: nearly every
        chunk. There is nothing to be done with it but to count its text."""
        return (
            self._partial is None
            and self._events >= NAMING_EVENTS
            and not self.ended
            and not self._cut_newline
            and chunk.endswith(b"\n\n")
            and not marked(chunk)
        )

    def finish(self) -> None:
        """Note that the upstream has sent everything. A last event without its empty line counts,
        and fewer images than were asked for are complete as well."""
        if self._partial is not None and not self.ended:
            rest: list[bytes] = []
            self._complete(b"", rest)
            self._held += b"".join(rest)
        self.ended = self.ended or self._ends_seen > 0

    def rest(self) -> bytes:
        held, self._held = self._held, b""
        return held

    def count_text(self, events: bytes) -> None:
        """For an estimate."""
        for text in self._text.findall(events):
            self.report.text_bytes += len(text)

    def _complete(self, segment: bytes, passed: list[bytes]) -> None:
        """The event that `segment` ends is whole: judge it."""
        event, begun = segment, self._begun
        if self._partial is not None:
            self._partial.feed(segment)
            event = self._partial.whole()
        self._partial, self._tail, self._begun = None, b"", False
        self._held += segment
        if self.ended:
            return
        self._events += 1
        self.count_text(event)
        verdict = self._judge(event)
        if verdict == "last":
            self.ended = True
            return
        if begun:  # too late to take it out
            verdict = "pass"
        if verdict == "pass":
            passed.append(self._held)
        self._cut_newline = verdict if self._held.endswith(b"\r") else ""
        self._held = b""

    def _grow(self, chunk: bytes, passed: list[bytes]) -> None:
        """The incomplete event grows. Send on what can't turn out to matter."""
        if self._partial is None:
            self._partial = Skeleton()
        self._partial.feed(chunk)
        self._tail = (self._tail + chunk)[-2:]
        self._held += chunk
        if self.ended:
            return
        keep = 0
        if self._may_matter(bytes(self._partial.text[:SHORT_STRING])):
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

    def _judge(self, event: bytes) -> str:
        """'pass', 'last', or 'take out'."""
        if self._events > NAMING_EVENTS and not marked(event):
            return "pass"
        text = data_of(event)
        if text.strip() == b"[DONE]":
            return "last"
        answer = decode_answer(text)
        if answer is None:
            return "pass"
        self.report.note(answer)
        if isinstance(answer.type, str) and LAST.fullmatch(answer.type.encode()):
            self._ends_seen += not self._chat
            return "last" if self._ends_seen == self._ends else "pass"
        empty = bytes(answer.choices).strip() == b"[]"
        take_out = self._take_out_usage and empty and isinstance(answer.usage, dict)
        return "take out" if take_out else "pass"
