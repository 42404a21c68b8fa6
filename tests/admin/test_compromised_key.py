"""A key that was leaked: revoked, its requests cut, replaced, and what it did, with one action."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from websockets.exceptions import ConnectionClosed

from tests.helpers.gateway import ROOT, Gateway, MakeGateway, wait_until
from tests.helpers.logins import Login, new_user
from tests.helpers.upstream import Received, Reply, Socket, Upstream, event, ws_events
from tests.helpers.websocket_client import client as websocket

pytestmark = [pytest.mark.promise_5, pytest.mark.promise_6, pytest.mark.promise_7]

# A request that is not cut is read on for longer than any test waits.
READ_ON = "[metering]\ndrain_seconds = 3600\n[limits.account]\nconcurrency = 0\n"
CHAT = {"model": "m", "messages": [], "stream": True}
SAME = [
    "label",
    "models",
    "concurrency",
    "requests_per_minute",
    "tokens_per_minute",
    "monthly_budget",
    "expires_at",
    "budget_id",
    "log_days",
    "account",
]


@pytest.fixture
def closing() -> Iterator[Callable[[Login], Login]]:
    with contextlib.ExitStack() as stack:

        def keep(login: Login) -> Login:
            stack.callback(login.client.close)
            return login

        yield keep


def report(gateway: Gateway, key_id: str, **body: Any) -> dict[str, Any]:
    found: dict[str, Any] = gateway.api("POST", f"/keys/{key_id}/compromised", body)
    return found


def keys_of(gateway: Gateway, account: str = "test") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = gateway.api("GET", f"/accounts/{account}/keys")["keys"]
    return found


def status_of(gateway: Gateway, key: str) -> int:
    with gateway.client(key) as client:
        return client.post("/responses", json={"model": "gpt-5.5", "input": "x"}).status_code


# ── The new key, and what the old one did ────────────────────────────────────────────────────────


def test_a_leaked_key_is_revoked_and_replaced_in_one_transaction(gateway: Gateway) -> None:
    gateway.cli("price", "add", "gpt-*", "--input", "1", "--output", "2")
    gateway.api("POST", "/accounts", {"name": "a"})
    limits = {"concurrency": 3, "requests_per_minute": 60, "tokens_per_minute": 100_000}
    options = {"label": "laptop", "models": "gpt-*,m", "monthly_budget": "7", "expires": "30d"}
    old = gateway.api("POST", "/accounts/a/keys", {**limits, **options})
    with gateway.client(old["key"]) as client:
        for model in ("gpt-5.5", "gpt-5.5", "gpt-5.4"):
            client.post("/responses", json={"model": model, "input": "x"})
    rows = gateway.rows(account="a")
    found = report(gateway, old["id"])
    new = found["new_key"]
    assert (found["was_in_force"], found["cut"], found["also_in_force"]) == (True, 0, [])
    assert (found["key"]["compromised"], found["key"]["revoked_at"] is None) == (True, False)
    assert {name: new[name] for name in SAME} == {name: old[name] for name in SAME}
    assert (new["replaces"], new["compromised"], new["revoked_at"]) == (old["id"], False, None)
    assert (status_of(gateway, old["key"]), status_of(gateway, new["key"])) == (401, 200)
    changes = gateway.api("GET", "/changes")["changes"][:2]
    assert [each["object_id"] for each in changes] == [old["id"], new["id"]]
    assert changes[0]["changed_at"] == changes[1]["changed_at"] == new["created_at"]
    activity = found["activity"]
    assert activity["latest"] == rows
    assert activity["outcomes"] == {"completed": 3}
    assert activity["first_request_at"] == rows[0]["started_at"]
    assert activity["last_request_at"] == rows[-1]["started_at"]
    assert [(each["model"], each["requests"]) for each in activity["models"]] == [
        ("gpt-5.4", 1),
        ("gpt-5.5", 2),
    ]
    by_key = gateway.api("GET", "/usage", key=old["id"])["totals"]
    assert activity["totals"] == by_key
    assert by_key["input_tokens"] > 0


def test_a_report_can_be_repeated(gateway: Gateway, key: str) -> None:
    key_id = keys_of(gateway)[0]["id"]
    assert status_of(gateway, key) == 200
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: report(gateway, key_id), range(8)))
    assert sorted(each["was_in_force"] for each in found) == [False] * 7 + [True]
    assert sum(each["new_key"] is not None for each in found) == 1
    assert len(keys_of(gateway)) == 2
    again = gateway.cli("key", "compromised", key_id)
    assert (again["was_in_force"], again["new_key"]) == (False, None)
    assert again["key"]["revoked_at"] == found[0]["key"]["revoked_at"]
    assert [each["key_id"] for each in again["activity"]["latest"]] == [key_id]
    text = gateway.run("key", "compromised", key_id).stdout
    assert "there is no new key" in text
    assert "sk-redbtc-" not in text
    assert len(keys_of(gateway)) == 2


def test_a_report_lists_from_a_time_on_and_can_leave_the_key_unreplaced(
    gateway: Gateway, key: str
) -> None:
    key_id = keys_of(gateway)[0]["id"]
    statuses = [status_of(gateway, key) for _ in range(2)]
    first, second = gateway.rows()
    assert statuses == [200, 200]
    refused = gateway.run("key", "compromised", key_id, "--since", "2026-02-31")
    assert refused.returncode == 1
    assert "is not a time" in refused.stderr
    assert status_of(gateway, key) == 200  # nothing was done
    since = second["started_at"]
    assert first["started_at"] <= since
    found = gateway.cli("key", "compromised", key_id, "--since", since, "--no-new-key")
    assert (found["was_in_force"], found["new_key"]) == (True, None)
    assert [each["request_id"] for each in found["activity"]["latest"]] == [
        each["request_id"] for each in gateway.rows() if each["started_at"] >= since
    ]
    assert found["activity"]["since"] == since
    assert len(keys_of(gateway)) == 1
    none = report(gateway, key_id, since="2099-01-01")["activity"]
    assert (none["outcomes"], none["models"], none["latest"]) == ({}, [], [])
    assert (none["first_request_at"], none["totals"]["requests"]) == (None, 0)


def test_an_expired_key_is_marked_but_not_replaced_and_its_successor_is_named(
    gateway: Gateway,
) -> None:
    old = gateway.api("POST", "/accounts", {"name": "a"}) and gateway.api(
        "POST", "/accounts/a/keys", {"label": "ci"}
    )
    namesake = gateway.api("POST", "/accounts/a/keys", {"label": "ci"})["id"]
    gateway.api("POST", "/accounts/a/keys", {"label": "other"})
    gateway.new_key("b")
    successor = gateway.api("POST", f"/keys/{old['id']}/rotate", {"overlap": "0"})["id"]
    found = report(gateway, old["id"])
    assert (found["was_in_force"], found["new_key"]) == (False, None)
    assert found["key"]["compromised"]
    assert sorted(found["also_in_force"]) == sorted([namesake, successor])
    third = gateway.api("POST", f"/keys/{successor}/rotate", {"overlap": "1h"})["id"]
    found = report(gateway, successor)
    new = found["new_key"]
    assert sorted(found["also_in_force"]) == sorted([namesake, third])
    assert (new["budget_id"], new["expires_at"]) == (old["id"], found["key"]["expires_at"])
    gateway.terminate()
    text = gateway.run("key", "compromised", third).stdout  # no gateway is needed
    assert "sk-redbtc-" in text
    assert f"{namesake} is a related key, still in force." in text


def test_who_may_report_a_key(gateway: Gateway, closing: Callable[[Login], Login]) -> None:
    for name in ("a", "b"):
        gateway.new_key(name)
    owner = closing(new_user(gateway, "owner@example.com", "owner", "a"))
    viewer = closing(new_user(gateway, "viewer@example.com", "viewer", "a"))
    (own,), (foreign,) = keys_of(gateway, "a"), keys_of(gateway, "b")

    def ask(login: Login, key_id: str) -> httpx2.Response:
        return login.client.post(f"/admin/v1/keys/{key_id}/compromised", json={})

    assert ask(viewer, own["id"]).status_code == 403
    there, nowhere = ask(owner, foreign["id"]), ask(owner, "key_0")
    assert (there.status_code, nowhere.status_code) == (404, 404)
    assert there.text.replace(foreign["id"], "key_0") == nowhere.text
    assert [len(keys_of(gateway, name)) for name in ("a", "b")] == [1, 1]
    assert ask(owner, own["id"]).json()["new_key"]["account"] == "a"


def test_the_page_shows_the_new_key_once_and_what_the_old_one_did(
    gateway: Gateway, closing: Callable[[Login], Login]
) -> None:
    key = gateway.new_key("a")
    assert status_of(gateway, key) == 200
    owner = closing(new_user(gateway, "owner@example.com", "owner", "a"))
    path = f"/dashboard/accounts/{owner.user['account_id']}/keys"
    (old,) = keys_of(gateway, "a")
    refused = owner.post(path, do="compromised", key=old["id"], since="whenever")
    assert (refused.status_code, "aria-invalid" in refused.text) == (400, True)
    assert keys_of(gateway, "a") == [old]
    shown = owner.post(path, do="compromised", key=old["id"], since="1h").text
    for text in ("sk-redbtc-", "1 request for ", "gpt-5.5", old["id"], "shown below, once"):
        assert text in shown
    assert "sk-redbtc-" not in owner.get(path).text
    again = owner.post(path, do="compromised", key=old["id"]).text
    assert "there is no new key" in again
    assert "sk-redbtc-" not in again
    assert len(keys_of(gateway, "a")) == 2


# ── Cutting ──────────────────────────────────────────────────────────────────────────────────────


def test_nothing_of_a_leaked_key_goes_on(make_gateway: MakeGateway, upstream: Upstream) -> None:
    """100 streams and 10 WebSocket turns are cut while new requests come in: none that was just
    authenticated slips through, since none would ever end."""
    gateway = make_gateway(READ_ON).start()
    key, other = gateway.new_key(), gateway.new_key()

    async def endless(_: Received, reply: Reply) -> None:
        await reply.head(200, {"content-type": "text/event-stream"})
        await reply.send(event({"id": "c", "model": "m", "choices": []}))
        await reply.wait(threading.Event())

    async def endless_turns(sock: Socket) -> None:
        while True:
            await sock.send(*ws_events(len(sock.frames), await sock.recv())[:2])

    upstream.script, upstream.talk = endless, endless_turns
    is_done = threading.Event()

    def converse() -> None:
        with contextlib.suppress(ConnectionClosed, OSError), websocket(gateway, key) as session:
            for number in range(5):
                session.send(stream_id=f"s{number}")
            while True:
                session.recv()

    def begin(shown: str) -> socket.socket:
        return stack.enter_context(gateway.begin(shown, CHAT, "/chat/completions"))

    def keep_asking() -> None:
        while not is_done.is_set():
            begin(key)

    with contextlib.ExitStack() as stack, ThreadPoolExecutor(6) as pool:
        talking = [pool.submit(converse) for _ in range(2)]
        streams = [begin(key) for _ in range(100)]
        begin(other)
        wait_until(lambda: gateway.metrics()["redbtc_in_flight"] == 111)
        asking = [pool.submit(keep_asking) for _ in range(4)]
        wait_until(lambda: gateway.metrics()["redbtc_in_flight"] > 121)
        found = report(gateway, keys_of(gateway)[0]["id"])
        is_done.set()
        assert found["cut"] >= 120  # the two sessions are counted as well
        for each in (*talking, *asking):
            each.result()
        for stream in streams:
            with contextlib.suppress(ConnectionError):
                while stream.recv(65536):  # until it ends
                    pass
        wait_until(lambda: gateway.metrics()["redbtc_in_flight"] == 1)
        report(gateway, keys_of(gateway)[1]["id"])
        wait_until(lambda: gateway.metrics()["redbtc_in_flight"] == 0)
    outcomes = {row["outcome"] for row in gateway.rows()}
    assert outcomes == {"client_disconnected"}


PAUSED = """
import asyncio, os, sys
sys.path.insert(0, {root!r})
from redbtc.gateway.websocket import turn_runner
candidates_for = turn_runner.candidates_for
async def paused(*arguments, **named):
    open("waits", "w").close()
    while not os.path.exists("goes_on"):
        await asyncio.sleep(0.001)
    return await candidates_for(*arguments, **named)
turn_runner.candidates_for = paused
"""


def test_a_turn_that_has_its_key_but_no_upstream_yet_is_cut(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    """The turn's references are still looked up when its key is revoked."""
    gateway = make_gateway(READ_ON)
    gateway.prelude = PAUSED.format(root=str(ROOT))
    gateway.start()
    key = gateway.new_key()
    got: list[Any] = []

    async def talk(sock: Socket) -> None:
        got.append(await sock.recv())

    upstream.talk = talk
    folder = Path(gateway.folder)
    with contextlib.suppress(ConnectionClosed, OSError), websocket(gateway, key) as session:
        session.send()
        wait_until((folder / "waits").exists)
        assert report(gateway, keys_of(gateway)[0]["id"])["cut"] == 2  # the session and its turn
        (folder / "goes_on").touch()
        session.closed()
    wait_until(lambda: gateway.metrics()["redbtc_in_flight"] == 0)
    wait_until(lambda: upstream.connections == 0)
    assert (got, gateway.rows()) == ([], [])


def test_the_answer_of_revoke_stays(gateway: Gateway) -> None:
    gateway.new_key()
    key_id = keys_of(gateway)[0]["id"]
    done = gateway.cli("key", "revoke", "--compromised", key_id)
    assert (done["id"], done["cut"], done["compromised"]) == (key_id, 0, True)
    assert "sk-redbtc-" not in json.dumps(done)
