"""What people use: the admin API and the commands.

The commands, and later the dashboard, all act through the admin API: on a running gateway over the
Unix socket beside its database (mode 0600: who may open it could open the database itself), on a
stopped one through the same app within the command's own process. So nothing is ever written
behind a running gateway's back. This room imports only the ledger.
"""

from __future__ import annotations

import asyncio
import contextlib
import csv
import io
import os
import re
import socket
import sqlite3
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar
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

import redbtc_ledger as ledger
from redbtc_ledger import Accounts, LedgerError, Loaded, Range, Settings, Store

# ── Admin API ────────────────────────────────────────────────────────────────────────────────────
# /admin/v1/…, JSON in and out, strict: an unknown member is an error that names it. Served on the
# Unix socket alone.

NAME_FORM = r"^[^\s/\x00-\x1f\x7f]([^/\x00-\x1f\x7f]*[^\s/\x00-\x1f\x7f])?$"
Limit = Annotated[int, Meta(ge=0, le=1_000_000_000)]
AccountName = Annotated[str, Meta(min_length=1, max_length=100, pattern=NAME_FORM)]
Text = Annotated[str, Meta(max_length=200)]


class NewAccount(Struct, forbid_unknown_fields=True):
    """POST /admin/v1/accounts. A limit left out is the settings'."""

    name: AccountName
    email: Text | None = None
    concurrency: Limit | None = None
    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None


class AccountChange(Struct, forbid_unknown_fields=True):
    """PATCH /admin/v1/accounts/{account}: what is left out stays; null is the settings' again."""

    email: Text | UnsetType | None = UNSET
    concurrency: Limit | UnsetType | None = UNSET
    requests_per_minute: Limit | UnsetType | None = UNSET
    tokens_per_minute: Limit | UnsetType | None = UNSET


class Suspension(Struct, forbid_unknown_fields=True):
    """POST /admin/v1/accounts/{account}/suspend"""

    reason: Text | None = None


class NewKey(Struct, forbid_unknown_fields=True):
    """POST /admin/v1/accounts/{account}/keys. `expires` is a time or a duration from now."""

    label: Text = ""
    expires: Text | None = None
    concurrency: Limit | None = None
    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None


class Rotation(Struct, forbid_unknown_fields=True):
    """POST /admin/v1/keys/{key}/rotate. The old key goes on for `overlap`."""

    overlap: Text = "24h"


class UsageQuery(Struct, forbid_unknown_fields=True):
    """GET /admin/v1/requests: filters, each left out where not wanted."""

    account: Text | None = None
    key: Text | None = None
    model: Text | None = None
    since: Text | None = None
    until: Text | None = None
    limit: Annotated[int, Meta(ge=1)] | None = None


Wanted = TypeVar("Wanted", bound=Struct)


async def read(request: Request, wanted: type[Wanted]) -> Wanted:
    """The request's JSON body, or what follows from an empty one."""
    return decode(await request.body() or b"{}", wanted)


def decode(body: bytes, wanted: type[Wanted]) -> Wanted:
    try:
        return msgspec.json.decode(body, type=wanted)
    except (msgspec.DecodeError, RecursionError) as error:
        raise LedgerError(str(error)) from None


def limits_of(body: NewAccount | NewKey) -> dict[str, int | None]:
    return {name: getattr(body, name) for name in ledger.LIMITS}


def answer(content: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(content), status, media_type="application/json")


class API:
    """The handlers; each is one route."""

    def __init__(self, store: Store, settings: Callable[[], Settings]) -> None:
        self._store = store
        self._settings = settings
        self._accounts = Accounts(store)

    async def list_accounts(self, _: Request) -> Response:
        return answer({"accounts": await self._accounts.all()})

    async def add_account(self, request: Request) -> Response:
        body = await read(request, NewAccount)
        return answer(await self._accounts.add(body.name, body.email, limits_of(body)), 201)

    async def show_account(self, request: Request) -> Response:
        return answer(await self._accounts.show(request.path_params["account"]))

    async def set_account(self, request: Request) -> Response:
        body = await read(request, AccountChange)
        given = {
            name: value
            for name, value in msgspec.structs.asdict(body).items()
            if value is not UNSET
        }
        return answer(await self._accounts.set(request.path_params["account"], given))

    async def suspend_account(self, request: Request) -> Response:
        body = await read(request, Suspension)
        return answer(await self._accounts.suspend(request.path_params["account"], body.reason))

    async def resume_account(self, request: Request) -> Response:
        return answer(await self._accounts.resume(request.path_params["account"]))

    async def list_keys(self, request: Request) -> Response:
        return answer({"keys": await self._accounts.keys(request.path_params["account"])})

    async def add_key(self, request: Request) -> Response:
        body = await read(request, NewKey)
        expires = ledger.parse_time(body.expires, relative_to_past=False) if body.expires else None
        account = request.path_params["account"]
        key = await self._accounts.add_key(account, body.label, expires, limits_of(body))
        return answer(key, 201)

    async def revoke_key(self, request: Request) -> Response:
        return answer(await self._accounts.revoke_key(request.path_params["key"]))

    async def rotate_key(self, request: Request) -> Response:
        body = await read(request, Rotation)
        overlap = 0 if body.overlap == "0" else ledger.parse_duration(body.overlap)
        return answer(await self._accounts.rotate_key(request.path_params["key"], overlap), 201)

    async def requests(self, request: Request) -> Response:
        """Rows of the ledger as they are read, then their totals."""
        try:
            query = msgspec.convert(dict(request.query_params), UsageQuery, strict=False)
        except msgspec.ValidationError as error:
            raise LedgerError(str(error)) from None
        wanted = await self._range(query)
        return StreamingResponse(self._report(wanted), media_type="application/json")

    async def _range(self, query: UsageQuery) -> Range:
        account = await self._accounts.show(query.account) if query.account else None
        if query.key:
            await self._accounts.key(query.key)
        given: dict[str, int] = {}
        if query.since:
            given["since"] = ledger.parse_time(query.since, relative_to_past=True)
        if query.until:
            given["until"] = ledger.parse_time(query.until, relative_to_past=True)
        if query.limit:
            given["limit"] = query.limit
        return Range(
            account=account["id"] if account else None,
            key=query.key,
            model=query.model,
            currency=self._settings().billing.currency,
            **given,
        )

    async def _report(self, wanted: Range) -> AsyncIterator[bytes]:
        yield b'{"requests":['
        comma = b""
        async for row in ledger.requests_in(self._store, wanted):
            yield comma + orjson.dumps(row)
            comma = b",\n"
        totals = await ledger.totals_of(self._store, wanted)
        yield b'],"totals":' + orjson.dumps(totals) + b"}"

    async def check_database(self, _: Request) -> Response:
        wrong = await ledger.check_database(self._store)
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
            Route(f"{key}/revoke", self.revoke_key, methods=["POST"]),
            Route(f"{key}/rotate", self.rotate_key, methods=["POST"]),
            Route("/admin/v1/requests", self.requests, methods=["GET"]),
            Route("/admin/v1/db/check", self.check_database, methods=["POST"]),
        ]


async def refused(_: Request, error: Exception) -> Response:
    """A LedgerError in OpenAI's error form."""
    status: dict[type[Exception], int] = {
        ledger.NotFound: 404,
        ledger.Conflict: 409,
        ledger.LedgerUnavailable: 503,
    }
    body = {"message": str(error), "type": "invalid_request_error", "param": None, "code": None}
    return answer({"error": body}, status.get(type(error), 400))


async def unknown(_: Request, error: Exception) -> Response:
    """What Starlette itself refuses: an unknown path or method."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    body = {"message": "Unknown request URL.", "type": "invalid_request_error", "code": None}
    return answer({"error": body}, status)


def app(store: Store, settings: Callable[[], Settings]) -> Starlette:
    """The admin API on a store; `settings` gives those in force."""
    handlers: dict[Any, Any] = {HTTPException: unknown}
    errors = (LedgerError, ledger.NotFound, ledger.Conflict, ledger.LedgerUnavailable)
    handlers |= dict.fromkeys(errors, refused)
    return Starlette(routes=API(store, settings).routes(), exception_handlers=handlers)


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
                    transport = httpx2.ASGITransport(app(store, lambda: loaded.settings))
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
        return ledger.load_settings(self._config)

    def call(self, method: str, path: str, body: Any = None, query: Any = None) -> Any:
        """The JSON that the admin API answers. Raises LedgerError with its message."""

        async def ask() -> Any:
            async with connect(self.loaded) as client:
                response = await client.request(method, path, json=body, params=query)
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


Decorated = Callable[..., Any]


def limit_options(function: Decorated) -> Decorated:
    for name in reversed(ledger.LIMITS):
        option = "--" + name.replace("_", "-")
        text = {
            "concurrency": "Requests in flight at most; 0: no limit.",
            "requests_per_minute": "Requests a minute at most; 0: no limit.",
            "tokens_per_minute": "Tokens a minute at most; 0: no limit.",
        }[name]
        function = click.option(option, type=LimitType(), help=text)(function)
    return function


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


def given(values: dict[str, Any]) -> dict[str, Any]:
    """What was said, with `default` as the API says it: null."""
    return {
        name: None if value == "default" else value
        for name, value in values.items()
        if value is not None
    }


def show(content: Any, as_json: bool, text: Callable[[], str]) -> None:
    click.echo(orjson.dumps(content, option=orjson.OPT_INDENT_2) if as_json else text())


def table(rows: Iterable[dict[str, Any]], columns: list[str]) -> str:
    """Rows under their columns' names; what is missing is a dash."""
    lines = [columns] + [
        ["-" if row.get(column) is None else str(row[column]) for column in columns] for row in rows
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def details(record: dict[str, Any]) -> str:
    width = max(len(name) for name in record)
    return "\n".join(
        f"{name.ljust(width)}  {'-' if value is None else value}" for name, value in record.items()
    )


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
@limit_options
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
    columns = ["name", "id", "status", *ledger.LIMITS, "keys_in_force", "created_at"]
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
@limit_options
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
@limit_options
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
    columns = ["id", "label", *ledger.LIMITS, "created_at", "expires_at", "revoked_at"]
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
    "duration_ms",
]


@commands.command()
@click.option("--account", help="Of this account.")
@click.option("--key", help="Of this key (its id).")
@click.option("--model", help="Of models that match this shell pattern.")
@click.option("--since", metavar="TIME", help="From then on: an ISO 8601 time, or 24h ago.")
@click.option("--until", metavar="TIME", help="Up to then.")
@click.option("--limit", type=click.IntRange(1), help="Only the newest so many.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
@json_option
@click.pass_obj
def usage(context: Context, /, as_csv: bool, as_json: bool, **filters: Any) -> None:
    """The ledger: a row for each request that reached an upstream, oldest first. The totals are of
    the whole range, whatever the limit."""
    if as_csv and as_json:
        raise click.UsageError("--csv and --json exclude each other")
    if as_json:
        context.copy("/admin/v1/requests", given(filters), sys.stdout.buffer)
        click.echo()
        return
    found = context.call("GET", "/admin/v1/requests", query=given(filters))
    click.echo(as_csv_text(found["requests"]) if as_csv else usage_text(found), nl=not as_csv)


def as_csv_text(rows: list[dict[str, Any]]) -> str:
    """RFC 4180, with a line of column names. What a spreadsheet would take for a formula is
    text."""
    out = io.StringIO()
    writer = csv.writer(out)
    if rows:
        writer.writerow(rows[0])
    for row in rows:
        values = ("" if value is None else str(value) for value in row.values())
        writer.writerow(f"'{value}" if value[:1] in "=+-@" and value else value for value in values)
    return out.getvalue()


def usage_text(found: dict[str, Any]) -> str:
    totals = {name: value for name, value in found["totals"].items() if value is not None}
    return f"{table(found['requests'], USAGE_COLUMNS)}\n\nTotals\n{details(totals)}"


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


async def welcome(store: Store, base_url: str, demo: bool) -> str:
    """What a newcomer needs: with no account yet, a first one and its key, shown this once."""
    accounts = Accounts(store)
    none: dict[str, int | None] = dict.fromkeys(ledger.LIMITS)
    command = f"{os.path.relpath(sys.executable)} {os.path.relpath(sys.argv[0])}"
    key = "$REDBTC_API_KEY"
    about_key = f"Your API key was shown at the first start. Another:  {command} key add first"
    if not await accounts.all():
        await accounts.add(FIRST_ACCOUNT, None, none)
        key = (await accounts.add_key(FIRST_ACCOUNT, "first run", None, none))["key"]
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
