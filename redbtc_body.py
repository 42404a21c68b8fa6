"""What the gateway must know of a request's body: a few facts, and the stored objects it names.

Rule 1. The body is held once, as it came, and never re-encoded. Of JSON the facts are read and
nothing else is built; of a form the short fields, as it arrives; a compressed body has a decoded
copy of bounded size beside it, made only to be read.

Rule 2. All accounts share the upstream's key, so a body may name no stored object of another. Names
of members that refer to one are found wherever they stand, by their text: within a JSON string a
quote is escaped, so what looks like a member's name is one. A name that hides behind escapes is
looked for wherever there are such escapes. What comes out is a list of references; whoever asks for
it knows whose they are. What isn't known to be the account's own is refused.
"""

from __future__ import annotations

import contextlib
import functools
import re
import sys
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct

from redbtc_meter import MAX_NAME
from redbtc_refusals import Headers, Refusal, header

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

Buffer = bytes | bytearray

# ── Media types ──────────────────────────────────────────────────────────────────────────────────

JSON_TYPE = re.compile(rb"application/(?:[\w.+-]+\+)?json\s*(?:;.*)?", re.IGNORECASE | re.DOTALL)
FORM_TYPE = re.compile(
    rb"multipart/form-data\s*;(?:.*;)?\s*boundary=(?:\"([^\"]{1,70})\"|([^\s;\"]{1,70})).*",
    re.IGNORECASE | re.DOTALL,
)
MOST_RATIO = 100  # of decoded to compressed bytes; Envoy's rule for what a request may cost
LEAST_BOUND = 1 << 20
MOST_FRAMES = 100  # that one body may be compressed in
WINDOW: dict[int, int] = {zstd.DecompressionParameter.window_log_max: 23}  # 8 MB, RFC 9659


class Media(NamedTuple):
    """How a body is written: compressed ("gzip", "zstd", or not at all: ""), and the boundary where
    it is a form, else None."""

    encoding: str
    boundary: bytes | None


def media_of(headers: Headers, forms: bool) -> Media:
    """Raises Refusal for what can't be read here, before the body is."""
    encoding = (
        (header(headers, b"content-encoding") or b"identity").strip().lower().decode("latin-1")
    )
    encoding = {"identity": "", "x-gzip": "gzip"}.get(encoding, encoding)
    if encoding not in ("", "gzip", "zstd"):
        message = "Content-Encoding must be gzip or zstd, or the body plain."
        raise Refusal("unsupported_media_type", message)
    content_type = header(headers, b"content-type")
    if content_type is None or JSON_TYPE.fullmatch(content_type):
        return Media(encoding, None)
    form = FORM_TYPE.fullmatch(content_type) if forms else None
    if form is None:
        allowed = "application/json or multipart/form-data" if forms else "application/json"
        raise Refusal("unsupported_media_type", f"Content-Type must be {allowed}.")
    return Media(encoding, form[1] or form[2])


def decompressed(body: Buffer, encoding: str, most: int) -> bytes:
    """The decoded copy of a body. Raises Refusal where it is longer than `most` bytes, or than
    MOST_RATIO times the body, or can't be decoded."""
    most = min(most, max(LEAST_BOUND, MOST_RATIO * len(body)))
    decoded: list[bytes] = []
    rest, room = bytes(body), most
    for _ in range(MOST_FRAMES):
        decoder: Any = zlib.decompressobj(31)
        if encoding == "zstd":
            decoder = zstd.ZstdDecompressor(options=WINDOW)
        try:
            decoded.append(decoder.decompress(rest, room + 1))
        except (zlib.error, zstd.ZstdError):
            break
        room -= len(decoded[-1])
        if room < 0:
            message = f"The request body is over {most} bytes when it is decoded."
            raise Refusal("request_too_large", message)
        rest = decoder.unused_data
        if not decoder.eof:
            break
        if not rest:
            return decoded[0] if len(decoded) == 1 else b"".join(decoded)
    raise Refusal("invalid_request", f"The request body is not valid {encoding}.")


# ── Forms ────────────────────────────────────────────────────────────────────────────────────────

MAX_PART_HEAD = 8192
MAX_FIELD = 4096
FIELD_NAME = re.compile(rb";\s*name=(?:\"([^\"]*)\"|([^\s;]+))", re.IGNORECASE)
FILE_NAME = re.compile(rb";\s*filename\*?=", re.IGNORECASE)
SINGLE_FIELDS = (b"model", b"stream", b"n")
MOST_PICTURE_TOKENS = 16_000  # more than any model makes of a picture


class Form:
    """A multipart form (RFC 7578, RFC 2046 §5.1.1), read as it grows: the names of its parts, and
    its short fields. Files are stepped over, never copied."""

    def __init__(self, boundary: bytes) -> None:
        self.names: set[bytes] = set()
        self.fields: dict[bytes, bytes] = {}
        self._tokens = 0
        self._delimiter = b"\r\n--" + boundary
        self._part = -1  # where the one begins that is not yet whole
        self._searched = 0

    def grow(self, body: Buffer) -> None:
        """`body` is what has come so far. Raises Refusal for a form that could be read in more than
        one way."""
        if self._part < 0 and body.startswith(self._delimiter[2:]):
            self._part = self._searched = len(self._delimiter) - 2
        while (end := body.find(self._delimiter, self._searched)) >= 0:
            if self._part >= 0:
                self._take(body, end)
            self._part = self._searched = end + len(self._delimiter)
        self._searched = max(self._searched, len(body) - len(self._delimiter) + 1)

    def _take(self, body: Buffer, end: int) -> None:
        """A part is whole."""
        start = self._part
        self._tokens += min(end - start, MOST_PICTURE_TOKENS)
        head_end = body.find(b"\r\n\r\n", start, min(end, start + MAX_PART_HEAD))
        head = bytes(body[start : max(start, head_end)])
        match = FIELD_NAME.search(head)
        if match is None:
            raise Refusal("invalid_request", "A part of the form has no name that can be read.")
        name = match[1] or match[2] or b""
        self.names.add(name)
        if FILE_NAME.search(head):
            return
        if name in SINGLE_FIELDS and name in self.fields:
            message = f"'{name.decode()}' stands twice in the form."
            raise Refusal("invalid_request", message, param=name.decode())
        if end - head_end - 4 <= MAX_FIELD:
            self.fields[name] = bytes(body[head_end + 4 : end])

    def most_tokens(self, body: Buffer) -> int:
        """What its parts can come to."""
        return self._tokens + min(len(body) - max(self._part, 0), MOST_PICTURE_TOKENS)

    def facts(self) -> Facts:
        """`model` and `stream` wherever they stand in the form: openai-node sends files before
        them."""
        stream = self.fields.get(b"stream", b"").strip().lower() in (b"true", b"1")
        model, number = self.fields.get(b"model"), self.fields.get(b"n", b"").strip()
        return Facts(
            model=model.decode("utf-8", "replace") if model else None,
            stream=stream,
            n=int(number) if re.fullmatch(rb"[0-9]{1,3}", number) else None,
        )


# ── Facts ────────────────────────────────────────────────────────────────────────────────────────


class StreamOptions(Struct):
    """`stream_options` of a chat request."""

    include_usage: bool | msgspec.UnsetType | None = msgspec.UNSET


class Facts(Struct):
    """What the gateway must know of a request's body. Other members are skipped, not built."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | msgspec.UnsetType | None = msgspec.UNSET
    background: bool | None = None
    store: bool | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None
    n: int | None = None
    service_tier: str | None = None
    input: msgspec.Raw = msgspec.Raw()
    tools: msgspec.Raw = msgspec.Raw()

    def most_output_tokens(self) -> int:
        """What the client allows an answer to have; 0 where it says nothing."""
        limits = (self.max_tokens, self.max_completion_tokens, self.max_output_tokens)
        return max(0, *(limit or 0 for limit in limits))

    @property
    def asks_for_usage(self) -> bool:
        """Whether a streamed chat will report it."""
        return self.stream_options == StreamOptions(include_usage=True)

    def image_model(self) -> str:
        """That of the tool which makes pictures, where it is named."""
        with contextlib.suppress(*NOT_JSON):
            for tool in listed(self.tools, TOOLS):
                if tool.type == "image_generation" and isinstance(tool.model, str):
                    return str(tool.model)
        return DEFAULT_IMAGE_MODEL


class FrameFacts(Facts):
    """The same of a WebSocket's frame."""

    type: str | None = None
    stream_id: str | None = None
    generate: bool | None = None
    response_id: str | None = None


class Tool(Struct):
    """One of the tools that a request offers."""

    type: Any = None
    model: Any = None


class Part(Struct):
    """A part of a message, or of a tool's output: `image_url` where it is a picture."""

    image_url: msgspec.Raw = msgspec.Raw()


class Item(Struct):
    """A message, or another item of the input; its text is not copied."""

    type: msgspec.Raw = msgspec.Raw()
    id: msgspec.Raw = msgspec.Raw()
    role: msgspec.Raw = msgspec.Raw()
    encrypted_content: msgspec.Raw = msgspec.Raw()
    result: msgspec.Raw = msgspec.Raw()
    content: msgspec.Raw = msgspec.Raw()
    output: msgspec.Raw = msgspec.Raw()

    @property
    def is_reference(self) -> bool:
        """Whether the upstream would look it up by its id: one that is nothing but an id (its type
        may be left out), and one without the content that makes it whole."""
        content = {
            "": self.role,
            "item_reference": msgspec.Raw(),
            "reasoning": self.encrypted_content,
            "compaction": self.encrypted_content,
            "image_generation_call": self.result,
        }
        whole = content.get(string_in(self.type))
        return is_text(self.id) and whole is not None and not is_text(whole)


class Messages(Struct):
    """Of a chat."""

    messages: list[Item] = []


def is_text(raw: msgspec.Raw) -> bool:
    """Whether it is a string with something in it."""
    return len(raw) > 2 and bytes(memoryview(raw)[:1]) == b'"'


def listed(text: msgspec.Raw, decoder: msgspec.json.Decoder[list[Any]]) -> list[Any]:
    """What is in a list; nothing where it is none."""
    return decoder.decode(text) if bytes(memoryview(text)[:1]) == b"[" else []


DEFAULT_IMAGE_MODEL = "gpt-image-2.6-sunburst"  # of the tool, where the request names none
NOT_JSON = (msgspec.DecodeError, RecursionError, UnicodeDecodeError)
FACTS, FRAME_FACTS = msgspec.json.Decoder(Facts), msgspec.json.Decoder(FrameFacts)
ITEMS, PARTS = msgspec.json.Decoder(list[Item]), msgspec.json.Decoder(list[Part])
TOOLS, MESSAGES = msgspec.json.Decoder(list[Tool]), msgspec.json.Decoder(Messages)


def read_json(body: Buffer, decoder: msgspec.json.Decoder[Any]) -> Any:
    """Raises Refusal for a body that can't be read."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        place = str(error).partition("`$.")[2].rstrip("`")
        message = str(error).partition(" - at")[0]
        raise Refusal("invalid_request", message, param=place or None) from None
    except NOT_JSON:
        raise Refusal("invalid_json") from None


class Content:
    """A request's body: `sent` as it came and goes on, `text` what is read of it."""

    def __init__(self, sent: Buffer, text: Buffer, form: Form | None, model_needed: bool) -> None:
        """Raises Refusal for a body that can't be read."""
        self.sent = sent
        self.text = text
        self._form = form
        self.facts: Facts = form.facts() if form else read_json(text, FACTS)
        self._check_model(model_needed)

    @classmethod
    def of_any(cls, body: Buffer) -> Content:
        """That of a request which needs none."""
        return cls(body, body, None, model_needed=False)

    def _check_model(self, needed: bool) -> None:
        if self.facts.model is None and needed:
            raise Refusal("invalid_request", "You must provide a model parameter.", param="model")
        if len(self.facts.model or "") > MAX_NAME:
            raise Refusal("invalid_request", "The name of the model is too long.", param="model")

    @functools.cached_property
    def _items(self) -> list[Item]:
        """Of the input; raises Refusal where they can't be read."""
        listed = bytes(memoryview(self.facts.input)[:1]) == b"["
        return read_json(self.facts.input, ITEMS) if listed else []

    def most_input_tokens(self) -> int:
        """What its content can come to: no token is shorter than a byte, but a picture's have
        nothing to do with its bytes. What is not in the body (files by their address, what a search
        finds) is not known here."""
        if self._form:
            return self._form.most_tokens(self.text)
        pictures: list[int] = []
        with contextlib.suppress(*NOT_JSON, Refusal):
            items = MESSAGES.decode(self.text).messages + self._items
            pictures = [
                len(part.image_url)
                for item in items
                for parts in (item.content, item.output)
                for part in listed(parts, PARTS)
                if part.image_url
            ]
        return len(self.text) - sum(pictures) + MOST_PICTURE_TOKENS * len(pictures)

    def references(self) -> Iterator[Reference]:
        """All stored objects that it names. Raises Refusal where one hides."""
        if self._form:
            names = (NAMES.search(name) for name in self._form.names)
            yield from (Reference(name[0].decode(), "") for name in names if name)
            return
        yield from references_in(self.text, self._items)


class Frame(Content):
    """A WebSocket's frame from a client."""

    facts: FrameFacts

    def __init__(self, text: bytes) -> None:
        self.sent = self.text = text
        self._form = None
        self.facts = read_json(text, FRAME_FACTS)
        self._check_model(self.facts.type == "response.create")


# ── References ───────────────────────────────────────────────────────────────────────────────────

WORDS = (
    rb"previous_response_id|comparison_response_id|conversation|file_ids?|vector_store_ids?|"
    rb"container(?:_id)?|skill_id|prompt|audio|voice"
)
NAMES = re.compile(rb"(?:file_ids?|vector_store_ids?|container_id|[a-z]+_response_id|conversation)")
MEMBER = re.compile(  # what can't begin one is passed over first: most of the time goes there
    rb'"(?=[acfipsv])(?:(' + WORDS + rb')"\s*:\s*(?=["\[{])|item_reference")', re.IGNORECASE
)
HIDDEN = re.compile(rb"(?:" + WORDS + rb"|item_reference|id|type|input)", re.IGNORECASE)
TEXT = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
STRING = re.compile(TEXT, re.DOTALL)
BRACKETS = re.compile(rb"[\[{]|[\]}]|" + TEXT, re.DOTALL)
ID_MEMBER = re.compile(rb'"id"\s*:\s*(' + TEXT + rb")", re.DOTALL)
# Letters, and what lies between: nobody need escape these. (One character before the look ahead:
# that is searched for much faster than four.)
ESCAPED = re.compile(rb"\\(?=u00[4-7])")
PLAIN = (b"prompt", b"audio", b"voice")  # these may be plain text as well
OBJECTS = (b"conversation", *PLAIN)  # and these an object with an id
MOST_HIDING = 200  # bytes of a name with all its letters escaped


class Reference(NamedTuple):
    """A stored object that a body names, and the member that names it."""

    name: str
    id: str


def references_in(text: Buffer, items: list[Item]) -> Iterator[Reference]:
    """Of JSON: by every member, at any depth, whose name says so, and the items of the input that
    are given by their id alone."""
    refuse_hidden(text)
    by_id = [item for item in items if item.is_reference]
    yield from (Reference("item_reference", string_in(item.id)) for item in by_id)
    named = sum(string_in(item.type) == "item_reference" for item in by_id)
    covered = 0  # up to here objects have been looked through
    for match in MEMBER.finditer(text):
        start, kind = match.end(), text[match.end() : match.end() + 1]
        if match[1] is None:
            named -= 1
            if named < 0:  # at some other place
                yield Reference("item_reference", "")
            continue
        name = match[1].lower()
        if kind == b'"' and name not in PLAIN:
            value = STRING.match(text, start)
            yield Reference(name.decode(), string_in(value[0]) if value else "")
        elif start >= covered and (name in OBJECTS if kind == b"{" else name not in PLAIN):
            covered = end_of(text, start)
            values = ID_MEMBER if kind == b"{" else STRING
            for value in values.finditer(text, start, covered):
                yield Reference(name.decode(), string_in(value[value.re.groups]))


def refuse_hidden(text: Buffer) -> None:
    """Raise Refusal where a name that matters is written with escapes."""
    if not ESCAPED.search(text):
        return
    for match in STRING.finditer(text):
        if match.end() - match.start() <= MOST_HIDING and ESCAPED.search(match[0]):
            name = string_in(match[0])
            if HIDDEN.fullmatch(name.encode("utf-8", "replace")):
                raise Refusal("invalid_request", f"'{name}' is written with escapes.", param=name)


def string_in(text: Buffer | msgspec.Raw) -> str:
    """The value of a JSON string."""
    try:
        return msgspec.json.decode(text, type=str)
    except NOT_JSON:
        return ""


def end_of(text: Buffer, start: int) -> int:
    """The end of the object or list that begins at `start`."""
    depth = 0
    for match in BRACKETS.finditer(text, start):
        first = text[match.start()]
        if first != 0x22:
            depth += 1 if first in b"[{" else -1
            if not depth:
                return match.end()
    return len(text)


# ── Change ───────────────────────────────────────────────────────────────────────────────────────
# The one change that is ever made to a body (CONTRACT section 6).

STREAM_OPTIONS = re.compile(rb'"stream_options"\s*:\s*\{(\s*\})?')
MOST_CANDIDATES = 16


def add_include_usage(body: Buffer, facts: Facts) -> Buffer:
    """The body of a streamed chat with `stream_options.include_usage` put in where it was left out,
    and every other byte as it was. A client that says null or false has not left it out."""
    options = facts.stream_options
    if options is msgspec.UNSET:
        start = body.index(b"{") + 1
        return body[:start] + b'"stream_options":{"include_usage":true},' + body[start:]
    if not isinstance(options, StreamOptions) or options.include_usage is not msgspec.UNSET:
        return body
    for match, _ in zip(STREAM_OPTIONS.finditer(body), range(MOST_CANDIDATES), strict=False):
        start = body.index(b"{", match.start()) + 1
        added = b'"include_usage":true' + (b"" if match[1] else b",")
        changed = body[:start] + added + body[start:]
        with contextlib.suppress(msgspec.DecodeError):
            if FACTS.decode(changed).stream_options == StreamOptions(include_usage=True):
                return changed  # the right place, not one inside a text or another object
    raise Refusal("invalid_request", "'stream_options' can't be found.", param="stream_options")
