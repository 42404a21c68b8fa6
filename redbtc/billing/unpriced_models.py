"""Models that clients asked for and that were refused, since they have no price.

Clients name the models, and a name could be any text. So only the name of a model that an upstream
offers is kept (redbtc/gateway/unpriced.py decides that), and only if it has the characters of
names. Requests are counted in memory, within bounds, and written every few seconds: an account that
asks for a million names costs no more than one that asks for fifty.
"""

from __future__ import annotations

import re
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

import orjson
from msgspec import Struct

from redbtc.billing.webhook_messages import WebhookMessages
from redbtc.store.database import Store
from redbtc.store.json_values import JSON_IDS, Moment, json_time
from redbtc.store.writer import SQLStatement
from redbtc.times import DAY

ASKED_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@/+~-]{0,63}")
MAX_REFUSED = 1000  # pairs of a model and an account in memory
MAX_REFUSED_OF_ONE = 50  # of them of one account
MAX_UNPRICED = 200  # models in the ledger; those that were asked for least are dropped
MAX_NAMED_ACCOUNTS = 20  # accounts of a model; the latest are kept
UNPRICED_DAYS = 90  # after the last request
MESSAGES_AN_HOUR = 10  # to the webhook

NOTE_MODEL = """
    INSERT INTO unpriced_models (model, requests, first_at, last_at) VALUES (?, ?, ?, ?)
        ON CONFLICT DO UPDATE SET requests = requests + excluded.requests,
           last_at = max(last_at, excluded.last_at)"""
NOTE_ACCOUNT = """
    INSERT INTO unpriced_model_accounts (model, account_id, requests, last_at)
    SELECT ?, id, ?, ? FROM accounts WHERE id = ? AND status <> 'terminated'
        ON CONFLICT DO UPDATE SET requests = requests + excluded.requests,
           last_at = max(last_at, excluded.last_at)"""
DROP_MODELS = f"""
    DELETE FROM unpriced_models WHERE model IN (
        SELECT model FROM unpriced_models ORDER BY requests DESC, last_at DESC
         LIMIT -1 OFFSET {MAX_UNPRICED})"""
DROP_ACCOUNTS = f"""
    DELETE FROM unpriced_model_accounts WHERE (model, account_id) IN (
        SELECT model, account_id FROM (
            SELECT model, account_id,
                   row_number() OVER (PARTITION BY model ORDER BY last_at DESC) AS place
              FROM unpriced_model_accounts)
         WHERE place > {MAX_NAMED_ACCOUNTS})"""
FORGET_MODELS = f"DELETE FROM unpriced_models WHERE model IN {JSON_IDS}"
UNPRICED = """
    SELECT model, requests, first_at, last_at, told_at FROM unpriced_models
     ORDER BY last_at DESC, model"""
ASKING = """
    SELECT model, accounts.name AS account, account_id, requests, last_at
      FROM unpriced_model_accounts JOIN accounts ON accounts.id = account_id
     ORDER BY model, last_at DESC"""
TOLD = "UPDATE unpriced_models SET told_at = ? WHERE model = ?"


class AskingAccount(Struct):
    """An account that asked for a model."""

    account: str
    account_id: str
    requests: int
    last_at: Moment


class UnpricedModel(Struct):
    """A model without a price: how many requests for it were refused, the first and the last time,
    and the accounts that asked, the latest first, at most 20."""

    model: str
    requests: int
    first_at: Moment
    last_at: Moment
    accounts: list[AskingAccount]


class Asked(NamedTuple):
    """The requests of an account since it was written last: times are in milliseconds."""

    model: str
    account_id: str
    requests: int
    first_at: int
    last_at: int


class UnpricedModels:
    """The models of one gateway."""

    def __init__(
        self, store: Store, messages: WebhookMessages, may_serve: Callable[[str], bool]
    ) -> None:
        """`may_serve` returns whether a model needs no price or has one."""
        self._store = store
        self._messages = messages
        self._may_serve = may_serve
        self._asked: dict[tuple[str, str], Asked] = {}
        self._names_of: Counter[str] = Counter()  # how many of them each account has
        self._told: deque[float] = deque(maxlen=MESSAGES_AN_HOUR)  # when the webhook was told

    def note(self, model: str, account_id: str) -> None:
        """Count a request that was refused. Names that can't be those of models are not, nor are
        too many."""
        known, now = self._asked.get((model, account_id)), self._store.time()
        if known:
            self._asked[model, account_id] = known._replace(
                requests=known.requests + 1, last_at=now
            )
        elif (
            len(self._asked) < MAX_REFUSED
            and self._names_of[account_id] < MAX_REFUSED_OF_ONE
            and ASKED_NAME.fullmatch(model)
        ):
            self._asked[model, account_id] = Asked(model, account_id, 1, now, now)
            self._names_of[account_id] += 1

    @property
    def asked(self) -> set[str]:
        """The names that were asked for and are not written yet."""
        return {model for model, _ in self._asked}

    async def write(self, is_offered: Callable[[str], bool]) -> None:
        """Write what was asked for, as far as an upstream offers it, forget models that have a
        price now, and tell the webhook of new ones. Raises StorageUnavailable; what was asked for
        is not counted then."""
        asked = [each for each in self._asked.values() if is_offered(each.model)]
        self._asked.clear()
        self._names_of.clear()
        if asked:
            await self._store.transact(*counting(asked), (DROP_MODELS, ()), (DROP_ACCOUNTS, ()))
        await self._forget()
        await self._tell()

    async def _forget(self) -> None:
        """Forget models that have a price, and those that nobody asks for any more."""
        since = self._store.time() - UNPRICED_DAYS * DAY
        rows = [row async for row in self._store.rows(UNPRICED)]
        gone = [
            row["model"] for row in rows if row["last_at"] < since or self._may_serve(row["model"])
        ]
        if gone:
            await self._store.transact((FORGET_MODELS, (orjson.dumps(gone).decode(),)))

    async def _tell(self) -> None:
        """Tell the webhook of each model once, of at most MESSAGES_AN_HOUR; the others wait."""
        if self._messages.webhook is None:
            return
        now = self._store.time()
        told = {row["model"] async for row in self._store.rows(UNPRICED) if row["told_at"]}
        for each in reversed(await self.listed()):
            full = len(self._told) == MESSAGES_AN_HOUR and time.monotonic() - self._told[0] < 3600
            if full:
                return
            if each.model not in told and each.accounts:
                self._told.append(time.monotonic())
                message = self._messages.statement("model.unpriced", message_about(each))
                await self._store.transact(message, (TOLD, (now, each.model)))
                self._messages.wakeup.set()

    async def listed(self) -> list[UnpricedModel]:
        """Return the models that were refused and still have no price, the latest first."""
        accounts: dict[str, list[AskingAccount]] = {}
        async for row in self._store.rows(ASKING):
            found = AskingAccount(
                row["account"], row["account_id"], row["requests"], json_time(row["last_at"])
            )
            accounts.setdefault(row["model"], []).append(found)
        return [
            UnpricedModel(
                model=row["model"],
                requests=row["requests"],
                first_at=json_time(row["first_at"]),
                last_at=json_time(row["last_at"]),
                accounts=accounts.get(row["model"], []),
            )
            async for row in self._store.rows(UNPRICED)
            if not self._may_serve(row["model"])
        ]


def counting(asked: Iterable[Asked]) -> list[SQLStatement]:
    """Return the statements that count requests."""
    statements: list[SQLStatement] = []
    for each in asked:
        times = each.first_at, each.last_at
        statements.append((NOTE_MODEL, (each.model, each.requests, *times)))
        account = (each.model, each.requests, each.last_at, each.account_id)
        statements.append((NOTE_ACCOUNT, account))
    return statements


def message_about(model: UnpricedModel) -> dict[str, object]:
    """Return the data of the message about a model."""
    account = model.accounts[0]
    text = f"{account.account} asked for the model {model.model}, which has no price: refused."
    return {
        "model": model.model,
        "account": account.account,
        "account_id": account.account_id,
        "requests": model.requests,
        "first_at": model.first_at,
        "text": text,
    }
