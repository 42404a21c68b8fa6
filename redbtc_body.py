"""What the gateway must know of a request's body: a few facts, and the stored objects it names.

Rule 1. The body is held once, as it came, and never re-encoded. Of JSON the facts are read and
nothing else is built; of a form the short fields, as it arrives; a compressed body has a decoded
copy of bounded size beside it, made only to be read.

Rule 2. All accounts share the upstream's key, so a body may name no stored object of another. Names
of members that refer to one are found wherever they stand, by their text: within a JSON string a
quote is escaped, so what looks like a member's name is one. Where there is any, it is looked at by
its place: metadata, schemas and arguments are somebody's own words. What comes out is a list of
references; whoever asks for it knows whose they are. What isn't known to be the account's own is
refused.

Rule 3. A body has one meaning. What the next reader could take in another way is refused: a member
that stands twice, a name behind escapes or in other letters, a form whose boundary or heads are in
doubt. Else what is checked here would not be what the upstream does.
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import re
import sys
import zlib
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Set
from itertools import compress, repeat
from typing import Any, NamedTuple, TypeVar
from urllib.parse import parse_qsl

import msgspec
from msgspec import Struct

from redbtc_meter import MAX_NAME, SURROGATE
from redbtc_refusals import Headers, Refusal, header

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

Buffer = bytes | bytearray

# ── Media types ──────────────────────────────────────────────────────────────────────────────────

# RFC 9110 §8.3.1, and no more: what one reader could understand in another way than the next one is
# refused, here and in the heads of a form's parts.
SET = rb';\s*+([\w-]++|filename\*)=("[^"]*+"|[^\s;"]*+)'
PARAMETRIZED = re.compile(rb"\s*+([\w/+.-]++)((?:\s*+" + SET + rb")*+)\s*+;?\s*+", re.IGNORECASE)
PARAMETER = re.compile(SET, re.IGNORECASE)
JSON_TYPE = re.compile(rb"application/(?:[\w.+-]+\+)?json")
BOUNDARY = re.compile(rb"[\w'()+,./:=?-]{1,70}")  # RFC 2046 §5.1.1, without its inner spaces
CHARSETS = (b"utf-8", b"utf8", b"us-ascii")
MOST_RATIO = 32  # of decoded to compressed bytes; to read them can take a multiple of their memory
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
    kind, parameters = parametrized(content_type or b"application/json") or (b"", {})
    if parameters.get(b"charset", b"utf-8").lower() in CHARSETS:
        if JSON_TYPE.fullmatch(kind):
            return Media(encoding, None)
        boundary = parameters.get(b"boundary", b"")
        if forms and kind == b"multipart/form-data" and BOUNDARY.fullmatch(boundary):
            return Media(encoding, boundary)
    allowed = "application/json or multipart/form-data" if forms else "application/json"
    raise Refusal("unsupported_media_type", f"Content-Type must be {allowed}, in UTF-8.")


def parametrized(text: bytes) -> tuple[bytes, dict[bytes, bytes]] | None:
    """A header's value and its parameters, their names in lower case; None where it can't be read,
    or in more than one way."""
    match = PARAMETRIZED.fullmatch(text)
    if match is None or b'\\"' in text:
        return None
    found = [(name.lower(), value.strip(b'"')) for name, value in PARAMETER.findall(match[2])]
    parameters = dict(found)
    return (match[1].lower(), parameters) if len(parameters) == len(found) else None


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
MOST_PARTS = 1000
SINGLE_FIELDS = (b"model", b"stream", b"n", b"svg[model]")
HEAD_LINE = re.compile(rb"([\w-]++):([^\r\n]*+)")
FORM_NAME = re.compile(
    rb"file_ids?|vector_store_ids?|container_id|_response_id|conversation", re.IGNORECASE
)
ODD_SVG = re.compile(rb"svg(?!\[model\]$|\[reasoning\])", re.IGNORECASE)
UNENCODED = (b"binary", b"8bit", b"7bit")
MOST_PICTURE_TOKENS = 16_000  # more than any model makes of a picture


class Form:
    """A multipart form (RFC 7578, RFC 2046 §5.1.1), read as it grows: the names of its parts, and
    its short fields. Files are stepped over, never copied."""

    def __init__(self, boundary: bytes) -> None:
        self.names: Counter[bytes] = Counter()
        self.fields: dict[bytes, bytes] = {}
        self._tokens = 0
        self._delimiter = b"--" + boundary
        self._part = -1  # where the one begins that is not yet whole
        self._searched = 0

    def grow(self, body: Buffer) -> None:
        """`body` is what has come so far. Raises Refusal for a form that could be read in more than
        one way."""
        while (end := body.find(self._delimiter, self._searched)) >= 0:
            first = self._part < 0  # with nothing before it, which another reader could take in
            if (end and body[end - 2 : end] != b"\r\n") or (first and end > 2):
                raise Refusal("invalid_request", "The form's boundary stands within a line.")
            if not first:
                self._take(body, end - 2)
            self._part = self._searched = end + len(self._delimiter)
        self._searched = max(self._searched, len(body) - len(self._delimiter) + 1)

    def _take(self, body: Buffer, end: int) -> None:
        """A part is whole."""
        start = self._part
        self._tokens += min(end - start, MOST_PICTURE_TOKENS)
        head_end = body.find(b"\r\n\r\n", start, min(end, start + MAX_PART_HEAD))
        parameters = parameters_of_part(bytes(body[start : max(start, head_end)]))
        name, size = parameters[b"name"], end - head_end - 4
        self.names[name.lower()] += 1
        if self.names.total() > MOST_PARTS:
            raise Refusal("invalid_request", f"The form has more than {MOST_PARTS} parts.")
        field = not {b"filename", b"filename*"} & parameters.keys()
        single = name.lower() in SINGLE_FIELDS
        once = field and self.names[name.lower()] == 1
        long = field and size > MAX_FIELD and name != b"prompt"
        if (single and not once) or long or ODD_SVG.match(name):
            shown = name.decode("utf-8", "replace")
            message = f"'{shown}' must stand in the form once, as a short text, and so written."
            raise Refusal("invalid_request", message, param=shown)
        if field and size <= MAX_FIELD:
            self.fields[name] = bytes(body[head_end + 4 : end])

    def most_tokens(self, body: Buffer) -> int:
        """What its parts can come to."""
        return self._tokens + min(len(body) - max(self._part, 0), MOST_PICTURE_TOKENS)

    def references(self) -> Iterator[Reference]:
        """Stored objects that it names, by the name of a part or within a short field."""
        for name, value in self.fields.items():
            if name != b"prompt":
                refuse_hidden(value, folded(value))
                yield from named_in(value)
        named = (FORM_NAME.search(name) for name in self.names)
        yield from (Reference(name[0].decode(), "") for name in named if name)

    def facts(self, body: Buffer) -> Facts:
        """`model` and `stream` wherever they stand in the form: openai-node sends files before
        them. Raises Refusal where the form has no end."""
        if self._part < 0 or body[self._part : self._part + 2] != b"--":
            raise Refusal("invalid_request", "The form has no end.")
        stream = self.fields.get(b"stream", b"").strip().lower() in (b"true", b"1")
        model, number = self.fields.get(b"model"), self.fields.get(b"n", b"").strip()
        return Facts(
            model=model.decode("utf-8", "replace") if model else None,
            stream=stream,
            n=int(number) if re.fullmatch(rb"[0-9]{1,3}", number) else None,
        )


def parameters_of_part(head: bytes) -> dict[bytes, bytes]:
    """Those of its Content-Disposition, `name` among them. Raises Refusal where they can't be read,
    or not in one way only."""
    padding, *lines = head.split(b"\r\n")
    matches = [HEAD_LINE.fullmatch(line) for line in lines]
    fields = {match[1].lower(): match[2] for match in matches if match}
    found = parametrized(fields.get(b"content-disposition", b""))
    encoding = fields.get(b"content-transfer-encoding", b"binary").strip().lower()
    once = not padding.strip(b" \t") and len(fields) == len(lines) and encoding in UNENCODED
    name = found[1].get(b"name", b"") if found and found[0] == b"form-data" else b""
    if not (once and found and 0 < len(name) <= MAX_NAME) or b"\\" in name:
        raise Refusal("invalid_request", "A part of the form has no head that can be read.")
    return found[1]


# ── JSON ─────────────────────────────────────────────────────────────────────────────────────────
# Read with as little building as can be: a member that isn't needed is stepped over.

Members = dict[str, msgspec.Raw]
MEMBERS, OBJECTS = msgspec.json.Decoder(Members), msgspec.json.Decoder(list[Members])
RAWS = msgspec.json.Decoder(list[msgspec.Raw])
NOTHING, NULL, EMPTY = msgspec.Raw(), msgspec.Raw(b"null"), msgspec.Raw(b"[]")
NOT_JSON = (msgspec.DecodeError, RecursionError, UnicodeDecodeError)
TEXT = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
STRING = re.compile(TEXT, re.DOTALL)
MEMBER_NAME = re.compile(rb"\s*+,?\s*+(" + TEXT + rb")\s*+:\s*+", re.DOTALL)
OBJECT_END = re.compile(rb"\s*+\}")
MOST_MEMBERS = 1000
SLICE = 1 << 20
FOLDED = ("ſ", "\N{KELVIN SIGN}")  # Unicode's lower case of these is s and k


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


def string_in(text: Buffer | msgspec.Raw) -> str:
    """The value of a JSON string."""
    try:
        return msgspec.json.decode(text, type=str)
    except NOT_JSON:
        return ""


def is_text(raw: msgspec.Raw) -> bool:
    """Whether it is a string with something in it."""
    return len(raw) > 2 and bytes(memoryview(raw)[:1]) == b'"'


def is_list(raw: msgspec.Raw) -> bool:
    return bytes(memoryview(raw)[:1]) == b"["


def listed(text: msgspec.Raw, decoder: msgspec.json.Decoder[list[Any]]) -> list[Any]:
    """What is in a list; nothing where it is none."""
    return decoder.decode(text) if is_list(text) else []


def read_members(text: Buffer) -> Members:
    """The members of a body that is a JSON object, by name, none of them built. Raises Refusal for
    what can't be read, or could be read in more than one way."""
    members: Members = read_json(text, MEMBERS)
    if len(text) != shortest(members):
        check_once(text, members)
    return members


def folded(text: Buffer) -> bool:
    """Whether it has one of the letters that some readers take for a plain one. Raises Refusal
    where it is not UTF-8 (RFC 8259 §8.1): msgspec doesn't look at strings that it steps over, and a
    lenient reader would drop what it can't read from a name."""
    if text.isascii():
        return False
    decoder, found = codecs.getincrementaldecoder("utf-8")(), False
    try:
        for at in range(0, len(text), SLICE):
            part = decoder.decode(memoryview(text)[at : at + SLICE])
            found = found or any(letter in part for letter in FOLDED)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        raise Refusal("invalid_json") from None
    return found


def check_letters(members: Iterable[str], known: Set[str]) -> None:
    """Raise Refusal where one that is known is written in other letters, which the next reader may
    take for it."""
    for name in members:
        if name not in known and name.casefold() in known:
            message = f"'{name}' is written '{name.casefold()}'."
            raise Refusal("invalid_request", message, param=name)


def read_list(given: msgspec.Raw, known: Set[str], needs_check: Set[str]) -> list[Members]:
    """The objects in a list, if it is one; those that have one of `needs_check` have one meaning.
    Raises Refusal."""
    if not is_list(given):
        return []
    objects: list[Members] = read_json(given, OBJECTS)
    checked = [not needs_check.isdisjoint(each) for each in objects]
    if any(checked):
        check_each(given, objects, checked)
        for each in compress(objects, checked):
            check_letters(each, known)
    return objects


def check_each(given: msgspec.Raw, objects: list[Members], which: Iterable[bool]) -> None:
    """Raise Refusal where a member of one of them stands in it twice."""
    raws = read_json(given, RAWS) if objects else []
    for each, raw in compress(zip(objects, raws, strict=True), which):
        if len(raw) != shortest(each):
            check_once(bytes(memoryview(raw)), each)


def shortest(members: Members) -> int:
    """How long an object is that is written as '{"name":value,…}': there is no room in it for
    anything more. Written wider it takes a closer look."""
    return 1 + 4 * len(members) + sum(map(len, members)) + sum(map(len, members.values()))


def check_once(text: Buffer, members: Members) -> None:
    """Raise Refusal where a member stands twice: the next reader may believe the other one."""
    if len(members) > MOST_MEMBERS:
        raise Refusal("invalid_request", f"The body has more than {MOST_MEMBERS} members.")
    seen: set[str] = set()
    at = text.index(b"{") + 1
    while match := MEMBER_NAME.match(text, at):
        name = string_in(match[1])
        if name in seen or not text.startswith(memoryview(members[name]), match.end()):
            break
        seen.add(name)
        at = match.end() + len(members[name])
    if len(seen) < len(members) or not OBJECT_END.match(text, at):
        raise Refusal("invalid_request", "A member of the body stands there twice.")


# ── Facts ────────────────────────────────────────────────────────────────────────────────────────


class StreamOptions(Struct):
    """`stream_options` of a chat request."""

    include_usage: bool | msgspec.UnsetType | None = msgspec.UNSET


class Facts(Struct):
    """What the gateway must know of a request's body. Other members are skipped, not built."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | msgspec.UnsetType | None = msgspec.UNSET
    background: bool | str | None = None  # of pictures it is a colour
    store: bool | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None
    n: int | None = None
    service_tier: str | None = None

    def most_output_tokens(self) -> int:
        """What the client allows an answer to have; 0 where it says nothing."""
        limits = (self.max_tokens, self.max_completion_tokens, self.max_output_tokens)
        return max(0, *(limit or 0 for limit in limits))

    @property
    def asks_for_usage(self) -> bool:
        """Whether a streamed chat will report it."""
        return self.stream_options == StreamOptions(include_usage=True)


class FrameFacts(Facts):
    """The same of a WebSocket's frame."""

    type: str | None = None
    stream_id: str | None = None
    previous_response_id: str | None = None


AnyFacts = TypeVar("AnyFacts", bound=Facts)


class Part(Struct):
    """A part of a message, or of a tool's output: `image_url` where it is a picture."""

    image_url: msgspec.Raw = NOTHING


Item = Members  # a message, or another item of the input
ROLES = ("user", "assistant", "system", "developer")
SEALED = ("reasoning", "compaction")  # whole with their content, encrypted or plain
OWN_WORDS = re.compile(  # items of which the client says all that there is, whatever their id
    r"|message|.*_output|(?:function|custom_tool|computer|apply_patch|(?:local_)?shell)_call"
)


def kind_of(item: Item) -> str:
    """An item's type, or a tool's."""
    return string_in(item["type"]) if "type" in item else ""


def is_listing(item: Item) -> bool:
    """Whether its tools are only told of."""
    return kind_of(item) == "mcp_list_tools"


def is_reference(item: Item) -> bool:
    """Whether the upstream would look it up by its id: what is nothing but an id (its type may be
    left out), and what lacks the content that makes it whole."""
    kind = kind_of(item)
    if kind == "item_reference" or item.keys() <= {"id", "type", "status"}:
        return True
    content = item.get("content", NULL)
    if kind in ("", "message"):
        return string_in(item.get("role", NOTHING)) not in ROLES or content == NULL
    if kind == "image_generation_call":
        failed = string_in(item.get("status", NOTHING)) == "failed"
        return not failed and not is_text(item.get("result", NOTHING))
    sealed = is_text(item.get("encrypted_content", NOTHING))
    return kind in SEALED and not sealed and content in (NULL, EMPTY)


DEFAULT_IMAGE_MODEL = "gpt-image-2.6-sunburst"  # of the tool, where the request names none
FACTS, FRAME_FACTS = msgspec.json.Decoder(Facts), msgspec.json.Decoder(FrameFacts)
PARTS = msgspec.json.Decoder(list[Part])
LISTS = {"input", "messages", "tools", "svg"}
TOOL_NAMES = {"type", "model", "svg", "tools", "function"}
ITEM_NAMES = {"id", "type", "status", "role", "content", "result", "encrypted_content", "tools"}
# An item with one of these is looked at closely; most histories have none.
TELLING = {"id", "ID", "Id", "iD", "tools", "Tools", "TOOLS"}
MOST_NESTING = 8  # of tools in tools
STEER_MEMBERS = {"type", "previous_response_id", "input"}  # and no others, says OpenAI's reference
FACT_NAMES = frozenset(FrameFacts.__struct_fields__) - LISTS
KNOWN = FACT_NAMES | LISTS


def facts_in(members: Members, decoder: msgspec.json.Decoder[AnyFacts]) -> AnyFacts:
    """Raises Refusal where one of them is not what it has to be, or is written in other letters."""
    check_letters(members, KNOWN)
    known = [b'"%b":%b' % (name.encode(), members[name]) for name in FACT_NAMES & members.keys()]
    facts: AnyFacts = read_json(b"{%b}" % b",".join(known), decoder)
    return facts


def tools_in(offering: list[Members]) -> list[Members]:
    """All that these offer, and those within them. Raises Refusal where they can't be read."""
    lists = [each["tools"] for each in offering if "tools" in each and not is_listing(each)]
    tools: list[Members] = []
    for _ in range(MOST_NESTING):
        found = [tool for given in lists for tool in read_list(given, TOOL_NAMES, TOOL_NAMES)]
        tools += found
        lists = [tool["tools"] for tool in found if "tools" in tool]
        if not lists:
            return tools
    raise Refusal("invalid_request", "Tools within tools within tools.", param="tools")


def models_of(tools: list[Members]) -> dict[str, bool]:
    """The models that tools make work, and whether they make pictures. Raises Refusal."""
    models: dict[str, bool] = {}
    for tool in tools:
        if kind_of(tool) == "image_generation":
            models |= author_in(tool)
            models[string_in(tool.get("model", NULL)) or DEFAULT_IMAGE_MODEL] = True
    return models


def author_in(members: Members) -> dict[str, bool]:
    """The model that writes an SVG, where it is named. Raises Refusal."""
    if members.get("svg", NULL) == NULL:
        return {}
    svg = read_members(bytes(memoryview(members["svg"])))
    check_letters(svg, TOOL_NAMES)
    author = string_in(svg.get("model", NULL))
    return {author: False} if author else {}


class Content:
    """A request's body: `sent` as it came and goes on, `text` what is read of it."""

    def __init__(self, sent: Buffer, text: Buffer, form: Form | None, model_needed: bool) -> None:
        """Raises Refusal for a body that can't be read."""
        self.sent = sent
        self.plain = sent is text  # not compressed
        self.text = text
        self._form = form
        self._read(FACTS)
        self.check_model(model_needed)

    def _read(self, decoder: msgspec.json.Decoder[Any]) -> None:
        self._inherited: dict[str, bool] = {}
        if self._form:
            self._members: Members = {}
            self.facts: Facts = self._form.facts(self.text)
            return
        self._folded = folded(self.text)
        try:
            self._members = read_members(self.text)
        except Refusal:  # half a character, from a text that was cut? It takes as much room
            self.text = SURROGATE.sub(rb"\\ufffd", self.text)
            self._members = read_members(self.text)
        self.facts = facts_in(self._members, decoder)

    @classmethod
    def steps(
        cls, sent: Buffer, text: Buffer, form: Form | None = None, model_needed: bool = False
    ) -> Generator[None, None, Content]:
        """Read a body in small steps and return its content. Raises Refusal for a body that can't
        be read."""
        yield
        return cls(sent, text, form, model_needed)

    def check_model(self, needed: bool) -> None:
        """Raise Refusal where it names none, or in too many words."""
        if self.facts.model is None and needed:
            raise Refusal("invalid_request", "You must provide a model parameter.", param="model")
        if len(self.facts.model or "") > MAX_NAME:
            raise Refusal("invalid_request", "The name of the model is too long.", param="model")

    @functools.cached_property
    def items(self) -> list[Members]:
        """Of the input; raises Refusal where they can't be read, or in more than one way."""
        given = self._members.get("input", NULL)
        if not (given == NULL or bytes(memoryview(given)[:1]) in (b'"', b"[")):
            raise Refusal("invalid_request", "'input' must be text or a list.", param="input")
        return read_list(given, ITEM_NAMES, TELLING)

    @functools.cached_property
    def tools(self) -> list[Members]:
        """All that it offers, wherever. Raises Refusal where they can't be read."""
        return tools_in([self._members, *self.items])

    def inherit(self, models: str | None) -> None:
        """It builds on something in which these work."""
        self._inherited |= msgspec.json.decode(models, type=dict[str, bool]) if models else {}

    @functools.cached_property
    def lasting_models(self) -> str | None:
        """Those that work in what will build on it, as JSON: of tools that are part of its input.
        Asked for when it has inherited."""
        lasting = self._inherited | models_of(tools_in(self.items))
        return msgspec.json.encode(lasting).decode() if lasting else None

    def further_models(self) -> dict[str, bool]:
        """Those that it makes work besides its own, and whether they make pictures: the image
        tool's, and an SVG's author. Raises Refusal."""
        if self._form:
            author = self._form.fields.get(b"svg[model]", b"").decode("utf-8", "replace")
            return {author: False} if author else {}
        models = self._inherited | author_in(self._members) | models_of(self.tools)
        if sum(models.values()) > 1:
            message = "The image tools have different models."
            raise Refusal("invalid_request", message, param="tools")
        return models

    def image_model(self) -> str:
        """That of the tool which makes pictures, whether it is named or not."""
        drawing = [model for model, images in self.further_models().items() if images]
        return drawing[0] if drawing else DEFAULT_IMAGE_MODEL

    def most_input_tokens(self) -> int:
        """What its content can come to: no token is shorter than a byte, but a picture's have
        nothing to do with its bytes. What is not in the body (files by their address, what a search
        finds) is not known here."""
        if self._form:
            return self._form.most_tokens(self.text)
        pictures: list[int] = []
        with contextlib.suppress(*NOT_JSON, Refusal):
            items = listed(self._members.get("messages", NOTHING), OBJECTS) + self.items
            pictures = [
                len(part.image_url)
                for item in items
                for parts in (item.get("content", NOTHING), item.get("output", NOTHING))
                for part in listed(parts, PARTS)
                if part.image_url
            ]
        return len(self.text) - sum(pictures) + MOST_PICTURE_TOKENS * len(pictures)

    def references(self) -> Iterator[Reference]:
        """All stored objects that it names. Raises Refusal where one hides."""
        if self._form:
            yield from self._form.references()
        else:
            refuse_hidden(self.text, self._folded)
            yield from references_in(self, self._members)


class Frame(Content):
    """A WebSocket's frame from a client."""

    facts: FrameFacts
    sent: bytes

    def __init__(self, text: bytes) -> None:
        self.sent = self.text = text
        self._form = None
        self._read(FRAME_FACTS)

    @classmethod
    def read(cls, text: bytes) -> Generator[None, None, Frame]:
        """Read a frame in small steps. Raises Refusal for a frame that can't be read."""
        yield
        return cls(text)

    def only(self, names: set[str]) -> Frame:
        """The same, if it has no other members. Raises Refusal."""
        for name in self._members.keys() - names:
            message = f"'{name}' can't stand in '{self.facts.type}'."
            raise Refusal("invalid_request", message, param=name[:MAX_NAME])
        return self


# ── References ───────────────────────────────────────────────────────────────────────────────────

WORDS = (
    rb"previous_response_id|comparison_response_id|conversation|file_ids?|vector_store_ids?|"
    rb"container(?:_id)?|skill_id|tunnel_id|approval_request_id|prompt|audio|voice"
)
MEMBER = re.compile(  # what can't begin one is passed over first: most of the time goes there
    rb'"(?=[acfpstv])(?:(' + WORDS + rb')"\s*:\s*(?=["\[{])|type"\s*:\s*"item_reference")',
    re.IGNORECASE,
)
HIDDEN = re.compile(rb"(?:" + WORDS + rb"|item_reference|id|type|input)", re.IGNORECASE)
BRACKETS = re.compile(rb"[\[{]|[\]}]|" + TEXT, re.DOTALL)
ID_MEMBER = re.compile(rb'"id"\s*:\s*(' + TEXT + rb")", re.DOTALL | re.IGNORECASE)
# Letters, and what lies between: nobody need escape these. (One character before the look ahead:
# that is searched for much faster than four.)
ESCAPED = re.compile(rb"\\(?=u(?:00[4-7]|017[fF]|212[aA]))")
PLAIN = (b"prompt", b"audio", b"voice")  # these may be plain text as well
HOLDERS = (b"conversation", b"container", *PLAIN)  # and these an object with an id
SCHEMAS = ("text", "response_format")
WORDS_OF = {  # members of items that are a model's or a server's own words
    "tool_search_call": {"arguments"},
    "local_shell_call": {"action"},
    "shell_call": {"action"},
    "mcp_list_tools": {"tools"},
    "additional_tools": {"tools"},
}
MOST_HIDING = 200  # bytes of a name with all its letters escaped


class Reference(NamedTuple):
    """A stored object that a body names, and the member that names it. `own`: it has to be the
    account's; otherwise it may be nobody's, and what stands beside the id is all that counts."""

    name: str
    id: str
    own: bool = True


def references_in(content: Content, members: Members) -> Iterator[Reference]:
    """Of JSON: the items of the input that are given by their id alone, and every member, at any
    depth, whose name says so. Raises Refusal where the body can't be read."""
    for item in content.items:
        if "id" in item and is_text(item["id"]):
            own = is_reference(item)
            if own or not OWN_WORDS.fullmatch(kind_of(item)):
                yield Reference("item_reference" if own else "input", string_in(item["id"]), own)
    if not MEMBER.search(content.text):
        return  # nearly always
    yield from named_beside(members, {"metadata", "client_metadata", "input", "tools", *SCHEMAS})
    check_each(members.get("input", EMPTY), content.items, repeat(True))
    for item in content.items:
        skipped = {"id", "type"} if kind_of(item) == "item_reference" else set()
        yield from named_beside(item, skipped | WORDS_OF.get(kind_of(item), set()))
    for tool in content.tools:
        yield from named_beside(tool, {"parameters", "headers", "function", "tools"})
    for each, within in [(tool, "function") for tool in content.tools] + [
        (members, name) for name in SCHEMAS
    ]:
        yield from named_within(each, within)


def named_within(members: Members, name: str) -> Iterator[Reference]:
    """In what describes a schema, but for the schema, which is its author's own words."""
    value = members.get(name, NULL)
    if bytes(memoryview(value)[:1]) != b"{":
        yield from named_beside({name: value}, set())
        return
    inner = read_members(bytes(memoryview(value)))
    for deeper in ("format", "json_schema"):
        if deeper in inner:
            yield from named_within(inner, deeper)
    yield from named_beside(inner, {"schema", "parameters", "format", "json_schema"})


def named_beside(members: Members, skipped: Set[str]) -> Iterator[Reference]:
    """In all members but some: of tools, that are looked at one by one, if they are a list."""
    for name, value in members.items():
        if name not in skipped or (name == "tools" and not is_list(value)):
            yield from named_in(b"%b:%b" % (msgspec.json.encode(name), value))


def named_in(text: Buffer) -> Iterator[Reference]:
    """By the names of members, at any depth."""
    done = {ID_MEMBER: 0, STRING: 0}  # up to where each has looked through objects and lists
    for match in MEMBER.finditer(text):
        start, kind = match.end(), text[match.end() : match.end() + 1]
        if match[1] is None:  # not among the items
            yield Reference("item_reference", "")
            continue
        name = match[1].lower()
        own = name != b"approval_request_id"  # of an item that may stand beside it
        if kind == b'"':
            value = STRING.match(text, start) if name not in PLAIN else None
            if value:
                yield Reference(name.decode(), string_in(value[0]), own)
        elif kind == b"[" or name in HOLDERS:
            ids = ID_MEMBER if kind == b"{" or name in PLAIN else STRING
            if start >= done[ids]:
                done[ids] = end_of(text, start)
                for value in ids.finditer(text, start, done[ids]):
                    yield Reference(name.decode(), string_in(value[ids.groups]), own)


def refuse_hidden(text: Buffer, folded: bool) -> None:
    """Raise Refusal where a name that matters is written in a way in which it isn't looked for."""
    if not folded and not ESCAPED.search(text):
        return
    for match in STRING.finditer(text):
        if match.end() - match.start() <= MOST_HIDING and (folded or ESCAPED.search(match[0])):
            written = string_in(match[0])
            name = written.casefold()
            if HIDDEN.fullmatch(name.encode("utf-8", "replace")) and (
                name.encode() not in match[0].lower()
            ):
                raise Refusal("invalid_request", f"'{name}' is written oddly.", param=name)


def check_query(query: bytes) -> None:
    """Raise Refusal for a query that says what only a body may say."""
    for name, _ in parse_qsl(query.decode("latin-1"), keep_blank_values=True):
        if name.casefold() in KNOWN or HIDDEN.fullmatch(name.encode()):
            message = f"'{name}' can't stand in the query."
            raise Refusal("invalid_request", message, param=name[:MAX_NAME])


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
