"""Read lists of prices that others publish: LiteLLM's price map and models.dev's api.json.

Both are JSON objects. LiteLLM's maps a model's name to fields such as `input_cost_per_token`, with
suffixes for long input and service tiers. That of models.dev maps a provider to its models, each
with a `cost` for a million tokens. Numbers are read as decimals, never as floats. A model with a
value that is no price is reported and left out, and so is one whose reasoning tokens have a price
of their own. A tier or threshold for which the list has only some of the prices is left out, too.
Fields that give no rate of this program are ignored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal
from typing import Any, NamedTuple, TypeGuard

from redbtc.billing.model_patterns import is_pattern
from redbtc.billing.prices import MAX_CALL_RATE, MAX_RATE
from redbtc.errors import UserError
from redbtc.money import decimal
from redbtc.rates import DEFAULT_TIER, UNITS
from redbtc.usage import MAX_TOKENS

MAX_LISTED_NAME = 256  # characters of a model's name
MAX_DIGITS = 60  # of a number
MAX_REPORTED = 80  # characters of a value in a message
NANO_DIGITS = 9
MILLION_DIGITS = 6
LIST_CURRENCY = "USD"  # of both kinds of lists

Slot = tuple[str, int]  # a service tier, and a threshold of input tokens
ListedModel = dict[Slot, dict[str, int]]  # the rates of each slot, in nanos


class PriceListing(NamedTuple):
    """The prices of a list, by model. `problems` says by model why it is left out. `partial` are by
    model its tiers and thresholds that are left out, since the list has only some of their
    prices."""

    kind: str
    models: dict[str, ListedModel]
    max_output_tokens: dict[str, int]
    problems: dict[str, str]
    partial: dict[str, list[Slot]]
    is_complete: bool  # a rate that it omits does not apply; otherwise it is just not listed


class ListedRate(NamedTuple):
    """The rate that a field of a list gives: the value times `factor` and ten to the `digits`."""

    rate: str
    digits: int = MILLION_DIGITS
    factor: int = 1


LITELLM_FIELDS = {
    "input_cost_per_token": ListedRate("input"),
    "cache_read_input_token_cost": ListedRate("cached_input"),
    "cache_creation_input_token_cost": ListedRate("cache_write"),
    "cache_creation_input_token_cost_above_12hr": ListedRate("cache_write_12h"),
    "output_cost_per_token": ListedRate("output"),
    "input_cost_per_image_token": ListedRate("image_input"),
    "output_cost_per_image_token": ListedRate("image_output"),
    "input_cost_per_audio_token": ListedRate("audio_input"),
    "output_cost_per_audio_token": ListedRate("audio_output"),
    "input_cost_per_character": ListedRate("characters"),
    "code_interpreter_cost_per_session": ListedRate("container", 0),
    "file_search_cost_per_1k_calls": ListedRate("file_search", -3),
}
AUDIO_SECOND = ListedRate("audio_minute", 0, 60)  # `input_cost_per_second` of a transcription
SEARCH = ListedRate("web_search", 0)
_NAMES = "|".join(sorted(LITELLM_FIELDS, reverse=True))
LITELLM_FIELD = re.compile(rf"({_NAMES})(?:_above_(\d{{1,6}})k_tokens)?(?:_([a-z]+))?")
LITELLM_TIERS = {
    None: DEFAULT_TIER,
    "flex": "flex",
    "priority": "priority",
    "ultrafast": "ultrafast",
}
MODELS_DEV_FIELDS = {
    "input": ListedRate("input", 0),
    "output": ListedRate("output", 0),
    "cache_read": ListedRate("cached_input", 0),
    "cache_write": ListedRate("cache_write", 0),
    "input_audio": ListedRate("audio_input", 0),
    "output_audio": ListedRate("audio_output", 0),
}
OVER_200K = 200_000


class NotAPrice(ValueError):
    """A value is no price that this program can have."""


def read_json_list(text: str, provider: str) -> PriceListing:
    """Return the prices of one provider in a list of one of the two kinds. Raises UserError if the
    text is no such list, or has no prices of the provider."""
    found = _parsed(text)
    if not isinstance(found, dict):
        raise UserError("the list is JSON, but not an object; see docs/billing.md")
    entry = found.get(provider)
    if isinstance(entry, dict) and isinstance(entry.get("models"), dict):
        return _read("models.dev", entry["models"].items(), _read_models_dev)
    of_provider = [
        (name.removeprefix(f"{provider}/"), fields)
        for name, fields in found.items()
        if isinstance(fields, dict) and fields.get("litellm_provider") == provider
    ]
    if of_provider:
        return _read("LiteLLM", of_provider, _read_litellm)
    raise UserError(
        f"the list has no models of the provider {provider!r}. It must be LiteLLM's "
        "model_prices_and_context_window.json, models.dev's api.json, or a TOML file such as "
        "prices.toml; --provider names another provider"
    )


def _parsed(text: str) -> Any:
    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise UserError(f"the list has a duplicate key: {shortened(name)}")
            found[name] = value
        return found

    def refuse(constant: str) -> None:
        raise UserError(f"the list has a number that JSON does not allow: {constant}")

    try:
        return json.loads(
            text,
            parse_float=Decimal,
            parse_int=Decimal,
            parse_constant=refuse,
            object_pairs_hook=without_duplicates,
        )
    except RecursionError:
        raise UserError("the list is nested too deeply to be a list of prices") from None
    except ArithmeticError:
        raise UserError("the list has a number that is out of range") from None
    except ValueError as error:
        raise UserError(f"the list is not valid JSON: {error}") from None


ListReader = Callable[[dict[str, Any]], Iterator[tuple[Slot, ListedRate, Any, str]]]


def _read(kind: str, models: Iterable[tuple[str, Any]], read: ListReader) -> PriceListing:
    listing = PriceListing(kind, {}, {}, {}, {}, is_complete=False)
    for name, fields in models:
        try:
            slots = _slots_of(name, fields, read)
        except NotAPrice as error:
            listing.problems[name] = str(error)
            continue
        if (DEFAULT_TIER, 0) in slots:
            if partial := without_partial(slots):
                listing.partial[name] = partial
            listing.models[name] = slots
            if maximum := _max_output_tokens(fields):
                listing.max_output_tokens[name] = maximum
    return listing


def _slots_of(name: str, fields: Any, read: ListReader) -> ListedModel:
    """Return the rates of a model by slot. Raises NotAPrice."""
    if not name.isprintable() or not 0 < len(name) <= MAX_LISTED_NAME or is_pattern(name):
        raise NotAPrice("this is no name of a model")
    if not isinstance(fields, dict):
        raise NotAPrice("this is no description of a model")
    slots: ListedModel = {}
    for slot, rate, value, field in read(fields):
        try:
            slots.setdefault(slot, {})[rate.rate] = nanos_of_listed(value, rate)
        except NotAPrice as error:
            raise NotAPrice(f"{field}: {error}") from None
    return slots


def without_partial(slots: ListedModel) -> list[Slot]:
    """Remove the tiers and thresholds that lack a price of tokens which the default tier has, and
    return them: such tokens would be free there, or cost what others do."""
    needed = slots[DEFAULT_TIER, 0].keys() - UNITS.keys()
    partial = [slot for slot, rates in slots.items() if needed - rates.keys()]
    for slot in partial:
        del slots[slot]
    return partial


def refuse_reasoning(value: Any, output: Any) -> None:
    """Raise NotAPrice if reasoning tokens have another price than output."""
    if value is not None and value != output:
        raise NotAPrice("its reasoning tokens have a price of their own")


def _read_litellm(fields: dict[str, Any]) -> Iterator[tuple[Slot, ListedRate, Any, str]]:
    """Yield each rate of a model in LiteLLM's map, with its slot, value and field."""
    output = fields.get("output_cost_per_token")
    refuse_reasoning(fields.get("output_cost_per_reasoning_token"), output)
    slots: list[Slot] = [(DEFAULT_TIER, 0)]
    for field, value in fields.items():
        match = LITELLM_FIELD.fullmatch(field)
        if match and match[3] in LITELLM_TIERS:  # the others are of batches and of other providers
            slot = LITELLM_TIERS[match[3]], int(match[2] or 0) * 1000
            slots.append(slot)
            yield slot, LITELLM_FIELDS[match[1]], value, field
    if fields.get("mode") == "audio_transcription" and "input_cost_per_second" in fields:
        yield slots[0], AUDIO_SECOND, fields["input_cost_per_second"], "input_cost_per_second"
    searches = fields.get("search_context_cost_per_query")
    if isinstance(searches, dict) and searches:
        highest = max(searches.values(), key=lambda each: each if is_number(each) else Decimal(-1))
        for slot in dict.fromkeys(slots):
            yield slot, SEARCH, highest, "search_context_cost_per_query"


def _read_models_dev(fields: dict[str, Any]) -> Iterator[tuple[Slot, ListedRate, Any, str]]:
    """Yield each rate of a model of models.dev, with its slot, value and field."""
    cost = fields.get("cost")
    if not isinstance(cost, dict):
        return
    refuse_reasoning(cost.get("reasoning"), cost.get("output"))
    longer: dict[int, Any] = {}
    tiers = cost.get("tiers")
    for each in tiers if isinstance(tiers, list) else []:
        about = each.get("tier") if isinstance(each, dict) else None
        size = about.get("size") if isinstance(about, dict) else None
        if isinstance(about, dict) and about.get("type") == "context" and is_count(size):
            longer[int(size)] = each
    if not longer and isinstance(cost.get("context_over_200k"), dict):
        longer[OVER_200K] = cost["context_over_200k"]
    for above, rates in ((0, cost), *longer.items()):
        for field, rate in MODELS_DEV_FIELDS.items():
            if field in rates:
                yield (DEFAULT_TIER, above), rate, rates[field], field


def _max_output_tokens(fields: dict[str, Any]) -> int | None:
    limit = fields.get("limit")
    found = fields.get(
        "max_output_tokens", limit.get("output") if isinstance(limit, dict) else None
    )
    return int(found) if is_count(found) else None


def is_number(value: Any) -> TypeGuard[Decimal]:
    """Return whether a value of JSON, as read here, is a number."""
    return isinstance(value, Decimal)


def is_count(value: Any) -> TypeGuard[Decimal]:
    """Return whether a value is a number of tokens that the ledger can have."""
    return is_number(value) and 1 <= value <= MAX_TOKENS and value == int(value)


def nanos_of_listed(value: Any, listed: ListedRate) -> int:
    """Return the nanos of a rate. Raises NotAPrice if the value is no number, negative, too large,
    or has more digits than an amount can have."""
    if not is_number(value):
        raise NotAPrice(f"{shortened(value)} is not a number")
    sign, digits, exponent = value.as_tuple()
    if not isinstance(exponent, int) or len(digits) > MAX_DIGITS or abs(exponent) > MAX_DIGITS:
        raise NotAPrice(f"{shortened(value)} is not a price")
    nanos = int("".join(map(str, digits))) * listed.factor * (-1 if sign else 1)
    shift = exponent + listed.digits + NANO_DIGITS
    power: int = 10 ** abs(shift)
    nanos, rest = (nanos * power, 0) if shift >= 0 else divmod(nanos, power)
    maximum = MAX_CALL_RATE if listed.rate in UNITS else MAX_RATE
    if not 0 <= nanos <= maximum:
        raise NotAPrice(
            f"{shortened(value)} is out of range: the rate {listed.rate} is from 0 to "
            f"{decimal(maximum)}"
        )
    if rest:
        raise NotAPrice(
            f"{shortened(value)} has more digits than the rate {listed.rate} can have: "
            f"{NANO_DIGITS} after the point"
        )
    return nanos


def shortened(value: Any) -> str:
    """Return a value of a list for a message, in one line."""
    text = str(value) if is_number(value) else repr(value)
    return text if len(text) <= MAX_REPORTED else f"{text[:MAX_REPORTED]}…"
