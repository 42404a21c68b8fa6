"""What a list of prices would change: the file that is made of it can always be imported, and then
gives exactly the prices of the list."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from redbtc.admin.api_money import prices_of
from redbtc.admin.inputs import NewPrices
from redbtc.billing.model_patterns import is_pattern
from redbtc.billing.price_changes import add_prices, models_in_use
from redbtc.billing.price_diff import Comparison, PriceDiff
from redbtc.billing.price_lists import ListedModel, PriceListing
from redbtc.billing.prices import Price
from redbtc.cli.money import prices_in_toml
from redbtc.cli.price_diff import ComparedList, known_prices, toml_listing, toml_of
from redbtc.config import BillingSettings
from redbtc.money import NANOS
from redbtc.rates import RATES
from redbtc.times import DAY
from tests.billing.test_billing import Bench, Clock, clock

__all__ = ["clock"]  # a fixture

pytestmark = pytest.mark.promise_8

NOTICE_DAYS = 30
FREE = BillingSettings(unpriced_models="free", price_notice_days=NOTICE_DAYS)
REFUSE = BillingSettings(unpriced_models="refuse", price_notice_days=NOTICE_DAYS)


def compare(bench: Bench, listing: PriceListing, every_model: bool = False) -> ComparedList:
    """Compare as `price diff` does."""
    in_use = bench.run(models_in_use(bench.billing))
    rows = list(bench.billing.prices.rows(bench.store.time()))
    comparison = Comparison(known_prices(rows, in_use), listing, every_model)
    at = bench.store.time()
    return ComparedList(comparison, "list.json", "USD", in_use.notice_days, at)


def import_file(bench: Bench, text: str) -> None:
    """Import a file as `price import` does."""
    tables = prices_in_toml(text, "new.toml")
    given = msgspec.convert({**tables, "take_over": False}, NewPrices)
    assert given.currency == "USD"
    prices = prices_of(given, bench.store.time())
    adding = add_prices(bench.billing, prices, without_notice=None, by="test", take_over=False)
    added = bench.run(adding)
    assert added.unchanged == 0


def listing_of(models: dict[str, ListedModel], complete: bool = False) -> PriceListing:
    return PriceListing("LiteLLM", models, {}, {}, {}, complete)


def use(bench: Bench, *models: str) -> None:
    key = bench.key("a")
    for model in models:
        bench.begin(key, model, 1, bench.store.time())


def nanos(**rates: float) -> dict[str, int]:
    return {name: int(rate * NANOS) for name, rate in rates.items()}


def price_of(model: str, tier: str = "default", above: int = 0, /, **rates: int) -> Price:
    return msgspec.structs.replace(Price(model, tier, above), **rates)


DEFAULT = ("default", 0)


@pytest.fixture
def bench(tmp_path: Path, clock: Clock) -> Iterator[Bench]:
    with contextlib.closing(Bench(tmp_path, REFUSE)) as opened:
        yield opened


def changes(found: PriceDiff) -> list[tuple[Any, ...]]:
    return [
        (each.model, each.tier, each.above_input_tokens, rate.rate, rate.now, rate.then)
        for each in found.changes
        for rate in each.rates
    ]


def test_rates_that_the_list_does_not_know_stay(bench: Bench) -> None:
    rates = nanos(input=5, output=30, file_search=0.0025, container=0.03)
    bench.price(price_of("m", max_output_tokens=99, **rates))
    listing = listing_of({"m": {DEFAULT: nanos(input=4, output=30), ("flex", 0): nanos(input=2)}})
    compared = compare(bench, listing)
    found = compared.result()
    assert changes(found) == [
        ("m", "default", 0, "input", "5", "4"),
        ("m", "flex", 0, "input", "5", "2"),
        ("m", "flex", 0, "output", "30", None),
    ]
    assert [each.rates[0].change_percent for each in found.changes] == ["-20.0", "-60.0"]
    import_file(bench, toml_of(compared.comparison.changed, compared))
    default, flex = (
        bench.billing.prices.which("m", bench.store.time(), tier, 0)[0]
        for tier in ("default", "flex")
    )
    assert default is not None
    assert default.given == {**rates, "input": 4 * NANOS, "max_output_tokens": 99}
    assert flex is not None
    assert flex.given == nanos(input=2, file_search=0.0025, container=0.03)


def test_an_increase_for_a_model_in_use_waits_for_its_notice(bench: Bench, clock: Clock) -> None:
    bench.price(price_of("m", **nanos(input=5)), price_of("n", **nanos(input=5)))
    use(bench, "m")
    listed = {DEFAULT: nanos(input=6)}
    compared = compare(bench, listing_of({"m": listed, "n": listed}))
    m, n = compared.result().changes
    assert (m.needs_notice, m.rises) == (True, ["input from 5 to 6"])
    assert (n.needs_notice, n.rises, n.in_force_from) == (False, ["input from 5 to 6"], None)
    assert m.in_force_from
    text = toml_of(compared.comparison.changed, compared)
    import_file(bench, text)
    again = compare(bench, listing_of({"m": listed, "n": listed})).result()
    assert again.changes == []
    assert [each.model for each in again.announced] == ["m"]
    clock.now += (NOTICE_DAYS + 2) * DAY
    assert compare(bench, listing_of({"m": listed, "n": listed})).result().announced == []


def test_only_models_with_a_price_or_requests_are_compared(bench: Bench) -> None:
    bench.price(price_of("m", **nanos(input=5)), price_of("other", **nanos(input=5)))
    use(bench, "m", "asked-for")
    listing = listing_of(
        {name: {DEFAULT: nanos(input=5)} for name in ("m", "asked-for", "never-heard-of")}
    )
    found = compare(bench, listing).result()
    assert changes(found) == [("asked-for", "default", 0, "input", None, "5")]
    assert found.changes[0].is_new
    assert (found.not_in_list, found.unchanged) == (["other"], 1)
    found = compare(bench, listing, every_model=True).result()
    assert [each.model for each in found.changes] == ["asked-for", "never-heard-of"]


def test_a_pattern_of_snapshots_follows_its_model(bench: Bench) -> None:
    bench.price(price_of("m", **nanos(input=5)), price_of("m-20*", **nanos(input=5)))
    without = {"m": {DEFAULT: nanos(input=4)}}
    found = compare(bench, listing_of(without)).result()
    assert [each.model for each in found.changes] == ["m", "m-20*"]
    snapshots: dict[str, ListedModel] = {
        "m-2025-01-01": {DEFAULT: nanos(input=5)},
        "m-2026-01-01": {DEFAULT: nanos(input=4)},
    }
    found = compare(bench, listing_of(without | snapshots)).result()
    assert [each.model for each in found.changes] == ["m", "m-2026-01-01"]


def test_a_model_that_leaves_its_pattern_takes_all_tiers_along(bench: Bench) -> None:
    bench.price(price_of("m*", **nanos(input=5)), price_of("m*", "flex", **nanos(input=2)))
    listed: dict[str, ListedModel] = {
        "m1": {DEFAULT: nanos(input=5)},
        "m2": {DEFAULT: nanos(input=4)},
    }
    compared = compare(bench, listing_of(listed))
    assert changes(compared.result()) == [("m2", "default", 0, "input", "5", "4")]
    import_file(bench, toml_of(compared.comparison.changed, compared))
    flex, _ = bench.billing.prices.which("m2", bench.store.time(), "flex", 0)
    assert flex is not None
    assert flex.given == nanos(input=2)


def test_a_file_changes_nothing_that_it_does_not_name(bench: Bench) -> None:
    bench.price(price_of("gpt-5*", **nanos(input=1, output=8)))
    bench.price(price_of("gpt-5.5-20*", **nanos(input=5, output=30)))
    named = {"gpt-5": {("default", 0): nanos(input=2, output=8)}}
    found = compare(bench, listing_of(named, complete=True)).result()
    assert {each.model for each in found.changes} == {"gpt-5"}
    assert found.not_in_list == ["gpt-5*", "gpt-5.5-20*"]


def test_a_file_of_prices_is_complete(bench: Bench) -> None:
    bench.price(price_of("m", max_output_tokens=5, **nanos(input=5, output=9)))
    text = 'prices = [{ model = ["m", "n*"], input = 5.0, max_output_tokens = 7 }]'
    tables = prices_in_toml(text, "f.toml")
    listing = toml_listing(tables, "f.toml", "USD", bench.store.time())
    assert changes(compare(bench, listing).result()) == [
        ("m", "default", 0, "output", "9", None),
        ("m", "default", 0, "max_output_tokens", "5", "7"),
        ("n*", "default", 0, "input", None, "5"),
        ("n*", "default", 0, "max_output_tokens", None, "7"),
    ]


# Any prices, any list

NAMES = ["a", "a-2025-01-01", "a-2026-01-01", "b", "b-x", "c"]
PATTERNS = ["a-20*", "b*", "*"]
TIERS = ["default", "flex"]
RATES_OF = st.dictionaries(
    st.sampled_from(["input", "cached_input", "output", "web_search", "file_search"]),
    st.integers(0, 4).map(lambda number: number * NANOS // 3),
    min_size=1,
)
MODELS = st.fixed_dictionaries(
    {DEFAULT: RATES_OF},
    optional={slot: RATES_OF for slot in itertools.product(TIERS, (0, 9)) if slot != DEFAULT},
)


@pytest.mark.slow
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    present=st.dictionaries(st.sampled_from(NAMES + PATTERNS), MODELS, max_size=5),
    listed=st.dictionaries(st.sampled_from(NAMES), MODELS, min_size=1),
    used=st.sets(st.sampled_from(NAMES)),
    free=st.booleans(),
    every_model=st.booleans(),
)
@example(
    present={"b*": {DEFAULT: {"input": 1}, ("flex", 0): {"input": 0}}},
    listed={
        "b": {DEFAULT: {"input": 0}, ("flex", 0): {"input": 1}},
        "b-x": {DEFAULT: {"input": 1}},
    },
    used={"b"},
    free=True,
    every_model=False,
)
@example(  # each snapshot gets a price of its own; the pattern is not then compared with `a`
    present={"a-20*": {DEFAULT: {"input": 1}}},
    listed={
        "a": {DEFAULT: {"input": 0}},
        "a-2025-01-01": {DEFAULT: {"input": 2}},
        "a-2026-01-01": {DEFAULT: {"input": 3}},
    },
    used=set(),
    free=False,
    every_model=False,
)
@example(  # flex becomes cheaper, but no longer has the price of long input
    present={"b": {DEFAULT: {"web_search": NANOS}, ("default", 9): {"web_search": 0}}},
    listed={"b": {DEFAULT: {"web_search": NANOS}, ("flex", 0): {"web_search": NANOS // 2}}},
    used={"b"},
    free=False,
    every_model=False,
)
def test_what_is_imported_is_what_the_list_says(
    tmp_path_factory: pytest.TempPathFactory,
    clock: Clock,
    present: dict[str, ListedModel],
    listed: dict[str, ListedModel],
    used: set[str],
    free: bool,
    every_model: bool,
) -> None:
    with contextlib.closing(Bench(tmp_path_factory.mktemp("b"), FREE if free else REFUSE)) as bench:
        use(bench, *used)
        bench.price(
            *(
                price_of(name, *slot, **rates)
                for name, slots in present.items()
                for slot, rates in slots.items()
            ),
            without_notice="new",
        )
        listing = listing_of(listed)
        compared = compare(bench, listing, every_model)
        if compared.comparison.changed:
            import_file(bench, toml_of(compared.comparison.changed, compared))
        clock.now += (NOTICE_DAYS + 2) * DAY
        after = compare(bench, listing, every_model).result()
        assert after.changes == []
        assert after.announced == []
        assert_prices_are_those_of(bench, listed, used if not every_model else {*NAMES}, present)


def assert_prices_are_those_of(
    bench: Bench, listed: dict[str, ListedModel], wanted: set[str], present: dict[str, ListedModel]
) -> None:
    """Each rate of the list applies to its model, where that has had a price or was wanted."""
    priced = wanted | {*present} | ({*listed} if any(map(is_pattern, present)) else set())
    for name, slots in listed.items():
        prices = bench.billing.prices.model_prices(name, bench.store.time())
        if prices is None:
            assert name not in priced or "*" not in present
            continue
        for (tier, above), rates in slots.items():
            applied = prices.price(tier, above + 1 if above else 0)
            assert {rate: applied.rates[rate] for rate in rates} == rates, name
            assert set(rates) <= set(RATES)
