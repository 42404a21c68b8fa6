"""The parts of which a RequestBody is made: the facts, references and tools found in its text."""

from __future__ import annotations

from typing import NamedTuple

from msgspec import Struct

from redbtc.locations import MAX_MODELS
from redbtc.refusals import Refusal
from redbtc.request_body.facts import Facts
from redbtc.request_body.references import References


class BodyRules(NamedTuple):
    """What differs between the bodies that endpoints take."""

    usual_model: str = ""  # the model of a request that names none; "": a request must name one
    has_items: bool = True  # `input`, if it is a list, has the items of a response
    is_spoken: bool = False  # `input` is a text to be spoken
    is_recording: bool = False  # a form with a recording as its part `file`


FurtherModels = dict[str, bool]  # by name, whether the request uses the model to make pictures


def check_models(models: FurtherModels) -> None:
    """Raise Refusal for more than MAX_MODELS models."""
    if len(models) > MAX_MODELS:
        message = f"The tools use more than {MAX_MODELS} different models."
        raise Refusal("invalid_request", message, param="tools")


def add_models(models: FurtherModels, more: FurtherModels) -> FurtherModels:
    """Add `more` to `models`, and return these. A model that makes pictures still does if it is
    named as the author of an SVG as well."""
    for model, images in more.items():
        models[model] = images or models.get(model, False)
    return models


class ToolUse(Struct):
    """The models and extras that the tools of a request can use. Tools that are part of the input
    are inherited by requests that build on this one."""

    count: int = 0
    models: FurtherModels = {}
    inheritable_models: FurtherModels = {}
    extras: int = 0  # bits of EXTRAS
    inheritable_extras: int = 0


class BodyContents(Struct):
    """The facts, references and tools found in a body. `options_at` is the place in its text where
    `include_usage` can be added; None if it need not be. `searches_web`: as a chat, the request
    searches the web once, which no usage reports."""

    facts: Facts
    references: References
    tools: ToolUse
    pictures: int
    picture_bytes: int
    max_input_tokens: int
    searches_web: bool = False
    options_at: int | None = None
    cache_key: str = ""  # `prompt_cache_key`; "" if it is no string
    replays: bool = False  # it has encrypted content of an earlier response
    prompts: int = 1  # of a completion; each gets answers of its own
    characters: int = 0  # of the text to be spoken
