"""The upstream at which a stored object is, and what a request gets by building on it: plain
data."""

from __future__ import annotations

from typing import NamedTuple

import orjson

MAX_MODELS = 16  # that a request uses besides its own


class ObjectLocation(NamedTuple):
    """The upstream that stores an object, and what a request that builds on the object uses.

    - `models`: the further models, as a JSON object (see `joined_models`), or None for none.
    - `minted_input`: for a response, whether the upstream chose all the ids in the listing of its
      input.
    - `extras`: bits of EXTRAS in redbtc/rates.py.
    - `tokens`: the maximum number of tokens that the request reads with the object; None if it is
      unknown.
    - `likely_tokens`: the likely number, for an estimate; None if it is the maximum.
    - `credential`: the digest of the client's own credential that it was stored with, and without
      which it is not found; None for an operator's.
    """

    upstream: str
    models: str | None = None
    minted_input: bool = False
    extras: int = 0
    tokens: int | None = None
    likely_tokens: int | None = None
    credential: str | None = None

    def with_tokens(self, tokens: int | None, likely: int | None = None) -> ObjectLocation:
        """Return the same location for an object of this many tokens."""
        return self._replace(tokens=tokens, likely_tokens=likely)

    @property
    def likely(self) -> int:
        """The likely number of the object's tokens, for an estimate."""
        return (self.tokens if self.likely_tokens is None else self.likely_tokens) or 0

    def joined(self, later: ObjectLocation) -> ObjectLocation:
        """Return the same location with the models, extras and tokens of a later one added."""
        return ObjectLocation(
            self.upstream,
            joined_models(self.models, later.models),
            self.minted_input,
            self.extras | later.extras,
            max(self.tokens or 0, later.tokens) if later.tokens is not None else self.tokens,
            self.likely_tokens if later.likely_tokens is None else later.likely_tokens,
            self.credential,
        )


def joined_models(models: str | None, more: str | None) -> str | None:
    """Return the models of both: a later request may name the same object, but what the object
    uses already stays. Both are None or a JSON object with the name of each model and whether it
    makes pictures, which is true in the result if it is in one of them. A request with more than
    MAX_MODELS is refused, so none are added to `models` if it has more."""
    if models is None or more is None:
        return models or more
    first, later = orjson.loads(models), orjson.loads(more)
    if len(first) > MAX_MODELS:
        return models
    return orjson.dumps(
        {each: True in (first.get(each), later.get(each)) for each in first | later}
    ).decode()
