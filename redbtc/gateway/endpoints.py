"""The endpoints whose requests are metered, and what is particular to each."""

from __future__ import annotations

from typing import NamedTuple


class Endpoint(NamedTuple):
    """A route whose requests are metered."""

    path: str
    chat: bool = False
    images: bool = False
    forms: bool = False  # the body can be a multipart form
    stores: bool = False  # the upstream can keep what it answers
    free: bool = False  # requests cost nothing
    # The members that limit the output tokens of an answer, of which the largest counts. Others,
    # which the upstream ignores here, count for nothing.
    output_limits: tuple[str, ...] = ()
    runs_tools: bool = False  # the upstream runs tools, at most `max_tool_calls` times

    @property
    def model_needed(self) -> bool:
        """Return whether a request must name a model. Images have a usual one."""
        return not self.images

    @property
    def has_number(self) -> bool:
        """Return whether `n` says how many answers or images are asked for."""
        return self.chat or self.images


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
    Endpoint("/v1/images/generations", images=True),
    Endpoint("/v1/images/edits", images=True, forms=True),
)
