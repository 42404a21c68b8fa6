"""Read config.toml, strictly.

An unknown key, a wrong type or a value out of range is an error that names the key's full path,
what was found and what is allowed. The defaults below are the documented ones; config.toml beside
the package explains each.
"""

from __future__ import annotations

import ipaddress
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_type_hints
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from redbtc.errors import UserError
from redbtc.headers import may_come_from_client
from redbtc.money import parse_limit
from redbtc.settings_tables import Count, Seconds, SettingsTable, Url, Variable
from redbtc.upstream_settings import UpstreamSettings, problem_of_name, problems_of
from redbtc.usage import MAX_TOKENS

HERE = Path(__file__).resolve().parent.parent
# Where pip puts the files that lie beside the package in a checkout. Its environment is the folder
# three levels above the package, or with `pip install --target` the folder that holds the package.
INSTALLED = [root / "share" / "redbtc-proxy" for root in (HERE, *HERE.parents[:3])]


def shipped(name: str) -> Path:
    """Return the path of a file that comes with the program."""
    paths = [folder / name for folder in (HERE, *INSTALLED)]
    return next((path for path in paths if path.exists()), paths[0])


Host = Annotated[str, Meta(min_length=1)]
Days = Annotated[int, Meta(ge=0, le=36_500)]
# Headers of requests that can't have the gateway's key, besides those of `problem_of_name`: HTTP or
# a proxy gives them a meaning, which logs and caches know.
OTHER_MEANING = re.compile(
    "authorization|proxy-.*|chatgpt-account-id|openai-(organization|project)|cookie2?|origin|"
    "referer|from|range|if-.*|accept-.*|access-control-.*|sec-.*|cache-control|pragma|date|via|"
    "max-forwards|forwarded|x-forwarded-.*|x-real-ip|x-request-id|x-redbtc-.*",
    re.IGNORECASE,
)
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/?#@,A-Z*]+")
WEB_ADDRESS = re.compile(r"https?://[^\s/?#@]+(?:[/?][^\s#]*)?")
MIN_BODIES_READ = 4  # so that an account's half holds the largest body and its decoded copy


class ServerSettings(SettingsTable, frozen=True):
    """The table [server]: where to listen, and the limits for reading requests."""

    host: Host | Annotated[tuple[Host, ...], Meta(min_length=1)] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 8080
    public_url: Url = "http://127.0.0.1:8080"
    trusted_proxies: tuple[str, ...] = ("127.0.0.1",)
    cors_origins: tuple[str, ...] = ("*",)
    key_headers: tuple[str, ...] = ("x-gateway-key",)
    max_body_bytes: Annotated[int, Meta(ge=1024, le=4 << 30)] = 104_857_600
    max_reading_bytes: Annotated[int, Meta(ge=0, le=1 << 40)] = 0
    body_timeout_seconds: Seconds = 60
    drain_seconds: Annotated[float, Meta(ge=0, le=86_400)] = 600
    shutdown_delay_seconds: Annotated[float, Meta(ge=0, le=600)] = 0
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @property
    def hosts(self) -> tuple[str, ...]:
        """Return the addresses to listen on."""
        return (self.host,) if isinstance(self.host, str) else self.host

    @property
    def reading_bytes(self) -> int:
        """Return how many bytes the bodies of requests that are not admitted yet may have in memory
        together. Each account may use half of them."""
        return self.max_reading_bytes or MIN_BODIES_READ * self.max_body_bytes


class DatabaseSettings(SettingsTable, frozen=True):
    """The table [database]: where the database is, and how safely it is written."""

    path: Annotated[str, Meta(min_length=1)] = "redbtc.db"
    synchronous: Literal["full", "normal"] = "full"
    check_seconds: Annotated[int, Meta(ge=0, le=86400)] = 60


class FailoverSettings(SettingsTable, frozen=True):
    """The table [failover]: how often, and for how long, a request is tried at other members before
    the client has received anything."""

    attempts: Annotated[int, Meta(ge=1, le=10)] = 3
    budget_seconds: Seconds = 20


class AccountLimitSettings(SettingsTable, frozen=True):
    """The table [limits.account]: limits of an account that has none of its own; 0: no limit."""

    concurrency: Count = 8
    requests_per_minute: Count = 0
    tokens_per_minute: Count = 0
    background: Count = 20


class LimitSettings(SettingsTable, frozen=True):
    """The table [limits]: limits of all accounts together; 0: no limit."""

    concurrency: Count = 0
    requests_per_minute: Count = 0
    tokens_per_minute: Count = 0
    queue_seconds: Annotated[float, Meta(ge=0, le=3600)] = 10
    account: AccountLimitSettings = AccountLimitSettings()


class MeteringSettings(SettingsTable, frozen=True):
    """The table [metering]: how usage is found where a client or an upstream does not help."""

    include_usage: Literal["add", "client"] = "add"
    unmetered: Literal["refuse", "allow"] = "refuse"
    on_disconnect: Literal["drain", "cancel"] = "drain"
    drain_seconds: Annotated[float, Meta(ge=0, le=3600)] = 15


class BillingSettings(SettingsTable, frozen=True):
    """The table [billing]. Notices of budgets are posted to the webhook, signed as Standard
    Webhooks specifies."""

    currency: Annotated[str, Meta(pattern="^[A-Z]{3}$")] = "USD"
    price_notice_days: Annotated[int, Meta(ge=0, le=3650)] = 30
    terms_notice_days: Annotated[int, Meta(ge=0, le=3650)] = 14
    default_credit_limit: Annotated[str, Meta(pattern=r"^(unlimited|\d+(\.\d+)?)$")] = "unlimited"
    unpriced_models: Literal["refuse", "free"] = "refuse"
    hold_output_tokens: Annotated[int, Meta(ge=1, le=MAX_TOKENS)] = 128_000
    hold_tool_calls: Annotated[int, Meta(ge=1, le=100_000)] = 32
    webhook_url: Annotated[str, Meta(pattern=r"^(https?://[^\s/?#]+[^\s#]*)?$")] = ""
    webhook_secret_env: Variable = ""


class RetentionSettings(SettingsTable, frozen=True):
    """The table [retention]: for how many days data is kept; 0: for ever, but for
    `request_log_days_max` (0: nobody may log requests) and `terminated_account_days` (0: erased at
    once)."""

    request_log_days_max: Days = 30
    usage_days: Days = 0
    stored_object_days: Days = 0
    change_days: Days = 0
    terminated_account_days: Days = 30


class RequestLogSettings(SettingsTable, frozen=True):
    """The table [request_log]: the space for the bodies of requests whose owners want them kept."""

    max_bytes: Annotated[int, Meta(ge=1 << 20, le=1 << 40)] = 1 << 30
    max_body_bytes: Annotated[int, Meta(ge=1024, le=1 << 30)] = 16 << 20


class MetricsSettings(SettingsTable, frozen=True):
    """The table [metrics]. With an empty `token_env`, only clients on this machine may read the
    metrics."""

    token_env: Variable = ""


class CodexSettings(SettingsTable, frozen=True):
    """The table [codex]. `catalog` is a file or a URL with what `codex debug models` prints; empty:
    Codex uses its own model catalogue."""

    catalog: str = ""


PAGES = ("terms", "privacy")  # of [site], each a file
# Who reads reports of security problems, as it is written into a line of security.txt.
CONTACT_ADDRESS = re.compile(r"(mailto:)?[A-Za-z0-9._+-]{1,64}@[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)*")
CONTACT_URL = re.compile(r"https://[!-~]{1,2000}")


class SiteSettings(SettingsTable, frozen=True):
    """The table [site]: the operator's own pages. `terms` and `privacy` are Markdown files,
    `contact` an email address or a URL for reports of security problems; empty: none."""

    terms: str = ""
    privacy: str = ""
    contact: str = ""


class Settings(SettingsTable, frozen=True):
    """The whole of config.toml, a field for each table."""

    server: ServerSettings = ServerSettings()
    database: DatabaseSettings = DatabaseSettings()
    upstreams: Annotated[tuple[UpstreamSettings, ...], Meta(min_length=1)] = (UpstreamSettings(),)
    failover: FailoverSettings = FailoverSettings()
    limits: LimitSettings = LimitSettings()
    metering: MeteringSettings = MeteringSettings()
    billing: BillingSettings = BillingSettings()
    retention: RetentionSettings = RetentionSettings()
    metrics: MetricsSettings = MetricsSettings()
    codex: CodexSettings = CodexSettings()
    request_log: RequestLogSettings = RequestLogSettings()
    site: SiteSettings = SiteSettings()

    @property
    def dashboard_url(self) -> str:
        """Return the URL at which browsers find the gateway: server.public_url if it is set,
        otherwise the first address to listen on."""
        server = self.server
        if server.public_url != ServerSettings().public_url:
            return server.public_url
        return url_of(server.hosts[0], server.port)


def url_of(host: str, port: int) -> str:
    """Return the URL with which clients on this machine reach a server on a host and port."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class SettingsError(UserError):
    """The settings file can't be read or is wrong."""


class LoadedSettings(NamedTuple):
    """Settings, and the file that they come from."""

    settings: Settings
    file: Path | None  # None: the built-in defaults
    folder: Path  # where relative paths start
    is_empty: bool = False  # the file sets nothing

    @property
    def database_path(self) -> Path:
        """Return the path of the database file itself. SQLite puts the -wal file beside the file to
        which a symbolic link leads, and all that belongs to the database must be there."""
        return Path(os.path.realpath(self.folder / self.settings.database.path))


def load_settings(path: str | None) -> LoadedSettings:
    """Read the settings from `path`, else from $REDBTC_CONFIG, else from config.toml beside the
    script, else use the defaults. Raises SettingsError with one line that says what is wrong and
    where."""
    beside = HERE / "config.toml"
    chosen = path or os.environ.get("REDBTC_CONFIG") or (str(beside) if beside.exists() else None)
    if chosen is None:
        return LoadedSettings(Settings(), None, Path.cwd())
    file = Path(chosen).absolute()
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{file}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file}: not valid TOML: {error}") from None
    try:
        settings = parse_settings(tables)
    except SettingsError as error:
        raise SettingsError(f"{file}: {error}") from None
    settings = _with_paths(settings, file.parent)
    return LoadedSettings(settings, file, file.parent, is_empty=not tables)


def _with_paths(settings: Settings, folder: Path) -> Settings:
    """Return the settings with the whole paths of the files that they name, which may be relative
    to the settings file's folder."""
    upstreams = tuple(
        msgspec.structs.replace(each, ca_file=str(folder / each.ca_file)) if each.ca_file else each
        for each in settings.upstreams
    )
    codex = settings.codex
    if codex.catalog and not is_web_address(codex.catalog):
        codex = msgspec.structs.replace(codex, catalog=str(folder / codex.catalog))
    site = settings.site
    files = {name: str(folder / getattr(site, name)) for name in PAGES if getattr(site, name)}
    site = msgspec.structs.replace(site, **files)
    return msgspec.structs.replace(settings, upstreams=upstreams, codex=codex, site=site)


def is_web_address(text: str) -> bool:
    """Return whether a setting is a URL, and not the path of a file."""
    return text.startswith(("http://", "https://"))


def reload_settings(before: LoadedSettings) -> Settings:
    """Read the settings again, from the same file as before. Raises SettingsError, also if the file
    sets nothing: an editor may not have finished writing it, and the defaults would replace all
    upstreams."""
    loaded = load_settings(str(before.file or "") or None)
    if loaded.is_empty:
        raise SettingsError(
            f"{loaded.file}: the file is empty or has only comments; a reload needs at least one "
            "setting in it. To use the built-in defaults, restart the gateway"
        )
    return loaded.settings


def parse_settings(tables: Mapping[str, Any]) -> Settings:
    """Return the settings in parsed TOML. Raises SettingsError."""
    try:
        settings = msgspec.convert(tables, Settings)
    except msgspec.ValidationError as error:
        raise SettingsError(_explain(str(error), tables)) from None
    for number, table in enumerate(tables.get("upstreams", ())):
        if table.get("api_key_envs") and "api_key_env" in table:
            raise SettingsError(
                f"upstreams[{number}].api_key_env: set beside api_key_envs; allowed is one of them"
            )
        if table.get("api_key_env") and table.get("credentials") == "client":
            raise SettingsError(
                f'upstreams[{number}].api_key_env: with credentials = "client", the upstream has '
                "no key of its own; remove the setting"
            )
    names = [upstream.name for upstream in settings.upstreams]
    for name in names:
        if names.count(name) > 1:
            raise SettingsError(
                f"upstreams.name: duplicate name {name!r}; each upstream needs its own"
            )
    for proxy in settings.server.trusted_proxies:
        try:
            ipaddress.ip_network(proxy, strict=False)
        except ValueError:
            raise SettingsError(
                f"server.trusted_proxies: found {proxy!r}; allowed are IP addresses and networks"
            ) from None
    for origin in settings.server.cors_origins:
        if origin != "*" and not ORIGIN.fullmatch(origin):
            raise SettingsError(
                f"server.cors_origins: found {origin!r}; allowed are '*' and origins such as "
                "'https://app.example.com': scheme, host and port in lower case, without a path"
            )
    _check_key_headers(settings.server)
    server, minimum = settings.server, MIN_BODIES_READ * settings.server.max_body_bytes
    if server.reading_bytes < minimum:
        raise SettingsError(
            f"server.max_reading_bytes: found {server.max_reading_bytes}; allowed are 0 and "
            f"numbers from {minimum}, which is {MIN_BODIES_READ} times server.max_body_bytes"
        )
    _check_upstreams(settings)
    _check_billing(settings.billing)
    catalog = settings.codex.catalog
    if "://" in catalog and not (WEB_ADDRESS.fullmatch(catalog) and _is_url(catalog)):
        raise SettingsError(f"codex.catalog: found {catalog!r}; not a valid URL")
    _check_contact(settings.site.contact)
    return settings


def _check_contact(contact: str) -> None:
    is_url = CONTACT_URL.fullmatch(contact) and _is_url(contact)
    if contact and not is_url and not CONTACT_ADDRESS.fullmatch(contact):
        raise SettingsError(
            f"site.contact: found {contact!r}; allowed are an email address, such as "
            "security@example.com, and an https:// URL"
        )


def _check_upstreams(settings: Settings) -> None:
    for number, upstream in enumerate(settings.upstreams):
        path = f"upstreams[{number}]"
        if not _is_url(upstream.base_url):
            raise SettingsError(f"{path}.base_url: found {upstream.base_url!r}; not a valid URL")
        for problem in problems_of(upstream):
            raise SettingsError(f"{path}.{problem}")
        if upstream.credentials == "client" and not settings.server.key_headers:
            raise SettingsError(
                f'{path}.credentials: "client" needs a header for the gateway\'s key in '
                "server.key_headers, which is empty"
            )


def _check_key_headers(server: ServerSettings) -> None:
    """Raise SettingsError if a header for the gateway's key is none, has another meaning, or would
    reach upstreams."""
    for name in server.key_headers:
        where, lower = f"server.key_headers: found {name!r}", name.lower().encode()
        if problem := problem_of_name(name):
            raise SettingsError(f"server.key_headers: {problem}")
        if may_come_from_client(lower):
            raise SettingsError(f"{where}, which is forwarded to upstreams; choose another name")
        if OTHER_MEANING.fullmatch(name):
            raise SettingsError(f"{where}, which has another meaning; choose another name")


def _check_billing(billing: BillingSettings) -> None:
    try:
        parse_limit(billing.default_credit_limit)
    except UserError as error:
        raise SettingsError(f"billing.default_credit_limit: {error}") from None
    if billing.webhook_url and not (billing.webhook_secret_env and _is_url(billing.webhook_url)):
        raise SettingsError(
            "billing.webhook_url: must be a URL, and billing.webhook_secret_env must be set"
        )


def _is_url(text: str) -> bool:
    try:
        return bool(urlsplit(text).hostname) and urlsplit(text).port != 0
    except ValueError:
        return False


TYPE_NAMES = {
    "int": "a whole number",
    "float": "a number",
    "str": "a string",
    "bool": "true or false",
    "array": "an array",
    "object": "a table",
}


MAY_BE_SECRET = re.compile(r"_env$|_envs\b|\.headers\b")  # where people may write the secret itself


def _explain(message: str, tables: Mapping[str, Any]) -> str:
    """Return msgspec's message as people would say it: the key's path, what was found, and what is
    allowed."""
    what, _, place = message.partition(" - at `$")
    path = place.rstrip("`").lstrip(".")
    unknown = re.fullmatch(r"Object contains unknown field `(.*)`", what)
    if unknown:
        key = f"{path}.{unknown[1]}".lstrip(".")
        return f"{key}: unknown key; allowed: {', '.join(_keys_at(path))}"
    found: Any = tables
    for step in re.findall(r"[^.\[\]]+", path):
        index = int(step) if isinstance(found, list) and step.isdigit() else step
        try:
            found = found[index]
        except (KeyError, IndexError, TypeError):
            break
    shown = "something else" if MAY_BE_SECRET.search(path) else repr(found)
    allowed = re.sub(
        r"`([\w |]+)`",
        lambda types: " or ".join(TYPE_NAMES.get(each, each) for each in types[1].split(" | ")),
        f"{what[0].lower()}{what[1:]}".partition(", got ")[0],
    )
    if what.startswith("Invalid enum value"):
        table, _, key = path.rpartition(".")
        choices = get_args(get_type_hints(type(_table_at(table)))[key])
        allowed = f"allowed are {', '.join(map(repr, choices))}"
    return f"{path or 'settings'}: found {shown}; {allowed}"


def _table_at(path: str) -> Any:
    """Return the default table at a path."""
    table: Any = Settings()
    for step in re.findall(r"[^.\[\]]+", path):
        table = table[0] if step.isdigit() or step == "..." else getattr(table, step)
    return table[0] if isinstance(table, tuple) else table


def _keys_at(path: str) -> list[str]:
    return list(_table_at(path).__struct_fields__)


DEMO = "demo"  # the name of the demonstration upstream


def with_demo(settings: Settings, url: str) -> Settings:
    """Return the settings with the demonstration upstream in place of all others."""
    demo = UpstreamSettings(name=DEMO, base_url=url, api_key_env="", websocket=False)
    return msgspec.structs.replace(settings, upstreams=(demo,))


def missing_keys(settings: Settings) -> list[str]:
    """Return a line for each key or secret that the settings name and the environment lacks."""
    lines = [
        f'upstream "{member.member_name}": environment variable {variable} is not set'
        for upstream in settings.upstreams
        for member in upstream.members
        for variable in member.missing_variables()
    ]
    secret = settings.billing.webhook_secret_env
    if secret and not os.environ.get(secret):
        lines.append(f"billing.webhook_url: environment variable {secret} is not set")
    return lines


def lacks_all_keys(settings: Settings) -> bool:
    """Return whether every member of every upstream lacks an environment variable."""
    members = [member for upstream in settings.upstreams for member in upstream.members]
    return all(member.missing_variables() for member in members)


def settings_at_restart(old: Settings, new: Settings) -> list[str]:
    """Return the names of settings that differ and that only a new process can apply."""
    pairs = {
        "server.host": (old.server.hosts, new.server.hosts),
        "server.port": (old.server.port, new.server.port),
        "server.trusted_proxies": (old.server.trusted_proxies, new.server.trusted_proxies),
        "database": (old.database, new.database),
        "billing.currency": (old.billing.currency, new.billing.currency),
    }
    return [name for name, (before, after) in pairs.items() if before != after]
