"""Lists of prices that others publish, read exactly, and hostile ones."""

from __future__ import annotations

import json
import time
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redbtc.billing.price_lists import (
    LITELLM_FIELDS,
    PriceListing,
    read_json_list,
)
from redbtc.billing.prices import MAX_CALL_RATE, MAX_RATE
from redbtc.errors import UserError
from redbtc.money import decimal
from redbtc.rates import UNITS
from tests.helpers.gateway import ROOT

pytestmark = pytest.mark.promise_8

LISTS = ROOT / "tests" / "billing" / "lists"  # cut out of LiteLLM 1.109.1 and of models.dev
LITELLM = (LISTS / "litellm.json").read_text()
MODELS_DEV = (LISTS / "models.dev.json").read_text()


def amounts(listing: PriceListing, model: str) -> dict[str, dict[str, str]]:
    """Return the prices of a model as decimal strings, by tier and threshold."""
    return {
        f"{tier} {above}": {name: decimal(rate) for name, rate in rates.items()}
        for (tier, above), rates in listing.models[model].items()
    }


def test_litellms_price_map() -> None:
    listing = read_json_list(LITELLM, "openai")
    assert (listing.kind, listing.is_complete) == ("LiteLLM", False)
    assert amounts(listing, "gpt-5.5") == {
        "default 0": {"input": "5", "cached_input": "0.5", "output": "30", "web_search": "0.01"},
        "default 272000": {
            "input": "10",
            "cached_input": "1",
            "output": "45",
            "web_search": "0.01",
        },
        "flex 0": {"input": "2.5", "cached_input": "0.25", "output": "15", "web_search": "0.01"},
        "flex 272000": {
            "input": "5",
            "cached_input": "0.5",
            "output": "22.5",
            "web_search": "0.01",
        },
        "priority 0": {
            "input": "12.5",
            "cached_input": "1.25",
            "output": "75",
            "web_search": "0.01",
        },
    }
    astra = amounts(listing, "gpt-6-astra")
    assert {slot.split()[0] for slot in astra} == {"default", "flex", "priority", "ultrafast"}
    assert astra["ultrafast 272000"] == {
        "input": "120",
        "cached_input": "12",
        "cache_write": "150",
        "cache_write_12h": "300",
        "output": "450",
        "web_search": "0.01",
    }
    assert amounts(listing, "whisper-1") == {"default 0": {"audio_minute": "0.006"}}
    assert amounts(listing, "tts-1") == {"default 0": {"characters": "15"}}
    assert amounts(listing, "gpt-image-2")["default 0"] == {
        "input": "5",
        "cached_input": "1.25",
        "image_input": "8",
        "image_output": "30",
    }
    assert amounts(listing, "container") == {"default 0": {"container": "0.03"}}
    assert listing.max_output_tokens["gpt-5.5"] == 128_000
    assert [*listing.problems] == ["gpt-realtime-whisper"]
    assert "0.000283333333333 has more digits" in listing.problems["gpt-realtime-whisper"]
    assert "claude-opus-4-6" not in listing.models
    azure = read_json_list(LITELLM, "azure")
    assert amounts(azure, "gpt-5.5")["default 0"]["web_search"] == "0.014"


def test_models_devs_list() -> None:
    listing = read_json_list(MODELS_DEV, "openai")
    assert (listing.kind, listing.is_complete, listing.problems) == ("models.dev", False, {})
    assert amounts(listing, "gpt-5.4") == {
        "default 0": {"input": "2.5", "cached_input": "0.25", "output": "15"},
        "default 272000": {"input": "5", "cached_input": "0.5", "output": "22.5"},
    }
    assert listing.max_output_tokens["gpt-5.4"] == 128_000
    cost = {"input": 1, "context_over_200k": {"input": 2}}
    text = json.dumps({"openai": {"models": {"m": {"cost": cost}}}})
    assert amounts(read_json_list(text, "openai"), "m") == {
        "default 0": {"input": "1"},
        "default 200000": {"input": "2"},
    }


@given(
    nanos=st.integers(0, MAX_RATE),
    field=st.sampled_from(sorted(LITELLM_FIELDS)),
    form=st.sampled_from(["{:f}", "{:e}", "{:E}"]),
)
def test_a_rate_has_every_digit_of_the_list(nanos: int, field: str, form: str) -> None:
    listed = LITELLM_FIELDS[field]
    if listed.rate in UNITS:
        nanos %= MAX_CALL_RATE + 1
    value = Decimal(nanos).scaleb(-9 - listed.digits)
    text = form.format(value)
    fields = {"litellm_provider": "openai", "input_cost_per_token": 0}
    body = json.dumps({"m": fields}).replace('": 0', f'": 0, "{field}": {text}')
    if field == "input_cost_per_token":
        body = json.dumps({"m": fields}).replace('": 0', f'": {text}')
    listing = read_json_list(body, "openai")
    assert listing.models["m"]["default", 0][listed.rate] == nanos


def of_model(fields: str, name: str = "m") -> str:
    return f'{{"{name}": {{"litellm_provider": "openai", {fields}}}}}'


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ('"input_cost_per_token": -1e-6', "-0.000001 is out of range"),
        ('"input_cost_per_token": -0.0000000000000000001', "is out of range"),
        ('"input_cost_per_token": 1e18', "1E+18 is out of range: the rate input is from 0 to 1000"),
        ('"input_cost_per_token": "0.000001"', "'0.000001' is not a number"),
        ('"input_cost_per_token": true', "True is not a number"),
        ('"input_cost_per_token": null', "None is not a number"),
        ('"input_cost_per_token": [1e-6]', "is not a number"),
        ('"input_cost_per_token": 1e999999999', "is not a price"),
        ('"input_cost_per_token": 1e-999999999', "is not a price"),
        (f'"input_cost_per_token": {"9" * 5000}', "is not a price"),
        (f'"input_cost_per_token": 0.{"0" * 5000}1', "is not a price"),
        ('"input_cost_per_token": 1.0000000001e-15', "has more digits"),
        (
            '"input_cost_per_token": 0, "output_cost_per_token_flex": -1',
            "output_cost_per_token_flex",
        ),
        (
            '"search_context_cost_per_query": {"low": "x"}, "input_cost_per_token": 0',
            "not a number",
        ),
    ],
)
def test_a_model_with_a_value_that_is_no_price_is_left_out(fields: str, said: str) -> None:
    listing = read_json_list(of_model(fields), "openai")
    assert listing.models == {}
    assert said in listing.problems["m"]
    assert len(listing.problems["m"]) < 300


@pytest.mark.parametrize("name", ["\\u0007", "a\\nb", "\\ud800", "\\u202e", "", "x" * 257])
def test_a_name_that_could_not_be_shown_is_left_out(name: str) -> None:
    listing = read_json_list(of_model('"input_cost_per_token": 0', name), "openai")
    assert listing.models == {}
    assert len(listing.problems) == 1


def test_a_tier_with_some_of_its_prices_is_left_out() -> None:
    """What it lacks would cost nothing."""
    listing = read_json_list(LITELLM, "azure")
    assert {slot.split()[0] for slot in amounts(listing, "gpt-5.5")} == {"default", "priority"}
    assert listing.partial == {"gpt-5.5": [("flex", 0), ("flex", 272_000)]}
    assert not listing.problems


def test_reasoning_tokens_with_a_price_of_their_own() -> None:
    field = '"output_cost_per_token": 3e-6, "output_cost_per_reasoning_token": '
    assert "m" in read_json_list(of_model(field + "3e-6"), "openai").models
    listing = read_json_list(of_model(field + "9e-6"), "openai")
    assert listing.problems == {"m": "its reasoning tokens have a price of their own"}


def test_a_pattern_is_no_name_of_a_model() -> None:
    listing = read_json_list(of_model('"input_cost_per_token": 1e-6', "gpt-*"), "openai")
    assert (listing.models, listing.problems) == ({}, {"gpt-*": "this is no name of a model"})


@pytest.mark.parametrize("maximum", ["1e30", "1e999999", "-1", "0", "1.5", '"9"', "null", "[]"])
def test_a_maximum_that_is_no_number_of_tokens_is_ignored(maximum: str) -> None:
    fields = f'"input_cost_per_token": 0, "max_output_tokens": {maximum}'
    listing = read_json_list(of_model(fields), "openai")
    assert [*listing.models] == ["m"]
    assert listing.max_output_tokens == {}


NESTED = 200_000


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not valid JSON"),
        ("{} x", "not valid JSON"),
        ('{"m": NaN}', "a number that JSON does not allow: NaN"),
        ('{"m": -Infinity}', "does not allow: -Infinity"),
        ('{"m": 1e99999999999999999999}', "out of range"),
        ("[]", "not an object"),
        ("{}", "no models of the provider 'openai'"),
        ('{"openai": {"models": []}}', "no models of the provider"),
        ('{"m": {"litellm_provider": "azure"}}', "no models of the provider"),
        ('{"m": 1, "m": 2}', "duplicate key: 'm'"),
        ('{"m": {"input_cost_per_token": 1, "input_cost_per_token": 2}}', "duplicate key"),
        ('{"m":' * NESTED + "1" + "}" * NESTED, "nested too deeply"),
        ("[" * NESTED, "nested too deeply"),
    ],
)
def test_a_list_that_is_none_is_refused(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_json_list(text, "openai")


def test_a_large_list_takes_time_in_proportion() -> None:
    models = ", ".join(
        f'"m{number}": {{"litellm_provider": "openai", "input_cost_per_token": -1}}'
        for number in range(20_000)
    )
    began = time.perf_counter()
    listing = read_json_list(f"{{{models}}}", "openai")
    assert len(listing.problems) == 20_000
    with pytest.raises(UserError, match="duplicate key: 'm0'"):
        read_json_list(f'{{{models}, "m0": 1}}', "openai")
    assert time.perf_counter() - began < 20
