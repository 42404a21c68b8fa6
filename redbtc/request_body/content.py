"""A request's body, with all that the gateway knows of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from redbtc.locations import ObjectLocation
from redbtc.meter.answers import MAX_NAME
from redbtc.meter.estimates import text_tokens
from redbtc.rates import EXTRAS
from redbtc.refusals import Refusal
from redbtc.request_body.edits import place_in_options, place_of
from redbtc.request_body.facts import (
    DEFAULT_IMAGE_MODEL,
    UNNAMED,
    Facts,
    FrameFacts,
    StreamOptions,
    check_short,
    facts_in,
)
from redbtc.request_body.forms import MAX_PICTURE_TOKENS, Form
from redbtc.request_body.pieces import MAX_PIECE, Buffer, Cutter, Pieces, Steps, check_utf8
from redbtc.request_body.reading import BodyReader, add_models, check_models
from redbtc.request_body.references import Reference
from redbtc.request_body.strict_json import (
    NULL,
    OBJECT_END,
    Members,
    check_letters,
    members_in,
    read_members,
    read_short,
)

PICTURE_TOKENS = 1500  # what most models make of a large one; only for estimates
FACTS, FRAME_FACTS = msgspec.json.Decoder(Facts), msgspec.json.Decoder(FrameFacts)
LONG_CACHE = EXTRAS["cache_write_12h"]
STEER_MEMBERS = {"type", "previous_response_id", "input"}  # the only ones in OpenAI's reference


class RequestBody:
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
        self._durable: dict[str, bool] = {}  # those of tools that are part of its input
        self.lasting_extras = 0  # of these, what a request that builds on this one can use

    @classmethod
    def steps(
        cls, sent: Buffer, text: Buffer, form: Form | None = None, model_needed: bool = False
    ) -> Steps[RequestBody]:
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
        reading = BodyReader(pieces, members)
        yield from reading.steps()
        named = reading.named
        self.references, self.chosen_ids = named.found, named.chosen
        if named.found or named.chosen:
            self.excess = named.excess(self.size)
        self.offers_tools = reading.tools > 0
        cache = LONG_CACHE if named.long_cache else 0
        self.extras, self.lasting_extras = reading.extras | cache, reading.lasting_extras | cache
        self.searches = reading.searches
        self._further, self._durable = reading.models, reading.durable
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

    def inherit(
        self, reference: Reference, mentions: int, home: ObjectLocation, growth: int
    ) -> None:
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
        durable = add_models(dict(self._inherited), self._durable)
        return msgspec.json.encode(durable).decode() if durable else None

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
            message = "All image tools in a request must use the same model."
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
        other byte; return whether it was added. A null counts as left out, and is replaced; a value
        of false does not. No other change is ever made to a body (docs/contract.md,
        section 6)."""
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


class ClientEvent(RequestBody):
    """A client's message on a WebSocket."""

    facts: FrameFacts
    _foreign: str | None  # the first member that steering does not have

    @classmethod
    def read(cls, text: Buffer) -> Steps[ClientEvent]:
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
            message = f"'{name}' is not allowed in an event of type '{self.facts.type}'."
            raise Refusal("invalid_request", message, param=name)


# Members whose objects are read as input with the request.
READ_NAMES = frozenset(("previous_response_id", "conversation", "item_reference"))
# That an item of an upstream's tool brings along beside what the body says of it: a picture, or
# what was found. Clients send whole histories of them.
MAX_TOOL_ITEM_TOKENS = 8000
