"""The commands, and how they reach the admin API: on a running gateway over the Unix socket beside
its database, on a stopped one through the same app within the command's own process. So nothing is
ever written behind a running gateway's back.
"""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import os
import re
import sqlite3
import ssl
import sys
import time
import tomllib
from collections.abc import AsyncIterator, Callable, Iterable
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import quote

import click
import httpx2
import msgspec
import orjson

import redbtc_admin as admin
import redbtc_backup as backup
import redbtc_billing as billing
import redbtc_ledger as ledger
import redbtc_start
from redbtc_billing import Books
from redbtc_files import DatabaseInUse, hold, hold_lock
from redbtc_ledger import Accounts
from redbtc_reports import csv_lines, statement_lines
from redbtc_settings import (
    LedgerError,
    Loaded,
    decimal,
    digits_of,
    iso_time,
    load_settings,
    parse_amount,
    parse_limit,
    shipped,
)
from redbtc_shapes import NewPrices
from redbtc_socket import socket_path
from redbtc_store import Migrated, Store

# ── Reaching it ──────────────────────────────────────────────────────────────────────────────────

PATIENCE_SECONDS = 5
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # reads no certificates, which takes 30 ms


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
                    transport: httpx2.AsyncBaseTransport = httpx2.AsyncHTTPTransport(
                        verify=NO_TLS, uds=path
                    )
                else:
                    store = await stack.enter_async_context(_open(loaded))
                    for line in opening(store):
                        click.echo(line, err=True)
                    books = await Books.open(store, loaded.settings.billing)
                    api = admin.API(books, admin.Stopped(), loaded.settings.dashboard_url)
                    transport = httpx2.ASGITransport(admin.served(api, admin.local))
            except DatabaseInUse:
                if time.monotonic() > patience:
                    raise
                await asyncio.sleep(0.05)
                continue
            yield await stack.enter_async_context(
                httpx2.AsyncClient(
                    transport=transport,
                    base_url="http://gateway",
                    headers={admin.WHO: user_name().encode()},
                    timeout=None,
                    trust_env=False,
                )
            )
            return


def _open(loaded: Loaded) -> contextlib.AbstractAsyncContextManager[Store]:
    os.umask(0o077)
    return Store.open(loaded.database_path, loaded.settings.database.synchronous)


def opening(store: Store) -> list[str]:
    """Return what opening the database has changed, for people, a line each."""
    lines = [migration_text(store.migrated)] if store.migrated else []
    if store.replaced:
        lines.append(f"A restore was finished. The replaced database is kept: {store.replaced}")
    return lines


def migration_text(migrated: Migrated) -> str:
    before, after, seconds, copy, no_copy = migrated
    text = f"The database was migrated from schema {before} to {after} in {seconds} s."
    return f"{text} As it was before: {copy}" if copy else f"{text} {no_copy}"


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


def user_name() -> str:
    """Who gives this command, for the record."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


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


def plain(text: str) -> str:
    """Return a text for the terminal: what users have named must not steer it."""
    return CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def cell(value: Any) -> str:
    """Return a value for the terminal; a dash where there is none."""
    value = ",".join(value) if isinstance(value, list) else value
    return "-" if value is None else plain(str(value))


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
    elif context.invoked_subcommand != "serve":  # which handles signals in its own way
        redbtc_start.restore()


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
    columns = ["name", "id", "status", "balance", "spent_this_month", *ledger.ACCOUNT_LIMITS]
    columns += ["throttle_factor", "keys_in_force", "created_at"]
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


@account.command("throttle")
@click.argument("name")
@click.option("--factor", required=True, help="The part of its limits that is left; 1 lifts it.")
@click.option("--until", metavar="TIME", help="Until then; left out: until it is lifted.")
@json_option
@click.pass_obj
def account_throttle(context: Context, /, name: str, as_json: bool, **options: Any) -> None:
    """Hold an account to a part of its limits, from its next request on."""
    changed = context.call("POST", _account(name, "/throttle"), given(options))

    def text() -> str:
        factor, until = changed["throttle_factor"], changed["throttled_until"]
        if factor is None:
            return f"Account {changed['name']} has all of its limits."
        return f"Account {changed['name']} has {factor} of its limits until {until or 'lifted'}."

    show(changed, as_json, text)


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
    times = ["created_at", "expires_at", "revoked_at", "last_used_on"]
    columns = ["id", "label", "models", *ledger.KEY_LIMITS, "budget_id", *times]
    show(found, as_json, lambda: table(found["keys"], columns))


@key.command("revoke")
@click.argument("key_id")
@click.option("--compromised", is_flag=True, help="Somebody else has it: cut what runs, too.")
@json_option
@click.pass_obj
def key_revoke(context: Context, key_id: str, compromised: bool, as_json: bool) -> None:
    """Refuse a key from the next request on."""
    path = f"/admin/v1/keys/{quote(key_id, safe='')}/revoke"
    changed = context.call("POST", path, {"compromised": compromised})
    cut = f" Requests cut: {changed['cut']}." if compromised else ""
    show(changed, as_json, lambda: f"Key {changed['id']} is revoked.{cut}")


@key.command("rotate")
@click.argument("key_id")
@click.option("--overlap", default="24h", show_default=True, help="How long the old key goes on.")
@json_option
@click.pass_obj
def key_rotate(context: Context, key_id: str, overlap: str, as_json: bool) -> None:
    """Print a new key like the old one, which ends after the overlap.

    The new key goes on with the old one's monthly budget: what both spend counts together.
    """
    path = f"/admin/v1/keys/{quote(key_id, safe='')}/rotate"
    added = context.call("POST", path, {"overlap": overlap})
    show(added, as_json, lambda: shown_once(added))


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
    body = {**prices, **given({"without_notice": reason})}
    added = context.call("POST", "/admin/v1/prices", body)

    def text() -> str:
        counts = f"{added['added']} added, {added['unchanged']} unchanged."
        rows = [price_table(added["prices"]), ""] if added["added"] else []
        return "\n".join([*rows, counts, *map(plain, billing.told_of_prices(added))])

    show(added, as_json, text)


@price.command("add")
@click.argument("model")
@click.option("--input", metavar="AMOUNT", help="For a million tokens, as the next six.")
@click.option("--cached-input", metavar="AMOUNT", help="Never given: as input.")
@click.option("--cache-write", metavar="AMOUNT", help="Never given: as input.")
@click.option(
    "--cache-write-12h",
    metavar="AMOUNT",
    help="Of what is kept for 12 hours. Never given: requests for that are refused.",
)
@click.option("--output", metavar="AMOUNT", help="Never given: 0, as for input.")
@click.option("--image-input", metavar="AMOUNT", help="Never given: as input.")
@click.option("--image-output", metavar="AMOUNT", help="Never given: as output.")
@click.option("--web-search", metavar="AMOUNT", help="For a call. Never given: 0.")
@click.option(
    "--file-search",
    metavar="AMOUNT",
    help="For a call. Never given: requests with the tool are refused.",
)
@click.option(
    "--container",
    metavar="AMOUNT",
    help="For a new container in which code runs. Never given: requests with such a tool are "
    "refused.",
)
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
    """Add the price of MODEL, a name or a shell pattern.

    To a model applies the most specific name or pattern that means it, and only that. Rates that
    are left out are those of the price that this one supersedes, or else of the one that applied
    to that name or pattern before. The output says what was taken over, which known models the
    price applies to, which later price will supersede it, and which notice was published.
    """
    add_prices(context, {"prices": [given(options)]}, without_notice, reason, as_json)


@price.command("import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@notice_options
@json_option
@click.pass_obj
def price_import(
    context: Context, file: Path, as_json: bool, without_notice: bool, reason: str | None
) -> None:
    """Add the prices of a TOML file, all or none. Prices that are in force anyway are left out.

    The file says all: a rate that it leaves out is not given any more, whatever was in force.
    """
    prices = {**read_prices(file), "take_over": False}
    add_prices(context, prices, without_notice, reason, as_json)


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
    "shadowed_by",
]


def price_table(rows: list[dict[str, Any]]) -> str:
    shadowed = ({**row, "shadowed_by": billing.few(row["shadowed_by"]) or None} for row in rows)
    return table(shadowed, PRICE_COLUMNS)


@price.command("list")
@json_option
@click.pass_obj
def price_list(context: Context, as_json: bool) -> None:
    """Past, current and coming prices.

    A rate of - was not given. `shadowed_by` are more specific names and patterns, whose prices
    apply to the models that they mean instead of this one.
    """
    found = context.call("GET", "/admin/v1/prices")
    show(found, as_json, lambda: price_table(found["prices"]))


@price.command("which")
@click.argument("model")
@click.option("--tier", help="Of a response that reports this service tier.  [default: default]")
@click.option("--input-tokens", type=int, help="Of a request with so many.  [default: 0]")
@click.option("--at", metavar="TIME", help="At that time; left out: now.")
@json_option
@click.pass_obj
def price_which(context: Context, /, as_json: bool, **options: Any) -> None:
    """Show which price applies to MODEL, which others match it, and why they don't apply."""
    found = context.call("GET", "/admin/v1/prices/which", query=given(options))

    def text() -> str:
        lines = [price_table([found["applies"]])] if found["applies"] else []
        lines.append(found["why"])
        for each in found["others"]:
            about = f"{billing.slot_name(each)}, {each['status']} since {each['effective_at']}"
            lines.append(f"Not {about.replace('coming since', 'coming at')}: {each['because']}.")
        return "\n".join(lines)

    show(found, as_json, text)


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
    added = context.call("POST", _account(account, "/payments"), given(options))
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
@click.option(
    "--refuse-requests",
    "refuses_requests",
    is_flag=True,
    help="Of a maintenance: answer new requests with 503 while it lasts.",
)
@json_option
@click.pass_obj
def notice_add(context: Context, /, as_json: bool, **options: Any) -> None:
    """Add a notice. New terms need billing.terms_notice_days of notice."""
    added = context.call("POST", "/admin/v1/notices", given(options))
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


@commands.group()
def user() -> None:
    """Who may log in to the dashboard."""


def link_text(added: dict[str, Any]) -> str:
    until = added["link_expires_at"]
    return f"{added['link']}\n\n{added['email']} sets a password there, once, until {until}."


@user.command("add")
@click.argument("email")
@click.option("--operator", is_flag=True, help="May do everything.")
@click.option("--account", metavar="NAME", help="Owns this account.")
@click.option("--viewer", is_flag=True, help="Of the account: sees all of it, changes nothing.")
@json_option
@click.pass_obj
def user_add(
    context: Context, email: str, operator: bool, account: str | None, viewer: bool, as_json: bool
) -> None:
    """Add a login and print the link with which its password is set, once."""
    if operator == bool(account) or (operator and viewer):
        raise click.UsageError("give --operator, or --account NAME with or without --viewer")
    role = "operator" if operator else "viewer" if viewer else "owner"
    body = given({"email": email, "role": role, "account": account})
    added = context.call("POST", "/admin/v1/users", body)
    show(added, as_json, lambda: link_text(added))


@user.command("list")
@json_option
@click.pass_obj
def user_list(context: Context, as_json: bool) -> None:
    """All logins, operators first."""
    found = context.call("GET", "/admin/v1/users")
    columns = ["email", "role", "account", "password_set_at", "link_expires_at", "id"]
    show(found, as_json, lambda: table(found["users"], columns))


def which_user(function: Decorated) -> Decorated:
    """Of several logins of one address."""
    account = click.option("--account", metavar="NAME", help="The login of this account.")
    operator = click.option("--operator", is_flag=True, help="The operator's login.")
    return account(operator(function))


def _which(account: str | None, operator: bool) -> dict[str, str]:
    return given({"account": account, "operator": "true" if operator else None})


@user.command("remove")
@click.argument("email")
@which_user
@json_option
@click.pass_obj
def user_remove(
    context: Context, email: str, account: str | None, operator: bool, as_json: bool
) -> None:
    """Remove a login, and log it out."""
    path = f"/admin/v1/users/{quote(email, safe='')}"
    removed = context.call("DELETE", path, query=_which(account, operator))
    show(removed, as_json, lambda: f"User {removed['email']} is removed.")


@user.command("reset")
@click.argument("email")
@which_user
@json_option
@click.pass_obj
def user_reset(
    context: Context, email: str, account: str | None, operator: bool, as_json: bool
) -> None:
    """End a login's password and sessions, and print a new link."""
    path = f"/admin/v1/users/{quote(email, safe='')}/reset"
    added = context.call("POST", path, query=_which(account, operator))
    show(added, as_json, lambda: link_text(added))


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
    if as_csv:
        click.echo("".join(csv_lines(rows)), nl=False)
    else:
        click.echo(f"{table(rows, columns)}\n\nTotals\n{details(totals)}")


def one_form(as_csv: bool, as_json: bool) -> None:
    if as_csv and as_json:
        raise click.UsageError("--csv and --json exclude each other")


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
        click.echo("".join(csv_lines(statement_lines(found))), nl=False)
    else:
        show(found, as_json, lambda: statement_text(found))


CORRECTION_AMOUNTS = ("before", "after", "difference")


def statement_text(found: dict[str, Any]) -> str:
    totals, currency = found["totals"], found["currency"]
    lately = [f"{month} {exact(paid, currency)}" for month, paid in found["paid_by_month"].items()]
    paid_lately = exact(found["paid_last_three_months"], currency)
    summary = {
        "opening balance": exact(found["opening_balance"], currency),
        "payments": exact(totals["paid"], currency),
        "usage": exact(totals["cost"], currency),
        "closing balance": exact(found["closing_balance"], currency),
        "requests": totals["requests"],
        "of them estimated": totals["estimated"],
        "without usage": totals["unreported"],
        "paid in three months": f"{paid_lately} ({', '.join(lately)})",
    }
    used = [{**row, "cost": exact(row["cost"], currency)} for row in found["usage"]]
    paid = [{**row, "amount": exact(row["amount"], currency)} for row in found["payments"]]
    state = "closed" if found["closed"] else "so far"
    parts = [f"{found['account']}, {found['month']}, {state}, in {currency}"]
    parts.append(details(summary))
    parts += [table(used, ["day", "model", *SUM_COLUMNS])] if used else []
    right = [
        {**row, **{name: exact(row[name], currency) for name in CORRECTION_AMOUNTS}}
        for row in found["corrections"]
    ]
    parts += [table(right, ["request_id", "day", *CORRECTION_AMOUNTS])] if right else []
    parts += [table(paid, ["created_at", "amount", "reference", "reason"])] if paid else []
    return "\n\n".join(parts)


def exact(amount: str, currency: str) -> str:
    """With the currency's digits after the point at least, as people write it."""
    return decimal(parse_amount(amount), digits_of(currency))


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


MAX_NICENESS = 19


@db.command("backup")
@click.argument("path")
@click.option(
    "--keep",
    type=click.IntRange(1),
    metavar="N",
    help="Keep the newest N backups, this one included, and remove older ones.",
)
@json_option
@click.pass_obj
def db_backup(context: Context, path: str, keep: int | None, as_json: bool) -> None:
    """Copy the database to PATH and verify the copy, while the gateway runs or not. The SHA-256 is
    written to PATH.sha256. If PATH is a folder, the file in it is named by the time; otherwise an
    earlier backup at PATH is replaced, or with --keep renamed to PATH.1, PATH.2 and so on."""
    os.nice(MAX_NICENESS)  # the gateway comes first
    made = backup.back_up(context.loaded.database_path, path, keep)
    text = "Backup {path}: {bytes} bytes, {requests} requests, schema {schema}, in {seconds} s."
    show(made._asdict(), as_json, lambda: text.format(**made._asdict()))


@db.command("restore")
@click.argument("path")
@json_option
@click.pass_obj
def db_restore(context: Context, path: str, as_json: bool) -> None:
    """Verify the backup PATH and put a copy of it in place of the database. No gateway may be
    running. The replaced database is kept beside it."""
    started = time.monotonic()
    database = context.loaded.database_path
    os.umask(0o077)
    with contextlib.ExitStack() as stack:
        stack.enter_context(backup.plain_errors(f"{path} was not restored"))
        stack.enter_context(hold_lock(database))
        if database.exists():
            stack.enter_context(hold(database))
        restored = backup.restore(database, path, ledger.CHECKS)
    done = {
        "database": str(database),
        "restored_from": path,
        "replaced": str(restored.replaced) if restored.replaced else None,
        "bytes": restored.bytes,
        **restored.contents._asdict(),
        "latest_request_at": iso_time(restored.contents.latest_request_at),
    }
    try:
        done |= context.call("POST", "/admin/v1/db/check")
    except LedgerError as error:
        done |= {"ok": False, "problems": [str(error)]}
    done["seconds"] = round(time.monotonic() - started, 3)
    show(done, as_json, lambda: restored_text(done))
    if not done["ok"]:
        raise SystemExit(1)


def restored_text(done: dict[str, Any]) -> str:
    latest = done["latest_request_at"]
    until = f", the newest of {latest}" if latest else ""
    lines = [f"{done['database']} is restored: {done['requests']} requests{until}."]
    if done["replaced"]:
        lines.append(f"The replaced database is kept: {done['replaced']}")
    return "\n".join([*lines, *(done["problems"] or ["The database is sound."])])


def time_text(found: dict[str, Any]) -> str:
    """Return what `db set-time` did, or would do."""
    at, moved = found["time"], found["moved"]
    if not moved:
        return f"Nothing in the ledger is dated after {at}."
    rows = "\n".join(f"  {table}: {count}" for table, count in moved.items())
    what = "Moved to" if found["done"] else "Dated after"
    return f"{what} {at}, rows by table:\n{rows}"


@db.command("set-time")
@click.argument("time", required=False)
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
@click.pass_obj
def db_set_time(context: Context, time: str | None, yes: bool, as_json: bool) -> None:
    """Move whatever is dated after TIME to TIME: requests, payments, sums and all else. TIME is an
    ISO 8601 time or a duration ago; left out: now. For a ledger that has entries of the future,
    after a clock that was ahead was believed. It can't be undone. Costs stay."""
    path, body = "/admin/v1/db/set-time", given({"time": time})
    found = context.call("POST", path, {**body, "preview": True})
    if found["moved"] and not yes:
        click.echo(time_text(found), err=True)
        click.confirm("Move all of this?", abort=True, err=True)
    found = context.call("POST", path, body)
    show(found, as_json, lambda: time_text(found))


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
FIRST_RUN = "first run"  # who makes its changes
FIRST_OPERATOR = "operator@localhost"


async def import_example(books: Books) -> None:
    """The prices of prices.toml, so that a newcomer's first requests are served; none where they
    are in another currency."""
    example = msgspec.convert(read_prices(shipped("prices.toml")), NewPrices)
    if example.currency == books.currency:
        prices = admin.prices_of(example, books.store.time())
        await books.add_prices(prices, without_notice=None, by=FIRST_RUN)


async def dashboard(api: admin.API) -> str:
    """Where it is. Until an operator has a password, and unless somebody has been made one, the
    first gets a link at each start to set one."""
    actor = admin.Actor(FIRST_RUN, "operator")
    operators = await api.users.all(None, "operator")
    first = [user["id"] for user in operators if user["email"] == FIRST_OPERATOR]
    if any(user["password_set_at"] for user in operators) or (operators and not first):
        return f"Dashboard  {api.dashboard_url}\n"
    if first:
        added = await api.perform(admin.API.reset_user, actor, {"user": first[0]})
    else:
        new = {"email": FIRST_OPERATOR, "role": "operator"}
        added = await api.perform(admin.API.add_user, actor, body=msgspec.json.encode(new))
    return f"Dashboard  {added['link']}   (to set the operator's password, once)\n"


async def welcome(api: admin.API, base_url: str, demo: bool) -> str:
    """What a newcomer needs: with no account yet, a first one and its key, shown this once."""
    accounts = Accounts(api.books.store)
    command = f"{os.path.relpath(sys.executable)} {os.path.relpath(sys.argv[0])}"
    key = "$REDBTC_API_KEY"
    about_key = f"Your API key was shown at the first start. Another:  {command} key add first"
    if not await accounts.any():
        account = await accounts.add(FIRST_ACCOUNT, None, {}, FIRST_RUN)
        key = (await accounts.add_key(account["id"], FIRST_RUN, None, {}, FIRST_RUN))["key"]
        about_key = f"API key    {key}   (shown this once: store it now)"
    model = await api.example_model(None)
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
