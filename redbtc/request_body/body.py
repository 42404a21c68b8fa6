"""A request's body, with everything that the gateway knows of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import msgspec

from redbtc.locations import ObjectLocation
from redbtc.meter.answers import MAX_NAME
from redbtc.meter.estimates import text_tokens
from redbtc.rates import EXTRAS
from redbtc.refusals import Refusal
from redbtc.request_body.contents import (
    BodyContents,
    BodyRules,
    FurtherModels,
    add_models,
    check_models,
)
from redbtc.request_body.edits import include_usage_edit
from redbtc.request_body.facts import DEFAULT_IMAGE_MODEL, UNNAMED, EventFacts, Facts
from redbtc.request_body.forms import Form
from redbtc.request_body.inherited import READ_MEMBERS, Inherited
from redbtc.request_body.pieces import Buffer
from redbtc.request_body.reading import read_contents
from redbtc.request_body.references import Reference
from redbtc.steps import Steps

PICTURE_TOKENS = 1500  # of a large picture, for most models; only for estimates
FACTS, EVENT_FACTS = msgspec.json.Decoder(Facts), msgspec.json.Decoder(EventFacts)
OF_IMAGES = BodyRules(usual_model=DEFAULT_IMAGE_MODEL)
OF_RECORDINGS = BodyRules(is_recording=True)
LONG_CACHE = EXTRAS["cache_write_12h"]
STEER_MEMBERS = {"type", "previous_response_id", "input"}  # all that OpenAI's reference allows


class RequestBody:
    """A request's body. `sent` is forwarded; all other attributes are what was read in `text`, the
    decoded body."""

    facts: Facts

    def __init__(self, sent: Buffer, text: Buffer, contents: BodyContents) -> None:
        named, tools = contents.references, contents.tools
        self.sent = sent
        self.is_plain = sent is text  # not compressed
        self.size = len(text)
        self.facts = contents.facts
        self.model = ""  # the requested model, whether the body names it or not
        # All stored objects that the body names, and how often, until they are looked up.
        self.references: Mapping[Reference, int] = named.found
        self.chosen_ids = named.chosen  # ids of items that the client chose
        # Bytes of memory by which the references and ids are larger than the text.
        self.excess_bytes = named.excess(self.size) if named.found or named.chosen else 0
        self.offers_tools = tools.count > 0
        cache = LONG_CACHE if named.long_cache else 0
        self.extras = tools.extras | cache  # bits of EXTRAS, inherited ones included
        self.inheritable_extras = tools.inheritable_extras | cache
        self.searches_web = contents.searches_web
        self.max_input_tokens = contents.max_input_tokens
        self.cache_key = contents.cache_key
        self.replays = contents.replays
        self.prompts = contents.prompts
        self.characters = contents.characters
        self.inherited = Inherited()
        self._models = tools.models
        self._inheritable_models = tools.inheritable_models
        self._pictures = contents.pictures
        self._picture_bytes = contents.picture_bytes
        self._options_at = contents.options_at
        # The place of the bytes that were added, and what the client had there.
        self._edited: tuple[int, int, Buffer] | None = None

    @classmethod
    def read_body(
        cls, sent: Buffer, text: Buffer, form: Form | None = None, rules: BodyRules = OF_IMAGES
    ) -> Steps[RequestBody]:
        """Read a body in small steps. `text` is the decoded body, `form` the form that has parsed
        it. Raises Refusal for a body that can't be read, that costs too much to read, or that could
        be read in more than one way."""
        if form:
            contents = yield from form.contents(text)
        else:
            contents, _ = yield from read_contents(text, FACTS, rules)
        body = cls(sent, text, contents)
        body.check_model(rules.usual_model)
        if rules.is_recording:
            check_recording(form)
        return body

    def check_model(self, usual: str) -> None:
        """Note the requested model: the usual one if the body may leave it out. Raises Refusal if
        it is missing but needed, since there is no usual one ("")."""
        if self.facts.model is None and not usual:
            raise Refusal("invalid_request", "You must provide a model parameter.", param="model")
        self.model = self.facts.model or usual

    @property
    def input_estimate(self) -> int:
        """The approximate number of tokens in the body and in the objects it refers to. Text is
        estimated by its size; a picture counts the same whatever its size."""
        text = text_tokens(self.size - self._picture_bytes)
        return text + PICTURE_TOKENS * self._pictures + self.inherited.likely_tokens

    def reads(self, reference: Reference) -> bool:
        """Return whether the object is read as input with the request."""
        return reference.name in READ_MEMBERS

    def inherit(
        self, reference: Reference, mentions: int, location: ObjectLocation, growth: int
    ) -> None:
        """Note an object that the request builds on; see Inherited.add."""
        self.extras |= location.extras
        self.inheritable_extras |= location.extras
        self.inherited.add(reference, mentions, location, growth, self.reads(reference))

    @property
    def mints_input(self) -> bool:
        """True if the upstream chooses all ids in the listing of this request's input: the client
        chose none, here or in what the request builds on."""
        return self.inherited.minted_input and not self.chosen_ids

    @property
    def inheritable_models(self) -> str | None:
        """The further models that a request which builds on this one uses, as JSON: those of tools
        that are part of the input. Complete once `inherit` was called for all references."""
        models = add_models(dict(self.inherited.models), self._inheritable_models)
        return msgspec.json.encode(models).decode() if models else None

    @property
    def long_cache(self) -> bool:
        """True if the request can write to the cache for more than 30 minutes."""
        return bool(self.extras & LONG_CACHE)

    def needed_rates(self) -> Iterator[tuple[str, str]]:
        """Yield each rate without which a price does not say what this request costs, and the
        member of the body that makes it necessary."""
        for rate, bit in EXTRAS.items():
            if self.extras & bit and rate != "web_search":
                yield rate, "prompt_cache_options" if bit == LONG_CACHE else "tools"

    def further_models(self) -> FurtherModels:
        """Return the models that the request uses besides its own: the image tool's, and the author
        of an SVG, which is UNNAMED if the upstream chooses it. Raises Refusal."""
        models = add_models(dict(self.inherited.models), self._models)
        if sum(models.values()) > 1:
            message = "All image tools in a request must use the same model."
            raise Refusal("invalid_request", message, param="tools")
        check_models(models)
        return models

    @property
    def could_name_author(self) -> bool:
        """True if the upstream chooses the author of an SVG only because the body names none."""
        return UNNAMED in self._models and UNNAMED not in self.inherited.models

    def image_model(self) -> str:
        """Return the model of the image tool, or the default one if there is no such tool."""
        drawing = [model for model, images in self.further_models().items() if images]
        return drawing[0] if drawing else DEFAULT_IMAGE_MODEL

    def add_include_usage(self) -> bool:
        """Add `stream_options.include_usage` to a streamed chat that leaves it out, changing no
        other byte; return whether it was added. A null counts as left out and is replaced; false
        does not. No other change is ever made to a body (docs/contract.md, section 6)."""
        edit = include_usage_edit(self.sent, self.facts.stream_options, self._options_at or 0)
        if edit is None:
            return False
        start, end, added = edit
        self._edited = start, start + len(added), self.sent[start:end]
        if isinstance(self.sent, bytearray):
            self.sent[start:end] = added
        else:
            self.sent = self.sent[:start] + added + self.sent[end:]
        return True

    def as_client_sent(self) -> list[bytes | memoryview]:
        """Return the body as the client sent it, in parts. They change when `sent` does."""
        sent = self.sent
        if self._edited is None:
            return [sent if isinstance(sent, bytes) else memoryview(sent)]
        start, end, replaced = self._edited
        return [memoryview(sent)[:start], memoryview(replaced), memoryview(sent)[end:]]


class ClientEvent(RequestBody):
    """A client's message on a WebSocket."""

    facts: EventFacts

    def __init__(self, text: Buffer, contents: BodyContents, unsteered: str | None) -> None:
        """Make an event of what was found in its text. `unsteered` is its first member that a
        "response.steer" can't have, or None."""
        super().__init__(text, text, contents)
        self._unsteered = unsteered

    @classmethod
    def read_event(cls, text: Buffer) -> Steps[ClientEvent]:
        """Read a message in small steps. Raises Refusal as `RequestBody.read_body` does."""
        contents, members = yield from read_contents(text, EVENT_FACTS, BodyRules())
        unsteered = next((name for name in members if name not in STEER_MEMBERS), None)
        return cls(text, contents, unsteered)

    def reads(self, reference: Reference) -> bool:
        """Return whether the object is read as input with the event. The response that a
        "response.steer" names is not, since it goes on."""
        steers = self.facts.type == "response.steer"
        return super().reads(reference) and not (
            steers and reference.name == "previous_response_id"
        )

    def check_steering(self) -> None:
        """Raise Refusal if the event has other members than a "response.steer" has."""
        if self._unsteered is not None:
            name = self._unsteered[:MAX_NAME]
            message = f"'{name}' is not allowed in an event of type '{self.facts.type}'."
            raise Refusal("invalid_request", message, param=name)


def check_recording(form: Form | None) -> None:
    """Raise Refusal unless a form has the recording itself. Some upstreams fetch one from a URL,
    but of that nobody could tell here how long it is and what it may cost."""
    if form is None or not form.has_file(b"file") or form.has_url():
        message = "Send the recording as the part 'file' of a form, with a filename, and no URL."
        raise Refusal("invalid_request", message, param="file")
