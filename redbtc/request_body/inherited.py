"""The tokens and models that a request inherits from the stored objects that it builds on."""

from __future__ import annotations

import msgspec
from msgspec import Struct

from redbtc.locations import ObjectLocation
from redbtc.request_body.contents import FurtherModels, add_models
from redbtc.request_body.references import Reference

# Members that name an object which is read as input with the request.
READ_MEMBERS = frozenset(("previous_response_id", "conversation", "item_reference"))
# The tokens of an item made by an upstream's tool that are not in the body: a picture, or what was
# found. Clients send whole histories of such items.
MAX_TOOL_ITEM_TOKENS = 8000


class Inherited(Struct):
    """The tokens and models that a request inherits. Complete once `add` was called for all
    references."""

    tokens: int = 0  # the maximum
    likely_tokens: int = 0
    is_unknown: bool = False  # the tokens of an object are not known
    # The conversations to which the input and the answer are added, with how often the request
    # names each, and its tokens among `tokens`.
    conversations: dict[str, tuple[int, int]] = {}
    models: FurtherModels = {}
    minted_input: bool = True  # the upstream chose all ids in what is inherited

    def add(
        self,
        reference: Reference,
        mentions: int,
        location: ObjectLocation,
        growth: int,
        is_read: bool,
    ) -> None:
        """Add an object, which the request names `mentions` times. `growth`: how many tokens other
        requests, which have not ended, can add to it. `is_read`: the object is read as input."""
        if location.models:
            add_models(self.models, msgspec.json.decode(location.models, type=FurtherModels))
        # The items of a conversation can change before the request gets there.
        if reference.name == "conversation" or not location.minted_input:
            self.minted_input = False
        if reference.name == "input":
            known = MAX_TOOL_ITEM_TOKENS if location.tokens is None else location.tokens + growth
            self.tokens += mentions * min(known, MAX_TOOL_ITEM_TOKENS)
            self.likely_tokens += mentions * min(location.likely, MAX_TOOL_ITEM_TOKENS)
        elif is_read:
            tokens = mentions * ((location.tokens or 0) + growth)
            self.tokens += tokens
            self.likely_tokens += mentions * location.likely
            if reference.name == "conversation":
                self.conversations[reference.id] = mentions, tokens
            self.is_unknown = self.is_unknown or location.tokens is None

    def update_conversation(self, conversation: str, now: int) -> None:
        """Note how many tokens a conversation has now, since it may have grown."""
        mentions, before = self.conversations[conversation]
        self.conversations[conversation] = mentions, mentions * now
        self.tokens += mentions * now - before

    @property
    def conversation_tokens(self) -> int:
        """The part of `tokens` that comes from conversations."""
        return sum(tokens for _, tokens in self.conversations.values())
