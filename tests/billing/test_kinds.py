"""Kinds of usage and rates: each is declared once, and everything that names them follows. The
fields of JSON and CSV, and their order, are promises (docs/contract.md section 5)."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from typing import Any

import pytest
from msgspec import Struct

from redbtc.admin.outputs import AccountWithMoney, PaymentAdded
from redbtc.billing.csv import csv_lines, statement_lines
from redbtc.billing.prices import Price
from redbtc.billing.records import Notice, PriceShown
from redbtc.billing.reports import Group, RequestShown, Sums, group_type
from redbtc.billing.statements import Statement, StatementTotals
from redbtc.rates import RATES
from redbtc.store.accounts import KeyAdded, KeyInList
from redbtc.store.schema import migrations, schema
from redbtc.usage import KINDS

pytestmark = pytest.mark.promise_8

FIRST = """input_tokens cached_input_tokens cache_write_tokens output_tokens reasoning_tokens
    image_input_tokens image_output_tokens web_searches"""
LATER = """tool_input_tokens cache_write_12h_tokens file_searches containers audio_input_tokens
    audio_output_tokens audio_ms characters"""
SUMS = f"requests estimated unreported {FIRST} {LATER} cost currency"
OF_RATES = """input cached_input cache_write cache_write_12h output image_input image_output
    web_search file_search container audio_input audio_output audio_minute characters"""
LIMITS = "concurrency requests_per_minute tokens_per_minute monthly_budget"
KEY = f"""account account_id label models {LIMITS} created_at expires_at revoked_at compromised
    budget_id log_days"""
FIELDS: dict[type[Struct], str] = {
    RequestShown: f"""request_id account key_id endpoint model requested_model upstream started_at
        first_byte_ms duration_ms status outcome usage_source {FIRST} service_tier response_id cost
        currency price_id month {LATER} estimated_cost corrected_at attempts upstream_status
        upstream_error_code upstream_request_id credentials""",
    Sums: SUMS,
    StatementTotals: f"{SUMS} paid",
    group_type(("model", "day")): f"model day {SUMS}",
    PriceShown: f"""model tier above_input_tokens effective_at {OF_RATES} max_output_tokens currency
        source created_at added_by reason id status shadowed_by""",
    AccountWithMoney: f"""id name email status status_reason {LIMITS} credit_limit throttle_factor
        throttled_until created_at keys_in_force log_days closing_asked_at terminated_at erase_at
        erased_at balance held available month spent_this_month
        currency""",
    KeyAdded: f"id key {KEY} replaces",
    KeyInList: f"id {KEY} last_used_on",
    PaymentAdded: """id account currency reference reason month created_at added_by amount
        balance""",
    Notice: """id kind account key_id month percent text effective_at until refuses_requests
        created_at added_by withdrawn_at delivered_at""",
}


@pytest.mark.parametrize("kind", FIELDS, ids=lambda kind: kind.__name__)
def test_fields_keep_their_order(kind: type[Struct]) -> None:
    assert kind.__struct_encode_fields__ == tuple(FIELDS[kind].split())


def test_the_columns_of_a_statement_keep_their_order() -> None:
    statement = Statement(
        account="a",
        account_id="acct",
        month="2026-11",
        closed=True,
        currency="USD",
        opening_balance="0",
        usage=[],
        corrections=[],
        payments=[],
        totals=StatementTotals(
            **dict.fromkeys(StatementTotals.__struct_fields__, 0)  # type: ignore[arg-type]
        ),
        closing_balance="0",
        paid_last_three_months="0",
        paid_by_month={},
    )
    header = next(csv_lines(statement_lines(statement)))
    columns = f"""line date description requests estimated unreported {FIRST} {LATER} cost amount
        before after difference"""
    assert header.strip().split(",") == columns.split()


def test_a_group_has_the_labels_that_were_asked_for() -> None:
    labels = {name for name in Group.__struct_fields__ if name not in Sums.__struct_fields__}
    assert labels == {"day", "model", "key_id", "account"}


# ── The schema ───────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def database() -> Iterator[sqlite3.Connection]:
    """An empty one of the newest version."""
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        for _, script in sorted(migrations(schema()).items()):
            connection.executescript(script)
        yield connection


@pytest.mark.parametrize("table", ["requests", "corrections", "usage_by_day"])
def test_each_kind_has_a_column(database: sqlite3.Connection, table: str) -> None:
    columns = {row[1] for row in database.execute(f"PRAGMA table_info({table})")}
    assert columns >= {*KINDS}


def test_each_field_of_a_price_has_a_column(database: sqlite3.Connection) -> None:
    columns = {row[1] for row in database.execute("PRAGMA table_info(prices)")}
    assert columns == {*Price.__struct_fields__}


def test_each_kind_is_summed_corrected_and_taken_back(database: sqlite3.Connection) -> None:
    """By the triggers alone; the numbers of each kind are its own."""
    used = {name: number for number, name in enumerate(KINDS, 10)}
    request = {
        **dict.fromkeys(("account_id", "key_id", "endpoint", "requested_model", "upstream"), "a"),
        "started_at": 0,
        "outcome": "pending",
        "usage_source": "estimated",
        "month": "1970-01",
        "cost": 7,
    }

    def insert(table: str, values: dict[str, Any]) -> None:
        places = ", ".join(f":{name}" for name in values)
        database.execute(f"INSERT INTO {table} ({', '.join(values)}) VALUES ({places})", values)

    def sums() -> tuple[int, ...]:
        found = database.execute(f"SELECT {', '.join(KINDS)} FROM usage_by_day").fetchall()
        assert len(found) == 1
        return tuple(found[0])

    for request_id in ("one", "two"):
        insert("requests", {"request_id": request_id, **request, **used})
        database.execute(
            "UPDATE requests SET outcome = 'interrupted' WHERE request_id = ?", (request_id,)
        )
    assert sums() == tuple(2 * number for number in used.values())
    more = {name: 3 * number for name, number in used.items()}
    about = {"request_id": "one", "account_id": "a", "month": "1970-01", "created_at": 0}
    insert("corrections", {**about, "cost": 9, **more})
    assert sums() == tuple(4 * number for number in used.values())
    insert("reopened", {"request_id": "two", "reopened_at": 1})
    assert sums() == tuple(3 * number for number in used.values())


# ── Rates ────────────────────────────────────────────────────────────────────────────────────────


def test_each_rate_is_for_a_kind_and_stands_below_the_one_it_is_part_of() -> None:
    seen: list[str] = [""]
    for name, rate in RATES.items():
        assert rate.usage in KINDS
        assert rate.part_of in seen
        seen.append(name)
    bits = [rate.extra for rate in RATES.values() if rate.extra]
    assert sorted(bits) == [1 << place for place in range(len(bits))]
