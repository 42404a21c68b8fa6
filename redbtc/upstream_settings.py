"""The tables [[upstreams]] of config.toml, and their members.

A *member* is one upstream with one of its keys. Its settings are those of its table, with one
variable in `api_key_envs` where the table has several.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import os
import re
from collections.abc import Iterator
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from redbtc.headers import CREDENTIAL_HEADERS
from redbtc.settings_tables import Count, Name, Seconds, SettingsTable, Url, Variable

VariableName = Annotated[str, Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Organization = Annotated[str, Meta(pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]{0,63})?$")]
Proxy = Annotated[str, Meta(pattern=r"^((https?|socks5h?)://[^\s/?#]+/?)?$")]

FROM_ENVIRONMENT = re.compile(r"\{env:([A-Za-z_][A-Za-z0-9_]*)\}")
HEADER_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # RFC 9110 §5.6.2
NOT_IN_A_HEADER = re.compile(r"[^\x20-\x7e]")
ALLOWED = "allowed is printable ASCII"
# Headers of the connection or the gateway, those that describe the body, and the one that keeps
# accounts that use the same key for a request from getting the same response.
RESERVED_HEADERS = re.compile(
    "host|connection|upgrade|te|trailer|keep-alive|proxy-connection|expect|accept-encoding|"
    "transfer-encoding|content-(length|type|encoding)|idempotency-key|sec-websocket-.*",
    re.IGNORECASE,
)


# What may change while requests are in flight: connections do not depend on it.
CHOICE = (
    "models",
    "priority",
    "weight",
    "max_concurrency",
    "organization",
    "first_byte_timeout_seconds",
    "total_timeout_seconds",
    "billing",
)


class UpstreamSettings(SettingsTable, frozen=True):
    """A table [[upstreams]]: a server that requests are sent to. Upstreams of equal `priority`
    share requests by `weight`. `headers` are added to each request, by name; their values name
    environment variables as `{env:NAME}`."""

    name: Name = "openai"
    base_url: Url = "https://api.openai.com/v1"
    api_key_env: Variable = "OPENAI_API_KEY"  # without effect where there are api_key_envs
    api_key_envs: tuple[VariableName, ...] = ()
    auth_header: str = "authorization"
    headers: dict[str, str] = msgspec.field(default_factory=dict)
    organization: Organization = ""
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
    ca_file: str = ""
    websocket: bool = True
    credentials: Literal["operator", "client"] = "operator"
    billing: Literal["price", "free"] = "price"

    @property
    def members(self) -> tuple[UpstreamSettings, ...]:
        """Return the settings of each member: one for each key, or one if there is one key or none.
        Members that are the same before and after a reload have equal settings."""
        replace = msgspec.structs.replace
        return tuple(replace(self, api_key_envs=(key,)) for key in self.api_key_envs) or (self,)

    @property
    def destination(self) -> tuple[object, ...]:
        """Return what decides where requests go and with which key: the rest says how they go."""
        key = self.key_variables, self.auth_header, self.headers, self.credentials
        return self.base_url, self.transport, self.proxy, self.ca_file, key

    def connects_like(self, other: UpstreamSettings) -> bool:
        """Return whether these settings differ from others in nothing but CHOICE."""
        chosen = {name: getattr(self, name) for name in CHOICE}
        return msgspec.structs.replace(other, **chosen) == self

    @property
    def member_name(self) -> str:
        """Return the name of a member in the ledger, metrics and lists, such as "openai", or
        "openai/KEY_A" where `api_key_envs` names the member's key."""
        return "/".join((self.name, *self.api_key_envs))

    @property
    def key_variables(self) -> tuple[str, ...]:
        """Return the names of the environment variables with the keys; none if no key is needed,
        or if it is each client's own."""
        if self.credentials == "client":
            return ()
        return self.api_key_envs or ((self.api_key_env,) if self.api_key_env else ())

    @property
    def header_variables(self) -> list[str]:
        """Return the names of the environment variables in `headers`, each once."""
        found = [name for text in self.headers.values() for name in FROM_ENVIRONMENT.findall(text)]
        return list(dict.fromkeys(found))

    @property
    def speaks_websocket(self) -> bool:
        """Return whether WebSocket is offered to clients."""
        return self.websocket and self.transport == "asyncio"

    def serves(self, model: str) -> bool:
        """Return whether one of `models` matches the model's name."""
        return "*" in self.models or any(fnmatch.fnmatchcase(model, each) for each in self.models)

    def missing_variables(self) -> list[str]:
        """Return the names of the environment variables that are needed and not set, or empty."""
        needed = dict.fromkeys((*self.key_variables, *self.header_variables))
        return [name for name in needed if not os.environ.get(name)]

    def added_headers(self) -> dict[str, str]:
        """Return the headers that are sent with each request of a member, by name in lower case:
        `headers` with the variables' values in place, and the key."""
        headers = {
            name.lower(): FROM_ENVIRONMENT.sub(lambda found: os.environ.get(found[1], ""), text)
            for name, text in self.headers.items()
        }
        if key := "".join(os.environ.get(name, "") for name in self.key_variables):
            name = self.auth_header.lower()
            headers[name] = f"Bearer {key}" if name == "authorization" else key
        return {name: value.strip() for name, value in headers.items()}


def problems_of(upstream: UpstreamSettings) -> Iterator[str]:
    """Yield what is wrong with a table beyond the types of its values, each with the name of the
    setting in the table. No value that may be a secret is in the text."""
    keys = upstream.api_key_envs
    for name in keys:
        if keys.count(name) > 1:
            yield f"api_key_envs: duplicate variable {name!r}; each key needs its own"
    if upstream.proxy and upstream.transport != "httpx":
        yield 'proxy: a proxy needs transport = "httpx"'
    if upstream.proxy.startswith("socks") and not importlib.util.find_spec("socksio"):
        yield "proxy: a SOCKS proxy needs the Python package socksio, which is missing"
    yield from problems_of_credentials(upstream)
    if problem := problem_of_name(upstream.auth_header):
        yield f"auth_header: {problem}"
    yield from problems_of_headers(upstream)
    for setting, names in (
        ("api_key_envs" if keys else "api_key_env", upstream.key_variables),
        ("headers", upstream.header_variables),
    ):
        for name in names:
            if NOT_IN_A_HEADER.search(os.environ.get(name, "")):
                yield (
                    f"{setting}: the value of the environment variable {name} has "
                    f"characters that a header can't have, such as line breaks; {ALLOWED}"
                )


def problems_of_credentials(upstream: UpstreamSettings) -> Iterator[str]:
    """Yield what is wrong with the settings of an upstream to which clients send their own
    credentials, or with settings that only such an upstream can have."""
    if upstream.credentials == "operator":
        if upstream.billing != "price":
            yield f'billing: found {upstream.billing!r}, which needs credentials = "client"'
        return
    if upstream.api_key_envs:
        yield (
            'api_key_envs: with credentials = "client", the upstream has no key of its own; remove '
            "the setting"
        )
    if upstream.auth_header != "authorization":
        yield 'auth_header: with credentials = "client", allowed is "authorization"'
    for name in upstream.headers:
        if name.lower().encode() in CREDENTIAL_HEADERS:
            yield f'headers.{name}: with credentials = "client", each client sends its own'


def problems_of_headers(upstream: UpstreamSettings) -> Iterator[str]:
    """Yield what is wrong with the names and values in `headers`."""
    names = [name.lower() for name in upstream.headers]
    for name, text in upstream.headers.items():
        path = f"headers.{name}"
        if problem := problem_of_name(name):
            yield f"headers: {problem}"
        elif names.count(name.lower()) > 1:
            yield f"{path}: duplicate name; upper and lower case are the same"
        elif upstream.key_variables and name.lower() == upstream.auth_header.lower():
            yield f"{path}: this header sends the API key (auth_header)"
        elif NOT_IN_A_HEADER.search(text):
            yield f"{path}: the value has characters that a header can't have; {ALLOWED}"
        elif "{env:" in FROM_ENVIRONMENT.sub("", text):
            yield f"{path}: the value has '{{env:' without the name of a variable and '}}' after it"


def problem_of_name(name: str) -> str | None:
    """Return why the settings can't set a header of this name, None if they can."""
    if not HEADER_NAME.fullmatch(name):
        return f"found {name!r}; allowed are letters, digits and !#$%&'*+-.^_`|~"
    if RESERVED_HEADERS.fullmatch(name):
        return f"found {name!r}, which depends on the request and can't be set here"
    return None
