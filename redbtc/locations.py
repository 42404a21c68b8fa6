"""Where the objects that an upstream stores are, as plain data."""

from __future__ import annotations

from typing import NamedTuple

import orjson


class ObjectLocation(NamedTuple):
    """Where an object is stored; the further models that a request which builds on it uses (JSON;
    None: none); for a response, whether the upstream chose all the ids in the listing of its input;
    and the extras (bits of EXTRAS in redbtc/rates.py) and tokens that a request which builds on it
    gets with it: at most (None: nobody knows how many) and likely (None: as many)."""

    upstream: str
    models: str | None = None
    minted_input: bool = False
    extras: int = 0
    tokens: int | None = None
    likely_tokens: int | None = None

    def with_tokens(self, tokens: int | None, likely: int | None = None) -> ObjectLocation:
        """Return the same home for an object of so many tokens."""
        return ObjectLocation(
            self.upstream, self.models, self.minted_input, self.extras, tokens, likely
        )

    @property
    def likely(self) -> int:
        """Return how many tokens the object likely has, for an estimate."""
        return (self.tokens if self.likely_tokens is None else self.likely_tokens) or 0

    def joined(self, later: ObjectLocation) -> ObjectLocation:
        """Return the same home with the models, extras and tokens of a later one added."""
        return ObjectLocation(
            self.upstream,
            joined(self.models, later.models),
            self.minted_input,
            self.extras | later.extras,
            max(self.tokens or 0, later.tokens) if later.tokens is not None else self.tokens,
            self.likely_tokens if later.likely_tokens is None else later.likely_tokens,
        )


MAX_MODELS = 16  # that a request uses besides its own


def joined(models: str | None, more: str | None) -> str | None:
    """Return the models of both: a later request may name the same object, but what works in it
    stays, and what makes pictures for one of them does. Both are JSON, or None where there are
    none. With more than MAX_MODELS nothing can be built on the object, so none are added to them.
    """
    if models is None or more is None:
        return models or more
    first, later = orjson.loads(models), orjson.loads(more)
    if len(first) > MAX_MODELS:
        return models
    return orjson.dumps(
        {each: True in (first.get(each), later.get(each)) for each in first | later}
    ).decode()
