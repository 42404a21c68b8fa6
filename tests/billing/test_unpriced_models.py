"""Models that are asked for and refused since they have no price: who hears of which."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zipfile import ZipFile

import pytest

from redbtc.billing.model_patterns import matches
from redbtc.billing.unpriced_models import (
    MAX_NAMED_ACCOUNTS,
    MAX_REFUSED,
    MAX_REFUSED_OF_ONE,
    MAX_UNPRICED,
    MESSAGES_AN_HOUR,
    UnpricedModels,
)
from redbtc.billing.webhook_messages import WebhookMessages
from redbtc.config import BillingSettings
from redbtc.gateway.unpriced import offered, offers
from redbtc.store.database import Store
from tests.dashboard.pages import cells
from tests.helpers.gateway import ROOT, Gateway, MakeGateway, wait_until
from tests.helpers.logins import new_user
from tests.helpers.upstream import Upstream, json_answer
from tests.helpers.webhook import SECRET, Hook, receiving

pytestmark = [pytest.mark.promise_6, pytest.mark.promise_7, pytest.mark.promise_9]

FAST = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from redbtc.gateway import unpriced
unpriced.FLUSH_SECONDS, unpriced.LIST_SECONDS, unpriced.PRUNE_SECONDS = 0.05, 0, 0.1
"""
LISTED = {
    "object": "list",
    "data": [{"id": each, "object": "model"} for each in ("new-1", "new-2")],
}
REFUSING = 'unpriced_models = "refuse"\n'


@pytest.fixture
def hook() -> Iterator[Hook]:
    with receiving() as found:
        yield found


@pytest.fixture
def refusing(make_gateway: MakeGateway, upstream: Upstream, hook: Hook) -> Gateway:
    """A gateway without prices, whose upstream lists two models."""
    upstream.script = json_answer(LISTED)
    gateway = make_gateway(f"[billing]\n{REFUSING}{hook.settings()}", HOOK_SECRET=SECRET)
    gateway.prelude = FAST
    return gateway.start()


def ask(gateway: Gateway, key: str, *models: str) -> None:
    with gateway.client(key) as client:
        for model in models:
            answer = client.post("/responses", json={"model": model, "input": "Hi"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def missing(gateway: Gateway) -> dict[str, dict[str, Any]]:
    found = gateway.api("GET", "/prices/missing")["models"]
    return {each["model"]: each for each in found}


def test_operators_hear_of_a_model_until_it_has_a_price(refusing: Gateway, hook: Hook) -> None:
    gateway = refusing
    keys = {name: gateway.new_key(name) for name in ("ada", "bob")}
    for key in keys.values():
        ask(gateway, key, "new-1", "new-1")
    ask(gateway, keys["bob"], "new-2")
    wait_until(lambda: len(missing(gateway)) == 2 and missing(gateway)["new-1"]["requests"] == 4)
    found = missing(gateway)["new-1"]
    assert found["first_at"] <= found["last_at"]
    assert {each["account"]: each["requests"] for each in found["accounts"]} == {"ada": 2, "bob": 2}
    assert [each["account"] for each in missing(gateway)["new-2"]["accounts"]] == ["bob"]
    wait_until(lambda: len(hook.posts) == 2)
    told = {post.content["data"]["model"]: post.content for post in hook.posts}
    assert set(told) == {"new-1", "new-2"}
    assert {each["type"] for each in told.values()} == {"model.unpriced"}
    assert told["new-2"]["data"]["text"] == (
        "bob asked for the model new-2, which has no price: refused."
    )
    notes = gateway.cli("check")["notes"]
    assert [note for note in notes if "new-1, new-2" in note]
    assert "new-1" in gateway.run("price", "missing").stdout
    operator = new_user(gateway, "op@example.com")
    with closing(operator.client):
        page = operator.get("/dashboard/overview").text
        rows = cells(page, "Models that were refused")
        assert {row[0]: row[1] for row in rows} == {"new-1": "4", "new-2": "1"}
        gateway.api("POST", "/prices", {"prices": [{"model": "new-*", "input": "1"}]})
        assert missing(gateway) == {}
        assert "Models without a price" not in operator.get("/dashboard/overview").text
    assert gateway.run("price", "missing").stdout.startswith("No model")
    assert gateway.cli("check")["notes"] == []
    with closing(sqlite3.connect(gateway.database)) as database:
        wait_until(lambda: not database.execute("SELECT 1 FROM unpriced_models").fetchall())
    assert len(hook.posts) == 2, "once for each model"


def test_what_no_upstream_offers_is_not_kept(refusing: Gateway) -> None:
    gateway = refusing
    key = gateway.new_key("ada")
    secret = "my-secret-password-0123"
    ask(gateway, key, secret, "<b>new-1</b>", "new-1\n", "new-1 please", "n" * 65, "new-2")
    wait_until(lambda: set(missing(gateway)) == {"new-2"})
    gateway.terminate()
    kept = b"".join(path.read_bytes() for path in gateway.folder.glob("redbtc.db*"))
    assert b"new-2" in kept
    assert secret.encode() not in kept
    assert secret not in gateway.log()


def test_an_account_is_told_in_its_export_and_not_named_once_erased(refusing: Gateway) -> None:
    gateway = refusing
    ask(gateway, gateway.new_key("ada"), "new-1")
    ask(gateway, gateway.new_key("bob"), "new-1")
    wait_until(lambda: "new-1" in missing(gateway) and missing(gateway)["new-1"]["requests"] == 2)
    gateway.cli("account", "export", "ada", "--to", str(gateway.folder / "ada.zip"))
    with ZipFile(gateway.folder / "ada.zip") as archive:
        found = json.loads(archive.read("refused-models.json"))["refused-models"]
    assert [(each["model"], each["requests"]) for each in found] == [("new-1", 1)]
    gateway.cli("account", "terminate", "ada", "--now", "--yes")
    accounts = missing(gateway)["new-1"]["accounts"]
    assert [each["account"] for each in accounts] == ["bob"]


def test_only_operators_see_who_asked(refusing: Gateway) -> None:
    gateway = refusing
    key = gateway.new_key("ada")
    ask(gateway, key, "new-1")
    wait_until(lambda: missing(gateway))
    with gateway.client(key) as client:
        for path in ("/admin/v1/prices/missing", "/admin/v1/me/prices/missing"):
            assert client.get(f"{gateway.url}{path}").status_code in (401, 403, 404)
    assert "new-1" not in gateway.get("/status").text


# ── Bounds ───────────────────────────────────────────────────────────────────────────────────────


class Ledger:
    """A ledger with so many accounts, and the models that were refused."""

    def __init__(self, store: Store, accounts: int) -> None:
        settings = BillingSettings(webhook_url="http://hook", webhook_secret_env="HOOK_SECRET")
        self.messages = WebhookMessages(store, settings)
        self.store = store
        self.priced: set[str] = set()
        self.models = UnpricedModels(store, self.messages, self.priced.__contains__)
        self.accounts = [f"acct_{number}" for number in range(accounts)]

    async def count(self, table: str) -> int:
        row = await self.store.one(f"SELECT count(*) FROM {table}")
        return int(row[0]) if row else 0


async def with_ledger(folder: Path, accounts: int) -> AsyncIterator[Ledger]:
    async with Store.open(folder / "redbtc.db", "normal") as store:
        ledger = Ledger(store, accounts)
        for each in ledger.accounts:
            sql = "INSERT INTO accounts (id, name, created_at) VALUES (?1, ?1, 0)"
            await store.transact((sql, (each,)), by="test")
        yield ledger


async def flood(folder: Path) -> None:
    async for ledger in with_ledger(folder, 30):
        models, one = ledger.models, ledger.accounts[0]
        for number in range(20_000):
            models.note(f"m{number}", one)
        assert len(models.asked) == MAX_REFUSED_OF_ONE
        for account in ledger.accounts:
            for number in range(MAX_REFUSED_OF_ONE):
                models.note(f"{account}-{number}", account)
        assert len(models.asked) == MAX_REFUSED
        for account in ledger.accounts:
            models.note("m0", account)
        await models.write(lambda _: True)
        assert not models.asked
        assert await ledger.count("unpriced_models") == MAX_UNPRICED
        assert await ledger.count("webhook_messages") == MESSAGES_AN_HOUR
        for account in ledger.accounts:
            for _ in range(3):
                models.note("popular", account)
        await models.write(lambda _: True)
        assert await ledger.count("unpriced_models") == MAX_UNPRICED
        first = next(each for each in await models.listed() if each.model == "popular")
        assert (first.requests, len(first.accounts)) == (90, MAX_NAMED_ACCOUNTS)
        assert await ledger.count("webhook_messages") == MESSAGES_AN_HOUR
        ledger.priced.add("popular")
        await models.write(lambda _: True)
        assert await ledger.count("unpriced_models") == MAX_UNPRICED - 1
        assert "popular" not in {each.model for each in await models.listed()}


def test_a_flood_of_names_costs_bounded_memory_rows_and_messages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOOK_SECRET", SECRET)
    asyncio.run(flood(tmp_path))


@pytest.mark.parametrize(
    ("listed", "patterns", "model", "is_offered"),
    [
        (["gpt-9"], ["*"], "gpt-9", True),
        (["gpt-9"], ["*"], "gpt-8", False),
        (["gpt-9"], ["gpt-*"], "gpt-8", False),
        ([], ["*"], "gpt-9", False),
        ([], ["g*"], "gpt-9", False),
        ([], ["gpt-*"], "gpt-9", True),
        ([], ["gpt-9"], "gpt-9", True),
        ([], ["gpt-9"], "gpt-99", False),
        ([], ["o3"], "o3", True),
        ([], ["*"], "*", False),
        ([], ["gpt-?x"], "gpt-9", False),
    ],
)
def test_a_name_must_be_in_a_list_or_match_more_than_a_wildcard(
    listed: list[str], patterns: list[str], model: str, is_offered: bool
) -> None:
    upstream: Any = SimpleNamespace(
        listed=listed,
        settings=SimpleNamespace(models=patterns),
        serves=lambda name: matches(name, patterns),
    )
    assert offers(upstream, model) == is_offered
    assert offered([upstream], {model, "other"}) == ({model} if is_offered else set())


def test_long_lists_are_read_once_for_all_names() -> None:
    class Listing:
        reads = 0

        @property
        def listed(self) -> list[str]:
            self.reads += 1
            return ["gpt-1", "gpt-2"]

    upstreams: Any = [Listing(), Listing()]
    names = {f"gpt-{number}" for number in range(1000)}
    assert offered(upstreams, names) == {"gpt-1", "gpt-2"}
    assert [each.reads for each in upstreams] == [1, 1]
