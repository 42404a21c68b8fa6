"""The facts of a request that limits, prices and the meter depend on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import TypeVar

import msgspec
from msgspec import Struct

from redbtc.meter.answers import MAX_NAME, SELF_CONTAINED
from redbtc.meter.scanner import NOT_JSON
from redbtc.refusals import Refusal
from redbtc.request_body.pieces import Pieces, read_json
from redbtc.request_body.strict_json import (
    NOTHING,
    NULL,
    Members,
    check_letters,
    is_list,
    is_text,
    string_in,
)

MAX_NUMBER = 999  # of answers or images, in `n`


def bad_number() -> Refusal:
    """Return the refusal of an `n` that readers could take for different numbers, or for none."""
    message = f"'n' must be a number from 1 to {MAX_NUMBER}."
    return Refusal("invalid_request", message, param="n")


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


class ContentPart(Struct):
    """A part of a message or of a tool's output. It is a picture if it has an `image_url`, or, in
    the output of a code interpreter, a `url`."""

    image_url: msgspec.Raw = NOTHING
    url: msgspec.Raw = NOTHING
    text: msgspec.Raw = NOTHING


InputItem = Members  # a message, or another item of the input
ROLES = ("user", "assistant", "system", "developer")
SEALED = (
    "reasoning",
    "compaction",
    "compaction_summary",
    "context_compaction",
)  # items that are complete with their content, encrypted or plain


def kind_of(item: InputItem) -> str:
    """An item's type, or a tool's."""
    return string_in(item["type"]) if "type" in item else ""


def has_text(content: msgspec.Raw, pieces: Pieces) -> bool:
    """Return whether a part in the first piece of an item's content has text."""
    with contextlib.suppress(*NOT_JSON):
        parts = PARTS.decode(pieces.parts(content)[0]) if is_list(content) else []
        return any(is_text(part.text) for part in parts)
    return False


def is_reference(item: InputItem, pieces: Pieces) -> bool:
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


def reference_in(item: InputItem, pieces: Pieces) -> str:
    """Return the name for a reference by an item's id: "item_reference" for an item that the
    upstream would look up, "input" for one that a tool of the upstream made; "" for any other item,
    whose id the client may choose."""
    if is_reference(item, pieces):
        return "item_reference"
    return "" if SELF_CONTAINED.fullmatch(kind_of(item)) else "input"


DEFAULT_IMAGE_MODEL = "gpt-image-2.6-sunburst"  # of the tool, where the request names none
UNNAMED = ""  # in place of an SVG author's model, where the upstream chooses it
PART, PARTS = msgspec.json.Decoder(ContentPart), msgspec.json.Decoder(list[ContentPart])
PICTURES = ("images", "mask", "markup")  # those of a request for images
LISTS = {"input", "messages", "tools", "svg"}
DRAWN = {"output_format", "input_image_mask"}  # members of the image tool or of an image request
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
