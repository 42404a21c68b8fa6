"""What people use: the admin API and the commands.

The commands, and later the dashboard, all act through the admin API: on a running gateway over the
Unix socket beside its database (mode 0600: who may open it could open the database itself), on a
stopped one through the same app within the command's own process. So nothing is ever written
behind a running gateway's back. This room imports only what is below: billing, ledger, settings.
"""

from __future__ import annotations

import asyncio
import contextlib
import csv
import getpass
import html
import io
import os
import re
import socket
import sqlite3
import sys
import time
import tomllib
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import quote

import click
import httpx2
import msgspec
import orjson
from msgspec import UNSET, Meta, Struct, UnsetType
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

import redbtc_billing as billing
import redbtc_ledger as ledger
from redbtc_billing import Books, Price, Range
from redbtc_ledger import Accounts, Key, Record, Store
from redbtc_settings import (
    MOST_TOKENS,
    Conflict,
    LedgerError,
    LedgerUnavailable,
    Loaded,
    NotFound,
    decimal,
    iso_time,
    load_settings,
    parse_amount,
    parse_duration,
    parse_limit,
    parse_month,
    parse_time,
    shipped,
)

# ── Admin API ────────────────────────────────────────────────────────────────────────────────────
# /admin/v1/…, JSON in and out, strict: an unknown member is an error that names it. Served on the
# Unix socket alone.

NAME_FORM = r"^[^\s/\x00-\x1f\x7f]([^/\x00-\x1f\x7f]*[^\s/\x00-\x1f\x7f])?$"
Limit = Annotated[int, Meta(ge=0, le=1_000_000_000)]
AccountName = Annotated[str, Meta(min_length=1, max_length=100, pattern=NAME_FORM)]
Text = Annotated[str, Meta(max_length=200)]
Amount = Annotated[str, Meta(max_length=40)]  # a decimal string
ModelName = Annotated[str, Meta(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f\x7f]+$")]


class NewAccount(Struct, forbid_unknown_fields=True):
    """POST /admin/v1/accounts. A limit left out is the settings', a budget left out is none."""

    name: AccountName
    email: Text | None = None
    concurrency: Limit | None = None
    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    credit_limit: Amount | None = None
    monthly_budget: Amount | None = None


class AccountChange(Struct, forbid_unknown_fields=True):
    """PATCH /admin/v1/accounts/{account}: what is left out stays; null is the settings' again."""

    email: Text | UnsetType | None = UNSET
    concurrency: Limit | UnsetType | None = UNSET
    requests_per_minute: Limit | UnsetType | None = UNSET
    tokens_per_minute: Limit | UnsetType | None = UNSET
    credit_limit: Amount | UnsetType | None = UNSET
    monthly_budget: Amount | UnsetType | None = UNSET


class Suspension(Struct, forbid_unknown_fields=True):
    """POST /admin/v1/accounts/{account}/suspend"""

    reason: Text | None = None


class NewKey(Struct, forbid_unknown_fields=True):
    """POST /admin/v1/accounts/{account}/keys. `expires` is a time or a duration from now; `models`
    are shell patterns, with commas or as a list."""

    label: Text = ""
    models: Annotated[str, Meta(max_length=4000)] | tuple[ModelName, ...] | None = None
    expires: Text | None = None
    concurrency: Limit | None = None
    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    monthly_budget: Amount | None = None


class Rotation(Struct, forbid_unknown_fields=True):
    """POST /admin/v1/keys/{key}/rotate. The old key goes on for `overlap`."""

    overlap: Text = "24h"


class NewPrice(Struct, forbid_unknown_fields=True):
    """A price of one or more patterns of models, in currency per million tokens; `web_search` per
    call. `effective` is a time or a duration from now; left out: now."""

    model: ModelName | tuple[ModelName, ...]
    tier: Annotated[str, Meta(pattern=r"^[a-z0-9_-]{1,32}$")] = billing.DEFAULT_TIER
    above_input_tokens: Annotated[int, Meta(ge=0, le=MOST_TOKENS)] = 0
    effective: Text | None = None
    input: Amount | None = None
    cached_input: Amount | None = None
    cache_write: Amount | None = None
    output: Amount | None = None
    image_input: Amount | None = None
    image_output: Amount | None = None
    web_search: Amount | None = None
    max_output_tokens: Annotated[int, Meta(ge=1, le=MOST_TOKENS)] | None = None
    source: Annotated[str, Meta(max_length=500)] | None = None


class NewPrices(Struct, forbid_unknown_fields=True):
    """POST /admin/v1/prices. `without_notice` is the reason for a rise without notice. With
    `currency` they are refused where that is not the ledger's."""

    prices: tuple[NewPrice, ...]
    without_notice: Annotated[str, Meta(min_length=1, max_length=500)] | None = None
    currency: Text | None = None
    source: Annotated[str, Meta(max_length=500)] | None = None
    by: Text | None = None


class NewPayment(Struct, forbid_unknown_fields=True):
    """POST /admin/v1/accounts/{account}/payments"""

    amount: Amount
    reference: Annotated[str, Meta(min_length=1, max_length=200)] | None = None
    reason: Annotated[str, Meta(min_length=1, max_length=500)] | None = None
    by: Text | None = None


class NewNotice(Struct, forbid_unknown_fields=True):
    """POST /admin/v1/notices. `effective`: now where it is left out; `until`: no end."""

    kind: Literal["price", "terms", "maintenance", "incident"]
    text: Annotated[str, Meta(min_length=1, max_length=billing.NOTICE_TEXT)]
    effective: Text | None = None
    until: Text | None = None
    by: Text | None = None


class UsageQuery(Struct, forbid_unknown_fields=True):
    """GET /admin/v1/requests and /admin/v1/usage: filters, each left out where not wanted. `limit`
    is for requests, `group_by` (day, model, key, account, with commas) for usage."""

    account: Text | None = None
    key: Text | None = None
    model: Text | None = None
    since: Text | None = None
    until: Text | None = None
    limit: Annotated[int, Meta(ge=1)] | None = None
    group_by: Text | None = None


Wanted = TypeVar("Wanted", bound=Struct)


async def read(request: Request, wanted: type[Wanted]) -> Wanted:
    """The request's JSON body, or what follows from an empty one."""
    return decode(await request.body() or b"{}", wanted)


def decode(body: bytes, wanted: type[Wanted]) -> Wanted:
    try:
        return msgspec.json.decode(body, type=wanted)
    except (msgspec.DecodeError, RecursionError) as error:
        raise LedgerError(str(error)) from None


def limits_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """What was said of an account or a key, its money as the ledger has it. No budget is none."""
    limits = dict(given)
    if isinstance(limits.get("credit_limit"), str):
        limits["credit_limit"] = parse_limit(limits["credit_limit"])
    if isinstance(limits.get("monthly_budget"), str):
        budget = limits["monthly_budget"]
        limits["monthly_budget"] = None if budget == "unlimited" else parse_limit(budget)
    return limits


def models_of(given: str | tuple[str, ...] | None) -> str | None:
    """The patterns that a key is limited to, as the ledger has them. Raises LedgerError."""
    if given is None:
        return None
    patterns = [each.strip() for each in (given.split(",") if isinstance(given, str) else given)]
    for pattern in patterns:
        if not pattern or "," in pattern or not pattern.isprintable():
            raise LedgerError(
                f"{pattern!r} is not a pattern of models; write it like gpt-5*,codex*"
            )
    return ",".join(patterns) or None


def answer(content: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(content), status, media_type="application/json")


def query_of(request: Request) -> UsageQuery:
    try:
        return msgspec.convert(dict(request.query_params), UsageQuery, strict=False)
    except msgspec.ValidationError as error:
        raise LedgerError(str(error)) from None


def groups_of(query: UsageQuery) -> list[str]:
    """What to group by. Raises LedgerError."""
    names = list(dict.fromkeys(query.group_by.split(","))) if query.group_by else []
    for name in names:
        if name not in billing.GROUPS:
            allowed = ", ".join(billing.GROUPS)
            raise LedgerError(f"can't group by {name!r}; allowed are {allowed}")
    return names


def range_of(query: UsageQuery, account_id: str | None) -> Range:
    """Raises LedgerError."""
    given: dict[str, int] = {}
    if query.since:
        given["since"] = parse_time(query.since, relative_to_past=True)
    if query.until:
        given["until"] = parse_time(query.until, relative_to_past=True)
    if query.limit:
        given["limit"] = query.limit
    return Range(account=account_id, key=query.key, model=query.model, **given)


async def usage_report(books: Books, query: UsageQuery, account_id: str | None) -> Response:
    """Sums by groups, and of all."""
    wanted, names = range_of(query, account_id), groups_of(query)
    async with books.store.snapshot() as snapshot:
        groups = await billing.usage_by(snapshot, wanted, names, books.currency) if names else []
        (totals,) = await billing.usage_by(snapshot, wanted, [], books.currency)
    return answer({"groups": groups, "totals": totals})


async def request_report(books: Books, wanted: Range) -> AsyncIterator[bytes]:
    """Rows of the ledger as they are read, then their totals, all of one instant."""
    yield b'{"requests":['
    comma = b""
    async with books.store.snapshot() as snapshot:
        async for row in billing.requests_in(snapshot, wanted, books.currency):
            yield comma + orjson.dumps(row)
            comma = b",\n"
        (totals,) = await billing.usage_by(snapshot, wanted, [], books.currency)
    yield b'],"totals":' + orjson.dumps(totals) + b"}"


def time_of(text: str | None, now: int) -> int:
    return parse_time(text, relative_to_past=False) if text else now


MONEY_SHOWN = ("balance", "held", "available", "month", "spent_this_month", "currency")


class API:
    """The handlers; each is one route."""

    def __init__(self, books: Books) -> None:
        self._books = books
        self._accounts = Accounts(books.store)

    async def _with_money(self, account: Record, status: int = 200) -> Response:
        limits = account["credit_limit"], account["monthly_budget"]
        money = await self._books.balance(account["id"], *limits)
        return answer({**account, **{name: money[name] for name in MONEY_SHOWN}}, status)

    async def list_accounts(self, _: Request) -> Response:
        return answer({"accounts": await self._accounts.all()})

    async def add_account(self, request: Request) -> Response:
        body = await read(request, NewAccount)
        limits = limits_of(msgspec.structs.asdict(body))
        return await self._with_money(await self._accounts.add(body.name, body.email, limits), 201)

    async def _account(self, request: Request) -> Record:
        return await self._accounts.show(request.path_params["account"])

    async def show_account(self, request: Request) -> Response:
        return await self._with_money(await self._account(request))

    async def set_account(self, request: Request) -> Response:
        body = await read(request, AccountChange)
        given = {
            name: value
            for name, value in msgspec.structs.asdict(body).items()
            if value is not UNSET
        }
        changed = await self._accounts.set(request.path_params["account"], limits_of(given))
        return await self._with_money(changed)

    async def suspend_account(self, request: Request) -> Response:
        body = await read(request, Suspension)
        return answer(await self._accounts.suspend(request.path_params["account"], body.reason))

    async def resume_account(self, request: Request) -> Response:
        return answer(await self._accounts.resume(request.path_params["account"]))

    async def list_keys(self, request: Request) -> Response:
        return answer({"keys": await self._accounts.keys(request.path_params["account"])})

    async def add_key(self, request: Request) -> Response:
        body = await read(request, NewKey)
        expires = parse_time(body.expires, relative_to_past=False) if body.expires else None
        account, limits = request.path_params["account"], limits_of(msgspec.structs.asdict(body))
        models = models_of(body.models)
        added = await self._accounts.add_key(account, body.label, expires, limits, models)
        return answer(added, 201)

    async def revoke_key(self, request: Request) -> Response:
        return answer(await self._accounts.revoke_key(request.path_params["key"]))

    async def rotate_key(self, request: Request) -> Response:
        body = await read(request, Rotation)
        overlap = 0 if body.overlap == "0" else parse_duration(body.overlap)
        return answer(await self._accounts.rotate_key(request.path_params["key"], overlap), 201)

    async def list_prices(self, _: Request) -> Response:
        return answer({"prices": self._books.prices.rows(self._books.store.time())})

    async def add_prices(self, request: Request) -> Response:
        body = await read(request, NewPrices)
        if body.currency not in (None, self._books.currency):
            raise LedgerError(f"these prices are in {body.currency}, not in {self._books.currency}")
        prices, reason = prices_of(body), body.without_notice
        added = await self._books.add_prices(prices, without_notice=reason, added_by=body.by)
        return answer(added, 201)

    async def list_payments(self, request: Request) -> Response:
        account = await self._account(request) if "account" in request.path_params else None
        return answer({"payments": await self._books.payments(account)})

    async def add_payment(self, request: Request) -> Response:
        body, account = await read(request, NewPayment), await self._account(request)
        payment = await self._books.pay(
            account,
            parse_amount(body.amount),
            reference=body.reference,
            reason=body.reason,
            added_by=body.by,
        )
        money = await self._books.balance(account["id"], account["credit_limit"], None)
        return answer({**payment, "balance": money["balance"]}, 201)

    async def statement(self, request: Request) -> Response:
        month = parse_month(request.path_params["month"])
        return answer(await billing.statement(self._books, await self._account(request), month))

    async def list_notices(self, _: Request) -> Response:
        return answer({"notices": await self._books.notices()})

    async def add_notice(self, request: Request) -> Response:
        body, now = await read(request, NewNotice), self._books.store.time()
        until = parse_time(body.until, relative_to_past=False) if body.until else None
        effective = time_of(body.effective, now)
        notice = await self._books.add_notice(body.kind, body.text, effective, until, body.by)
        return answer(notice, 201)

    async def withdraw_notice(self, request: Request) -> Response:
        return answer(await self._books.withdraw_notice(request.path_params["notice"]))

    async def _whose(self, query: UsageQuery) -> str | None:
        """The id of the account that is asked for. Raises NotFound for it, or for the key."""
        account = await self._accounts.show(query.account) if query.account else None
        if query.key:
            await self._accounts.key(query.key)
        return account["id"] if account else None

    async def requests(self, request: Request) -> Response:
        query = query_of(request)
        wanted = range_of(query, await self._whose(query))
        report = request_report(self._books, wanted)
        return StreamingResponse(report, media_type="application/json")

    async def usage(self, request: Request) -> Response:
        query = query_of(request)
        return await usage_report(self._books, query, await self._whose(query))

    async def check_database(self, _: Request) -> Response:
        wrong = await ledger.check_database(self._books.store)
        return answer({"ok": not wrong, "problems": wrong})

    def routes(self) -> list[Route]:
        account, key = "/admin/v1/accounts/{account}", "/admin/v1/keys/{key}"
        return [
            Route("/admin/v1/accounts", self.list_accounts, methods=["GET"]),
            Route("/admin/v1/accounts", self.add_account, methods=["POST"]),
            Route(account, self.show_account, methods=["GET"]),
            Route(account, self.set_account, methods=["PATCH"]),
            Route(f"{account}/suspend", self.suspend_account, methods=["POST"]),
            Route(f"{account}/resume", self.resume_account, methods=["POST"]),
            Route(f"{account}/keys", self.list_keys, methods=["GET"]),
            Route(f"{account}/keys", self.add_key, methods=["POST"]),
            Route(f"{account}/payments", self.list_payments, methods=["GET"]),
            Route(f"{account}/payments", self.add_payment, methods=["POST"]),
            Route(f"{account}/statements/{{month}}", self.statement, methods=["GET"]),
            Route(f"{key}/revoke", self.revoke_key, methods=["POST"]),
            Route(f"{key}/rotate", self.rotate_key, methods=["POST"]),
            Route("/admin/v1/prices", self.list_prices, methods=["GET"]),
            Route("/admin/v1/prices", self.add_prices, methods=["POST"]),
            Route("/admin/v1/payments", self.list_payments, methods=["GET"]),
            Route("/admin/v1/notices", self.list_notices, methods=["GET"]),
            Route("/admin/v1/notices", self.add_notice, methods=["POST"]),
            Route("/admin/v1/notices/{notice}/withdraw", self.withdraw_notice, methods=["POST"]),
            Route("/admin/v1/requests", self.requests, methods=["GET"]),
            Route("/admin/v1/usage", self.usage, methods=["GET"]),
            Route("/admin/v1/db/check", self.check_database, methods=["POST"]),
        ]


def prices_of(body: NewPrices) -> list[Price]:
    """Raises LedgerError for a rate that is none."""
    return [
        price_of(each, model, body.source)
        for each in body.prices
        for model in ([each.model] if isinstance(each.model, str) else each.model)
    ]


def price_of(given: NewPrice, model: str, source: str | None) -> Price:
    """Raises LedgerError for a rate that is none."""
    rates: dict[str, Any] = {}
    for name in billing.Rates._fields:
        rate = getattr(given, name)
        if rate is not None:
            rates[name] = parse_amount(rate)
            most = billing.MOST_CALL_RATE if name == "web_search" else billing.MOST_RATE
            if not 0 <= rates[name] <= most:
                raise LedgerError(f"{model}: {name}: {rate} is out of range")
    if not rates:
        raise LedgerError(f"{model}: a price needs at least one rate; 0 where it is free")
    return Price(
        model=model,
        tier=given.tier,
        above_input_tokens=given.above_input_tokens,
        effective_at=parse_time(given.effective, relative_to_past=False) if given.effective else 0,
        max_output_tokens=given.max_output_tokens,
        source=given.source or source,
        **rates,
    )


MOST_ROWS = 1000  # of its requests that an account gets at once


class Me:
    """GET /admin/v1/me/…: an account's own figures, for whoever has one of its keys. Served on the
    public port; the gateway puts the key into the scope."""

    def __init__(self, books: Books, limits: Callable[[Key], Record]) -> None:
        """`limits` tells the limits in force for a key and what is left of them, save money's."""
        self._books = books
        self._limits = limits
        self._accounts = Accounts(books.store)

    @staticmethod
    def _key(request: Request) -> Key:
        key: Key = request.scope["key"]
        return key

    async def _account(self, request: Request) -> Record:
        return await self._accounts.show(self._key(request).account_id)

    async def all(self, request: Request) -> Response:
        account, key = await self._account(request), self._key(request)
        return answer(
            {
                "account": account["name"],
                "account_id": account["id"],
                "key_id": key.id,
                "balance": await self._money(account),
                "limits": await self._limits_and_budgets(key),
                "notices": await self._books.notices_now(account["id"]),
            }
        )

    async def _money(self, account: Record) -> Record:
        return await self._books.balance(
            account["id"], account["credit_limit"], account["monthly_budget"]
        )

    async def _limits_and_budgets(self, key: Key) -> Record:
        budgets = await self._books.budgets(key)
        found: Record = self._limits(key)
        return {
            whose: {**limits, "monthly_budget": budgets[whose]} for whose, limits in found.items()
        }

    async def balance(self, request: Request) -> Response:
        return answer(await self._money(await self._account(request)))

    async def limits(self, request: Request) -> Response:
        return answer(await self._limits_and_budgets(self._key(request)))

    async def prices(self, _: Request) -> Response:
        rows = self._books.prices.rows(self._books.store.time())
        shown = [billing.for_account(row, "reason") for row in rows if row["status"] != "past"]
        return answer({"prices": shown})

    async def _query(self, request: Request) -> UsageQuery:
        query, account = query_of(request), await self._account(request)
        if query.account not in (None, account["name"], account["id"]):
            raise NotFound(f"there is no account {query.account!r}")
        if query.key:
            of = None
            with contextlib.suppress(NotFound):
                of = (await self._accounts.key(query.key))["account"]
            if of != account["name"]:  # another's key is answered as one that never was
                raise NotFound(f"there is no key {query.key!r}")
        return query

    async def usage(self, request: Request) -> Response:
        query = await self._query(request)
        return await usage_report(self._books, query, self._key(request).account_id)

    async def requests(self, request: Request) -> Response:
        query = await self._query(request)
        query.limit = min(query.limit or 100, MOST_ROWS)
        wanted = range_of(query, self._key(request).account_id)
        # Whole before the first byte is sent: who reads slowly keeps no snapshot.
        report = b"".join([part async for part in request_report(self._books, wanted)])
        return Response(report, media_type="application/json")

    async def payments(self, request: Request) -> Response:
        payments = await self._books.payments(await self._account(request))
        return answer({"payments": [billing.for_account(payment) for payment in payments]})

    async def notices(self, request: Request) -> Response:
        return answer({"notices": await self._books.notices_now(self._key(request).account_id)})

    async def statement(self, request: Request) -> Response:
        month = parse_month(request.path_params["month"])
        return answer(await billing.statement(self._books, await self._account(request), month))

    def routes(self) -> list[Route]:
        me = "/admin/v1/me"
        return [
            Route(me, self.all, methods=["GET"]),
            Route(f"{me}/balance", self.balance, methods=["GET"]),
            Route(f"{me}/limits", self.limits, methods=["GET"]),
            Route(f"{me}/prices", self.prices, methods=["GET"]),
            Route(f"{me}/usage", self.usage, methods=["GET"]),
            Route(f"{me}/requests", self.requests, methods=["GET"]),
            Route(f"{me}/payments", self.payments, methods=["GET"]),
            Route(f"{me}/notices", self.notices, methods=["GET"]),
            Route(f"{me}/statements/{{month}}", self.statement, methods=["GET"]),
        ]


async def refused(_: Request, error: Exception) -> Response:
    """A LedgerError in OpenAI's error form."""
    status: dict[type[Exception], int] = {
        NotFound: 404,
        Conflict: 409,
        LedgerUnavailable: 503,
    }
    body = {"message": str(error), "type": "invalid_request_error", "param": None, "code": None}
    return answer({"error": body}, status.get(type(error), 400))


async def unknown(_: Request, error: Exception) -> Response:
    """What Starlette itself refuses: an unknown path or method."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    body = {"message": "Unknown request URL.", "type": "invalid_request_error", "code": None}
    return answer({"error": body}, status)


def served(routes: list[Route]) -> Starlette:
    """The routes as an app."""
    handlers: dict[Any, Any] = {HTTPException: unknown}
    handlers |= dict.fromkeys((LedgerError, NotFound, Conflict, LedgerUnavailable), refused)
    return Starlette(routes=routes, exception_handlers=handlers)


def app(books: Books) -> Starlette:
    """The admin API."""
    return served(API(books).routes())


def me(books: Books, limits: Callable[[Key], Record]) -> Starlette:
    """What an account may ask of itself."""
    return served(Me(books, limits).routes())


# ── Status ───────────────────────────────────────────────────────────────────────────────────────
# What everybody may know of the gateway, without a key.

STATUS_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Status: {status}</title>
<style>:root{{color-scheme:light dark}}body{{font:1rem/1.5 system-ui,sans-serif;max-width:45rem;
margin:3rem auto;padding:0 1rem}}h1{{font-size:1.75rem}}h2{{font-size:1.1rem;margin:2rem 0 0}}
p{{margin:.25rem 0;overflow-wrap:anywhere}}time{{font-variant-numeric:tabular-nums}}</style>
<h1>Status: {status}</h1>
<p>Up for {uptime}.</p>
{notices}
</html>
"""


async def status(books: Books, uptime_seconds: int) -> Record:
    """What /status says."""
    shown = ("id", "kind", "text", "effective_at", "until", "created_at")
    notices = [{name: row[name] for name in shown} for row in await books.notices_now()]
    now = str(iso_time(books.store.time()))
    in_force = {notice["kind"] for notice in notices if notice["effective_at"] <= now}
    worst = [kind for kind in ("incident", "maintenance") if kind in in_force]
    return {
        "status": worst[0] if worst else "ok",
        "uptime_seconds": uptime_seconds,
        "incidents": [notice for notice in notices if notice["kind"] == "incident"],
        "notices": [notice for notice in notices if notice["kind"] != "incident"],
    }


def status_page(found: Record) -> bytes:
    """The same for people."""

    def time_on_page(moment: str) -> str:
        return f'<time datetime="{moment}">{moment[:10]} {moment[11:16]} UTC</time>'

    lines = []
    for notice in found["incidents"] + found["notices"]:
        when = f"From {time_on_page(notice['effective_at'])}"
        if notice["until"] and notice["kind"] != "price":  # of a price: how long that is told
            when += f" to {time_on_page(notice['until'])}"
        text = html.escape(notice["text"])
        lines.append(f"<h2>{notice['kind'].title()}</h2>\n<p>{when}</p>\n<p>{text}</p>")
    uptime = timedelta(seconds=found["uptime_seconds"])
    notices = "\n".join(lines) or "<p>No notices.</p>"
    page = STATUS_PAGE.format(status=found["status"], uptime=uptime, notices=notices)
    return page.encode()


def prefers_html(accept: str) -> bool:
    """Whether an Accept header asks for a page rather than for JSON (RFC 9110 §12.5.1)."""
    weights: dict[str, float] = {}
    for entry in accept.lower().split(","):
        name, *parameters = (part.strip() for part in entry.split(";"))
        quality = [part[2:] for part in parameters if part.startswith("q=")]
        with contextlib.suppress(ValueError):
            weights[name] = float(quality[0]) if quality else 1.0
    return weights.get("text/html", 0) > weights.get("application/json", 0)


# ── Reaching it ──────────────────────────────────────────────────────────────────────────────────

LONGEST_SOCKET_PATH = 100  # sun_path holds 108 bytes on Linux, 104 on macOS
PATIENCE_SECONDS = 5


@contextlib.contextmanager
def socket_path(database: Path, *, make: bool = False) -> Iterator[str]:
    """The path of the gateway's Unix socket, by way of its folder's descriptor where it is too long
    for a socket. With `make` an unused socket of mode 0600 is there, for the server to take
    over."""
    path = f"{database}.sock"
    with contextlib.ExitStack() as stack:
        if len(os.fsencode(path)) > LONGEST_SOCKET_PATH:
            folder = os.open(database.parent, os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, folder)
            path = f"/proc/self/fd/{folder}/{database.name}.sock"
        if make:
            Path(path).unlink(missing_ok=True)
            stack.callback(Path(path).unlink, missing_ok=True)
            with socket.socket(socket.AF_UNIX) as placeholder:
                placeholder.bind(path)
            os.chmod(path, 0o600)
        yield path


@contextlib.asynccontextmanager
async def connect(loaded: Loaded) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of the admin API: of the running gateway's, else of one in this process. Where a
    gateway is just starting or stopping, wait for it. Raises LedgerError."""
    patience = time.monotonic() + PATIENCE_SECONDS
    while True:
        async with contextlib.AsyncExitStack() as stack:
            path = stack.enter_context(socket_path(loaded.database_path))
            try:
                if await _answers(path):
                    transport: httpx2.AsyncBaseTransport = httpx2.AsyncHTTPTransport(uds=path)
                else:
                    store = await stack.enter_async_context(_open(loaded))
                    books = await Books.open(store, loaded.settings.billing)
                    transport = httpx2.ASGITransport(app(books))
            except ledger.DatabaseInUse:
                if time.monotonic() > patience:
                    raise
                await asyncio.sleep(0.05)
                continue
            yield await stack.enter_async_context(
                httpx2.AsyncClient(
                    transport=transport, base_url="http://gateway", timeout=None, trust_env=False
                )
            )
            return


def _open(loaded: Loaded) -> contextlib.AbstractAsyncContextManager[Store]:
    os.umask(0o077)
    return Store.open(loaded.database_path, loaded.settings.database.synchronous)


async def _answers(path: str) -> bool:
    try:
        _, writer = await asyncio.open_unix_connection(path)
    except (FileNotFoundError, ConnectionRefusedError):
        return False
    except OSError as error:
        raise LedgerError(f"the gateway's socket {path}: {error.strerror}") from None
    writer.close()
    await writer.wait_closed()
    return True


# ── Commands ─────────────────────────────────────────────────────────────────────────────────────


class Context:
    """What the options before the command say; the settings are read when they are needed."""

    def __init__(self, config: str | None) -> None:
        self._config = config

    @property
    def loaded(self) -> Loaded:
        return load_settings(self._config)

    def call(self, method: str, path: str, body: Any = None, query: Any = None) -> Any:
        """The JSON that the admin API answers. Raises LedgerError with its message."""

        content = None if body is None else msgspec.json.encode(body)

        async def ask() -> Any:
            async with connect(self.loaded) as client:
                response = await client.request(method, path, content=content, params=query)
                return _content(response.status_code, response.content)

        return asyncio.run(ask())

    def copy(self, path: str, query: Any, out: Any) -> None:
        """Copy the admin API's answer to a GET to `out`, as it comes."""

        async def ask() -> None:
            async with (
                connect(self.loaded) as client,
                client.stream("GET", path, params=query) as response,
            ):
                if response.status_code != 200:
                    _content(response.status_code, await response.aread())
                async for chunk in response.aiter_bytes():
                    out.write(chunk)

        asyncio.run(ask())


def _content(status: int, body: bytes) -> Any:
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise LedgerError(f"the gateway answered {status}; see its log") from None
    if status >= 400:
        raise LedgerError(content["error"]["message"])
    return content


class LimitType(click.ParamType[Any]):
    """A number, or `default` for what the settings say."""

    name = "number"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if value == "default":
            return value
        if not re.fullmatch(r"\d{1,9}", value):
            self.fail(f"{value!r} is neither a number up to 999999999 nor 'default'", param, ctx)
        return int(value)


class AmountType(click.ParamType[Any]):
    """A limit in money: a decimal number, `unlimited`, or `default` for what the settings say."""

    name = "amount"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if value != "default":
            try:
                parse_limit(value)
            except LedgerError as error:
                self.fail(str(error), param, ctx)
        return value


Decorated = Callable[..., Any]
LIMIT_TEXTS = {
    "concurrency": "Requests in flight at most; 0: no limit.",
    "requests_per_minute": "Requests a minute at most; 0: no limit.",
    "tokens_per_minute": "Tokens a minute at most; 0: no limit.",
    "monthly_budget": "What may be spent in a calendar month (UTC); unlimited: no limit.",
    "credit_limit": "How far below zero the balance may go: an amount, or unlimited.",
}


def limit_options(names: Iterable[str]) -> Callable[[Decorated], Decorated]:
    def decorate(function: Decorated) -> Decorated:
        for name in reversed(list(names)):
            option = "--" + name.replace("_", "-")
            kind = LimitType() if name in ledger.LIMITS else AmountType()
            function = click.option(option, type=kind, help=LIMIT_TEXTS[name])(function)
        return function

    return decorate


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


def given(values: dict[str, Any]) -> dict[str, Any]:
    """What was said, with `default` as the API says it: null."""
    return {
        name: None if value == "default" else value
        for name, value in values.items()
        if value is not None
    }


CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def show(content: Any, as_json: bool, text: Callable[[], str]) -> None:
    click.echo(orjson.dumps(content, option=orjson.OPT_INDENT_2) if as_json else text())


def cell(value: Any) -> str:
    """A value on the terminal. What is missing is a dash; what users have named must not steer."""
    value = ",".join(value) if isinstance(value, list) else value
    return "-" if value is None else CONTROL.sub(lambda found: repr(found[0])[1:-1], str(value))


def table(rows: Iterable[dict[str, Any]], columns: list[str]) -> str:
    """Rows under their columns' names."""
    lines = [columns] + [[cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def details(record: dict[str, Any]) -> str:
    width = max(len(name) for name in record)
    return "\n".join(f"{name.ljust(width)}  {cell(value)}" for name, value in record.items())


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--config", metavar="PATH", help="The settings file instead of config.toml.")
@click.pass_context
def commands(context: click.Context, config: str | None) -> None:
    """RedBTC AI: an OpenAI-compatible API gateway."""
    context.obj = Context(config)
    if context.invoked_subcommand is None:
        context.invoke(commands.commands["serve"])


@commands.group()
def account() -> None:
    """Who may use the gateway."""


@account.command("add")
@click.argument("name")
@click.option("--email", help="Whom to write to.")
@limit_options(ledger.ACCOUNT_LIMITS)
@json_option
@click.pass_obj
def account_add(context: Context, /, name: str, as_json: bool, **options: Any) -> None:
    """Add an account. Limits that are left out are the settings'."""
    added = context.call("POST", "/admin/v1/accounts", {"name": name, **given(options)})
    show(added, as_json, lambda: f"Account {added['name']} added ({added['id']}).")


@account.command("list")
@json_option
@click.pass_obj
def account_list(context: Context, as_json: bool) -> None:
    """All accounts."""
    found = context.call("GET", "/admin/v1/accounts")
    columns = ["name", "id", "status", *ledger.ACCOUNT_LIMITS, "keys_in_force", "created_at"]
    show(found, as_json, lambda: table(found["accounts"], columns))


def _account(name: str, action: str = "") -> str:
    return f"/admin/v1/accounts/{quote(name, safe='')}{action}"


@account.command("show")
@click.argument("name")
@json_option
@click.pass_obj
def account_show(context: Context, name: str, as_json: bool) -> None:
    """One account, by its name or id. A limit of - is the settings'."""
    found = context.call("GET", _account(name))
    show(found, as_json, lambda: details(found))


@account.command("set")
@click.argument("name")
@click.option("--email", help="Whom to write to.")
@limit_options(ledger.ACCOUNT_LIMITS)
@json_option
@click.pass_obj
def account_set(context: Context, /, name: str, as_json: bool, **options: Any) -> None:
    """Change an account, from its next request on. `default`: what the settings say."""
    if not given(options):
        raise click.UsageError("say what to change; --help lists what can be")
    changed = context.call("PATCH", _account(name), given(options))
    show(changed, as_json, lambda: details(changed))


@account.command("suspend")
@click.argument("name")
@click.option("--reason", help="Why; shown to operators.")
@json_option
@click.pass_obj
def account_suspend(context: Context, name: str, reason: str | None, as_json: bool) -> None:
    """Refuse an account's requests from the next one on."""
    changed = context.call("POST", _account(name, "/suspend"), {"reason": reason})
    show(changed, as_json, lambda: f"Account {changed['name']} is suspended.")


@account.command("resume")
@click.argument("name")
@json_option
@click.pass_obj
def account_resume(context: Context, name: str, as_json: bool) -> None:
    """Serve a suspended account again."""
    changed = context.call("POST", _account(name, "/resume"))
    show(changed, as_json, lambda: f"Account {changed['name']} is active.")


@commands.group()
def key() -> None:
    """API keys: shown once, stored as hashes."""


def shown_once(added: dict[str, Any]) -> str:
    return f"{added['key']}\n\nKey {added['id']}, shown this once: store it now."


@key.command("add")
@click.argument("account")
@click.option("--label", help="What its owner calls it.")
@click.option("--expires", metavar="TIME", help="2026-12-31T00:00:00Z, or 90d from now.")
@click.option("--models", metavar="PATTERNS", help='Only these: "gpt-5*,codex*".')
@limit_options(ledger.KEY_LIMITS)
@json_option
@click.pass_obj
def key_add(context: Context, /, account: str, as_json: bool, **options: Any) -> None:
    """Add a key to an account and print it, once."""
    added = context.call("POST", _account(account, "/keys"), given(options))
    show(added, as_json, lambda: shown_once(added))


@key.command("list")
@click.argument("account")
@json_option
@click.pass_obj
def key_list(context: Context, account: str, as_json: bool) -> None:
    """An account's keys."""
    found = context.call("GET", _account(account, "/keys"))
    times = ["created_at", "expires_at", "revoked_at"]
    columns = ["id", "label", "models", *ledger.KEY_LIMITS, *times]
    show(found, as_json, lambda: table(found["keys"], columns))


@key.command("revoke")
@click.argument("key_id")
@json_option
@click.pass_obj
def key_revoke(context: Context, key_id: str, as_json: bool) -> None:
    """Refuse a key from the next request on."""
    changed = context.call("POST", f"/admin/v1/keys/{quote(key_id, safe='')}/revoke")
    show(changed, as_json, lambda: f"Key {changed['id']} is revoked.")


@key.command("rotate")
@click.argument("key_id")
@click.option("--overlap", default="24h", show_default=True, help="How long the old key goes on.")
@json_option
@click.pass_obj
def key_rotate(context: Context, key_id: str, overlap: str, as_json: bool) -> None:
    """Print a new key like the old one, which ends after the overlap."""
    path = f"/admin/v1/keys/{quote(key_id, safe='')}/rotate"
    added = context.call("POST", path, {"overlap": overlap})
    show(added, as_json, lambda: shown_once(added))


def user_name() -> str:
    """Who gives this command, for the record."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


@commands.group()
def price() -> None:
    """What models cost, from when on. Prices are added, never changed."""


def notice_options(function: Decorated) -> Decorated:
    reason = click.option("--reason", help="Why, for the record.")
    without = click.option(
        "--without-notice", is_flag=True, help="Let a rise take effect early; needs --reason."
    )
    return without(reason(function))


def add_prices(
    context: Context,
    prices: dict[str, Any],
    without_notice: bool,
    reason: str | None,
    as_json: bool,
) -> None:
    if without_notice != bool(reason):
        raise click.UsageError("--without-notice and --reason need each other")
    body = {**prices, "by": user_name(), **given({"without_notice": reason})}
    added = context.call("POST", "/admin/v1/prices", body)

    def text() -> str:
        counts = f"{added['added']} added, {added['unchanged']} unchanged."
        rows = table(added["prices"], PRICE_COLUMNS)
        return f"{rows}\n\n{counts}" if added["added"] else counts

    show(added, as_json, text)


@price.command("add")
@click.argument("model")
@click.option("--input", metavar="AMOUNT", help="For a million tokens, as all but web searches.")
@click.option("--cached-input", metavar="AMOUNT", help="Left out: as input.")
@click.option("--cache-write", metavar="AMOUNT", help="Left out: as input.")
@click.option("--output", metavar="AMOUNT", help="Left out: 0, as input.")
@click.option("--image-input", metavar="AMOUNT", help="Left out: as input.")
@click.option("--image-output", metavar="AMOUNT", help="Left out: as output.")
@click.option("--web-search", metavar="AMOUNT", help="For a call; left out: 0.")
@click.option("--tier", help="Of responses that report this service tier.  [default: default]")
@click.option("--above-input-tokens", type=int, help="Of requests with more input than that.")
@click.option("--max-output-tokens", type=int, help="The most that the model says at once.")
@click.option("--effective", metavar="TIME", help="From then on; left out: now.")
@click.option("--source", help="Where it was read.")
@notice_options
@json_option
@click.pass_obj
def price_add(
    context: Context, /, as_json: bool, without_notice: bool, reason: str | None, **options: Any
) -> None:
    """Add the price of MODEL, a name or a shell pattern; the most specific pattern counts."""
    add_prices(context, {"prices": [given(options)]}, without_notice, reason, as_json)


@price.command("import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@notice_options
@json_option
@click.pass_obj
def price_import(
    context: Context, file: Path, as_json: bool, without_notice: bool, reason: str | None
) -> None:
    """Add the prices of a TOML file, all or none; what is so anyway is left out."""
    add_prices(context, read_prices(file), without_notice, reason, as_json)


def read_prices(file: Path) -> dict[str, Any]:
    """The tables of a price file as the API takes them: amounts as decimal strings, exactly as they
    stand in it. Raises LedgerError."""
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"), parse_float=Decimal)
    except OSError as error:
        raise LedgerError(f"{file}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise LedgerError(f"{file}: not TOML: {error}") from None
    prices = tables.get("prices")
    if not isinstance(prices, list) or not all(isinstance(price, dict) for price in prices):
        raise LedgerError(f"{file}: needs an array 'prices' of tables")
    for price in prices:
        for name, value in price.items():
            if type(value) in (int, Decimal) and not name.endswith("_tokens"):
                price[name] = format(Decimal(value), "f")
    return tables


PRICE_COLUMNS = [
    "model",
    "tier",
    "above_input_tokens",
    "status",
    "effective_at",
    *billing.Rates._fields,
]


@price.command("list")
@json_option
@click.pass_obj
def price_list(context: Context, as_json: bool) -> None:
    """Past, current and coming prices. A rate of - was not given."""
    found = context.call("GET", "/admin/v1/prices")
    show(found, as_json, lambda: table(found["prices"], PRICE_COLUMNS))


@commands.group()
def payment() -> None:
    """What accounts have paid."""


# A negative amount must not be taken for an option.
@payment.command("add", context_settings={"ignore_unknown_options": True})
@click.argument("account")
@click.argument("amount")
@click.option("--reference", help="Sent again with the same reference, it is added once.")
@click.option("--reason", help="Of a refund or correction, which are negative.")
@json_option
@click.pass_obj
def payment_add(context: Context, /, account: str, as_json: bool, **options: Any) -> None:
    """Write down a payment of an account, such as 25.00; a refund is negative."""
    body = {**given(options), "by": user_name()}
    added = context.call("POST", _account(account, "/payments"), body)
    money = "Payment of {amount} {currency} for {account} ({id}); the balance is {balance}."
    show(added, as_json, lambda: money.format(**added))


@payment.command("list")
@click.argument("account", required=False)
@json_option
@click.pass_obj
def payment_list(context: Context, account: str | None, as_json: bool) -> None:
    """All payments, or an account's, oldest first."""
    path = _account(account, "/payments") if account else "/admin/v1/payments"
    found = context.call("GET", path)
    columns = ["created_at", "account", "amount", "currency", "reference", "reason", "id"]
    show(found, as_json, lambda: table(found["payments"], columns))


@commands.group()
def notice() -> None:
    """What users are told, on /status and by the API."""


@notice.command("add")
@click.argument("text")
@click.option(
    "--kind",
    type=click.Choice(["price", "terms", "maintenance", "incident"]),
    required=True,
    help="What it is about.",
)
@click.option("--effective", metavar="TIME", help="From when it holds; left out: now.")
@click.option("--until", metavar="TIME", help="Until when; left out: it has no end.")
@json_option
@click.pass_obj
def notice_add(context: Context, /, as_json: bool, **options: Any) -> None:
    """Add a notice. New terms need billing.terms_notice_days of notice."""
    added = context.call("POST", "/admin/v1/notices", {**given(options), "by": user_name()})
    show(added, as_json, lambda: f"Notice {added['id']} added.")


@notice.command("list")
@json_option
@click.pass_obj
def notice_list(context: Context, as_json: bool) -> None:
    """All notices."""
    found = context.call("GET", "/admin/v1/notices")
    columns = ["id", "kind", "account", "effective_at", "until", "withdrawn_at", "text"]
    show(found, as_json, lambda: table(found["notices"], columns))


@notice.command("withdraw")
@click.argument("notice_id")
@json_option
@click.pass_obj
def notice_withdraw(context: Context, notice_id: str, as_json: bool) -> None:
    """Show a notice to nobody any more."""
    path = f"/admin/v1/notices/{quote(notice_id, safe='')}/withdraw"
    changed = context.call("POST", path)
    show(changed, as_json, lambda: f"Notice {changed['id']} is withdrawn.")


USAGE_COLUMNS = [
    "started_at",
    "account",
    "requested_model",
    "status",
    "outcome",
    "usage_source",
    "input_tokens",
    "cached_input_tokens",
    "output_tokens",
    "cost",
    "duration_ms",
]
SUM_COLUMNS = [
    "requests",
    "estimated",
    "unreported",
    "input_tokens",
    "cached_input_tokens",
    "output_tokens",
    "cost",
]


@commands.command()
@click.option("--account", help="Of this account.")
@click.option("--key", help="Of this key (its id).")
@click.option("--model", help="Of models that match this shell pattern.")
@click.option("--since", metavar="TIME", help="From then on: an ISO 8601 time, or 24h ago.")
@click.option("--until", metavar="TIME", help="Up to then.")
@click.option("--limit", type=click.IntRange(1), help="Only the newest so many.")
@click.option("--group-by", metavar="NAMES", help="Sums by day, model, key, account: day,model.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
@json_option
@click.pass_obj
def usage(context: Context, /, as_csv: bool, as_json: bool, **filters: Any) -> None:
    """The ledger: a row for each request that reached an upstream, oldest first, or sums of them.
    The totals are of the whole range, whatever the limit."""
    one_form(as_csv, as_json)
    grouped = filters["group_by"] is not None
    if grouped and filters["limit"]:
        raise click.UsageError("--limit is for requests, not for sums of them")
    path = "/admin/v1/usage" if grouped else "/admin/v1/requests"
    if as_json:
        context.copy(path, given(filters), sys.stdout.buffer)
        click.echo()
        return
    found = context.call("GET", path, query=given(filters))
    rows = found["groups" if grouped else "requests"]
    labels = [name for name in rows[0] if name not in found["totals"]] if rows else []
    columns = [*labels, *SUM_COLUMNS] if grouped else USAGE_COLUMNS
    totals = {name: value for name, value in found["totals"].items() if value is not None}
    text = as_csv_text(rows) if as_csv else f"{table(rows, columns)}\n\nTotals\n{details(totals)}"
    click.echo(text, nl=not as_csv)


def one_form(as_csv: bool, as_json: bool) -> None:
    if as_csv and as_json:
        raise click.UsageError("--csv and --json exclude each other")


FORMULA = re.compile(r"[=+@]|-(?![0-9.]+$)")


def as_csv_text(rows: list[dict[str, Any]]) -> str:
    """RFC 4180, with a line of column names. What a spreadsheet would take for a formula, and is
    no number, is text."""
    out = io.StringIO()
    writer = csv.writer(out)
    if rows:
        writer.writerow(rows[0])
    for row in rows:
        values = ("" if value is None else str(value) for value in row.values())
        writer.writerow(f"'{value}" if FORMULA.match(value) else value for value in values)
    return out.getvalue()


@commands.command()
@click.argument("account")
@click.argument("month", metavar="YYYY-MM")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
@json_option
@click.pass_obj
def statement(context: Context, account: str, month: str, as_csv: bool, as_json: bool) -> None:
    """An account's month: opening balance, usage by day and model, payments, closing balance, and
    what was paid in the last three months."""
    one_form(as_csv, as_json)
    found = context.call("GET", _account(account, f"/statements/{quote(month, safe='')}"))
    if as_csv:
        click.echo(as_csv_text(statement_lines(found)), nl=False)
    else:
        show(found, as_json, lambda: statement_text(found))


def statement_lines(found: dict[str, Any]) -> list[dict[str, Any]]:
    """A statement as lines of one form: the opening balance and all payments, less all costs, are
    the closing balance."""
    empty = dict.fromkeys(["line", "date", "description", *billing.COUNTS, "cost", "amount"])
    lines = [{"line": "opening balance", "amount": found["opening_balance"]}]
    for used in found["usage"]:
        figures = {name: used[name] for name in (*billing.COUNTS, "cost")}
        lines.append(
            {"line": "usage", "date": used["day"], "description": used["model"], **figures}
        )
    for paid in found["payments"]:
        line = {"line": "payment", "date": paid["created_at"][:10], "amount": paid["amount"]}
        lines.append({**line, "description": paid["reason"] or paid["reference"]})
    lines.append({"line": "closing balance", "amount": found["closing_balance"]})
    return [{**empty, **line} for line in lines]


def statement_text(found: dict[str, Any]) -> str:
    totals = found["totals"]
    lately = [f"{month} {money(paid)}" for month, paid in found["paid_by_month"].items()]
    summary = {
        "opening balance": money(found["opening_balance"]),
        "payments": money(totals["paid"]),
        "usage": money(totals["cost"]),
        "closing balance": money(found["closing_balance"]),
        "requests": totals["requests"],
        "of them estimated": totals["estimated"],
        "without usage": totals["unreported"],
        "paid in three months": f"{money(found['paid_last_three_months'])} ({', '.join(lately)})",
    }
    used = [{**row, "cost": money(row["cost"])} for row in found["usage"]]
    paid = [{**row, "amount": money(row["amount"])} for row in found["payments"]]
    state = "closed" if found["closed"] else "so far"
    parts = [f"{found['account']}, {found['month']}, {state}, in {found['currency']}"]
    parts.append(details(summary))
    parts += [table(used, ["day", "model", *SUM_COLUMNS])] if used else []
    parts += [table(paid, ["created_at", "amount", "reference", "reason"])] if paid else []
    return "\n\n".join(parts)


def money(amount: str) -> str:
    """With two digits after the point at least, as people write it."""
    return decimal(parse_amount(amount), 2)


@commands.group()
def db() -> None:
    """The database."""


@db.command("check")
@json_option
@click.pass_obj
def db_check(context: Context, as_json: bool) -> None:
    """Check the whole file for damage."""
    found = context.call("POST", "/admin/v1/db/check")
    show(found, as_json, lambda: "\n".join(found["problems"]) or "The database is sound.")
    if not found["ok"]:
        raise SystemExit(1)


def show_check(loaded: Loaded | None, problems: list[str], as_json: bool) -> None:
    """What `check` found; exits with 2 where something is wrong. Without `loaded` the settings
    themselves are."""
    unused = loaded.without_effect if loaded else []
    notes = [f"{key}: accepted, but has no effect yet" for key in unused]
    found = {
        "ok": not problems,
        "settings": str(loaded.file) if loaded and loaded.file else None,
        "database": str(loaded.database_path) if loaded else None,
        "problems": problems,
        "notes": notes,
    }
    read = [f"settings: {loaded.file or 'the built-in defaults'}"] if loaded else []
    lines = [*read, *notes, *problems, "not ok" if problems else "ok"]
    show(found, as_json, lambda: "\n".join(lines))
    if problems:
        raise SystemExit(2)


# ── First run ────────────────────────────────────────────────────────────────────────────────────

FIRST_ACCOUNT = "first"


async def import_example(books: Books) -> None:
    """The prices of prices.toml, so that a newcomer's first requests are served."""
    example = msgspec.convert(read_prices(shipped("prices.toml")), NewPrices)
    await books.add_prices(prices_of(example), without_notice=None, added_by="first run")


async def welcome(store: Store, base_url: str, demo: bool) -> str:
    """What a newcomer needs: with no account yet, a first one and its key, shown this once."""
    accounts = Accounts(store)
    command = f"{os.path.relpath(sys.executable)} {os.path.relpath(sys.argv[0])}"
    key = "$REDBTC_API_KEY"
    about_key = f"Your API key was shown at the first start. Another:  {command} key add first"
    if not await accounts.all():
        await accounts.add(FIRST_ACCOUNT, None, {})
        key = (await accounts.add_key(FIRST_ACCOUNT, "first run", None, {}))["key"]
        about_key = f"API key    {key}   (shown this once: store it now)"
    model = "redbtc-demo" if demo else "gpt-5.4-mini"
    chat = f'{{"model":"{model}","messages":[{{"role":"user","content":"Say hello."}}]'
    curl = f'curl {base_url}/chat/completions -H "Authorization: Bearer {key}"'
    curl += ' -H "Content-Type: application/json"'
    upstream = (
        "a demonstration upstream: no model is behind it. Set OPENAI_API_KEY for OpenAI."
        if demo
        else "the upstreams of the settings."
    )
    return f"""
RedBTC AI forwards to {upstream}

Base URL   {base_url}
{about_key}

Try it, plain and streamed:

{curl} -d '{chat}}}'

{curl} -N -d '{chat},"stream":true}}'

What was used:  {command} usage
"""


def main() -> None:
    """Run the command line; exit 0 done, 1 refused or failed, 2 wrong usage."""
    try:
        commands(prog_name="redbtc-proxy")
    except (LedgerError, sqlite3.Error, httpx2.HTTPError) as error:
        click.echo(f"Error: {error}", err=True)
        raise SystemExit(1) from None
    except UnicodeEncodeError:
        click.echo("Error: what was given is not UTF-8", err=True)
        raise SystemExit(2) from None
