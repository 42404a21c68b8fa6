"""The admin API as its own description tells it, and who is shown what. schemathesis sends what the
description allows and what it doesn't; the rest is what no description can say."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis import Case, GenerationMode

from gateway import NO_TLS, Gateway
from redbtc_admin import OPERATIONS, PREFIX, Operation, openapi
from upstream import Upstream

PASSWORD = "correct horse battery staple 7"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """One gateway for all of schemathesis' requests."""
    with Upstream() as upstream:
        gateway = Gateway(tmp_path_factory.mktemp("gateway"), upstream.url).start()
        yield gateway
        gateway.close()


def log_in(gateway: Gateway, link: str) -> dict[str, str]:
    """Sets a password with a user's link; headers of a browser that is logged in from then on."""
    origin = {"origin": gateway.url}
    form = {"password": PASSWORD, "again": PASSWORD}
    url = f"{gateway.url}/dashboard/link/{link.rsplit('/', 1)[1]}"
    with httpx2.Client(trust_env=False, verify=NO_TLS) as client:
        answer = client.post(url, data=form, headers=origin)
        assert answer.status_code == 303, answer.text
        return {"Cookie": f"redbtc={answer.cookies['redbtc']}", "Origin": gateway.url}


def new_user(gateway: Gateway, email: str, role: str, account: str | None = None) -> dict[str, str]:
    """Headers of a new user who is logged in."""
    body = {"email": email, "role": role, **({"account": account} if account else {})}
    return log_in(gateway, gateway.api("POST", "/users", body)["link"])


# ── As it is described ───────────────────────────────────────────────────────────────────────────

# Who asks is always logged in, or shows a key; the check `ignored_auth` asks again without.
CONFIG = schemathesis.Config.from_dict({"generation": {"with-security-parameters": False}})
DESCRIBED = schemathesis.openapi.from_dict(openapi(secure=False), config=CONFIG)
FEW = settings(
    max_examples=15,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


class Known(NamedTuple):
    """Who asks, and ids of what there is."""

    gateway: Gateway
    session: requests.Session
    cookie: dict[str, str]
    bearer: dict[str, str]
    ids: dict[str, str]


@pytest.fixture(scope="module")
def known(running: Gateway) -> Iterator[Known]:
    key = running.new_key("first")
    (shown,) = running.api("GET", "/accounts/first/keys")["keys"]
    notice = running.api("POST", "/notices", {"kind": "incident", "text": "slow"})
    cookie = new_user(running, "op@example.com", "operator")
    # Users and sessions that may end: removing or resetting the one who asks, or ending his
    # session, would refuse all that is asked after it.
    victim = running.api("POST", "/users", {"email": "victim@example.com", "account": "first"})
    ids = {
        "account": shown["account_id"],
        "key": shown["id"],
        "notice": notice["id"],
        "user": victim["id"],
        "session": "ses_0123456789abcdef",
        "month": shown["created_at"][:7],
    }
    with requests.Session() as session:
        session.trust_env = False
        yield Known(running, session, cookie, {"Authorization": f"Bearer {key}"}, ids)


@DESCRIBED.parametrize()
@FEW
def test_every_operation_keeps_its_description(case: Case, known: Known) -> None:
    assert case.meta is not None
    if case.meta.generation.mode == GenerationMode.POSITIVE:
        # Chance finds no id. Three in four times it is one that there is.
        case.path_parameters.update(
            {
                name: known.ids[name]
                for name, value in case.path_parameters.items()
                if len(str(value)) % 4
            }
        )
    headers = known.bearer if case.path.startswith(f"{PREFIX}/me") else known.cookie
    case.call_and_validate(known.gateway.url, known.session, headers)
