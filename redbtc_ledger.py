"""The ledger: settings, store, accounts and keys, usage. What is kept, and nothing of HTTP.

This is the lowest of the three rooms: the gateway (redbtc_proxy.py) and the people's side of it
(redbtc_admin.py) stand above and import it; it imports neither.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import hashlib
import ipaddress
import os
import re
import secrets
import sqlite3
import sys
import time
import tomllib
import zlib
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import chain, groupby
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import urlsplit

import aiosqlite
import msgspec
from msgspec import Meta, Struct

HERE = Path(__file__).resolve().parent
INSTALLED = Path(sys.prefix) / "share" / "redbtc-proxy"  # where the package puts schema.sql


class LedgerError(Exception):
    """What was asked for can't be done; the message says why in one line, fit for a user."""


class NotFound(LedgerError):
    """There is no such account or key."""


class Conflict(LedgerError):
    """It exists already, or it is in a state that doesn't allow this."""


class LedgerUnavailable(LedgerError):
    """The database can't be read or written now; it will be tried again."""


# ── Times ────────────────────────────────────────────────────────────────────────────────────────
# The ledger's clock is the wall clock in milliseconds. Limits and timeouts use the monotonic clock.

RELATIVE_TIME = re.compile(r"(\d{1,9})(s|m|h|d|w)")
SECONDS_IN = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def now_ms() -> int:
    """The wall clock, in milliseconds since 1970 UTC."""
    return time.time_ns() // 1_000_000


def iso_time(milliseconds: int | None) -> str | None:
    """2026-11-23T10:47:00.123Z, as reports and JSON show times."""
    if milliseconds is None:
        return None
    seconds, rest = divmod(milliseconds, 1000)
    return f"{_iso_second(seconds)}.{rest:03d}Z"


@functools.lru_cache(1000)
def _iso_second(seconds: int) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}"


def parse_duration(text: str) -> int:
    """Milliseconds of '90s', '15m', '24h', '30d' or '2w'. Raises LedgerError."""
    match = RELATIVE_TIME.fullmatch(text.strip())
    if not match:
        raise LedgerError(f"{text!r} is not a duration; write it like 90s, 15m, 24h, 30d or 2w")
    return int(match[1]) * SECONDS_IN[match[2]] * 1000


def parse_time(text: str, *, relative_to_past: bool) -> int:
    """Milliseconds since 1970 of an ISO 8601 time (UTC where it names no zone) or of a duration
    ('24h'), which counts back from now or forward. Raises LedgerError."""
    if RELATIVE_TIME.fullmatch(text.strip()):
        distance = parse_duration(text)
        return now_ms() - distance if relative_to_past else now_ms() + distance
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        raise LedgerError(
            f"{text!r} is not a time; write ISO 8601 (2026-11-23T10:00:00Z) or a duration (24h)"
        ) from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)


# ── Settings ─────────────────────────────────────────────────────────────────────────────────────
# config.toml, strictly: an unknown key, a wrong type or a value out of range is an error that names
# the key's full path, what was found and what is allowed. The defaults below are the documented
# ones; config.toml beside this file explains each.

Count = Annotated[int, Meta(ge=0, le=1_000_000_000)]
Seconds = Annotated[float, Meta(gt=0, le=86_400)]
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Variable = Annotated[str, Meta(pattern=r"^([A-Za-z_][A-Za-z0-9_]*)?$")]
Url = Annotated[str, Meta(pattern=r"^https?://[^\s/?#]+[^\s?#]*$")]


Proxy = Annotated[str, Meta(pattern=r"^((https?|socks5h?)://[^\s/?#]+/?)?$")]


class Table(Struct, forbid_unknown_fields=True, frozen=True):
    """A table of the settings file."""


class Server(Table, frozen=True):
    """[server]: what listens, and what a request may cost before it is read."""

    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 8080
    public_url: Url = "http://127.0.0.1:8080"
    trusted_proxies: tuple[str, ...] = ("127.0.0.1",)
    max_body_bytes: Annotated[int, Meta(ge=1024, le=4 << 30)] = 104_857_600
    body_timeout_seconds: Seconds = 60
    drain_seconds: Annotated[float, Meta(ge=0, le=86_400)] = 600
    log_level: Literal["debug", "info", "warning", "error"] = "info"


class Database(Table, frozen=True):
    """[database]"""

    path: Annotated[str, Meta(min_length=1)] = "redbtc.db"
    synchronous: Literal["full", "normal"] = "full"


class UpstreamSettings(Table, frozen=True):
    """[[upstreams]]: where requests may go. `weight` shares among those of equal `priority`."""

    name: Name = "openai"
    base_url: Url = "https://api.openai.com/v1"
    api_key_env: Variable = "OPENAI_API_KEY"
    models: Annotated[tuple[str, ...], Meta(min_length=1)] = ("*",)
    priority: Count = 1
    weight: Annotated[int, Meta(ge=1, le=1_000_000)] = 1
    max_concurrency: Count = 0
    connect_timeout_seconds: Seconds = 5
    first_byte_timeout_seconds: Seconds = 600
    idle_timeout_seconds: Seconds = 300
    total_timeout_seconds: Seconds = 3600
    transport: Literal["asyncio", "httpx"] = "asyncio"
    proxy: Proxy = ""


class AccountLimits(Table, frozen=True):
    """[limits.account]: an account's limits unless set on it; 0: none."""

    concurrency: Count = 8
    requests_per_minute: Count = 0
    tokens_per_minute: Count = 0


class Limits(Table, frozen=True):
    """[limits]: all accounts together; 0: none."""

    concurrency: Count = 0
    requests_per_minute: Count = 0
    tokens_per_minute: Count = 0
    queue_seconds: Annotated[float, Meta(ge=0, le=3600)] = 10
    account: AccountLimits = AccountLimits()


class Metering(Table, frozen=True):
    """[metering]"""

    include_usage: Literal["add", "client"] = "add"
    on_disconnect: Literal["drain", "cancel"] = "drain"
    drain_seconds: Annotated[float, Meta(ge=0, le=3600)] = 15


class Billing(Table, frozen=True):
    """[billing]. Until there are prices only `currency` is used."""

    currency: Annotated[str, Meta(pattern="^[A-Z]{3}$")] = "USD"
    price_notice_days: Count = 30
    terms_notice_days: Count = 14
    default_credit_limit: Annotated[str, Meta(pattern=r"^(unlimited|\d+(\.\d+)?)$")] = "unlimited"
    unpriced_models: Literal["refuse", "free"] = "free"


class Retention(Table, frozen=True):
    """[retention]"""

    request_log_days_max: Count = 30
    usage_days: Count = 0
    terminated_account_days: Count = 30


class Metrics(Table, frozen=True):
    """[metrics]: with an empty `token_env` only loopback may read them."""

    token_env: Variable = ""


class Settings(Table, frozen=True):
    """All of config.toml."""

    server: Server = Server()
    database: Database = Database()
    upstreams: Annotated[tuple[UpstreamSettings, ...], Meta(min_length=1)] = (UpstreamSettings(),)
    limits: Limits = Limits()
    metering: Metering = Metering()
    billing: Billing = Billing()
    retention: Retention = Retention()
    metrics: Metrics = Metrics()


# Accepted now, used by what is still to come; `check` says so for each that is not at its default.
WITHOUT_EFFECT = [
    "server.public_url",
    "upstreams.max_concurrency",
    "billing.price_notice_days",
    "billing.terms_notice_days",
    "billing.default_credit_limit",
    "billing.unpriced_models",
    "retention.request_log_days_max",
    "retention.usage_days",
    "retention.terminated_account_days",
]


class SettingsError(LedgerError):
    """The settings file is missing, unreadable or wrong."""


class Loaded(NamedTuple):
    """Settings as read, the file they came from (None: the defaults), the folder where relative
    paths start, and the keys in it that have no effect yet."""

    settings: Settings
    file: Path | None
    folder: Path
    without_effect: list[str]

    @property
    def database_path(self) -> Path:
        return self.folder / self.settings.database.path


def load_settings(path: str | None) -> Loaded:
    """Settings from `path`, else from $REDBTC_CONFIG, else from config.toml beside this script,
    else the defaults. Raises SettingsError with one line that says what is wrong and where."""
    beside = HERE / "config.toml"
    chosen = path or os.environ.get("REDBTC_CONFIG") or (str(beside) if beside.exists() else None)
    if chosen is None:
        return Loaded(Settings(), None, Path.cwd(), [])
    file = Path(chosen).absolute()
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{file}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file}: not TOML: {error}") from None
    try:
        settings = parse_settings(tables)
    except SettingsError as error:
        raise SettingsError(f"{file}: {error}") from None
    unused = [key for key in WITHOUT_EFFECT if _value(settings, key) != _value(Settings(), key)]
    return Loaded(settings, file, file.parent, unused)


def parse_settings(tables: Mapping[str, Any]) -> Settings:
    """Settings out of parsed TOML. Raises SettingsError."""
    try:
        settings = msgspec.convert(tables, Settings)
    except msgspec.ValidationError as error:
        raise SettingsError(_explain(str(error), tables)) from None
    names = [upstream.name for upstream in settings.upstreams]
    for name in names:
        if names.count(name) > 1:
            raise SettingsError(f"upstreams.name: {name!r} stands twice; each needs its own name")
    for proxy in settings.server.trusted_proxies:
        try:
            ipaddress.ip_network(proxy, strict=False)
        except ValueError:
            raise SettingsError(
                f"server.trusted_proxies: found {proxy!r}; allowed are IP addresses and networks"
            ) from None
    for upstream in settings.upstreams:
        if not _is_url(upstream.base_url):
            raise SettingsError(f"upstreams.base_url: found {upstream.base_url!r}; no such URL")
        if upstream.proxy and upstream.transport != "httpx":
            raise SettingsError('upstreams.proxy: needs transport = "httpx"')
    return settings


def _is_url(text: str) -> bool:
    try:
        return bool(urlsplit(text).hostname) and urlsplit(text).port != 0
    except ValueError:
        return False


def _value(settings: Any, key: str) -> Any:
    first, _, rest = key.partition(".")
    value = getattr(settings, first)
    if isinstance(value, tuple) and rest:
        return {_value(table, rest) for table in value}
    return _value(value, rest) if rest else value


def _explain(message: str, tables: Mapping[str, Any]) -> str:
    """msgspec's message, turned round: the key's path, what was found, what is allowed."""
    what, _, place = message.partition(" - at `$")
    path = place.rstrip("`").lstrip(".")
    unknown = re.fullmatch(r"Object contains unknown field `(.*)`", what)
    if unknown:
        key = f"{path}.{unknown[1]}".lstrip(".")
        return f"{key}: unknown key; allowed here are {', '.join(_keys_at(path))}"
    found: Any = tables
    for step in re.findall(r"[^.\[\]]+", path):
        index = int(step) if isinstance(found, list) and step.isdigit() else step
        try:
            found = found[index]
        except (KeyError, IndexError, TypeError):
            break
    shown = "something else" if path.endswith("_env") else repr(found)  # it may be the secret
    return f"{path or 'settings'}: found {shown}; {what[0].lower()}{what[1:]}"


def _keys_at(path: str) -> list[str]:
    table: Any = Settings()
    for step in re.findall(r"[^.\[\]]+", path):
        table = table[0] if step.isdigit() or step == "..." else getattr(table, step)
    table = table[0] if isinstance(table, tuple) else table
    return list(table.__struct_fields__)


# ── Store ────────────────────────────────────────────────────────────────────────────────────────
# One file, one writer. All writes of the process go through one connection, rows of the ledger in
# groups: whatever has come while a commit was under way is the next commit. Reads have connections
# of their own that can't write. A lock file beside the database keeps every other process out.

APPLICATION_ID = 0x52424343  # marks the file as ours
BUSY_TIMEOUT_MS = 1000
RETRY_SECONDS = 0.25
SECTION = re.compile(r"^-- version (\d+)$", re.MULTILINE)
BEAT = "INSERT OR REPLACE INTO heartbeat (id, beat_at) VALUES (1, ?)"
INTERRUPT = "UPDATE requests SET outcome = 'interrupted' WHERE outcome = 'pending'"
FORGET = "DELETE FROM requests WHERE request_id = ? AND outcome = 'pending'"


Values = Sequence[Any] | dict[str, Any]
Change = tuple[str, Sequence[Any]]  # a statement and its values


class DatabaseInUse(LedgerError):
    """Another process holds the database."""


class Entry(NamedTuple):
    """A statement that waits for the next commit. `insist`: it is tried again until it is written;
    otherwise it fails with the commit that fails."""

    sql: str
    values: Sequence[Any]
    written: asyncio.Future[None]
    insist: bool


def schema() -> str:
    """The text of schema.sql, beside this file or where the package was installed."""
    folder = HERE if (HERE / "schema.sql").exists() else INSTALLED
    return (folder / "schema.sql").read_text(encoding="utf-8")


def migrations(text: str) -> dict[int, str]:
    """The sections of schema.sql by the version that each brings the database to."""
    parts = SECTION.split(text)
    return {int(number): script for number, script in zip(parts[1::2], parts[2::2], strict=True)}


class Writer(aiosqlite.Connection):
    """The connection that writes. A transaction is one call to its thread; one with a single
    statement is one call to SQLite, too, and lets go of Python's lock but once."""

    _synchronous = ""

    async def write(self, changes: Sequence[Change], synchronous: str) -> int:
        """Commit these changes together; returns how many rows the last one changed."""
        changed: int = await self._execute(self._write, changes, synchronous)  # type: ignore[no-untyped-call]
        return changed

    def _write(self, changes: Sequence[Change], synchronous: str) -> int:
        database, changed = self._conn, 0
        if synchronous != self._synchronous:
            database.execute(f"PRAGMA synchronous = {synchronous}")
            self._synchronous = synchronous
        try:
            if len(changes) > 1:
                database.execute("BEGIN IMMEDIATE")
            for sql, values in changes:
                changed = database.execute(sql, values).rowcount
            database.commit()
        except Exception:
            with contextlib.suppress(sqlite3.Error):
                database.rollback()
            raise
        return changed


class Store:
    """The database of one gateway, opened by `async with Store.open(...)`.

    `record` puts a row of the ledger on disk, `transact` makes an administrative change, `rows` and
    `look_up` read. `healthy` is False from a commit that failed to the next that didn't.
    """

    def __init__(self, path: Path, synchronous: str) -> None:
        self.path = path
        self.healthy = True
        self.failure = ""  # what the last failed commit failed with
        self.commits = 0
        self.committed_at = time.monotonic()
        self.interrupted = 0  # rows that the process before this one left behind
        self._synchronous = synchronous
        self._loop = asyncio.get_running_loop()
        self._waiting: list[Entry] = []
        self._wake = asyncio.Event()
        self._closing = False

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, path: Path, synchronous: str) -> AsyncIterator[Store]:
        """The store in the file `path`, made or brought up to date where needed. Raises
        DatabaseInUse, or LedgerError where the file is not ours, too new, or can't be opened."""
        store = cls(path, synchronous)
        async with contextlib.AsyncExitStack() as stack:
            try:
                await store._open(stack)
            except (sqlite3.Error, OSError) as error:
                raise LedgerError(f"{path}: {error}") from None
            yield store

    async def _open(self, stack: contextlib.AsyncExitStack) -> None:
        stack.callback(os.close, _lock(self.path))
        writer = Writer(lambda: sqlite3.connect(self.path, isolation_level=None), 64)
        await stack.enter_async_context(writer)
        self._writer = writer
        await self._configure()
        await self._migrate()
        self.interrupted = await self.transact((INTERRUPT, ()))
        reader = aiosqlite.connect(f"{self.path.as_uri()}?mode=ro", uri=True)
        self._reader = await stack.enter_async_context(reader)
        self._lookup = sqlite3.connect(f"{self.path.as_uri()}?mode=ro", uri=True, timeout=0)
        stack.callback(self._lookup.close)
        loop = asyncio.create_task(self._write_groups(), name="ledger")
        stack.push_async_callback(self._finish, loop)

    async def _configure(self) -> None:
        """Set what durability depends on, then read each back: SQLite is silent when it can't."""
        tables = await self._value("SELECT count(*) FROM sqlite_schema")
        marked = await self._value("PRAGMA application_id")
        if tables and marked != APPLICATION_ID:
            raise LedgerError(f"{self.path} is a database of another program; it is left alone")
        wanted: dict[str, tuple[str | int, str | int]] = {
            "application_id": (APPLICATION_ID, APPLICATION_ID),
            "busy_timeout": (BUSY_TIMEOUT_MS, BUSY_TIMEOUT_MS),
            "journal_mode": ("WAL", "wal"),
            "synchronous": (self._synchronous, {"full": 2, "normal": 1}[self._synchronous]),
            "foreign_keys": ("ON", 1),
            "secure_delete": ("ON", 1),
        }
        for pragma, (value, expected) in wanted.items():
            if await self._value(f"PRAGMA {pragma}") != expected:
                await self._value(f"PRAGMA {pragma} = {value}")
            if (found := await self._value(f"PRAGMA {pragma}")) != expected:
                raise LedgerError(f"{self.path}: {pragma} is {found}, not {expected}")

    async def _migrate(self) -> None:
        version = await self._value("PRAGMA user_version")
        sections = migrations(schema())
        if version > max(sections):
            raise LedgerError(
                f"{self.path} was written by a newer version of this program (schema {version}; "
                f"this one knows {max(sections)})"
            )
        for number, script in sorted(sections.items()):
            if number > version:
                await self._writer.executescript(
                    f"BEGIN IMMEDIATE; {script}\nPRAGMA user_version = {number}; COMMIT;"
                )

    async def _value(self, sql: str) -> Any:
        async with self._writer.execute(sql) as cursor:
            row = await cursor.fetchone()
            return row[0] if row else None

    # Reading

    def look_up(self, sql: str, values: Sequence[Any]) -> tuple[Any, ...] | None:
        """One row by an index, at once, on the event loop: about 5 µs. Raises LedgerUnavailable."""
        try:
            rows = self._lookup.execute(sql, values).fetchall()
        except sqlite3.Error as error:
            raise LedgerUnavailable(f"can't be read: {error}") from None
        return rows[0] if rows else None

    async def rows(self, sql: str, values: Values = ()) -> AsyncIterator[sqlite3.Row]:
        """The rows of a query, as they are read; each by position or by column name."""
        async with self._reader.execute(sql, values) as cursor:
            cursor.row_factory = sqlite3.Row
            while batch := await cursor.fetchmany(500):
                for row in batch:
                    yield row

    # Writing

    async def transact(self, *statements: tuple[str, Sequence[Any]]) -> int:
        """Make an administrative change, all of it or none; returns how many rows the last
        statement changed. Raises sqlite3.IntegrityError, or LedgerUnavailable where it can't be
        committed."""
        try:
            return await self._writer.write(statements, self._synchronous)
        except sqlite3.IntegrityError:
            raise
        except sqlite3.Error as error:
            raise LedgerUnavailable(f"the database can't be written: {error}") from None

    def record(self, sql: str, values: Sequence[Any], *, insist: bool) -> asyncio.Future[None]:
        """Write in the next group; the future is done when it is on disk. With `insist` it is tried
        until it succeeds, otherwise the future raises LedgerUnavailable if this try fails."""
        written: asyncio.Future[None] = self._loop.create_future()
        if self.healthy or insist:
            self._waiting.append(Entry(sql, values, written, insist))
            self._wake.set()
        else:
            written.set_exception(LedgerUnavailable(self.failure))
        return written

    async def can_commit(self) -> bool:
        """Whether a commit succeeds now: one within the last second is proof enough."""
        if self.healthy and time.monotonic() - self.committed_at > 1:
            try:
                await self.transact((BEAT, (now_ms(),)))
                self.committed_at = time.monotonic()
            except LedgerUnavailable as error:
                self.healthy, self.failure = False, str(error)
                self._wake.set()  # the retries that bring it back
        return self.healthy

    async def _write_groups(self) -> None:
        while not self._closing or self._waiting:
            if self.healthy:
                await self._wake.wait()
                self._wake.clear()
            else:
                await asyncio.sleep(RETRY_SECONDS)
            await asyncio.sleep(0)  # whoever is ready in this turn of the loop comes along
            group, self._waiting = self._waiting, []
            if group or not self.healthy:
                await self._write_group(group)

    async def _write_group(self, group: list[Entry]) -> None:
        changes: list[Change] = []
        for sql, entries in groupby(group, key=lambda entry: entry.sql):
            values = [entry.values for entry in entries]
            if sql == RECORD:
                groups = [values[at : at + MOST_ROWS] for at in range(0, len(values), MOST_ROWS)]
                changes += [(record_of(len(rows)), list(chain(*rows))) for rows in groups]
            else:
                changes += [(sql, each) for each in values]
        if not self.healthy:
            changes.append((BEAT, (now_ms(),)))
        # A row that was only begun need not outlive a loss of power, just this process.
        lasting = not self.healthy or any(entry.insist for entry in group)
        try:
            await self._writer.write(changes, self._synchronous if lasting else "normal")
        except sqlite3.OperationalError as error:
            self._failed(group, str(error))
        except (sqlite3.Error, ValueError, OverflowError) as error:
            await self._isolate(group, error)
        else:
            self.healthy, self.failure = True, ""
            self.commits += 1
            self.committed_at = time.monotonic()
            for entry in group:
                if not entry.written.done():
                    entry.written.set_result(None)

    def _failed(self, group: list[Entry], reason: str) -> None:
        """Keep what must be written; for the rest take back whatever may have reached the disk
        (after a failed fsync a row's fate is unknown)."""
        self.healthy, self.failure = False, reason
        kept = [entry for entry in group if entry.insist]
        for entry in group:
            if not entry.insist:
                if not entry.written.done():
                    entry.written.set_exception(LedgerUnavailable(reason))
                nobody: asyncio.Future[None] = self._loop.create_future()
                kept.append(Entry(FORGET, entry.values[:1], nobody, True))
        self._waiting[:0] = kept

    async def _isolate(self, group: list[Entry], error: Exception) -> None:
        """A value that SQLite won't take must not hold up the others: write one by one."""
        if len(group) > 1:
            for entry in group:
                await self._write_group([entry])
        elif group and not group[0].written.done():
            group[0].written.set_exception(error)

    async def _finish(self, loop: asyncio.Task[None]) -> None:
        self._closing = True
        self._wake.set()
        if not self.healthy:  # nothing more can be done: those rows stay pending, then interrupted
            loop.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await loop


def _lock(database: Path) -> int:
    """A lock that ends with the process, however it ends. Raises DatabaseInUse."""
    file = os.open(f"{database}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise DatabaseInUse(f"{database} is in use by another gateway or command") from None
    return file


# ── Keys ─────────────────────────────────────────────────────────────────────────────────────────
# sk-redbtc-, 256 bits of chance as 43 base62 characters, and the CRC32 of all before it as 6 more:
# a slip of the finger, or a string that only looks like a key, is told apart without a look-up.

KEY_PREFIX = "sk-redbtc-"
BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def base62(number: int, width: int) -> str:
    """`number` in base 62, most significant digit first, filled up with zeros to `width`."""
    digits = []
    for _ in range(width):
        number, digit = divmod(number, 62)
        digits.append(BASE62[digit])
    return "".join(reversed(digits))


def new_key() -> str:
    """A fresh API key, 59 characters. It is shown once; only its hash is kept."""
    body = KEY_PREFIX + base62(secrets.randbits(256), 43)
    return body + base62(zlib.crc32(body.encode()), 6)


def hash_of_key(key: str) -> bytes | None:
    """The SHA-256 under which a key is stored; None for what can't be a key."""
    shown = key.encode()
    if len(shown) != 59 or key[-6:] != base62(zlib.crc32(shown[:-6]), 6):
        return None
    return hashlib.sha256(shown).digest()


class Key(NamedTuple):
    """A key that is in force, with what its account allows: limits of None are the settings'."""

    id: str
    account_id: str
    account_status: str
    concurrency: int | None
    requests_per_minute: int | None
    tokens_per_minute: int | None
    account_concurrency: int | None
    account_requests_per_minute: int | None
    account_tokens_per_minute: int | None


KEY_IN_FORCE = """
    SELECT keys.id, accounts.id, accounts.status,
           keys.concurrency, keys.requests_per_minute, keys.tokens_per_minute,
           accounts.concurrency, accounts.requests_per_minute, accounts.tokens_per_minute
      FROM keys JOIN accounts ON accounts.id = keys.account_id
     WHERE keys.hash = ? AND keys.revoked_at IS NULL AND ifnull(keys.expires_at, ?2 + 1) > ?2"""


def key_in_force(store: Store, key: str) -> Key | None:
    """The key and its account, or None where it is malformed, unknown, revoked or expired. Reads
    the database, so that what was committed a moment ago holds. Raises LedgerUnavailable."""
    hashed = hash_of_key(key)
    found = store.look_up(KEY_IN_FORCE, (hashed, now_ms())) if hashed else None
    return Key(*found) if found else None


# ── Accounts ─────────────────────────────────────────────────────────────────────────────────────

LIMITS = ("concurrency", "requests_per_minute", "tokens_per_minute")
ACCOUNT = """
    SELECT id, name, email, status, status_reason, concurrency, requests_per_minute,
           tokens_per_minute, created_at,
           (SELECT count(*) FROM keys WHERE account_id = accounts.id AND revoked_at IS NULL
               AND ifnull(expires_at, ?1 + 1) > ?1) AS keys_in_force
      FROM accounts"""
ACCOUNT_BY_NAME = ACCOUNT + " WHERE name = ?2 OR id = ?2"
ACCOUNTS = ACCOUNT + " ORDER BY name"
ADD_ACCOUNT = """
    INSERT INTO accounts (id, name, email, concurrency, requests_per_minute, tokens_per_minute,
                          created_at) VALUES (?, ?, ?, ?, ?, ?, ?)"""
SET_ACCOUNT = """
    UPDATE accounts SET email = ?, concurrency = ?, requests_per_minute = ?, tokens_per_minute = ?
     WHERE id = ?"""
SET_STATUS = "UPDATE accounts SET status = ?, status_reason = ? WHERE id = ?"
KEY = """
    SELECT keys.id, accounts.name AS account, keys.label, keys.concurrency,
           keys.requests_per_minute, keys.tokens_per_minute, keys.created_at, keys.expires_at,
           keys.revoked_at
      FROM keys JOIN accounts ON accounts.id = keys.account_id"""
KEY_BY_ID = KEY + " WHERE keys.id = ?"
KEYS_OF_ACCOUNT = KEY + " WHERE accounts.id = ? ORDER BY keys.created_at, keys.id"
ADD_KEY = """
    INSERT INTO keys (id, hash, account_id, label, concurrency, requests_per_minute,
                      tokens_per_minute, created_at, expires_at)
    SELECT ?, ?, id, ?, ?, ?, ?, ?, ? FROM accounts WHERE id = ?"""
COPY_KEY = """
    INSERT INTO keys (id, hash, account_id, label, concurrency, requests_per_minute,
                      tokens_per_minute, created_at, expires_at)
    SELECT ?, ?, account_id, label, concurrency, requests_per_minute, tokens_per_minute, ?,
           expires_at FROM keys WHERE id = ?"""
EXPIRE_KEY = "UPDATE keys SET expires_at = min(ifnull(expires_at, ?1), ?1) WHERE id = ?2"
REVOKE_KEY = "UPDATE keys SET revoked_at = ifnull(revoked_at, ?) WHERE id = ?"

Record = dict[str, Any]  # one row, as JSON shows it


def _shown(row: sqlite3.Row) -> Record:
    record = dict(row)
    for name in ("created_at", "expires_at", "revoked_at"):
        if name in record:
            record[name] = iso_time(record[name])
    return record


class Accounts:
    """Accounts and their keys. An account is named by its name or its id."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def _one(self, sql: str, *values: Any) -> Record | None:
        async for row in self._store.rows(sql, values):
            return _shown(row)
        return None

    async def all(self) -> list[Record]:
        """All accounts, by name."""
        return [_shown(row) async for row in self._store.rows(ACCOUNTS, (now_ms(),))]

    async def show(self, name: str) -> Record:
        """Raises NotFound."""
        account = await self._one(ACCOUNT_BY_NAME, now_ms(), name)
        if account is None:
            raise NotFound(f"there is no account {name!r}")
        return account

    async def add(self, name: str, email: str | None, limits: Mapping[str, int | None]) -> Record:
        """Raises Conflict where the name is taken."""
        values = (_new_id("acct"), name, email, *(limits[limit] for limit in LIMITS), now_ms())
        try:
            await self._store.transact((ADD_ACCOUNT, values))
        except sqlite3.IntegrityError:
            raise Conflict(f"there is an account {name!r} already") from None
        return await self.show(name)

    async def set(self, name: str, changes: Mapping[str, Any]) -> Record:
        """Change the given ones of email and limits; a limit of None is the settings' again."""
        account = await self.show(name)
        after = {**account, **changes}
        values = [after["email"], *(after[limit] for limit in LIMITS), account["id"]]
        await self._store.transact((SET_ACCOUNT, values))
        return await self.show(account["id"])

    async def suspend(self, name: str, reason: str | None) -> Record:
        """Refuse its requests from the next one on."""
        account = await self.show(name)
        await self._store.transact((SET_STATUS, ("suspended", reason, account["id"])))
        return await self.show(account["id"])

    async def resume(self, name: str) -> Record:
        """Serve its requests again."""
        account = await self.show(name)
        await self._store.transact((SET_STATUS, ("active", None, account["id"])))
        return await self.show(account["id"])

    async def keys(self, name: str) -> list[Record]:
        """The account's keys, oldest first, without what would let one use them."""
        account = await self.show(name)
        return [_shown(row) async for row in self._store.rows(KEYS_OF_ACCOUNT, (account["id"],))]

    async def key(self, key_id: str) -> Record:
        """Raises NotFound."""
        key = await self._one(KEY_BY_ID, key_id)
        if key is None:
            raise NotFound(f"there is no key {key_id!r}; `key list ACCOUNT` shows their ids")
        return key

    async def add_key(
        self, name: str, label: str, expires_at: int | None, limits: Mapping[str, int | None]
    ) -> Record:
        """A new key; `key` in the answer is the only copy of it there will ever be."""
        account = await self.show(name)
        secret, key_id = new_key(), _new_id("key")
        of_limits = (limits[limit] for limit in LIMITS)
        values = (key_id, hash_of_key(secret), label, *of_limits, now_ms(), expires_at)
        await self._store.transact((ADD_KEY, (*values, account["id"])))
        return {"id": key_id, "key": secret, **await self.key(key_id)}

    async def revoke_key(self, key_id: str) -> Record:
        """Refuse it from the next request on. Revoking twice keeps the first time."""
        await self.key(key_id)
        await self._store.transact((REVOKE_KEY, (now_ms(), key_id)))
        return await self.key(key_id)

    async def rotate_key(self, key_id: str, overlap_ms: int) -> Record:
        """A new key with the old one's label, limits and expiry; the old one goes on for
        `overlap_ms`. Raises Conflict where the old one is no longer in force."""
        old = await self.key(key_id)
        if old["revoked_at"] or (
            old["expires_at"] and old["expires_at"] <= str(iso_time(now_ms()))
        ):
            raise Conflict(f"key {key_id} is revoked or expired; add a new one instead")
        secret, new_id = new_key(), _new_id("key")
        await self._store.transact(
            (COPY_KEY, (new_id, hash_of_key(secret), now_ms(), key_id)),
            (EXPIRE_KEY, (now_ms() + overlap_ms, key_id)),
        )
        return {"id": new_id, "key": secret, **await self.key(new_id), "replaces": key_id}


def _new_id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(8)}"


# ── Requests ─────────────────────────────────────────────────────────────────────────────────────
# The ledger proper: a row is begun when its request leaves for an upstream and settled at its end.
# One statement does both, so that writing it again after a commit of unknown fate changes nothing.

UsageSource = Literal["upstream", "estimated", "none"]
Outcome = Literal[
    "pending",
    "completed",
    "upstream_error",
    "upstream_failed",
    "client_disconnected",
    "interrupted",
]


class Usage(Struct, frozen=True):
    """What one request used, in OpenAI's way of counting: cached_input and cache_write are parts of
    input, reasoning of output. None: nobody reported it."""

    input_tokens: int | None = None
    cached_input_tokens: int | None = None
    cache_write_tokens: int | None = None
    output_tokens: int | None = None
    reasoning_tokens: int | None = None
    image_input_tokens: int | None = None
    image_output_tokens: int | None = None
    web_searches: int | None = None


class Row(Struct):
    """One request in the ledger; schema.sql explains each field. Times in milliseconds."""

    request_id: str
    account_id: str
    key_id: str
    endpoint: str
    requested_model: str
    upstream: str
    started_at: int
    first_byte_ms: int | None = None
    duration_ms: int | None = None
    status: int | None = None
    outcome: Outcome = "pending"
    usage_source: UsageSource = "none"
    model: str | None = None
    service_tier: str | None = None
    response_id: str | None = None
    usage: Usage = Usage()


COLUMNS = (*Row.__struct_fields__[:-1], *Usage.__struct_fields__)
SETTLED = [f"{name} = excluded.{name}" for name in COLUMNS[COLUMNS.index("first_byte_ms") :]]
PLACES = f"({', '.join('?' * len(COLUMNS))})"
RECORD = f"""
    INSERT INTO requests ({", ".join(COLUMNS)}) VALUES {PLACES}
        ON CONFLICT (request_id) DO UPDATE SET upstream = excluded.upstream, {", ".join(SETTLED)}
        WHERE outcome = 'pending'"""
MOST_ROWS = 32  # of one statement


@functools.lru_cache(MOST_ROWS)
def record_of(rows: int) -> str:
    """RECORD for so many rows at once."""
    return RECORD.replace(PLACES, ", ".join([PLACES] * rows))


def _values(row: Row) -> list[Any]:
    *values, usage = msgspec.structs.astuple(row)
    return [*values, *msgspec.structs.astuple(usage)]


async def begin(store: Store, row: Row) -> None:
    """Commit the row as pending. Raises LedgerUnavailable; then it will not be in the ledger."""
    await store.record(RECORD, _values(row), insist=False)


async def settle(store: Store, row: Row) -> None:
    """Commit the row as it ended, however long that takes."""
    await store.record(RECORD, _values(row), insist=True)


async def forget(store: Store, row: Row) -> None:
    """Take back a pending row whose request did not leave for the upstream after all."""
    await store.record(FORGET, (row.request_id,), insist=True)


IN_RANGE = """
      FROM requests JOIN accounts ON accounts.id = requests.account_id
     WHERE requests.started_at >= :since AND requests.started_at < :until
       AND (:account IS NULL OR requests.account_id = :account)
       AND (:key IS NULL OR requests.key_id = :key)
       AND (:model IS NULL OR ifnull(requests.model, requested_model) GLOB :model)"""
REQUESTS = f"""
    SELECT * FROM (
    SELECT request_id, accounts.name AS account, key_id, endpoint, model, requested_model, upstream,
           started_at, first_byte_ms, duration_ms, requests.status, outcome, usage_source,
           {", ".join(Usage.__struct_fields__)}, service_tier, response_id,
           NULL AS cost, :currency AS currency
           {IN_RANGE} ORDER BY started_at DESC, request_id DESC LIMIT :limit)
     ORDER BY started_at, request_id"""
TOTALS = f"""
    SELECT count(*) AS requests,
           {", ".join(f"sum({name}) AS {name}" for name in Usage.__struct_fields__)},
           NULL AS cost, :currency AS currency {IN_RANGE}"""


class Range(Struct, frozen=True):
    """Which requests: of an account and a key (by id), a model (a shell pattern), from `since` up
    to but without `until` (milliseconds). `limit` keeps the newest of them; -1: all."""

    account: str | None = None
    key: str | None = None
    model: str | None = None
    since: int = 0
    until: int = 1 << 62
    limit: int = -1
    currency: str = "USD"


async def requests_in(store: Store, wanted: Range) -> AsyncIterator[Record]:
    """Rows of the ledger, oldest first, with the fields of CONTRACT.md section 5."""
    async for row in store.rows(REQUESTS, msgspec.structs.asdict(wanted)):
        record = dict(row)
        record["started_at"] = iso_time(record["started_at"])
        yield record


async def totals_of(store: Store, wanted: Range) -> Record:
    """Their number and sums, whatever `limit` says; a sum is null where no row has a number."""
    async for row in store.rows(TOTALS, msgspec.structs.asdict(wanted)):
        return dict(row)
    raise AssertionError("an aggregate always has one row")


# ── Checks ───────────────────────────────────────────────────────────────────────────────────────

CHECKS = {"integrity": "PRAGMA integrity_check(20)", "foreign keys": "PRAGMA foreign_key_check"}


async def check_database(store: Store) -> list[str]:
    """What is wrong with the file, line by line; empty where nothing is."""
    wrong = []
    for name, pragma in CHECKS.items():
        async for row in store.rows(pragma):
            if tuple(row) != ("ok",):
                wrong.append(f"{name}: {' '.join(str(part) for part in row)}")
    return wrong


def check_file(path: Path) -> list[str]:
    """What is wrong with the database before anything opens it for writing; it may be in use."""
    if not path.exists():
        writable = os.access(path.parent, os.W_OK)
        return [] if writable else [f"{path}: can't be made: the folder is missing or not writable"]
    try:
        with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
            (marked,) = database.execute("PRAGMA application_id").fetchone()
            (version,) = database.execute("PRAGMA user_version").fetchone()
            rows = database.execute("PRAGMA quick_check(20)").fetchall()
    except sqlite3.Error as error:
        return [f"{path}: {error}"]
    wrong = [f"{path}: {line}" for (line,) in rows if line != "ok"]
    if marked != APPLICATION_ID:
        wrong.append(f"{path}: a database of another program")
    elif version > max(migrations(schema())):
        wrong.append(f"{path}: written by a newer version of this program (schema {version})")
    return wrong
