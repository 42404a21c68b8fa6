"""The endpoints whose requests are metered, and what is particular to each."""

from __future__ import annotations

from typing import Literal, NamedTuple

from redbtc.request_body.body import OF_IMAGES, OF_RECORDINGS
from redbtc.request_body.contents import BodyRules

Counted = Literal[  # what is billed of an answer that reports no usage
    "",
    "searches",  # a web search
    "characters",  # those of the text that was spoken
]


class Endpoint(NamedTuple):
    """A route whose requests are metered."""

    path: str
    chat: bool = False  # answers have choices, and streams report usage only if they are asked to
    images: bool = False
    audio: bool = False  # requests or answers are audio
    forms: bool = False  # the body can be a multipart form
    stores: bool = False  # the upstream can keep what it answers
    free: bool = False  # requests cost nothing
    writes: bool = True  # a model writes the answer, so that it has output tokens
    # The members that limit the output tokens of an answer; the largest counts. Others don't count,
    # since the upstream ignores them here.
    output_limits: tuple[str, ...] = ()
    runs_tools: bool = False  # the upstream runs tools, at most `max_tool_calls` times
    counts: Counted = ""
    body: BodyRules = BodyRules()

    @property
    def has_number(self) -> bool:
        """Return whether `n` says how many answers or images are asked for."""
        return self.chat or self.images

    @property
    def needs_price(self) -> bool:
        """Return whether the model of a request must have a price where others are refused."""
        return not (self.free and self.body.usual_model)


RESPONSES = Endpoint(
    "/v1/responses", stores=True, output_limits=("max_output_tokens",), runs_tools=True
)
METERED = (
    Endpoint(
        "/v1/chat/completions",
        chat=True,
        output_limits=("max_completion_tokens", "max_tokens"),
    ),
    RESPONSES,
    Endpoint("/v1/responses/compact"),
    Endpoint("/v1/responses/input_tokens", free=True),
    Endpoint("/v1/images/generations", images=True, body=OF_IMAGES),
    Endpoint("/v1/images/edits", images=True, forms=True, body=OF_IMAGES),
    Endpoint("/v1/completions", chat=True, output_limits=("max_tokens",)),
    Endpoint("/v1/embeddings", writes=False, body=BodyRules(has_items=False)),
    Endpoint(
        "/v1/moderations",
        free=True,
        writes=False,
        body=BodyRules(usual_model="omni-moderation-latest", has_items=False),
    ),
    Endpoint("/v1/audio/transcriptions", audio=True, forms=True, body=OF_RECORDINGS),
    Endpoint("/v1/audio/translations", audio=True, forms=True, body=OF_RECORDINGS),
    Endpoint(
        "/v1/audio/speech",
        audio=True,
        counts="characters",
        body=BodyRules(has_items=False, is_spoken=True),
    ),
    Endpoint("/v1/alpha/search", counts="searches"),
    Endpoint("/v1/memories/trace_summarize"),
)
