"""A request that fails at one upstream is sent to another one, over HTTP: after which failures, and
after which it is not. After each request the ledger has one row, and all is given back."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import math
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
from backports import zstd

from redbtc.config import FailoverSettings
from redbtc.gateway.failover import Failover
from redbtc.upstream.past_requests import FAILURES_IN_ROW
from tests.gateway.errors import error
from tests.helpers.gateway import PATIENCE_SECONDS, free_port, wait_until
from tests.helpers.pair import BALANCE, CHAT, CHAT_COST, MODEL, RESPONSE, Pair, nowhere
from tests.helpers.response_store import ResponseStore
from tests.helpers.upstream import (
    Headers,
    Received,
    Reply,
    Script,
    chat_json,
    json_answer,
    openai_like,
    response_pieces,
    silent,
    stream,
)

pytestmark = [pytest.mark.promise_1, pytest.mark.promise_4, pytest.mark.promise_9]

BAD_STATUSES = (429, 500, 502, 503, 504, 529, 401, 403)
ERROR = {"error": {"message": "Try elsewhere", "type": "server_error", "code": "some_code"}}
CLOSE = {"on_disconnect": "cancel"}  # the upstream is not read on when the client has left
QUICK = {"connect_timeout_seconds": 0.3, "idle_timeout_seconds": 1}


def fails(status: int = 500, seconds: float = 0.0, headers: Headers = ()) -> Script:
    """Answer with an error, after some seconds."""
    answer = json_answer(ERROR, status, headers)

    async def script(request: Received, reply: Reply) -> None:
        await asyncio.sleep(seconds)
        await answer(request, reply)

    return script


async def tears(_: Received, reply: Reply) -> None:
    reply.tear()


async def tears_after_head(_: Received, reply: Reply) -> None:
    await reply.head(200, [("content-type", "application/json")], "length:1000")
    await reply.send(b'{"id":')
    reply.tear()


# ── After which failures ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("status", BAD_STATUSES)
def test_after_a_status(pair: Pair, status: int) -> None:
    pair.bad.script = fails(status)
    assert pair.ask().status_code == 200
    pair.assert_served_by_good(cost=CHAT_COST)
    assert len(pair.bad.requests) == len(pair.good.requests) == 1


@pytest.mark.parametrize(
    "headers",
    [
        {"retry-after": "20"},
        {"retry-after": "Fri, 31 Dec 2099 23:59:59 GMT"},
        {"retry-after": "0"},
        {"retry-after": "soon"},
        {"retry-after-ms": "1500"},
        {"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "6m0s"},
    ],
)
def test_a_429_rests_the_upstream(pair: Pair, headers: dict[str, str]) -> None:
    pair.bad.script = fails(429, headers=headers)
    assert pair.ask().status_code == 200
    pair.assert_served_by_good()
    assert pair.ask().status_code == 200
    assert len(pair.bad.requests) == 1, "it rests for a second at least"
    (change,) = pair.gateway.api("GET", "/upstreams/changes", limit=1)["changes"]
    assert (change["upstream"], change["state"]) == (pair.name("bad"), "resting")


@contextlib.contextmanager
def refusing(_: Path) -> Iterator[dict[str, Any]]:
    yield {"base_url": nowhere()}


@contextlib.contextmanager
def unknown(_: Path) -> Iterator[dict[str, Any]]:
    yield {"base_url": "http://no-such-host.invalid/v1"}


@contextlib.contextmanager
def black_hole(_: Path) -> Iterator[dict[str, Any]]:
    """A port whose queue of connections is full: packets to it are dropped."""
    with socket.socket() as listener, contextlib.ExitStack() as closing:
        listener.bind(("127.0.0.1", free_port()))
        listener.listen(0)
        for _number in range(4):
            waiting = closing.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield {"base_url": f"http://127.0.0.1:{listener.getsockname()[1]}/v1"}


@contextlib.contextmanager
def bad_certificate(folder: Path) -> Iterator[dict[str, Any]]:
    """An upstream with a certificate of an authority that is not known."""
    if not shutil.which("openssl"):
        pytest.skip("no openssl")
    file = folder / "own.pem"
    own = f"openssl req -x509 -newkey rsa:2048 -nodes -keyout {file} -out {file}.crt -subj /CN=a"
    subprocess.run(own.split(), check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(f"{file}.crt", file)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection, contextlib.suppress(OSError):
                        context.wrap_socket(connection, server_side=True)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield {"base_url": f"https://127.0.0.1:{listener.getsockname()[1]}/v1"}
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(PATIENCE_SECONDS)


CONNECTIONS = [
    (refusing, "refused"),
    (unknown, "dns"),
    (black_hole, "connect_timeout"),
    (bad_certificate, "tls: self-signed certificate"),
]


@pytest.mark.parametrize(("broken", "cause"), CONNECTIONS)
def test_after_a_failed_connection(
    pair: Pair, tmp_path: Path, broken: Callable[..., Any], cause: str
) -> None:
    with broken(tmp_path) as bad:
        pair.use({**QUICK, **bad})
        assert pair.ask().status_code == 200
        pair.assert_served_by_good(cost=CHAT_COST)
        pair.use({**QUICK, **bad}, {"base_url": bad["base_url"], **QUICK})
        answer = pair.ask()
        assert error(answer) == (502, "upstream_unreachable", None)
        fields = ("status", "outcome", "attempts", "upstream_status", "upstream_error_code")
        assert pair.met(*fields) == (502, "upstream_failed", 2, None, cause)
        assert not Decimal(pair.row["cost"] or 0)


BIG = json.dumps({**CHAT, "user": "x" * 3_000_000}).encode()
JSON = {"content-type": "application/json"}
FORM = {"content-type": "multipart/form-data; boundary=xyz"}
PICTURE = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 400
EDIT = (
    b'--xyz\r\nContent-Disposition: form-data; name="model"\r\n\r\ngpt-up\r\n'
    b'--xyz\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nA cat\r\n'
    b'--xyz\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n'
    b"Content-Type: image/png\r\n\r\n" + PICTURE + b"\r\n--xyz--\r\n"
)
PLAIN = json.dumps(CHAT).encode()
SPACED = b'{ "model" :\t"gpt-up",\n "input": "Hi" }\n'
STREAMED = json.dumps({**CHAT, "stream": True, "stream_options": {"include_usage": True}}).encode()
BODIES = {
    "of 3 MB": ("/chat/completions", BIG, JSON),
    "gzip": ("/chat/completions", gzip.compress(PLAIN), {**JSON, "content-encoding": "gzip"}),
    "zstd": ("/chat/completions", zstd.compress(PLAIN), {**JSON, "content-encoding": "zstd"}),
    "streamed chat": ("/chat/completions", STREAMED, JSON),
    "response": ("/responses", SPACED, JSON),
    "streamed response": ("/responses", json.dumps({**RESPONSE, "stream": True}).encode(), JSON),
    "compaction": ("/responses/compact", SPACED, JSON),
    "count": ("/responses/input_tokens", SPACED, JSON),
    "image": ("/images/generations", b'{"model": "gpt-up", "prompt": "A cat"}', JSON),
    "streamed image": (
        "/images/generations",
        b'{"model": "gpt-up", "prompt": "A cat", "stream": true}',
        JSON,
    ),
    "edit": ("/images/edits", EDIT, FORM),
}


@pytest.mark.parametrize("status", [None, 503])
@pytest.mark.parametrize("kind", BODIES)
def test_the_body_arrives_unchanged(pair: Pair, kind: str, status: int | None) -> None:
    path, body, headers = BODIES[kind]
    pair.use({"base_url": nowhere()} if status is None else {})
    if status:
        pair.bad.script = fails(status)
    if "content-encoding" in headers:
        pair.good.script = json_answer(ANSWER)
    answer = pair.ask(path, content=body, headers={**headers, "x-client-request-id": "mine"})
    assert answer.status_code == 200
    (arrived,) = pair.good.requests
    assert arrived.body == body
    for tried in [*pair.bad.requests, arrived]:
        assert tried.body == body
        assert tried.path == f"/v1{path}"
        assert tried.header("content-length") == str(len(body))
        assert tried.header("x-client-request-id") == "mine"
        for name, value in headers.items():
            assert tried.header(name) == value
    pair.assert_served_by_good()


ANSWER = {"id": "a", "object": "chat.completion", "model": MODEL, "choices": [], "usage": {}}


def test_the_added_option_is_sent_again(pair: Pair) -> None:
    """A streamed chat gets the option that makes it report its usage, once."""
    pair.bad.script = fails(500)
    answer = pair.ask(stream=True)
    assert answer.status_code == 200
    assert b"prompt_tokens" not in answer.content, "the client did not ask for its usage"
    first, second = pair.bad.requests[0], pair.good.requests[0]
    assert first.body == second.body
    assert second.json() == {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
    pair.assert_served_by_good(cost=CHAT_COST)


def test_an_answer_before_the_whole_body_came(pair: Pair) -> None:
    """Proxies refuse a large request without reading it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"HTTP/1.1 503 Busy\r\ncontent-length: 2\r\n\r\n{}")
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(1 << 16):
                    pass

        with ThreadPoolExecutor(1) as pool:
            served = pool.submit(serve)
            pair.use({"base_url": f"http://127.0.0.1:{listener.getsockname()[1]}/v1"})
            assert pair.ask(content=BIG, headers=JSON).status_code == 200
            served.exception(PATIENCE_SECONDS)
    assert pair.good.requests[0].body == BIG
    pair.assert_served_by_good()


def test_a_third_upstream(pair: Pair) -> None:
    pair.use({}, {"base_url": nowhere(), "weight": 1000}, {})
    pair.bad.script = fails(429)
    assert pair.ask().status_code == 200
    assert pair.met("upstream", "attempts") == (f"more2{pair.number}", 3)


def test_both_upstreams_get_the_same_idempotency_key(pair: Pair) -> None:
    pair.bad.script = fails(503)
    assert pair.ask(headers={"idempotency-key": "mine"}).status_code == 200
    (first,), (second,) = pair.bad.requests, pair.good.requests
    assert first.header("idempotency-key") == second.header("idempotency-key") != "mine"


# ── After which it is not sent to another one ────────────────────────────────────────────────────


@pytest.mark.parametrize("status", [400, 404, 408, 409, 413, 422])
def test_a_4xx_about_the_request_passes(pair: Pair, status: int) -> None:
    pair.bad.script = fails(status)
    answer = pair.ask()
    assert (answer.status_code, answer.json()) == (status, ERROR)
    assert not pair.good.requests
    found = pair.met("upstream", "attempts", "upstream_status", "outcome", "cost")
    assert found[:4] == (pair.name("bad"), 1, status, "upstream_error")


@pytest.mark.parametrize(
    ("script", "status", "outcome", "cause"),
    [
        (silent, 504, "upstream_failed", "first_byte_timeout"),
        (tears, 502, "upstream_failed", "reset"),
        (tears_after_head, None, "upstream_failed", "reset"),
        (stream(response_pieces(["Hi"])[:3], end="tear"), None, "upstream_failed", "reset"),
    ],
)
def test_a_request_that_may_have_been_acted_on(
    pair: Pair, script: Script, status: int | None, outcome: str, cause: str
) -> None:
    pair.use({"first_byte_timeout_seconds": 0.3})
    pair.bad.script = script
    if status is None:
        with pytest.raises(httpx2.TransportError):
            pair.ask("/responses", stream=True)
    else:
        assert pair.ask("/responses", stream=True).status_code == status
    assert not pair.good.requests
    fields = ("upstream", "attempts", "outcome", "upstream_error_code")
    found = pair.met(*fields)
    assert found == (pair.name("bad"), 1, outcome, cause)


def background(pair: Pair, **more: Any) -> int:
    return pair.ask("/responses", background=True, **more).status_code


@pytest.mark.parametrize("status", BAD_STATUSES)
def test_a_background_response_is_created_once(pair: Pair, status: int) -> None:
    pair.bad.script, pair.good.script = fails(status), ResponseStore(first=1000 * pair.number)
    certain = status in (429, 401, 403)
    assert background(pair) == (200 if certain else status)
    assert len(pair.good.requests) == certain
    row = pair.row
    assert row["upstream"] == pair.name("good" if certain else "bad")
    assert (row["attempts"], row["outcome"]) == (
        (2, "pending") if certain else (1, "upstream_error")
    )


def test_a_background_response_after_a_failed_connection(pair: Pair) -> None:
    pair.use({"base_url": nowhere()})
    pair.good.script = ResponseStore(first=1000 * pair.number)
    assert background(pair) == 200
    assert (pair.row["upstream"], pair.row["attempts"]) == (pair.name("good"), 2)


@pytest.mark.parametrize("status", BAD_STATUSES)
@pytest.mark.parametrize("organization", ["", "acme"])
def test_what_is_stored_stays_in_its_organization(
    pair: Pair, status: int, organization: str
) -> None:
    """Members of one organization can read what the other one has stored."""
    pair.use({"organization": organization}, {"organization": organization})
    pair.bad.script = pair.good.script = store = ResponseStore(first=1000 * pair.number)
    made = pair.ask("/responses").json()["id"]
    pair.bad.script = fails(status)
    certain = status in (429, 401, 403) and bool(organization)
    seen = 502 if status in (401, 403) else status
    with pair.gateway.client(pair.key) as client:
        assert client.get(f"/responses/{made}").status_code == (200 if certain else seen)
    assert pair.ask("/responses", previous_response_id=made).status_code == (
        200 if certain else seen
    )
    assert len(pair.good.requests) == 2 * certain
    pair.wait_until_idle()
    assert len(store.responses) == (2 if certain else 1)


# ── Bounds ───────────────────────────────────────────────────────────────────────────────────────


def test_one_attempt(pair: Pair) -> None:
    pair.use({}, failover={"attempts": 1})
    pair.bad.script = fails(500)
    assert pair.ask().status_code == 500
    assert pair.met("upstream", "attempts") == (pair.name("bad"), 1)
    assert not pair.good.requests


def test_at_most_so_many_attempts(pair: Pair) -> None:
    pair.use({}, *[{"base_url": pair.bad.url}] * 4)
    pair.bad.script = fails(500)
    assert pair.ask().status_code == 500
    assert pair.met("attempts") == (3,)
    assert len(pair.bad.requests) == 3


def test_the_budget_is_used_up(pair: Pair) -> None:
    pair.use({}, failover={"budget_seconds": 0.2})
    pair.bad.script = fails(500, seconds=0.3)
    assert pair.ask().status_code == 500
    assert pair.met("upstream", "attempts") == (pair.name("bad"), 1)
    assert not pair.good.requests


def test_the_deadline_is_that_of_the_request(pair: Pair) -> None:
    """It does not begin anew with each attempt: each is shorter than it, both together are not."""
    pair.use(*[{"total_timeout_seconds": 1.5}] * 2)
    pair.bad.script = fails(500, seconds=1)

    async def slow(request: Received, reply: Reply) -> None:
        if not await reply.wait(request.closed, 1):
            await openai_like(request, reply)

    pair.good.script = slow
    assert error(pair.ask())[:2] == (504, "upstream_timeout")
    found = pair.met("upstream", "attempts", "status", "outcome", "upstream_error_code")
    assert found == (pair.name("good"), 2, 504, "upstream_failed", "first_byte_timeout")


def test_a_client_that_leaves_is_not_sent_on(pair: Pair) -> None:
    pair.use({}, metering=CLOSE)
    pair.bad.script = silent
    with pair.gateway.begin(pair.key, CHAT, "/chat/completions"):
        pair.bad.wait_for(lambda: pair.bad.in_flight == 1)
    assert pair.met("attempts", "outcome") == (1, "client_disconnected")
    assert not pair.good.requests


def test_a_client_that_leaves_while_the_request_is_drained(pair: Pair) -> None:
    """The upstream is read on, but no other one is asked."""
    pair.use({}, metering={"on_disconnect": "drain"})
    release = threading.Event()

    async def script(request: Received, reply: Reply) -> None:
        await reply.wait(release)
        await fails(500)(request, reply)

    pair.bad.script = script
    with pair.gateway.begin(pair.key, CHAT, "/chat/completions"):
        pair.bad.wait_for(lambda: pair.bad.in_flight == 1)
    wait_until(lambda: pair.gateway.connections() == 0)
    release.set()
    assert pair.met("attempts", "outcome", "status") == (1, "upstream_error", 500)
    assert not pair.good.requests


def test_a_client_that_leaves_between_two_attempts_pays_nothing(pair: Pair, tmp_path: Path) -> None:
    """The first upstream has answered with an error, the second one can't be reached yet."""
    with black_hole(tmp_path) as hole:
        pair.use({}, {**hole, "connect_timeout_seconds": 60}, metering=CLOSE)
        pair.bad.script = fails(500)
        with pair.gateway.begin(pair.key, CHAT, "/chat/completions"):
            wait_until(lambda: [each["in_flight"] for each in overview(pair)] == [0, 1])
        found = pair.met("attempts", "outcome", "upstream_status")
        assert found == (2, "client_disconnected", 500)
        assert not Decimal(pair.row["cost"] or 0)


def overview(pair: Pair) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pair.gateway.api("GET", "/overview")["upstreams"]
    return found


# ── Many at once ─────────────────────────────────────────────────────────────────────────────────


def test_a_balance_is_never_overspent(pair: Pair) -> None:
    """The hold of a request is one, however often it is tried."""
    pair.use({}, limits={"account": {"concurrency": 0}})
    pair.bad.script = fails(429, seconds=0.01)
    usage = {"prompt_tokens": 1, "completion_tokens": 99_999, "total_tokens": 100_000}
    pair.good.script = chat_json(usage)
    body = {**CHAT, "max_tokens": 1000, "n": 100}  # up to 1 USD
    with ThreadPoolExecutor(50) as pool:
        statuses = list(pool.map(lambda _: pair.ask(**body).status_code, range(200)))
    assert {*statuses} == {200, 429}
    pair.wait_until_idle()
    account = pair.gateway.api("GET", f"/accounts/{pair.account}")
    rows = pair.gateway.rows(account=pair.account, limit=1000)
    paid = sum(Decimal(row["cost"]) for row in rows)
    assert Decimal(account["balance"]) == Decimal(BALANCE) - paid >= 0
    assert Decimal(account["held"]) == 0
    assert len(rows) == statuses.count(200) in (9, 10)


def test_a_request_that_fails_at_once_has_no_attempt(pair: Pair) -> None:
    """It is not sent to the only upstream, which is known not to be reachable."""
    pair.alone(base_url="http://no-such-host.invalid/v1")
    for _ in range(FAILURES_IN_ROW + 1):
        assert pair.ask().status_code == 502
    rows = pair.gateway.rows(account=pair.account)
    assert [row["attempts"] for row in rows] == [1] * FAILURES_IN_ROW + [0]
    assert {row["upstream_error_code"] for row in rows} == {"dns"}


def test_the_budget_ends_for_a_request_that_was_not_sent_to_the_first_member() -> None:
    candidates: Any = SimpleNamespace(are_full=True)
    for budget, may_wait in ((60, True), (0, False)):
        settings = FailoverSettings(budget_seconds=budget)
        failover: Failover[Any] = Failover(settings, math.inf, certain_only=False)
        assert failover.may_wait(candidates, None) is may_wait
