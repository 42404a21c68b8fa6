"""The most that a request can use and cost, which is held before it is forwarded.

All of it follows from the request's body, its endpoint, the prices and the settings. Where a body
sets no limit of its own, the settings say what is held ([billing] hold_output_tokens and
hold_tool_calls).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from redbtc.billing.billing import Billing
from redbtc.billing.model_prices import FREE, ModelPrices
from redbtc.billing.spending import Hold
from redbtc.config import BillingSettings
from redbtc.gateway.endpoints import Endpoint
from redbtc.meter.estimates import MaximumUsage
from redbtc.rates import AUDIO_TOKENS_A_MINUTE, DEFAULT_TIER, EXTRAS, MINUTE_MS
from redbtc.request_body.body import RequestBody
from redbtc.request_body.facts import UNNAMED
from redbtc.store.objects import Objects
from redbtc.usage import Usage

MIN_AUDIO_BYTES_A_SECOND = 500  # speech codecs need more; silence could be shorter
USUAL_PICTURES = 4  # held for the image tool where a request has no 'max_tool_calls'


def maximum_of_unknown(settings: BillingSettings, input_tokens: int) -> MaximumUsage:
    """Return the most that a request can use if nothing but its input is known."""
    output, calls = settings.hold_output_tokens, settings.hold_tool_calls
    return MaximumUsage(input_tokens, output, output, calls, min(USUAL_PICTURES, calls))


def tokens_of_length(audio_ms: int) -> int:
    """Return how many tokens a recording of this length is billed as where its length is not."""
    return math.ceil(audio_ms * AUDIO_TOKENS_A_MINUTE / MINUTE_MS)


class Maximum:
    """The most that a request can use and cost. `answers` is how many it asks for."""

    __slots__ = ("_billing", "_body", "_endpoint", "_settings", "answers")

    def __init__(self, endpoint: Endpoint, body: RequestBody, billing: Billing) -> None:
        self._endpoint = endpoint
        self._body = body
        self._billing = billing
        self._settings = billing.settings
        self.answers = body.facts.number() * body.prompts if endpoint.has_number else 1
        if endpoint.chat and body.facts.best_of:
            self.answers = max(self.answers, body.facts.best_of * body.prompts)

    def note_growth(self, hold: Hold, objects: Objects) -> None:
        """Let the hold note the tokens that the request can add to the conversations that it
        names."""
        inherited = self._body.inherited
        if inherited.conversations:
            added = self.usage(hold).all_tokens - inherited.conversation_tokens
            hold.grow(objects, inherited.conversations, added)

    def cost(self, prices: ModelPrices | None, further_input: int = 0) -> int:
        """Return the most that the request can cost, in nanos. `further_input` is in tokens. A
        model without a price (None) is free, but the models of its tools can have prices."""
        body, endpoint = self._body, self._endpoint
        if endpoint.free or not (prices or body.further_models()):
            return 0
        prices, tier = prices or FREE, body.facts.service_tier
        if endpoint.counts == "searches":
            return prices.max_call_cost(EXTRAS["web_search"], tier)
        of_audio = prices.max_audio_cost(self._audio(), tier) if endpoint.audio else 0
        if endpoint.counts and not body.facts.asks_for_events:  # tokens are not reported
            return of_audio
        read = self.input_tokens(further_input)
        written = self.output_tokens(prices) * self.answers
        cost = prices.max_cost(read, written, tier, endpoint.images, body.long_cache)
        if of_audio > cost:
            cost = of_audio
        further = self._further_cost(prices, read)
        if endpoint.images:
            return cost + self.answers * further
        call = prices.max_call_cost(body.extras, tier)
        return cost + self.calls() * call + self._pictures() * max(0, further - call)

    def usage(self, hold: Hold, further_input: int = 0) -> MaximumUsage:
        """Return the most that the request can use. `hold` is the hold for it."""
        read = self.input_tokens(further_input)
        written = self.output_tokens(hold.model_prices) * self.answers
        calls, pictures = self.calls(), self._pictures()
        length_ms = self._audio().audio_ms or 0
        return MaximumUsage(read, written, self._drawn(hold), calls, pictures, length_ms)

    def input_tokens(self, further_input: int) -> int:
        """Return how many tokens the request can read."""
        body = self._body
        read = body.max_input_tokens + body.inherited.tokens + further_input
        if self._endpoint.audio:
            read = max(read, tokens_of_length(self._audio().audio_ms or 0))
        return read + (self._settings.hold_output_tokens if body.inherited.is_unknown else 0)

    def output_tokens(self, prices: ModelPrices | None) -> int:
        """Return how many tokens one answer can have."""
        if not self._endpoint.writes:
            return 0
        limits = (
            self._body.facts.largest(self._endpoint.output_limits),
            prices.max_output_tokens if prices else None,
        )
        return min((limit for limit in limits if limit), default=self._settings.hold_output_tokens)

    def _audio(self) -> Usage:
        """Return the most audio that the request can send, and the text that it has spoken. An
        endpoint without audio has none."""
        if not self._endpoint.audio:
            return Usage()
        body = self._body
        length_ms = 0 if self._endpoint.counts else body.size * 1000 // MIN_AUDIO_BYTES_A_SECOND
        return Usage(audio_ms=length_ms, characters=body.characters)

    def calls(self) -> int:
        """Return how many calls of the upstream's tools there can be."""
        return self._call_limit or self._settings.hold_tool_calls

    def _pictures(self) -> int:
        """Return how many of the calls can be the image tool's. Unless the request says how many,
        it is assumed to draw only a few: each costs as much as many other calls."""
        return self._call_limit or min(USUAL_PICTURES, self._settings.hold_tool_calls)

    @property
    def _call_limit(self) -> int:
        """The request's own limit of tool calls; 0 where it has none."""
        if self._endpoint.chat:
            return 1
        limit = self._body.facts.max_tool_calls if self._endpoint.runs_tools else None
        return max(0, limit or 0)

    def _further_cost(self, prices: ModelPrices, read: int) -> int:
        """Return the most that one use of each further model can cost, in nanos: one call of the
        image tool, or one SVG. A model without a price is billed by `prices`, those of the
        requested model. The author of an SVG that is not named can be any model."""
        usual = self._settings.hold_output_tokens

        def max_cost(of_model: ModelPrices, tier: str | None, images: bool) -> int:
            return of_model.max_cost(read, of_model.max_output_tokens or usual, tier, images)

        asked = prices, self._body.facts.service_tier
        further = 0
        for model, images in self._body.further_models().items():
            if model == UNNAMED:
                all_models = [(each, DEFAULT_TIER) for each in self._billing.prices_in_force()]
                further += max(max_cost(*each, False) for each in (asked, *all_models))
            else:
                own = self._billing.model_prices(model)
                further += max_cost(*((own, DEFAULT_TIER) if own else asked), images)
        return further

    def _drawn(self, hold: Hold) -> int:
        """Return the most output tokens of the image tool's model in one call. If that model has no
        price, the requested model's maximum counts."""
        drawing = [model for model, images in self._body.further_models().items() if images]
        if not drawing:
            return 0
        prices = hold.prices_of(drawing[0]) or hold.model_prices
        of_model = prices.max_output_tokens if prices else None
        return of_model or self._settings.hold_output_tokens

    def advice(self) -> str:
        """Return a sentence, after a space, that says how to lower the most that the request can
        cost; "" if nothing does."""
        ways = ", or ".join(self._cheaper_ways())
        return f" To reduce this maximum, use {ways}." if ways else ""

    def _cheaper_ways(self) -> Iterator[str]:
        """Yield what would lower the most that the request can cost."""
        body, members = self._body, self._endpoint.output_limits
        if members:
            yield f"a lower {' or '.join(map(repr, members))}"
        uses_tools = self._endpoint.runs_tools and (body.extras or body.further_models())
        if uses_tools and self.calls() > 1:
            yield "a lower 'max_tool_calls'"
        if self.answers > 1:
            yield "a lower 'n'"
        if body.could_name_author:
            yield "a cheaper model in 'svg.model'"
        prices = self._billing.model_prices(body.model)
        if members and prices and prices.exceeds_default(body.facts.service_tier):
            yield f"the 'service_tier' '{DEFAULT_TIER}'"
