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
    NO_VALUE,
    NULL,
    Members,
    check_letters,
    is_list,
    is_text,
    string_in,
)

MAX_N = 999  # of answers or images, in `n`


def bad_number() -> Refusal:
    """Return the refusal of an `n` that readers could take for different numbers, or for none."""
    message = f"'n' must be a whole number from 1 to {MAX_N}."
    return Refusal("invalid_request", message, param="n")


class StreamOptions(Struct):
    """`stream_options` of a chat request."""

    include_usage: bool | msgspec.UnsetType | None = msgspec.UNSET

    @property
    def decides(self) -> bool:
        """True if the options say if usage is wanted. Null is the same as leaving it out."""
        return isinstance(self.include_usage, bool)


class Facts(Struct):
    """The members of a body that limits, prices and the meter need. Others are skipped, not
    built."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | msgspec.UnsetType | None = msgspec.UNSET
    background: bool | str | None = None  # a colour in requests for images
    store: bool | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None
    max_tool_calls: int | None = None
    n: int | None = None
    best_of: int | None = None  # answers to a completion that are made, of which the best are sent
    stream_format: str | None = None  # of speech
    service_tier: str | None = None

    def largest(self, names: Iterable[str]) -> int:
        """Return the largest value of these members; 0 if none of them is given."""
        largest = 0
        for name in names:
            largest = max(largest, getattr(self, name) or 0)
        return largest

    def number(self) -> int:
        """Return the requested number of answers or images. Raises Refusal."""
        number = 1 if self.n is None else self.n
        if not 1 <= number <= MAX_N:
            raise bad_number()
        return number

    @property
    def asks_for_events(self) -> bool:
        """True if the answer may be server-sent events."""
        return bool(self.stream) or self.stream_format == "sse"

    @property
    def asks_for_usage(self) -> bool:
        """True if a streamed chat asks for its usage."""
        return self.stream_options == StreamOptions(include_usage=True)

    @property
    def turns_usage_off(self) -> bool:
        """True if a streamed chat asks not to get its usage."""
        return self.stream_options == StreamOptions(include_usage=False)


class EventFacts(Facts):
    """The facts of a client's event on a WebSocket."""

    type: str | None = None
    stream_id: str | None = None
    previous_response_id: str | None = None


AnyFacts = TypeVar("AnyFacts", bound=Facts)


class TextPart(Struct):
    """A part of a message or of another item, which can have text."""

    text: msgspec.Raw = NO_VALUE


InputItem = Members  # a message, or another item of the input
ROLES = ("user", "assistant", "system", "developer")
# Types of items that are complete with their content, encrypted or plain.
REASONING = ("reasoning", "compaction", "compaction_summary", "context_compaction")


def type_of(item: InputItem) -> str:
    """Return the type of an item or a tool; "" if it has none."""
    return string_in(item["type"]) if "type" in item else ""


def has_text(content: msgspec.Raw, pieces: Pieces) -> bool:
    """Return whether a part in the first piece of an item's content has text."""
    with contextlib.suppress(*NOT_JSON):
        parts = TEXT_PARTS_DECODER.decode(pieces.parts(content)[0]) if is_list(content) else []
        return any(is_text(part.text) for part in parts)
    return False


def is_reference(item: InputItem, pieces: Pieces) -> bool:
    """Return whether the upstream would look the item up by its id, since it is nothing but an id
    (its type may be left out), or lacks the content that would make it complete."""
    kind = type_of(item)
    if kind == "item_reference" or item.keys() <= {"id", "type", "status"}:
        return True
    if kind == "additional_tools":
        return not is_list(item.get("tools", NULL))
    content = item.get("content", NULL)
    if kind == "agent_message":
        return content == NULL
    if kind in ("", "message"):
        return string_in(item.get("role", NO_VALUE)) not in ROLES or content == NULL
    encrypted = is_text(item.get("encrypted_content", NO_VALUE))
    return kind in REASONING and not encrypted and not has_text(content, pieces)


def reference_in(item: InputItem, pieces: Pieces) -> str:
    """Return the name for a reference by an item's id: "item_reference" for an item that the
    upstream would look up, "input" for one that a tool of the upstream made; "" for any other item,
    whose id the client may choose."""
    if is_reference(item, pieces):
        return "item_reference"
    return "" if SELF_CONTAINED.fullmatch(type_of(item)) else "input"


DEFAULT_IMAGE_MODEL = "gpt-image-2.6-sunburst"  # of the image tool, if the request names none
UNNAMED = ""  # stands for the model of an SVG's author if the upstream chooses it
TEXT_PARTS_DECODER = msgspec.json.Decoder(list[TextPart])
PICTURE_MEMBERS = ("images", "mask", "markup")  # of a request for images
LISTS = {"input", "messages", "tools", "svg"}
IMAGE_MEMBERS = {"output_format", "input_image_mask"}  # of the image tool or an image request
FACT_NAMES = frozenset(EventFacts.__struct_fields__) - LISTS
# Some upstreams with OpenAI's API let a client choose the id of a response with this member. That
# could be the id of another account's response.
CHOOSES_ID = "request_id"
SEARCHES_WEB = "web_search_options"  # a chat with this member searches the web once
KNOWN = FACT_NAMES | LISTS | IMAGE_MEMBERS | set(PICTURE_MEMBERS) | {CHOOSES_ID, SEARCHES_WEB}


def facts_in(members: Members, decoder: msgspec.json.Decoder[AnyFacts]) -> AnyFacts:
    """Return the facts among a body's members. Raises Refusal for a fact that has the wrong type,
    or whose name has letters of another case."""
    check_letters(members, KNOWN)
    if CHOOSES_ID in members:
        message = f"'{CHOOSES_ID}' is not allowed: the upstream chooses the id of a response."
        raise Refusal("invalid_request", message, param=CHOOSES_ID)
    known = [b'"%b":%b' % (name.encode(), members[name]) for name in FACT_NAMES & members.keys()]
    text = b"{%b}" % b",".join(known)
    facts: AnyFacts = read_json(text, decoder)
    if len(text) > MAX_NAME:
        check_short(facts)
    return facts


def check_short(facts: Facts) -> None:
    """Raise Refusal for a string that is too long. A very long one was cut out of the body, and its
    stand-in was read instead, which must not be shown."""
    for name in facts.__struct_fields__:
        value = getattr(facts, name)
        if isinstance(value, str) and len(value) > MAX_NAME:
            message = f"'{name}' has more than {MAX_NAME} characters."
            raise Refusal("invalid_request", message, param=name)
