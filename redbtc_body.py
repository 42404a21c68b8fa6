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

Rule 4. A body is parsed on the event loop that all requests share, and before the limits that
depend on its contents can refuse it. So all parsing is a generator of small steps
(redbtc_slices.py), no step calls msgspec or re on more than a piece of the text (redbtc_pieces.py),
and everything that can be repeated has a maximum far above legitimate use.
"""

from __future__ import annotations

import contextlib
import re
import sys
import zlib
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Set
from typing import Any, NamedTuple, TypeVar
from urllib.parse import parse_qsl, quote, urlencode

import msgspec
from msgspec import Struct

from redbtc_estimates import text_tokens
from redbtc_ledger import EXTRAS, Home
from redbtc_meter import MAX_NAME, OWN_WORDS
from redbtc_pieces import (
    MAX_PIECE,
    TEXT,
    Buffer,
    Cutter,
    Pieces,
    Steps,
    check_utf8,
    read_json,
)
from redbtc_refusals import Headers, Refusal, header
from redbtc_rows import MAX_MODELS
from redbtc_scanner import NOT_JSON, SURROGATE

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

# ── Media types ──────────────────────────────────────────────────────────────────────────────────

# RFC 9110 §8.3.1, and no more: what one reader could understand in another way than the next one is
# refused, here and in the heads of a form's parts.
SET = rb';\s*+([\w-]++|filename\*)=("[^"]*+"|[^\s;"]*+)'
PARAMETRIZED = re.compile(rb"\s*+([\w/+.-]++)((?:\s*+" + SET + rb")*+)\s*+;?\s*+", re.IGNORECASE)
PARAMETER = re.compile(SET, re.IGNORECASE)
JSON_TYPE = re.compile(rb"application/(?:[\w.+-]+\+)?json")
BOUNDARY = re.compile(rb"[\w'()+,./:=?-]{1,70}")  # RFC 2046 §5.1.1, without its inner spaces
CHARSETS = (b"utf-8", b"utf8", b"us-ascii")
MAX_RATIO = 32  # of decoded to compressed bytes; parsing takes a multiple of the decoded bytes
MIN_BOUND = 64 << 10  # decoded bytes that are allowed at any ratio
MAX_FRAMES = 100  # gzip members or zstd frames of one body
DECODER_INPUT, DECODER_OUTPUT = 32 << 10, 256 << 10  # bytes in each step, which takes under 1 ms
ZSTD_OPTIONS: dict[int, int] = {zstd.DecompressionParameter.window_log_max: 23}  # 8 MB, RFC 9659


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


def most_decoded(size: int, most: int) -> int:
    """Return how many bytes the decoded copy of a body of `size` bytes may have: not more than
    `most`."""
    return min(most, max(MIN_BOUND, MAX_RATIO * size))


def decompressed(body: Buffer, encoding: str, most: int) -> Steps[Buffer]:
    """Decode a compressed body in small steps and return the copy. Raises Refusal if that is longer
    than `most_decoded` allows or the body can't be decoded."""
    most = most_decoded(len(body), most)
    decoded, at = bytearray(), 0
    for _ in range(MAX_FRAMES):
        decoder: Any = zlib.decompressobj(31)
        if encoding == "zstd":
            decoder = zstd.ZstdDecompressor(options=ZSTD_OPTIONS)
        rest: Buffer = b""  # input that zlib returns unused; zstd keeps it
        while not decoder.eof:
            given, before = rest, len(decoded)
            if not rest and getattr(decoder, "needs_input", True):
                given = body[at : at + DECODER_INPUT]
                at += len(given)
            try:
                decoded += decoder.decompress(given, min(DECODER_OUTPUT, most + 1 - before))
            except (zlib.error, zstd.ZstdError):
                raise unreadable(encoding) from None
            if len(decoded) > most:
                message = f"The decoded request body has more than {most} bytes."
                raise Refusal("request_too_large", message)
            if not given and len(decoded) == before:  # the compressed data is cut short
                raise unreadable(encoding)
            rest = getattr(decoder, "unconsumed_tail", b"")
            yield
        at -= len(decoder.unused_data)
        if at == len(body):
            return decoded
    raise unreadable(encoding)


def unreadable(encoding: str) -> Refusal:
    """Return the refusal of a body that is not what its Content-Encoding says."""
    return Refusal("invalid_request", f"The request body is not valid {encoding}.")


# ── Forms ────────────────────────────────────────────────────────────────────────────────────────

MAX_PART_HEAD = 8192
MAX_FIELD = 4096
MAX_PARTS = 1000
FORM_WINDOW = 64 << 10  # bytes that are searched in one step
SINGLE_FIELDS = (b"model", b"stream", b"n", b"svg[model]", b"output_format")
# Readers differ in how they take spaces, control characters, '%5B', accents and look-alike letters.
FIELD_NAME = re.compile(rb"[A-Za-z0-9_.\[\]-]+")
ODD_SINGLE = re.compile(
    rb"(?:model|stream|n|prompt|output_format)[.\[]|_charset_$", re.IGNORECASE
)  # RFC 7578 §4.6
NUMBER = re.compile(rb"[1-9][0-9]{0,2}")
MAX_NUMBER = 999  # of answers or images, in `n`
# Some readers split a part of one of these types into further fields.
NESTED_TYPE = re.compile(rb"multipart/|message/|application/x-www-form-urlencoded")
FORM_END = re.compile(rb"--(?:[ \t\r\n]|\Z)")  # else to some readers it is no boundary
HEAD_LINE = re.compile(rb"([\w-]++):([^\r\n]*+)")
FORM_NAME = re.compile(
    rb"file_ids?|vector_store_ids?|container_id|_response_id|conversation", re.IGNORECASE
)
ODD_SVG = re.compile(rb"svg(?!\[model\]$|\[reasoning\])", re.IGNORECASE)
UNENCODED = (b"binary", b"8bit", b"7bit")
MAX_PICTURE_TOKENS = 16_000  # more than any model makes of a picture
PICTURE_TOKENS = 1500  # what most models make of a large one; only for estimates


class Form:
    """A multipart form (RFC 7578, RFC 2046 §5.1.1), read as it grows: the names of its parts, and
    its short fields. Files are stepped over, never copied."""

    def __init__(self, boundary: bytes) -> None:
        self.names: set[bytes] = set()  # in lower case
        self.fields: dict[bytes, bytes] = {}
        self._parts = 0
        self._tokens = 0
        self.files = self.file_bytes = 0
        self._delimiter = b"--" + boundary
        self._part = -1  # where the part begins that is not yet whole
        self._searched = 0

    def grow(self, body: Buffer) -> Steps[None]:
        """Parse on, in small steps: `body` is the form as far as it has arrived. Raises Refusal for
        a form that could be read in more than one way."""
        size = len(self._delimiter)
        while self._searched <= len(body) - size:
            end = body.find(self._delimiter, self._searched, self._searched + FORM_WINDOW)
            if end < 0:
                window_end = min(self._searched + FORM_WINDOW, len(body))
                self._searched = window_end - size + 1
            else:
                self._find(body, end)
            yield

    def _find(self, body: Buffer, end: int) -> None:
        """A boundary."""
        first = self._part < 0  # with nothing before it, which another reader could take in
        if (end and body[end - 2 : end] != b"\r\n") or (first and end > 2):
            raise Refusal("invalid_request", "The form's boundary stands within a line.")
        if not first:
            self._take(body, end - 2)
        self._part = self._searched = end + len(self._delimiter)

    def _take(self, body: Buffer, end: int) -> None:
        """A part is whole."""
        start = self._part
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise Refusal("invalid_request", f"The form has more than {MAX_PARTS} parts.")
        head_end = body.find(b"\r\n\r\n", start, min(end, start + MAX_PART_HEAD))
        parameters = parameters_of_part(bytes(body[start : max(start, head_end)]))
        name, size = parameters[b"name"], end - head_end - 4
        field = not {b"filename", b"filename*"} & parameters.keys()
        if not field and not parameters.get(b"filename"):
            self._check_doubtful(name, bytes(body[head_end + 4 : min(end, head_end + 64)]))
        self._tokens += end - start if field else min(end - start, MAX_PICTURE_TOKENS)
        if not field:
            self.files, self.file_bytes = self.files + 1, self.file_bytes + size
        single = name.lower() in SINGLE_FIELDS
        proper = field and name.lower() not in self.names and name.islower()
        self.names.add(name.lower())
        long = field and size > MAX_FIELD and name != b"prompt"
        if (single and not proper) or long or ODD_SVG.match(name) or ODD_SINGLE.match(name):
            shown = name.decode()
            message = f"'{shown}' must be in the form once, in lower case, as a short text field."
            raise Refusal("invalid_request", message, param=shown)
        if field and size <= MAX_FIELD:
            self.fields[name] = bytes(body[head_end + 4 : end])

    @staticmethod
    def _check_doubtful(name: bytes, begin: bytes) -> None:
        """Raise Refusal for a part that some readers take for a file and others for a field, since
        its filename is empty or only a `filename*`, if its value begins like JSON."""
        if begin.lstrip()[:1] in (b"{", b"[", b'"'):
            shown = name.decode()
            message = f"'{shown}' must have a 'filename' that is not empty, or none at all."
            raise Refusal("invalid_request", message, param=shown)

    def most_tokens(self, body: Buffer) -> int:
        """What its parts can come to."""
        return self._tokens + min(len(body) - max(self._part, 0), MAX_PICTURE_TOKENS)

    def references(self) -> Steps[Named]:
        """Return the stored objects that the form names, by the name of a part or in a short field.
        Raises Refusal."""
        named = Named()
        for name, value in self.fields.items():
            if name != b"prompt":
                yield from check_utf8(value)
                yield from refuse_hidden(value)
                yield from named_in(value, Pieces(value), named)
            yield
        for name in self.names:
            if match := FORM_NAME.search(name.replace(b".", b"_")):
                named.add(Reference(match[0].decode(), ""))
        return named

    def facts(self, body: Buffer) -> Facts:
        """`model` and `stream` wherever they stand in the form: openai-node sends files before
        them. Raises Refusal where the form has no end."""
        if self._part < 0 or not FORM_END.match(body, self._part):
            raise Refusal("invalid_request", "The form has no end.")
        stream = self.fields.get(b"stream", b"").strip().lower() in (b"true", b"1")
        model, number = self.fields.get(b"model"), self.fields.get(b"n")
        if number is not None and not NUMBER.fullmatch(number):
            raise bad_number()
        return Facts(
            model=model.decode("utf-8", "replace") if model else None,
            stream=stream,
            n=int(number) if number else None,
        )


def bad_number() -> Refusal:
    """Return the refusal of an `n` that readers could take for different numbers, or for none."""
    message = f"'n' must be a number from 1 to {MAX_NUMBER}."
    return Refusal("invalid_request", message, param="n")


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
    plain = is_plain(fields.get(b"content-type", b"").strip().lower())
    if not (once and plain and found and 0 < len(name) <= MAX_NAME):
        raise Refusal("invalid_request", "A part of the form has no head that can be read.")
    if not FIELD_NAME.fullmatch(name):
        message = "The name of a form field may have only letters, digits and '_.-[]'."
        raise Refusal("invalid_request", message)
    return found[1]


def is_plain(content_type: bytes) -> bool:
    """Whether a part of that type holds neither parts of its own nor text in another charset."""
    found = parametrized(content_type)
    charset = found[1].get(b"charset", b"utf-8") if found else b"charset" in content_type
    return charset in (*CHARSETS, False) and not NESTED_TYPE.match(content_type)


# ── JSON ─────────────────────────────────────────────────────────────────────────────────────────
# Read with as little building as can be: a member that isn't needed is stepped over.

Members = dict[str, msgspec.Raw]
MEMBERS, OBJECTS = msgspec.json.Decoder(Members), msgspec.json.Decoder(list[Members])
RAWS = msgspec.json.Decoder(list[msgspec.Raw])
NOTHING, NULL = msgspec.Raw(), msgspec.Raw(b"null")
STRING = re.compile(TEXT, re.DOTALL)
MEMBER_NAME = re.compile(rb"\s*+,?\s*+(" + TEXT + rb")\s*+:\s*+", re.DOTALL)
OBJECT_END = re.compile(rb"\s*+\}")
MAX_MEMBERS = 1000  # of each object that is parsed; no request of OpenAI's API has 100
FOLDED = ("ſ".encode(), "\N{KELVIN SIGN}".encode())  # Unicode's case folding makes them s and k
TOO_WIDE = f"An object in the body has more than {MAX_MEMBERS} members."
TWICE = "Duplicate key in the JSON body."
PACE = 32  # objects that are checked in one step


def string_in(text: Buffer | msgspec.Raw) -> str:
    """The value of a JSON string."""
    try:
        return msgspec.json.decode(text, type=str)
    except NOT_JSON:
        return ""


def is_text(raw: msgspec.Raw) -> bool:
    """Return whether a value is a string that is not empty."""
    return len(raw) > 2 and bytes(memoryview(raw)[:1]) == b'"'


def is_list(raw: msgspec.Raw) -> bool:
    return bytes(memoryview(raw)[:1]) == b"["


def read_members(text: Buffer) -> Members:
    """Return the members of a JSON object by name, with their values as they are written. Raises
    Refusal for a text that can't be parsed, or that could be read in more than one way."""
    members: Members = read_json(text, MEMBERS)
    if len(members) > MAX_MEMBERS:
        raise Refusal("invalid_request", TOO_WIDE)
    if len(text) != shortest(members):
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
    """Raise Refusal for a name that is a known one with letters of another case or look-alike
    letters: the next reader may take it for the known one."""
    for name in members:
        if name not in known and name.casefold() in known:
            message = f"The key '{name}' must be written '{name.casefold()}'."
            raise Refusal("invalid_request", message, param=name)


def read_list(
    pieces: Pieces, part: Buffer, known: Set[str], telling: Set[str] | None
) -> Steps[list[Members]]:
    """Return the objects in a piece of a list. Only those with a member in `telling` (None: all)
    are checked: Raises Refusal for one of these that could be read in more than one way."""
    objects: list[Members] = read_json(part, OBJECTS)
    checked = [
        number
        for number, each in enumerate(objects)
        if telling is None or not telling.isdisjoint(each)
    ]
    raws = read_json(part, RAWS) if checked else ()
    for number in checked:
        each, raw = objects[number], raws[number]
        if len(each) > MAX_MEMBERS:
            raise Refusal("invalid_request", TOO_WIDE)
        if len(raw) != shortest(each):
            check_once(bytes(memoryview(raw)), each)
        check_letters(each, known)
        if number % PACE == 0:
            yield
    if pieces.cut:
        for number, each in enumerate(objects):
            if long := pieces.taken_out(each):
                objects[number] = yield from members_in(long)
                check_letters(objects[number], known)
                yield
    return objects


def shortest(members: Members) -> int:
    """Return the length of an object that is written as '{"name":value,…}', without white space or
    escapes in names. An object of this length has no room for a duplicate; others are checked."""
    return 1 + 4 * len(members) + sum(map(len, members)) + sum(map(len, members.values()))


def check_once(text: Buffer, members: Members) -> None:
    """Raise Refusal for an object with duplicate keys: the next reader may use the other one."""
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
    """Return where the value of the member `wanted` begins in the text of its object."""
    at = text.index(b"{") + 1
    for name, value in members.items():
        match = MEMBER_NAME.match(text, at)
        if match is None or name == wanted:
            break
        at = match.end() + len(value)
    assert match is not None, "`wanted` is one of the members, and those were checked"
    return match.end()


# ── Facts ────────────────────────────────────────────────────────────────────────────────────────


class StreamOptions(Struct):
    """`stream_options` of a chat request."""

    include_usage: bool | msgspec.UnsetType | None = msgspec.UNSET

    @property
    def says(self) -> bool:
        """Whether it says if usage is wanted; null is the same as nothing."""
        return isinstance(self.include_usage, bool)


class Facts(Struct):
    """What the gateway must know of a request's body. Other members are skipped, not built."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | msgspec.UnsetType | None = msgspec.UNSET
    background: bool | str | None = None  # for images, a colour
    store: bool | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None
    max_tool_calls: int | None = None
    n: int | None = None
    service_tier: str | None = None

    def largest(self, names: Iterable[str]) -> int:
        """Return the largest value of the members that limit something; 0 if none of them does."""
        largest = 0
        for name in names:
            largest = max(largest, getattr(self, name) or 0)
        return largest

    def number(self) -> int:
        """Return how many answers or images are asked for. Raises Refusal."""
        number = 1 if self.n is None else self.n
        if not 1 <= number <= MAX_NUMBER:
            raise bad_number()
        return number

    @property
    def asks_for_usage(self) -> bool:
        """Whether a streamed chat asks for its usage."""
        return self.stream_options == StreamOptions(include_usage=True)

    @property
    def turns_usage_off(self) -> bool:
        """Whether a streamed chat says that it wants no usage."""
        return self.stream_options == StreamOptions(include_usage=False)


class FrameFacts(Facts):
    """The same of a WebSocket's frame."""

    type: str | None = None
    stream_id: str | None = None
    previous_response_id: str | None = None


AnyFacts = TypeVar("AnyFacts", bound=Facts)


class Part(Struct):
    """A part of a message or of a tool's output. It is a picture if it has an `image_url`, or, in
    the output of a code interpreter, a `url`."""

    image_url: msgspec.Raw = NOTHING
    url: msgspec.Raw = NOTHING
    text: msgspec.Raw = NOTHING


Item = Members  # a message, or another item of the input
ROLES = ("user", "assistant", "system", "developer")
SEALED = (
    "reasoning",
    "compaction",
    "compaction_summary",
    "context_compaction",
)  # items that are complete with their content, encrypted or plain


def kind_of(item: Item) -> str:
    """An item's type, or a tool's."""
    return string_in(item["type"]) if "type" in item else ""


def has_text(content: msgspec.Raw, pieces: Pieces) -> bool:
    """Return whether a part in the first piece of an item's content has text."""
    with contextlib.suppress(*NOT_JSON):
        parts = PARTS.decode(pieces.parts(content)[0]) if is_list(content) else []
        return any(is_text(part.text) for part in parts)
    return False


def is_reference(item: Item, pieces: Pieces) -> bool:
    """Return whether the upstream would look the item up by its id: it is nothing but an id (its
    type may be left out), or lacks the content that would make it complete."""
    kind = kind_of(item)
    if kind == "item_reference" or item.keys() <= {"id", "type", "status"}:
        return True
    content = item.get("content", NULL)
    if kind in ("", "message"):
        return string_in(item.get("role", NOTHING)) not in ROLES or content == NULL
    sealed = is_text(item.get("encrypted_content", NOTHING))
    return kind in SEALED and not sealed and not has_text(content, pieces)


def reference_in(item: Item, pieces: Pieces) -> str:
    """Return the name for a reference by an item's id: "item_reference" for an item that the
    upstream would look up, "input" for one that a tool of the upstream made; "" for any other item,
    whose id the client may choose."""
    if is_reference(item, pieces):
        return "item_reference"
    return "" if OWN_WORDS.fullmatch(kind_of(item)) else "input"


DEFAULT_IMAGE_MODEL = "gpt-image-2.6-sunburst"  # of the tool, where the request names none
UNNAMED = ""  # in place of an SVG author's model, where the upstream chooses it
FACTS, FRAME_FACTS = msgspec.json.Decoder(Facts), msgspec.json.Decoder(FrameFacts)
PART, PARTS = msgspec.json.Decoder(Part), msgspec.json.Decoder(list[Part])
PICTURE = b"image_url"
CONTENTS = ("content", "output")  # members of an item that can hold pictures
PICTURES = ("images", "mask", "markup")  # those of a request for images
LISTS = {"input", "messages", "tools", "svg"}
DRAWN = {"output_format", "input_image_mask"}  # members of the image tool or of an image request
TOOL_NAMES = {"type", "model", "svg", "tools", "function", "container", "environment"} | DRAWN
# How the types of the upstream's own tools begin, with the bits of what they use; there are dated
# ones, such as web_search_preview_2025_03_11.
BITS_OF_TOOLS = {
    "web_search": EXTRAS["web_search"],
    "file_search": EXTRAS["file_search"],
    "code_interpreter": EXTRAS["container"],
    "shell": EXTRAS["container"],
}
STARTS_OF_TOOLS = tuple(BITS_OF_TOOLS)
LONG_CACHE = EXTRAS["cache_write_12h"]
NO_NEW_CONTAINER = ("local", "container_reference")  # types of a shell's environment
ITEM_NAMES = {"id", "type", "status", "role", "content", "output", "encrypted_content", "tools"}
# Only items with one of these members are checked; most histories have none.
TELLING = {"id", "ID", "Id", "iD", "tools", "Tools", "TOOLS"}
MAX_NESTING = 8  # levels of tools within tools
MAX_OPTIONS = 4096  # bytes of `stream_options` in which a null is looked for
STEER_MEMBERS = {"type", "previous_response_id", "input"}  # the only ones in OpenAI's reference
FACT_NAMES = frozenset(FrameFacts.__struct_fields__) - LISTS
# Some upstreams that speak OpenAI's API let a client choose the id of a response with this member;
# it could be another account's.
CHOOSES_ID = "request_id"
SEARCHES = "web_search_options"  # with this member a chat searches the web, once
KNOWN = FACT_NAMES | LISTS | DRAWN | set(PICTURES) | {CHOOSES_ID, SEARCHES}


def facts_in(members: Members, decoder: msgspec.json.Decoder[AnyFacts]) -> AnyFacts:
    """Return the facts among a body's members. Raises Refusal for one that has the wrong type, or
    whose name has letters of another case."""
    check_letters(members, KNOWN)
    if CHOOSES_ID in members:
        message = f"'{CHOOSES_ID}' can't be chosen: the upstream gives a response its id."
        raise Refusal("invalid_request", message, param=CHOOSES_ID)
    known = [b'"%b":%b' % (name.encode(), members[name]) for name in FACT_NAMES & members.keys()]
    text = b"{%b}" % b",".join(known)
    facts: AnyFacts = read_json(text, decoder)
    if len(text) > MAX_NAME:
        check_short(facts)
    return facts


def check_short(facts: Facts) -> None:
    """Raise Refusal for a text that is too long. One that is very long was cut out of the body, and
    what was read is a stand-in, which must not be shown."""
    for name in facts.__struct_fields__:
        value = getattr(facts, name)
        if isinstance(value, str) and len(value) > MAX_NAME:
            message = f"'{name}' has more than {MAX_NAME} characters."
            raise Refusal("invalid_request", message, param=name)


class Content:
    """A request's body: `sent` is what is forwarded, all other attributes are what was read."""

    facts: Facts

    def __init__(self, sent: Buffer, text: Buffer) -> None:
        self.sent = sent
        self.plain = sent is text  # not compressed
        self.size = len(text)  # bytes, decoded
        self.model = ""  # that is asked for, whether it is named or not
        self.offers_tools = False
        self.extras = 0  # what it can use that has a rate of its own: bits of EXTRAS
        self.searches = False  # as a chat it searches the web once, which no usage reports
        # All stored objects that it names and how often it does, until they are looked up.
        self.references: Mapping[Reference, int] = {}
        self.inherited_tokens = 0  # of what it builds on, at most
        self.likely_inherited = 0  # the same, likely
        self.inherits_unknown = False  # it builds on something of which the tokens are not known
        # The conversations that its input and its answer are added to, how often each is named, and
        # the tokens that count for it.
        self.conversations: dict[str, tuple[int, int]] = {}
        self.most_input_tokens = self.size
        self.pictures = self.picture_bytes = 0  # that it brings along, as far as they were counted
        self._options_at: int | None = None  # where the text leaves `include_usage` out
        self._inherited: dict[str, bool] = {}
        self._inherits_minted = True
        self._read_names = READ_NAMES
        self.chosen_ids: set[str] = set()  # of items, by the client
        self.excess = 0  # bytes of memory by which what was read is larger than the text
        self._further: dict[str, bool] = {}  # further models it uses, and whether for pictures
        self._lasting: dict[str, bool] = {}  # those of tools that are part of its input
        self.lasting_extras = 0  # of these, what a request that builds on this one can use

    @classmethod
    def steps(
        cls, sent: Buffer, text: Buffer, form: Form | None = None, model_needed: bool = False
    ) -> Steps[Content]:
        """Read a body in small steps and return its content. `text` is the body decoded. Raises
        Refusal for a body that can't be read, that costs too much to read, or that could be read in
        more than one way."""
        content = cls(sent, text)
        if form:
            yield from content._read_form(form, text)
        else:
            yield from content._read(text, FACTS)
        content.check_model(model_needed)
        return content

    def _read_form(self, form: Form, text: Buffer) -> Steps[None]:
        self.facts = form.facts(text)
        check_short(self.facts)
        named = yield from form.references()
        self.references, self.excess = named.found, named.excess(self.size)
        self.most_input_tokens = form.most_tokens(text)
        self.pictures, self.picture_bytes = form.files, form.file_bytes
        author = form.fields.get(b"svg[model]", b"").decode("utf-8", "replace")
        format_ = form.fields.get(b"output_format", b"").strip().lower()
        self._further = {author or UNNAMED: False} if author or format_ == b"svg" else {}

    def _read(self, text: Buffer, decoder: msgspec.json.Decoder[Any]) -> Steps[Members]:
        if len(text) > MAX_PIECE:
            pieces: Pieces = yield from Cutter(text).steps()
            members = yield from members_in(pieces.parts(pieces.root))
        else:
            if not text.isascii():
                yield from check_utf8(text)
            pieces, members = read_short(text)
        if pieces.cut and pieces.is_stand_in(members.get("stream_options", NULL)):
            raise Refusal(
                "invalid_request", "'stream_options' is too long.", param="stream_options"
            )
        self.facts = facts_in(members, decoder)
        reading = Reading(pieces, members)
        yield from reading.steps()
        named = reading.named
        self.references, self.chosen_ids = named.found, named.chosen
        if named.found or named.chosen:
            self.excess = named.excess(self.size)
        self.offers_tools = reading.tools > 0
        cache = LONG_CACHE if named.long_cache else 0
        self.extras, self.lasting_extras = reading.extras | cache, reading.lasting_extras | cache
        self.searches = reading.searches
        self._further, self._lasting = reading.models, reading.lasting
        self.pictures, self.picture_bytes = reading.pictures, reading.picture_bytes
        self.most_input_tokens += MAX_PICTURE_TOKENS * reading.pictures - reading.picture_bytes
        options = self.facts.stream_options
        if isinstance(options, StreamOptions):
            (part,) = pieces.parts(members["stream_options"])
            check_letters(read_members(part), {"include_usage"})
        if options is None or (isinstance(options, StreamOptions) and not options.says):
            self._options_at = yield from place_of(pieces, "stream_options")
            if options and options.include_usage is None:
                self._options_at += yield from place_in_options(text, self._options_at)
        return members

    def check_model(self, needed: bool) -> None:
        """Note the model that is asked for: the usual one where none need be named. Raises Refusal
        if it is missing but needed."""
        if self.facts.model is None and needed:
            raise Refusal("invalid_request", "You must provide a model parameter.", param="model")
        self.model = self.facts.model or ("" if needed else DEFAULT_IMAGE_MODEL)

    @property
    def input_estimate(self) -> int:
        """About how many tokens it comes to, with what it builds on: by its size, but for
        pictures, whose tokens don't depend on their bytes."""
        text = text_tokens(self.size - self.picture_bytes)
        return text + PICTURE_TOKENS * self.pictures + self.likely_inherited

    def inherit(self, reference: Reference, mentions: int, home: Home, growth: int) -> None:
        """Note an object that this request builds on, how often it names it, and how many tokens
        requests that have not ended can add to it."""
        if home.models:
            add_models(self._inherited, msgspec.json.decode(home.models, type=dict[str, bool]))
        self.extras |= home.extras
        self.lasting_extras |= home.extras
        # The items of a conversation can change before the request gets there.
        minted_input = home.minted_input and reference.name != "conversation"
        self._inherits_minted = self._inherits_minted and minted_input
        if reference.name == "input":
            known = MAX_TOOL_ITEM_TOKENS if home.tokens is None else home.tokens + growth
            self.inherited_tokens += mentions * min(known, MAX_TOOL_ITEM_TOKENS)
            self.likely_inherited += mentions * min(home.likely, MAX_TOOL_ITEM_TOKENS)
        elif reference.name in self._read_names:
            tokens = mentions * ((home.tokens or 0) + growth)
            self.inherited_tokens += tokens
            self.likely_inherited += mentions * home.likely
            if reference.name == "conversation":
                self.conversations[reference.id] = mentions, tokens
            self.inherits_unknown = self.inherits_unknown or home.tokens is None

    def weigh_again(self, conversation: str, now: int) -> None:
        """Note the tokens that a conversation has by now: it may have grown."""
        mentions, before = self.conversations[conversation]
        self.conversations[conversation] = mentions, mentions * now
        self.inherited_tokens += mentions * now - before

    @property
    def conversation_tokens(self) -> int:
        """Of the inherited tokens those of conversations."""
        return sum(tokens for _, tokens in self.conversations.values())

    @property
    def mints_input(self) -> bool:
        """Whether the upstream chooses all ids in the listing of this request's input: the client
        chose none, here or in what this request builds on."""
        return self._inherits_minted and not self.chosen_ids

    @property
    def lasting_models(self) -> str | None:
        """The further models that a request which builds on this one uses, as JSON: those of tools
        that are part of the input. Complete once `inherit` was called for all references."""
        lasting = add_models(dict(self._inherited), self._lasting)
        return msgspec.json.encode(lasting).decode() if lasting else None

    @property
    def long_cache(self) -> bool:
        """Whether it can write to the cache for more than 30 minutes."""
        return bool(self.extras & LONG_CACHE)

    def needed_rates(self) -> Iterator[tuple[str, str]]:
        """Yield the rates without which a price does not say what this request costs, and the
        member of the body that asks for it."""
        for rate, bit in EXTRAS.items():
            if self.extras & bit and rate != "web_search":
                yield rate, "prompt_cache_options" if bit == LONG_CACHE else "tools"

    def further_models(self) -> dict[str, bool]:
        """Return the models that the request uses besides its own, each with whether it makes
        pictures: the image tool's model, and the author of an SVG, which is UNNAMED where the
        upstream chooses it. Raises Refusal."""
        models = add_models(dict(self._inherited), self._further)
        if sum(models.values()) > 1:
            message = "The image tools have different models."
            raise Refusal("invalid_request", message, param="tools")
        check_models(models)
        return models

    @property
    def could_name_author(self) -> bool:
        """Whether the upstream chooses the author of an SVG only because the request names none."""
        return UNNAMED in self._further and UNNAMED not in self._inherited

    def image_model(self) -> str:
        """That of the tool which makes pictures, whether it is named or not."""
        drawing = [model for model, images in self.further_models().items() if images]
        return drawing[0] if drawing else DEFAULT_IMAGE_MODEL

    def add_include_usage(self) -> bool:
        """Add `stream_options.include_usage` to a streamed chat that leaves it out, changing no
        other byte; return whether it was added. A null is left out, too, and is replaced; a value
        of false is not. This is the only change that is ever made to a body (CONTRACT section
        6)."""
        sent, options = self.sent, self.facts.stream_options
        at = end = self._options_at or 0
        if isinstance(options, StreamOptions) and options.says:
            return False
        if options is None:
            end, added = at + len(b"null"), b'{"include_usage":true}'
        elif options is msgspec.UNSET:
            at = end = sent.index(b"{") + 1
            added = b'"stream_options":{"include_usage":true},'
        elif options.include_usage is None:
            end, added = at + len(b"null"), b"true"
        else:
            at = end = sent.index(b"{", at) + 1
            added = b'"include_usage":true' + (b"" if OBJECT_END.match(sent, at) else b",")
        if isinstance(sent, bytearray):
            sent[at:end] = added
        else:
            self.sent = sent[:at] + added + sent[end:]
        return True


class Frame(Content):
    """A client's message on a WebSocket."""

    facts: FrameFacts
    _foreign: str | None  # the first member that steering does not have

    @classmethod
    def read(cls, text: Buffer) -> Steps[Frame]:
        """Read a frame in small steps. Raises Refusal as `Content.steps` does."""
        frame = cls(text, text)
        members = yield from frame._read(text, FRAME_FACTS)
        if frame.facts.type == "response.steer":  # the response that it names goes on
            frame._read_names = READ_NAMES - {"previous_response_id"}
        frame._foreign = next((name for name in members if name not in STEER_MEMBERS), None)
        return frame

    def check_steering(self) -> None:
        """Raise Refusal if it has other members than steering has."""
        if self._foreign is not None:
            name = self._foreign[:MAX_NAME]
            message = f"'{name}' is not allowed in '{self.facts.type}'."
            raise Refusal("invalid_request", message, param=name)


# ── Reading ──────────────────────────────────────────────────────────────────────────────────────

MAX_ITEMS = 20_000  # of the input; the history of a day's work has 2,000
MAX_TOOLS = 4_000  # nested ones included; OpenAI allows 128, MCP servers have some hundreds


def check_models(models: dict[str, bool]) -> None:
    """Raise Refusal for more than MAX_MODELS models."""
    if len(models) > MAX_MODELS:
        message = f"The tools name more than {MAX_MODELS} models."
        raise Refusal("invalid_request", message, param="tools")


def add_models(models: dict[str, bool], more: dict[str, bool]) -> dict[str, bool]:
    """Add `more` to `models`, and return these. One that makes pictures still does if it is named
    as an SVG's author as well."""
    for model, images in more.items():
        models[model] = images or models.get(model, False)
    return models


class Reading:
    """One pass over a body's members, its input and its tools, which collects the references, ids,
    models and pictures in them."""

    def __init__(self, pieces: Pieces, members: Members) -> None:
        self.named = Named()
        self.tools = self._items = 0
        self.models: dict[str, bool] = {}
        self.lasting: dict[str, bool] = {}
        self.extras = self.lasting_extras = 0  # of the upstream's tools: bits of EXTRAS
        self.searches = False  # the request as a whole is one search of the web
        self.pictures = self.picture_bytes = 0
        self.countable = True  # whether the pictures can be counted by their places
        self._pieces = pieces
        self._members = members
        self._names = False  # whether any member may name a stored object
        self._shows = False  # whether any member may be a picture
        # Lists of tools to read, with their depth and whether they are part of the input.
        self._offers: deque[tuple[msgspec.Raw, int, bool]] = deque()

    def steps(self) -> Steps[None]:
        """Read the body in small steps. Raises Refusal for a body that can't be read, is too large,
        or has a name in a disguised spelling."""
        members = self._members
        for piece in self._pieces.all():
            escaped = yield from refuse_hidden(piece)
            self._names = self._names or MEMBER.search(piece) is not None
            self._shows = self._shows or escaped or PICTURE in piece
            if self._pieces.cut:
                yield
        if "input" in members:
            yield from self._read_input(members["input"])
        if "tools" in members:
            self._offers.append((members["tools"], 0, False))
        while self._offers:
            yield from self._read_tools(*self._offers.popleft())
        if "svg" in members or "output_format" in members:
            yield from self._note_author(members, lasting=False)
        if members.get(SEARCHES, NULL) != NULL:
            self.searches = True
            self.extras |= EXTRAS["web_search"]
        if self._names:
            yield from self._name_members(members)
        if self._shows:
            yield from self._count_messages(members.get("messages", NULL))
            yield from self._count_pictures(members, PICTURES)
            if not self.countable:
                yield from self._count_names()

    def _read_input(self, given: msgspec.Raw) -> Steps[None]:
        if not (given == NULL or bytes(memoryview(given)[:1]) in (b'"', b"[")):
            raise Refusal("invalid_request", "'input' must be text or a list.", param="input")
        for part in self._pieces.parts(given) if is_list(given) else ():
            telling = None if self._names or self._shows else TELLING
            objects = yield from read_list(self._pieces, part, ITEM_NAMES, telling)
            self._count_items(objects)
            for number, item in enumerate(objects):
                if "id" in item or "tools" in item:
                    self._note_item(item)
                if "outputs" in item:
                    yield from self._count_outputs(item)
                if self._names:
                    yield from self._name_item(item)
                if self._shows:
                    yield from self._count_pictures(item, CONTENTS)
                if number % PACE == 0:
                    yield

    def _count_items(self, items: list[Members]) -> None:
        self._items += len(items)
        if self._items > MAX_ITEMS:
            message = f"The input has more than {MAX_ITEMS} items."
            raise Refusal("invalid_request", message, param="input")

    def _note_item(self, item: Item) -> None:
        if "id" in item and is_text(item["id"]):
            object_id = string_in(item["id"])
            if name := reference_in(item, self._pieces):
                self.named.add(Reference(name, object_id))
                if is_text(item.get("result", NULL)) and kind_of(item) == "image_generation_call":
                    self.pictures += 1
                    self.picture_bytes += self._pieces.size(item["result"])
            else:
                self.named.choose(object_id[: MAX_NAME + 1])  # a longer one is never learned
        if "tools" in item and kind_of(item) != "mcp_list_tools":  # that one only reports tools
            self._offers.append((item["tools"], 0, True))

    def _count_outputs(self, item: Item) -> Steps[None]:
        """Count the pictures in the output of a code interpreter."""
        made = "id" in item and reference_in(item, self._pieces) == "input"
        if made and is_list(item["outputs"]) and kind_of(item) == "code_interpreter_call":
            for text in self._pieces.parts(item["outputs"]):
                with contextlib.suppress(*NOT_JSON):
                    pictures = [each.url for each in PARTS.decode(text) if is_text(each.url)]
                    self.pictures += len(pictures)
                    self.picture_bytes += sum(map(self._pieces.size, pictures))
                yield

    def _name_item(self, item: Item) -> Steps[None]:
        kind = kind_of(item)
        skipped = {"id", "type"} if kind == "item_reference" else set()
        yield from self._name_beside(item, skipped | WORDS_OF.get(kind, set()))

    def _read_tools(self, given: msgspec.Raw, depth: int, lasting: bool) -> Steps[None]:
        if depth >= MAX_NESTING:
            message = f"Tools are nested more than {MAX_NESTING} levels deep."
            raise Refusal("invalid_request", message, param="tools")
        for part in self._pieces.parts(given) if is_list(given) else ():
            telling = None if self._names else TOOL_NAMES
            tools = yield from read_list(self._pieces, part, TOOL_NAMES, telling)
            self._count_tools(tools)
            for number, tool in enumerate(tools):
                if "type" not in tool:  # unless it has another name of these, it is not checked yet
                    check_letters(tool, TOOL_NAMES)
                kind = kind_of(tool)
                if kind.startswith("image_generation"):
                    yield from self._note_painter(tool, lasting)
                elif kind.startswith(STARTS_OF_TOOLS):
                    yield from self._note_tool(tool, kind, lasting)
                if "tools" in tool:
                    self._offers.append((tool["tools"], depth + 1, lasting))
                if self._names:
                    yield from self._name_tool(tool)
                if number % PACE == 0:
                    yield

    def _count_tools(self, tools: list[Members]) -> None:
        self.tools += len(tools)
        if self.tools > MAX_TOOLS:
            message = f"The body has more than {MAX_TOOLS} tools."
            raise Refusal("invalid_request", message, param="tools")

    def _name_tool(self, tool: Members) -> Steps[None]:
        yield from self._name_beside(tool, {"headers", "function", "tools", *TOOL_SCHEMAS})
        yield from self._name_within(tool, "function")

    def _note_tool(self, tool: Members, kind: str, lasting: bool) -> Steps[None]:
        """Note what a tool can use. A container that is named, and its own machine, are not new."""
        if kind.startswith("code_interpreter") and is_text(tool.get("container", NULL)):
            return
        if kind.startswith("shell"):
            given = tool.get("environment", NULL)
            if given == NULL:
                return
            environment = yield from members_in(self._pieces.parts(given))
            check_letters(environment, TOOL_NAMES)
            if kind_of(environment) in NO_NEW_CONTAINER:
                return
        bit = next(BITS_OF_TOOLS[start] for start in STARTS_OF_TOOLS if kind.startswith(start))
        self.extras |= bit
        self.lasting_extras |= bit if lasting else 0

    def _note_painter(self, tool: Members, lasting: bool) -> Steps[None]:
        yield from self._note_author(tool, lasting)
        if self._shows:
            yield from self._count_pictures(tool, ("input_image_mask",))
        model = string_in(tool.get("model", NULL)) or DEFAULT_IMAGE_MODEL
        self._note_model(model, True, lasting)

    def _note_author(self, drawing: Members, lasting: bool) -> Steps[None]:
        """Note the author of an SVG, if `drawing`, an image tool or the body of an image request,
        asks for one."""
        given, author = drawing.get("svg", NULL), ""
        if given != NULL:
            svg = yield from members_in(self._pieces.parts(given))
            check_letters(svg, TOOL_NAMES)
            author = string_in(svg.get("model", NULL))
        if author or string_in(drawing.get("output_format", NULL)).lower() == "svg":
            self._note_model(author or UNNAMED, False, lasting)

    def _note_model(self, model: str, images: bool, lasting: bool) -> None:
        if len(model) > MAX_NAME:
            message = f"The model of a tool has more than {MAX_NAME} characters."
            raise Refusal("invalid_request", message, param="tools")
        for models in (self.models, self.lasting) if lasting else (self.models,):
            check_models(add_models(models, {model: images}))

    # Pictures

    def _count_messages(self, given: msgspec.Raw) -> Steps[None]:
        for part in self._pieces.parts(given) if is_list(given) else ():
            try:
                messages = yield from read_list(self._pieces, part, {"content"}, None)
            except Refusal:
                self.countable = False
                return
            self._count_items(messages)
            for message in messages:
                yield from self._count_pictures(message, CONTENTS)
            yield

    def _count_names(self) -> Steps[None]:
        """Count every `image_url` in the body, and every escape, as a picture, and all bytes as
        text. For bodies with malformed lists, which some upstreams ignore."""
        self.pictures = self.picture_bytes = 0
        for piece in self._pieces.all():
            self.pictures += piece.count(PICTURE)
            for number, _ in enumerate(ESCAPED.finditer(piece)):
                self.pictures += 1
                if number % 256 == 0:
                    yield
            yield

    def _count_pictures(self, item: Members, names: Iterable[str]) -> Steps[None]:
        """Count the pictures in members of an object: lists of parts, or one part."""
        for name in names:
            given = item.get(name, NOTHING)
            single = bytes(memoryview(given)[:1]) == b"{"
            for text in self._pieces.parts(given) if single or is_list(given) else ():
                try:
                    parts = [PART.decode(text)] if single else PARTS.decode(text)
                except NOT_JSON:
                    self.countable = False
                    return
                pictures = [each.image_url for each in parts if each.image_url]
                self.pictures += len(pictures)
                self.picture_bytes += sum(map(self._pieces.size, pictures))
                yield

    # References by the names of members

    def _name_members(self, members: Members) -> Steps[None]:
        skipped = {"metadata", "client_metadata", "input", "tools", "functions", *SCHEMAS}
        yield from self._name_beside(members, skipped)
        for name in SCHEMAS:
            yield from self._name_within(members, name)
        functions = members.get("functions", NULL)
        for part in self._pieces.parts(functions) if is_list(functions) else ():
            found = yield from read_list(self._pieces, part, set(), None)
            self._count_tools(found)
            for function in found:
                yield from self._name_beside(function, TOOL_SCHEMAS)

    def _name_within(self, members: Members, name: str, depth: int = 0) -> Steps[None]:
        """Note references in a member that holds a schema, but not in the schema itself, which is
        its author's own text."""
        value = members.get(name, NULL)
        if bytes(memoryview(value)[:1]) != b"{":
            yield from self._name_beside({name: value}, set())
            return
        if depth >= MAX_NESTING:
            message = f"'{name}' is nested more than {MAX_NESTING} levels deep."
            raise Refusal("invalid_request", message, param=name)
        inner = yield from members_in(self._pieces.parts(value))
        for deeper in ("format", "json_schema"):
            if deeper in inner:
                yield from self._name_within(inner, deeper, depth + 1)
        yield from self._name_beside(inner, {"schema", "format", "json_schema"} | TOOL_SCHEMAS)

    def _name_beside(self, members: Members, skipped: Set[str]) -> Steps[None]:
        """Note references in all members except `skipped`. "tools" and "functions" are skipped only
        if they are lists, whose elements are read one by one."""
        for name, value in members.items():
            if name not in skipped or (name in ("tools", "functions") and not is_list(value)):
                text = b"%b:%b" % (msgspec.json.encode(name), value)
                yield from named_in(text, self._pieces, self.named)


# ── References ───────────────────────────────────────────────────────────────────────────────────

WORDS = (
    rb"previous_response_id|comparison_response_id|conversation|file_ids?|vector_store_ids?|"
    rb"container(?:_id)?|skill_id|tunnel_id|approval_request_id|prompt|audio|voice"
)
CACHE_WORDS = rb"prompt_cache_(?:options|breakpoint)"  # members with a `ttl`
MEMBER = re.compile(  # the look-ahead rejects most strings early, where most of the time is spent
    rb'"(?=[acfpstv])(?:('
    + WORDS
    + rb')"\s*:\s*(?=["\[{])|type"\s*:\s*"item_reference"|('
    + CACHE_WORDS
    + rb')"\s*:\s*(?=\{))',
    re.IGNORECASE,
)
HIDDEN = re.compile(
    rb"(?:" + WORDS + rb"|" + CACHE_WORDS + rb"|item_reference|id|type|input)", re.IGNORECASE
)
BRACKETS = re.compile(rb"[\[{]|[\]}]|" + TEXT, re.DOTALL)
ID_MEMBER = re.compile(rb'"id"\s*:\s*(' + TEXT + rb")", re.DOTALL | re.IGNORECASE)
# Escapes of ASCII letters and of the letters in FOLDED, which no writer needs. (With only one
# character before the look-ahead, the search is much faster than with four.)
ESCAPED = re.compile(rb"\\(?=u(?:00[4-7]|017[fF]|212[aA]))")
PLAIN = (b"prompt", b"audio", b"voice")  # members that may also be plain text
HOLDERS = (b"conversation", b"container", *PLAIN)  # members that may be an object with an id
SCHEMAS = ("text", "response_format")
TOOL_SCHEMAS = {"parameters", "output_schema"}
WORDS_OF = {  # by an item's type, the members that hold a model's or a server's own text
    "tool_search_call": {"arguments"},
    "local_shell_call": {"action"},
    "shell_call": {"action"},
    "mcp_list_tools": {"tools"},
    "additional_tools": {"tools"},
    "tool_search_output": {"tools"},
}
# Members whose objects are read as input with the request.
READ_NAMES = frozenset(("previous_response_id", "conversation", "item_reference"))
# That an item of an upstream's tool brings along beside what the body says of it: a picture, or
# what was found. Clients send whole histories of them.
MAX_TOOL_ITEM_TOKENS = 8000
MAX_REFERENCES = 20_000  # different ones, as many as items
MAX_MENTIONS = 50_000  # repeated ones included
ID_BYTES = 250  # of memory for an id and what refers to it, besides its characters
MAX_HIDING = 200  # bytes of a string that is looked at: any name with all its letters escaped


class Reference(Struct, frozen=True, gc=False):
    """A stored object that a body names, and the member that names it. It has to be the account's
    own: another account's and one that does not exist are refused alike. (Garbage collections skip
    it: to go through the references of many bodies would hold the loop.)"""

    name: str
    id: str


class Named:
    """The ids in a body, each once: those of stored objects, and those that the client chose."""

    def __init__(self) -> None:
        self.found: dict[Reference, int] = {}  # and how often each is named
        self.chosen: set[str] = set()
        self.long_cache = False  # a cache lifetime other than the usual one is asked for
        self._mentions = 0
        self._characters = 0

    def excess(self, size: int) -> int:
        """Return by how many bytes of memory the ids are larger than `size`."""
        ids = len(self.found) + len(self.chosen)
        return max(0, ID_BYTES * ids + 4 * self._characters - size)

    def choose(self, object_id: str) -> None:
        """Note an id that the client chose."""
        if object_id not in self.chosen:
            self.chosen.add(object_id)
            self._characters += len(object_id)

    def add(self, reference: Reference) -> None:
        """Note a stored object. Raises Refusal for too many."""
        self._mentions += 1
        if self._mentions > MAX_MENTIONS:
            message = f"The body names stored objects more than {MAX_MENTIONS} times."
            raise Refusal("invalid_request", message)
        if reference not in self.found:
            self._characters += len(reference.id)
        self.found[reference] = self.found.get(reference, 0) + 1
        if len(self.found) > MAX_REFERENCES:
            message = f"The body names more than {MAX_REFERENCES} stored objects."
            raise Refusal("invalid_request", message)


def named_in(text: Buffer, pieces: Pieces, named: Named) -> Steps[None]:
    """Note the stored objects that members in a text name, at any depth."""
    seen: dict[re.Pattern[bytes], set[int]] = {ID_MEMBER: set(), STRING: set()}
    for piece in pieces.within(text, set()):
        done = {ID_MEMBER: 0, STRING: 0}  # by pattern, the offset up to which it was searched for
        for match in MEMBER.finditer(piece):
            start, kind = match.end(), piece[match.end() : match.end() + 1]
            name = (match[1] or b"").lower()
            if match[2]:
                yield from note_lifetime(piece, start, pieces, named)
            elif not name:  # an "item_reference" that is not among the items
                named.add(Reference("item_reference", ""))
            elif kind == b'"':
                value = STRING.match(piece, start)
                if value and name not in PLAIN:
                    yield from note_ids(name, STRING, value[0], pieces, named)
            elif kind == b"[" or name in HOLDERS:
                ids = ID_MEMBER if kind == b"{" or name in PLAIN else STRING
                if start >= done[ids]:
                    done[ids] = yield from end_of(piece, start)
                    for held in pieces.within(piece[start : done[ids]], seen[ids]):
                        yield from note_ids(name, ids, held, pieces, named)
            yield
        yield


USUAL_LIFETIME = "30m"


def note_lifetime(piece: Buffer, start: int, pieces: Pieces, named: Named) -> Steps[None]:
    """Note whether an object of options of the prompt cache asks for another lifetime than the
    usual one. Raises Refusal for one that could be read in more than one way."""
    end = yield from end_of(piece, start)
    options = yield from members_in(pieces.parts(piece[start:end]))
    check_letters(options, {"ttl"})
    lifetime = options.get("ttl", NULL)
    if lifetime != NULL and string_in(lifetime) != USUAL_LIFETIME:
        named.long_cache = True


def note_ids(
    name: bytes, ids: re.Pattern[bytes], text: Buffer, pieces: Pieces, named: Named
) -> Steps[None]:
    """Note all ids that the pattern `ids` finds in a text, as references by the member `name`."""
    yield
    for number, value in enumerate(ids.finditer(text)):
        if not pieces.is_mark(value[ids.groups]):
            named.add(Reference(name.decode(), string_in(value[ids.groups])))
        if number % PACE == 0:
            yield


def refuse_hidden(text: Buffer) -> Steps[bool]:
    """Raise Refusal for a name that matters but is written with escapes or look-alike letters, so
    that a search by its text would miss it. Return whether the text has any of these."""
    folded = not text.isascii() and any(letter in text for letter in FOLDED)
    if not folded and not ESCAPED.search(text):
        return False
    for number, match in enumerate(STRING.finditer(text)):
        if match.end() - match.start() <= MAX_HIDING and (folded or ESCAPED.search(match[0])):
            written = string_in(match[0])
            name = written.casefold()
            if HIDDEN.fullmatch(name.encode("utf-8", "replace")) and (
                name.encode() not in match[0].lower()
            ):
                message = (
                    f"The name '{name}' contains escapes or look-alike characters. "
                    "Write it in plain ASCII."
                )
                raise Refusal("invalid_request", message, param=name)
        if number % 256 == 0:
            yield
    return True


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


def place_in_options(text: Buffer, at: int) -> Steps[int]:
    """Return the offset of the value of `include_usage` in `stream_options`, which begin at `at` in
    the body's text. Raises Refusal if they are longer than any that are of use."""
    options = bytes(text[at : at + MAX_OPTIONS])
    options = options[: (yield from end_of(options, 0))]
    with contextlib.suppress(Refusal):
        return start_of(options, read_members(options), "include_usage")
    message = f"'stream_options' has more than {MAX_OPTIONS} bytes."
    raise Refusal("invalid_request", message, param="stream_options")


def place_of(pieces: Pieces, wanted: str) -> Steps[int]:
    """Return the offset in a body of the value of its member `wanted`."""
    for number, part in enumerate(pieces.parts(pieces.root)):
        members = read_members(part)
        if wanted in members:
            return pieces.place(number, start_of(part, members, wanted))
        yield
    raise KeyError(wanted)


# ── Queries ──────────────────────────────────────────────────────────────────────────────────────

MAX_FIELDS = 100  # of a query
VALUE = re.compile(r"[\w.:=+~,-]{1,256}", re.ASCII)  # no '%', which could be decoded twice


class Query:
    """The fields of a stored response's query that are forwarded. Empty ones and others, such as
    the `api-version` that tools add by themselves, are dropped without a refusal."""

    def __init__(self, given: bytes, allowed: Collection[str]) -> None:
        """Raises Refusal for a query with more than MAX_FIELDS fields, and for a forwarded value
        that could be read in more than one way."""
        if given.count(b"&") >= MAX_FIELDS:
            raise Refusal("invalid_request", f"The query has more than {MAX_FIELDS} fields.")
        fields = parse_qsl(given.decode("latin-1"), errors="replace")
        self._fields = [(name, value) for name, value in fields if name in allowed]
        for name, value in self._fields:
            if not VALUE.fullmatch(value):
                message = (
                    f"'{name}' in the query may have at most 256 characters: letters, digits and "
                    "'._:=+~,-'."
                )
                raise Refusal("invalid_request", message, param=name)

    def values(self, name: str) -> list[str]:
        """Return all values of a field."""
        return [value for each, value in self._fields if each == name]

    def encoded(self) -> bytes:
        """Return the query for the upstream."""
        return urlencode(self._fields, safe="[]", quote_via=quote).encode()
