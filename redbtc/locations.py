"""The location of an object that an upstream stores, as plain data."""

from __future__ import annotations

from typing import NamedTuple

import orjson


class ObjectLocation(NamedTuple):
    """The upstream that stores an object, and what a request that builds on the object inherits."""

    upstream: str
    models: str | None = None  # further models that such a request uses, as JSON; None: none
    minted_input: bool = False  # of a response: the upstream chose all ids in its listed input
    extras: int = 0  # bits of EXTRAS in redbtc/rates.py
    tokens: int | None = None  # the maximum; None: unknown
    likely_tokens: int | None = None  # None: as many as `tokens`

    def with_tokens(self, tokens: int | None, likely: int | None = None) -> ObjectLocation:
        """Return the same location for an object with these numbers of tokens."""
        return ObjectLocation(
            self.upstream, self.models, self.minted_input, self.extras, tokens, likely
        )

    @property
    def likely(self) -> int:
        """Return how many tokens the object likely has, for an estimate."""
        return (self.tokens if self.likely_tokens is None else self.likely_tokens) or 0

    def joined(self, later: ObjectLocation) -> ObjectLocation:
        """Return this location with the models, extras and tokens of a later one added."""
        return ObjectLocation(
            self.upstream,
            joined(self.models, later.models),
            self.minted_input,
            self.extras | later.extras,
            max(self.tokens or 0, later.tokens) if later.tokens is not None else self.tokens,
            self.likely_tokens if later.likely_tokens is None else later.likely_tokens,
        )


MAX_MODELS = 16  # of one request, besides the requested one


def joined(models: str | None, more: str | None) -> str | None:
    """Return the models of two locations of the same object, which a later request named again. A
    model that makes pictures in one of them does in the result. Models are JSON, or None if there
    are none. With more than MAX_MODELS no request can build on the object, so none are added."""
    if models is None or more is None:
        return models or more
    first, later = orjson.loads(models), orjson.loads(more)
    if len(first) > MAX_MODELS:
        return models
    return orjson.dumps(
        {each: True in (first.get(each), later.get(each)) for each in first | later}
    ).decode()
