"""Promise 7: what stands for a client's own credential, and the objects that belong to it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, cast

import pytest

from redbtc.locations import ObjectLocation
from redbtc.store.credentials import ClientCredential
from redbtc.store.database import Store
from redbtc.store.objects import Objects
from redbtc.store.spill import OwedChange, change_of, line_of
from tests.helpers.credentials import jwt, login

pytestmark = pytest.mark.promise_7

SECRET = b"secret"


def digest(headers: dict[str, str], account: str = "acct_1", secret: bytes = SECRET) -> str:
    lines = [(name.encode(), value.encode()) for name, value in headers.items()]
    return ClientCredential(lines, account, secret).digest


def test_the_digest_of_a_login_outlives_its_token() -> None:
    assert digest(login("u", exp=1)) == digest(login("u", exp=2, jti="x"))
    assert len(digest(login("u"))) == 32


def test_every_part_of_an_identity_counts() -> None:
    """Nothing can be moved from one part to the next, either."""
    token = {"authorization": f"Bearer {jwt('u')}"}
    different = [
        digest(login("u")),
        digest(login("u"), account="acct_2"),
        digest(login("u"), secret=b"other"),
        digest(login("v")),
        digest(login("u", "w")),
        digest(login("u", iss="https://elsewhere.example")),
        digest(token),
        digest({"authorization": f"Bearer {jwt('u', exp=1)}"}),
        digest({"authorization": "Bearer sk-1"}),
        digest({"authorization": "Bearer sk-2"}),
        digest({"authorization": "Bearer sk-1", "chatgpt-account-id": "w"}),
        digest({"authorization": "Bearer sk-1", "chatgpt-account-id": ""}),
        digest({"authorization": "Bearer sk-", "chatgpt-account-id": "1"}),
        digest({"authorization": ""}),
    ]
    assert len(set(different)) == len(different)


@pytest.mark.parametrize(
    "token",
    [
        "a.b.c",
        "e30.e30.e30",  # no subject
        "e30.eyJzdWIiOjF9.e30",  # one that is no text
        "e30.bnVsbA.",
        f"{jwt('u')}.x",
        f"{jwt('u')} x",
        "x" + "." * 50,
    ],
)
def test_what_names_no_user_is_its_own_identity(token: str) -> None:
    headers = {"authorization": f"Bearer {token}", "chatgpt-account-id": "w"}
    assert digest(headers) == digest(headers)
    assert digest(headers) != digest(headers | {"authorization": f"Bearer {token}y"})


def test_a_credential_is_not_shown() -> None:
    credential = ClientCredential([(b"authorization", b"Bearer sk-canary")], "acct_1", SECRET)
    assert "canary" not in repr(credential) + str(credential)


class SlowStore:
    """A ledger whose commits have not happened yet."""

    secret = SECRET

    def __init__(self) -> None:
        self.written: list[Any] = []

    def time(self) -> int:
        return 1

    def record(self, sql: str, values: Sequence[Any], **_: bool) -> asyncio.Future[None]:
        self.written.append((sql, values))
        return asyncio.get_running_loop().create_future()

    def look_up(self, *_: object) -> None:
        return None

    def look_up_all(self, *_: object) -> list[Any]:
        return []


def test_a_claim_that_is_not_written_yet_keeps_its_credential() -> None:
    async def claim_twice() -> None:
        store = SlowStore()
        objects = Objects(cast(Store, store))
        mine, theirs = (
            ObjectLocation("up", tokens=n, credential=c) for n, c in ((1, "a"), (9, "b"))
        )
        objects.own(["resp_1"], "acct_1", mine)
        objects.own(["resp_1"], "acct_1", theirs)
        objects.own(["resp_1"], "acct_1", theirs._replace(credential=None))
        assert objects.location_of("resp_1", "acct_1", "a") == mine
        assert objects.look_up(["resp_1"], "acct_1", "a") == {"resp_1": mine}
        for credential in ("b", None):
            assert objects.location_of("resp_1", "acct_1", credential) is None
            assert objects.look_up(["resp_1"], "acct_1", credential) == {"resp_1": None}
        assert objects.location_of("resp_1", "acct_2", "a") is None
        for written in store.written:  # what can't be committed goes into the spill file
            change = OwedChange(*written)
            assert change_of(line_of(change).rstrip(b"\n")) == change

    asyncio.run(claim_twice())
