"""Clients with credentials of their own, and a gateway in front of an upstream for them and one of
the operator's."""

from __future__ import annotations

import base64
import json
import signal
from typing import Any

from tests.helpers.gateway import Gateway
from tests.helpers.upstream import Upstream

API_KEY = "Bearer sk-own-canary-8d3f"
WORKSPACE = "workspace-canary-77"


def jwt(subject: str, **claims: Any) -> str:
    """Return a JSON Web Token of a user, as a ChatGPT login has one; nobody has signed it."""
    parts = [{"alg": "RS256"}, {"iss": "https://auth.openai.com", "sub": subject, **claims}]
    texts = [base64.urlsafe_b64encode(json.dumps(each).encode()) for each in parts]
    return ".".join([text.decode().rstrip("=") for text in texts] + ["c2lnbmF0dXJlLWNhbmFyeQ"])


def login(subject: str, workspace: str = WORKSPACE, **claims: Any) -> dict[str, str]:
    """Return the headers of a ChatGPT login."""
    token = jwt(subject, **claims)
    return {"authorization": f"Bearer {token}", "chatgpt-account-id": workspace}


def with_key(key: str, authorization: str | None = API_KEY, **more: str) -> dict[str, str]:
    """Return the headers of a client that sends a key of the gateway beside its own credential."""
    own = {} if authorization is None else {"authorization": authorization}
    return {"x-gateway-key": key, **own, **more}


def table(upstream: Upstream, name: str, **more: Any) -> dict[str, Any]:
    """Return an upstream of the operator's; with `credentials="client"` in `more`, one of the
    clients'."""
    key = {} if more.get("credentials") == "client" else {"api_key_env": "TEST_UPSTREAM_KEY"}
    return {"name": name, "base_url": upstream.url, **key, **more}


def settings_of(*tables: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Return settings with these upstreams."""
    return {"upstreams": list(tables), **more}


def reload(gateway: Gateway, settings: dict[str, Any]) -> None:
    """Let a running gateway apply other settings."""
    gateway.configure(settings)
    before = gateway.log().count('"event":"reloaded"')
    gateway.signal(signal.SIGHUP)
    gateway.wait_for_log('"event":"reloaded"', before + 1)
