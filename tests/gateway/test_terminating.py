"""Terminating an account ends all that runs for it, within moments, and nothing of another one."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx2
import pytest

from tests.gateway.errors import error
from tests.helpers.gateway import PATIENCE_SECONDS, ROOT, Gateway, MakeGateway, wait_until
from tests.helpers.leaving import marks_in, texts_of
from tests.helpers.response_store import BODY, ResponseStore, create
from tests.helpers.upstream import (
    Received,
    Reply,
    Socket,
    Upstream,
    json_answer,
    response_pieces,
    ws_events,
)
from tests.helpers.websocket_client import client as websocket

pytestmark = [pytest.mark.promise_4, pytest.mark.promise_6, pytest.mark.promise_7]

STREAMS = 500
STREAMED = {**BODY, "stream": True}
CREATED, ADDED, DELTA, COMPLETED = response_pieces(["Hello"])


class Holding:
    """The script of an upstream that begins each streamed answer, and ends it when `go_on` is
    set. Background responses are kept by a ResponseStore."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.stored = ResponseStore(turns=1_000_000)

    async def __call__(self, request: Received, reply: Reply) -> None:
        if not request.body or not request.json().get("stream"):
            await self.stored(request, reply)
            return
        await reply.head(200, [("content-type", "text/event-stream")])
        await reply.send(CREATED + ADDED + DELTA)
        while not (self.go_on.is_set() or request.closed.is_set()):
            await reply.wait(self.go_on, 0.2)
        await reply.send(COMPLETED)
        await reply.end()

    async def talk(self, sock: Socket) -> None:
        frame = await sock.recv()
        await sock.send(*ws_events(1, frame)[:2])
        await sock.recv()


def ended(sock: socket.socket) -> bytes:
    """Return what arrives until the connection ends."""
    got = b""
    try:
        while part := sock.recv(65536):
            got += part
    except ConnectionError:
        pass
    return got


def pending(gateway: Gateway, account: str) -> int:
    rows = gateway.rows(account=account)
    return sum(row["outcome"] == "pending" for row in rows)


def test_all_that_runs_is_cut(make_gateway: MakeGateway, upstream: Upstream) -> None:
    upstream.script = script = Holding()
    upstream.talk = script.talk
    gateway = make_gateway("[limits]\nqueue_seconds = 600").start()
    key = gateway.new_key("leaves", concurrency=STREAMS + 1)
    other = gateway.new_key("stays")
    with ExitStack() as stack:

        def begin(key: str) -> socket.socket:
            return stack.enter_context(gateway.begin(key, STREAMED))

        stays = [begin(other) for _ in range(3)]
        with websocket(gateway, key) as session:
            session.send()
            session.until("response.output_text.delta")
            cut = [begin(key) for _ in range(STREAMS)]
            upstream.wait_for(lambda: upstream.in_flight == STREAMS + 3)
            queued = [begin(key) for _ in range(5)]
            wait_until(lambda: gateway.metrics()["redbtc_queued"] == 5)
            uploading = stack.enter_context(gateway.connect())
            head = f"POST /v1/responses HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {key}\r\n"
            uploading.sendall(f"{head}content-length: 100\r\n\r\n{{".encode())
            everything = STREAMS + 1 + 5 + 1 + 3
            wait_until(lambda: gateway.metrics()["redbtc_in_flight"] == everything)
            done = gateway.api("POST", "/accounts/leaves/terminate", {})
            assert done["done"]
            # A session and its turn are two, unless the one ends with the other.
            assert done["cut"] in (everything - 3, everything - 2)
            assert session.closed() in (None, 1006)
        answers = [ended(sock) for sock in (*cut, *queued, uploading)]
        assert not any(b"response.completed" in each for each in answers)
        wait_until(lambda: gateway.metrics()["redbtc_in_flight"] == 3)
        wait_until(lambda: not pending(gateway, "leaves"))
        limits = gateway.api("GET", "/accounts/leaves/limits")
        assert limits["concurrency"]["in_flight"] == 0
        upstream.wait_for(lambda: upstream.in_flight == 3)
        rows = gateway.rows(account="leaves", limit=1000)
        assert len(rows) == STREAMS + 1
        assert {(row["outcome"], row["usage_source"]) for row in rows} == {
            ("client_disconnected", "estimated")
        }
        with gateway.client(key) as client:
            refused = error(client.post("/responses", json=BODY))
        assert refused[:2] == (401, "invalid_api_key")
        script.go_on.set()
        for sock in stays:
            sock.settimeout(PATIENCE_SECONDS)
            got = b""
            while b"response.completed" not in got:
                part = sock.recv(65536)
                assert part, "it goes on to its end"
                got += part
    assert gateway.cli("db", "check")["ok"]


def test_no_request_slips_through(make_gateway: MakeGateway, upstream: Upstream) -> None:
    """However far a request has come when its account is terminated, it ends or is refused."""
    upstream.script = Holding()
    gateway = make_gateway('[metering]\non_disconnect = "cancel"').start()
    key = gateway.new_key("leaves", concurrency=100)
    begun, terminated = itertools.count(), threading.Event()

    def send(_: int) -> None:
        """Begin streams until one is refused. The gateway has to end the last ones."""
        status = 200
        while status != 401:
            with (
                contextlib.suppress(httpx2.HTTPError),
                gateway.client(key) as client,
                client.stream("POST", "/responses", json=STREAMED) as answer,
            ):
                status = answer.status_code
                next(begun)
                if terminated.is_set():
                    answer.read()

    with ThreadPoolExecutor(12) as pool:
        sending = [pool.submit(send, number) for number in range(12)]
        wait_until(lambda: next(begun) > 150)
        terminated.set()
        gateway.api("POST", "/accounts/leaves/terminate", {})
        for each in sending:
            each.result(PATIENCE_SECONDS)
    wait_until(lambda: gateway.metrics()["redbtc_in_flight"] == 0)
    wait_until(lambda: not pending(gateway, "leaves"))


@pytest.mark.parametrize("runs", [True, False])
def test_background_responses_are_cancelled(
    make_gateway: MakeGateway, upstream: Upstream, runs: bool
) -> None:
    """Also after a restart, if no gateway ran when the account was terminated."""
    upstream.script = script = Holding()
    gateway = make_gateway().start()
    key, other = gateway.new_key("leaves"), gateway.new_key("stays")
    taken, kept = (create(gateway, each, background=True)["id"] for each in (key, other))
    if not runs:
        gateway.kill()
    done = gateway.cli("account", "terminate", "leaves", "--yes")
    assert done["cut"] == int(runs)
    if not runs:
        gateway.start()
    wait_until(lambda: not pending(gateway, "leaves"))
    (row,) = gateway.rows(account="leaves")
    assert row["outcome"] == "client_disconnected"
    states = [script.stored.responses[each]["status"] for each in (taken, kept)]
    assert states == ["cancelled", "queued"]


def test_what_can_not_end_is_erased_later(make_gateway: MakeGateway, upstream: Upstream) -> None:
    """A background response whose upstream does not answer may still write something."""
    upstream.script = script = Holding()
    gateway = make_gateway()
    own = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    gateway.prelude = f"{own}from redbtc.gateway import view; view.END_SECONDS = 0.3\n"
    gateway.start()
    key = gateway.new_key("leaves")
    made = create(gateway, key, background=True)["id"]
    account = gateway.api("GET", "/accounts/leaves")["id"]

    async def busy(request: Received, reply: Reply) -> None:
        await json_answer({"error": {"message": "x"}}, 503)(request, reply)

    upstream.script = busy
    done = gateway.cli("account", "terminate", "leaves", "--yes", "--now", check=False)
    assert done.returncode == 1
    assert "have not ended" in json.loads(done.stdout)["missing"]
    assert gateway.api("GET", f"/accounts/{account}")["erased_at"] is None
    gateway.kill()
    done = gateway.cli("account", "terminate", account, "--yes", "--now", check=False)
    assert "have not ended" in json.loads(done.stdout)["missing"], "nor does a stopped one know"
    gateway.start()
    upstream.script = script
    wait_until(lambda: not pending(gateway, account))
    assert "stored_objects.id" not in texts_of(gateway.database, made), "it can't come back"
    assert gateway.cli("account", "terminate", account, "--yes", "--now")["erased_at"]
    assert marks_in(gateway.folder, made) == {}
    assert gateway.row()["response_id"] is None
