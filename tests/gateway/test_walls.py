"""Promise 7: nothing in a request reaches an object of another account, and no answer reveals
whether such an object exists."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import re
import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from websockets.sync.client import ClientConnection, connect

from redbtc.locations import ObjectLocation
from redbtc.store.database import Store
from redbtc.store.objects import Objects
from redbtc.store.schema import migrations, schema
from tests.gateway.errors import error
from tests.helpers.gateway import Gateway, MakeGateway, wait_until
from tests.helpers.upstream import (
    Received,
    Reply,
    Script,
    Socket,
    Upstream,
    event,
    json_answer,
    response_object,
    stream,
    ws_events,
)

pytestmark = [pytest.mark.promise_6, pytest.mark.promise_7]

BODY = {"model": "gpt-up", "input": "Hi"}
FORM = {"content-type": "multipart/form-data; boundary=xyz"}


class Echo:
    """An upstream that lists the input of each response with the ids that the client gave, and ids
    of its own for items without one."""

    def __init__(self) -> None:
        self.inputs: dict[str, list[dict[str, Any]]] = {}
        self._numbers = itertools.count(1)

    async def __call__(self, request: Received, reply: Reply) -> None:
        await self._script(request)(request, reply)

    def _script(self, request: Received) -> Script:
        if request.method != "POST":
            response_id = request.path.split("?")[0].split("/")[3]
            return json_answer({"object": "list", "data": self.inputs[response_id]})
        body, number = request.json(), next(self._numbers)
        given = body["input"] if isinstance(body["input"], list) else [{"role": "user"}]
        before = self.inputs.get(body.get("previous_response_id"), [])
        items = [{"id": f"in_{number}_{at}", **item} for at, item in enumerate(given)]
        self.inputs[f"resp_{number}"] = before + items
        message = {"id": f"msg_{number}", "type": "message", "role": "assistant", "content": []}
        response = response_object(
            id=f"resp_{number}", output=[message], conversation=body.get("conversation")
        )
        return json_answer(response)


@pytest.fixture
def echo(upstream: Upstream) -> Echo:
    echo = Echo()
    upstream.script = echo
    return echo


def create(client: httpx2.Client, headers: dict[str, str] | None = None, **more: Any) -> Any:
    answer = client.post("/responses", json={**BODY, **more}, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refer(client: httpx2.Client, item_id: str) -> int:
    """Return the status of a request that refers to an item."""
    item = {"type": "item_reference", "id": item_id}
    return client.post("/responses", json={**BODY, "input": [item]}).status_code


def said(item_id: str) -> dict[str, Any]:
    """Return a message whose id the client chose."""
    return {"type": "message", "role": "user", "content": "x", "id": item_id}


@contextlib.contextmanager
def held(gateway: Gateway) -> Iterator[None]:
    """While this is open, nothing can be committed."""
    with contextlib.closing(sqlite3.connect(gateway.database)) as database:
        database.execute("BEGIN IMMEDIATE")
        yield
        database.rollback()


# Ownership


def test_listing_anothers_id_makes_it_nobody_elses(
    gateway: Gateway, upstream: Upstream, echo: Echo
) -> None:
    """This holds at every instant: while the row is written, afterwards, and after a restart."""
    with (
        gateway.client(gateway.new_key("a")) as a,
        gateway.client(gateway.new_key("b")) as b,
        ThreadPoolExecutor(1) as pool,
    ):
        theirs = create(b)["output"][0]["id"]
        mine = create(a, input=[said(theirs), {"role": "user", "content": "y"}])["id"]
        seen = len(upstream.requests)
        tries = 50
        for _ in range(tries):
            listing = pool.submit(a.get, f"/responses/{mine}/input_items")
            statuses = {refer(a, theirs) for _ in range(3)}
            assert listing.result().json()["data"][0]["id"] == theirs
            assert statuses | {refer(a, theirs)} == {400}
        with held(gateway):
            a.get(f"/responses/{mine}/input_items")
            assert refer(a, theirs) == 400
        gateway.kill()
        gateway.start()
        assert refer(a, theirs) == 400
        assert len(upstream.requests) == seen + tries + 1
        assert refer(b, theirs) == 200


def test_an_id_that_the_client_chose_is_never_its_own(
    gateway: Gateway, upstream: Upstream, echo: Echo
) -> None:
    """This holds however the id got into the listed input."""
    with gateway.client(gateway.new_key()) as client:
        chosen = create(client, input=[said("msg_chosen")])["id"]
        built_on = create(client, previous_response_id=chosen)["id"]
        upstream.script = json_answer(response_object(id="resp_c", conversation={"id": "conv_1"}))
        create(client)
        upstream.script = echo
        in_conversation = create(client, conversation="conv_1")["id"]
        echo.inputs[in_conversation].append(said("msg_chosen"))  # of a request meanwhile
        repeated = create(client, headers={"idempotency-key": "k"})["id"]
        echo.inputs[repeated].append(said("msg_chosen"))  # of the first with this key
        called = [{"type": "function_call_output", "call_id": "msg_chosen", "output": "x"}]
        derived = create(client, input=called)["id"]
        echo.inputs[derived] = [{**called[0], "id": "msg_chosen"}]
        for each in (chosen, built_on, in_conversation, repeated, derived):
            listed = client.get(f"/responses/{each}/input_items").json()["data"]
            assert "msg_chosen" in [item["id"] for item in listed]
            assert refer(client, "msg_chosen") == 400, each
            on = f"/responses/{each}/input_items?after=msg_chosen"
            assert client.get(on).status_code == 200, "it has seen it there"
        assert refer(client, f"in_{built_on[5:]}_0") == 400, "it can't be told apart"


def test_an_id_that_the_upstream_chose_is_its_accounts(gateway: Gateway, echo: Echo) -> None:
    """This holds through a chain of responses, and after a restart."""
    key, other = gateway.new_key(), gateway.new_key("other")
    with gateway.client(key) as client, gateway.client(other) as stranger:
        first = create(client)
        own = {"type": "item_reference", "id": first["output"][0]["id"]}
        second = create(client, previous_response_id=first["id"], input=[own])["id"]
        gateway.kill()
        gateway.start()
        assert refer(client, "in_1_0") == 400, "not listed yet"
        client.get(f"/responses/{second}/input_items")
        for item_id in ("in_1_0", "msg_1"):
            assert refer(client, item_id) == 200
            assert refer(stranger, item_id) == 400


@pytest.mark.parametrize("way", ["json", "stream", "background"])
def test_an_item_that_is_only_repeated_is_not_learned(
    gateway: Gateway, upstream: Upstream, way: str
) -> None:
    output = [said("msg_chosen"), {**said("msg_made"), "role": "assistant"}]
    response = response_object(output=output, status="completed")
    events: list[dict[str, Any]] = [
        *({"type": "response.output_item.added", "item": item} for item in output),
        {"type": "response.completed", "response": response},
    ]
    upstream.script = json_answer(response)
    if way == "stream":
        upstream.script = stream([event(each, each["type"]) for each in events])
    with gateway.client(gateway.new_key()) as client:
        body = {**BODY, "stream": way == "stream", "background": way == "background"}
        answer = client.post("/responses", json={**body, "input": [said("msg_chosen")]})
        assert answer.status_code == 200
        assert refer(client, "msg_chosen") == 400
        assert refer(client, "msg_made") == 200


@pytest.mark.parametrize("chosen", [True, False])
def test_the_same_of_a_background_response_after_a_restart(
    gateway: Gateway, upstream: Upstream, chosen: bool
) -> None:
    queued = response_object(usage=None, status="queued", output=[])
    output = [said("msg_chosen"), {**said("msg_made"), "role": "assistant"}]
    ended, ready = response_object(output=output if chosen else output[1:]), threading.Event()

    async def script(request: Received, reply: Reply) -> None:
        answer = ended if ready.is_set() else queued
        await json_answer(answer)(request, reply)

    upstream.script = script
    with gateway.client(gateway.new_key()) as client:
        items = [said("msg_chosen")] if chosen else "Hi"
        create(client, background=True, input=items)
        gateway.kill()
        gateway.start()
        ready.set()
        wait_until(lambda: gateway.row()["outcome"] == "completed", 100)
        assert refer(client, "msg_chosen") == 400
        assert refer(client, "msg_made") == (400 if chosen else 200)


@pytest.mark.slow
@pytest.mark.front_door
def test_two_accounts_that_are_given_one_id(gateway: Gateway, upstream: Upstream) -> None:
    """Should an upstream give two accounts one id, the first account owns it; both are served."""
    states = itertools.chain(["queued"] * 4, itertools.repeat("completed"))

    async def script(request: Received, reply: Reply) -> None:
        state = next(states)
        usage = {"input_tokens": 1, "output_tokens": 1} if state == "completed" else None
        await json_answer(response_object(usage=usage, status=state))(request, reply)

    upstream.script = script
    with (
        gateway.client(gateway.new_key("a")) as a,
        gateway.client(gateway.new_key("b")) as b,
    ):
        for client in (a, b):
            create(client, background=True)
        assert b.get("/responses/resp_1").status_code == 404
        assert a.get("/responses/resp_1").status_code == 200
        wait_until(lambda: "pending" not in [row["outcome"] for row in gateway.rows()], 100)
        assert b.delete("/responses/resp_1").status_code == 404
        assert a.delete("/responses/resp_1").status_code == 200
    assert {row["account"]: row["usage_source"] for row in gateway.rows()} == {
        "a": "upstream",
        "b": "upstream",
    }


@pytest.mark.parametrize("status", [300, 302, 400, 404, 500])
def test_an_error_makes_nothing_an_accounts(
    gateway: Gateway, upstream: Upstream, status: int
) -> None:
    said_ids = response_object(id="resp_x", output=[{"type": "message", "id": "msg_x"}])
    with gateway.client(gateway.new_key()) as client:
        for background in (False, True):
            upstream.script = json_answer({**said_ids, "status": "queued"}, status)
            body = {**BODY, "background": background}
            assert client.post("/responses", json=body).status_code == status
        upstream.script = json_answer(response_object())
        assert refer(client, "msg_x") == 400
        assert client.get("/responses/resp_x").status_code == 404
    assert "pending" not in [row["outcome"] for row in gateway.rows()]


def test_an_error_event_makes_nothing_an_accounts(gateway: Gateway, upstream: Upstream) -> None:
    said_error = {"type": "error", "id": "resp_x", "error": {"code": "x", "message": "x"}}

    async def talk(sock: Socket) -> None:
        await sock.recv()
        await sock.send(said_error)
        await sock.recv()

    upstream.script, upstream.talk = stream([event(said_error, "error")]), talk
    key = gateway.new_key()
    with gateway.client(key) as client, websocket(gateway, key) as socket:
        for background in (False, True):
            body = {**BODY, "background": background, "stream": True}
            assert client.post("/responses", json=body).status_code == 200
        socket.send(json.dumps({"type": "response.create", **BODY}))
        assert json.loads(socket.recv())["type"] == "error"
        upstream.script = json_answer(response_object())
        assert client.get("/responses/resp_x").status_code == 404
    assert {row["outcome"] for row in gateway.rows()} == {"upstream_error"}


@pytest.mark.slow
def test_the_store_and_its_claims_always_agree(tmp_path: Path) -> None:
    """An account that owns an object keeps it until it deletes the object, however commits and
    claims interleave, and in a new process as well."""

    async def run(chance: random.Random, path: Path) -> None:
        owners: dict[str, str] = {}
        weights: dict[str, tuple[int, int | None]] = {}  # extras and tokens
        contended: set[str] = set()  # claimed by another account, too
        deleting: dict[str, tuple[str, asyncio.Task[None]]] = {}
        async with Store.open(path, "normal") as store:
            for account in "ab":
                add = "INSERT INTO accounts (id, name, created_at) VALUES (?, ?, 0)"
                await store.transact((add, (account, account)), by="test")
            objects = Objects(store)
            for _ in range(100):
                account, name = chance.choice("ab"), chance.choice("xyz")
                if chance.random() < 0.7:
                    tokens = chance.choice([None, 1, 2, 3])
                    home = ObjectLocation(
                        "up", chance.choice([None, "{}"]), False, chance.choice([0, 1, 4])
                    )
                    objects.own([name], account, home.with_tokens(tokens))
                    owners.setdefault(name, account)
                    if owners[name] != account:
                        contended.add(name)
                    else:
                        tools, largest = weights.get(name, (0, None))
                        largest = max(largest or 0, tokens) if tokens else largest
                        weights[name] = tools | home.extras, largest
                elif owners.get(name) == account and name not in deleting:
                    delete = asyncio.create_task(objects.disown(name, account))
                    await asyncio.sleep(0)
                    deleting[name] = owners.pop(name), delete
                    weights.pop(name, None)
                if chance.random() < 0.3:
                    await asyncio.sleep(chance.choice([0, 0, 0.001]))
                for each in "xyz":
                    if each in deleting and deleting[each][1].done():
                        del deleting[each]
                    owned = objects._owned(each)  # in one read: a commit could come between two
                    told = {owned.account_id} if owned else set()
                    next_owner = {owners[each]} if each in owners else set()
                    if each in deleting:  # until that is committed it is its owner's
                        assert told in ({deleting[each][0]}, next_owner)
                    else:
                        assert told == next_owner
                        if owned and each not in contended:  # else once all is committed
                            assert (owned.location.extras, owned.location.tokens) == weights[each]
                        assert objects.is_free(each) == (not next_owner)
        async with Store.open(path, "normal") as store:
            objects = Objects(store)
            for each in "xyz":
                told = {by for by in "ab" if objects.location_of(each, by)}
                assert told == ({owners[each]} if each in owners else set())
                for account in told:
                    found = objects.location_of(each, account)
                    assert found
                    assert (found.extras, found.tokens) == weights[each]

    for seed in range(20):
        asyncio.run(run(random.Random(seed), tmp_path / f"{seed}.db"))


def test_models_of_what_is_built_on_hold_while_they_are_written(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    """Naming the object again without models does not hide them."""
    gateway = make_gateway('[billing]\nunpriced_models = "refuse"').start()
    for model in ("gpt-up", "gpt-image-dear"):
        gateway.cli("price", "add", model, "--input", "1", "--output", "1")
    key = gateway.new_key()
    limited = gateway.cli("key", "add", "test", "--models", "gpt-up")["key"]
    upstream.script = json_answer(response_object(output=[]))
    tool = {"type": "image_generation", "model": "gpt-image-dear"}
    offered = [{"type": "additional_tools", "tools": [tool]}, {"role": "user", "content": "x"}]
    with gateway.client(key) as client, gateway.client(limited) as narrow:
        create(client, input=offered)
        upstream.script = json_answer({"object": "list", "data": [{"id": "resp_1"}]})
        with held(gateway):
            client.get("/responses/resp_1/input_items")
            answer = narrow.post("/responses", json={**BODY, "previous_response_id": "resp_1"})
            assert error(answer)[:2] == (403, "model_not_allowed")


def test_a_ledger_of_an_earlier_version_keeps_its_objects(
    make_gateway: MakeGateway, echo: Echo
) -> None:
    """Such a ledger does not say who chose the ids of its inputs, so listings teach nothing."""
    gateway = make_gateway()
    sections = migrations(schema())
    with contextlib.closing(sqlite3.connect(gateway.database)) as database:
        for number in range(1, 8):
            database.executescript(sections[number])
        database.executescript("""
            PRAGMA application_id = 0x52424343;
            PRAGMA user_version = 7;
            INSERT INTO acting VALUES (1, 'test', 0);
            INSERT INTO accounts (id, name, created_at) VALUES ('acct_1', 'test', 0);
            DELETE FROM acting;
            INSERT INTO stored_objects (id, account_id, upstream, created_at)
                VALUES ('resp_old', 'acct_1', 'test', 0), ('msg_old', 'acct_1', 'test', 0);""")
    gateway.start()
    echo.inputs["resp_old"] = [{"id": "msg_chosen"}]
    with gateway.client(gateway.new_key()) as client, gateway.client(gateway.new_key("b")) as b:
        assert client.get("/responses/resp_old/input_items").status_code == 200
        assert [refer(client, each) for each in ("msg_old", "msg_chosen")] == [200, 400]
        assert refer(b, "msg_old") == 400


# One answer

WAYS: list[dict[str, Any]] = [
    {"previous_response_id": "ID"},
    {"prompt_cache_options": {"comparison_response_id": "ID"}},
    {"conversation": "ID"},
    {"conversation": {"id": "ID"}},
    {"prompt": {"id": "ID"}},
    {"tools": [{"type": "code_interpreter", "container": "ID"}]},
    {"tools": [{"type": "file_search", "vector_store_ids": ["ID"]}]},
    {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "ID"}]}]},
    {"input": [{"type": "item_reference", "id": "ID"}]},
    {"input": [{"id": "ID"}]},
    {"input": [{"type": "reasoning", "id": "ID", "summary": []}]},
    {"input": [{"type": "web_search_call", "id": "ID", "status": "completed", "action": {}}]},
    {"input": [{"type": "image_generation_call", "id": "ID", "result": "x"}]},
    {"input": [{"type": "code_interpreter_call", "id": "ci_1", "container_id": "ID"}]},
    {"input": [{"type": "mcp_approval_response", "approval_request_id": "ID", "approve": True}]},
]
ROUTES = [("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items")]
TOOLS = ("web_search_call", "image_generation_call", "mcp_approval_request", "file_search_call")


def made_by(client: httpx2.Client, upstream: Upstream) -> list[str]:
    """Create objects of every kind for the client's account."""
    ids = [f"{kind}_theirs" for kind in ("resp", "conv", "msg", "cntr", *TOOLS)]
    response_id, conversation, message, container, *tools = ids
    output: list[dict[str, Any]] = [{**said(message), "role": "assistant"}]
    output += [{"type": kind, "id": each} for kind, each in zip(TOOLS, tools, strict=True)]
    output.append({"type": "code_interpreter_call", "id": "ci_theirs", "container_id": container})
    upstream.script = json_answer(
        response_object(id=response_id, conversation={"id": conversation}, output=output)
    )
    create(client)
    return [*ids, "ci_theirs"]


def test_anothers_id_is_answered_like_one_that_never_was(
    gateway: Gateway, upstream: Upstream
) -> None:
    """This holds over HTTP and WebSockets, for every kind of object and every place that names
    it."""
    with (
        gateway.client(gateway.new_key("a")) as a,
        gateway.client(gateway.new_key("b")) as b,
    ):
        theirs = made_by(b, upstream)
        upstream.talk = talk_of_nothing
        seen = len(upstream.requests)
        with websocket(gateway, gateway.new_key("a")) as connection:
            seen += 1  # its handshake
            for way, name in itertools.product(WAYS, theirs):
                answers = []
                for each in (name, "x" * len(name)):
                    text = json.dumps({**BODY, **way}).replace('"ID"', f'"{each}"')
                    headers = {"content-type": "application/json"}
                    answer = a.post("/responses", content=text, headers=headers)
                    connection.send(text.replace("{", '{"type":"response.create",', 1))
                    refused = str(connection.recv(timeout=100))
                    shown = answer.text + refused
                    assert '"error"' in answer.text
                    assert '"error"' in refused
                    names = [line for line, _ in answer.headers.raw]
                    answers.append((answer.status_code, names, shown.replace(each, "ID")))
                assert answers[0] == answers[1], (way, name)
        for (method, suffix), name in itertools.product(ROUTES, theirs):
            refusals = []
            for each in (name, "x" * len(name)):
                answer = a.request(method, f"/responses/{each}{suffix}")
                refusals.append((answer.status_code, answer.text.replace(each, "ID")))
            assert refusals[0] == refusals[1]
            assert refusals[0][0] == 404
        assert len(upstream.requests) == seen


async def talk_of_nothing(sock: Socket) -> None:
    while True:
        await sock.recv()


@contextlib.contextmanager
def websocket(
    gateway: Gateway, key: str, query: str = "", **headers: str
) -> Iterator[ClientConnection]:
    given = {"authorization": f"Bearer {key}", **headers}
    url = f"ws://127.0.0.1:{gateway.port}/v1/responses{query}"
    with connect(url, additional_headers=given, proxy=None) as connection:
        yield connection


def test_what_the_upstreams_tools_made_can_be_sent_back_unstored(
    gateway: Gateway, upstream: Upstream
) -> None:
    """Only the account can send it back, even if the response is not stored."""
    searched = {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {}}
    sealed = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"}
    asked = {"type": "mcp_approval_request", "id": "mcpr_1", "name": "n", "arguments": "{}"}
    upstream.script = json_answer(response_object(output=[searched, sealed, asked]))
    approval = {"type": "mcp_approval_response", "approval_request_id": "mcpr_1", "approve": True}
    history = [searched, sealed, asked, approval]
    with (
        gateway.client(gateway.new_key("a")) as a,
        gateway.client(gateway.new_key("b")) as b,
    ):
        create(a, store=False)
        create(a, store=False, input=history)
        assert refer(a, "rs_1") == 400
        for item in (searched, asked, approval):
            answer = b.post("/responses", json={**BODY, "input": [item]})
            assert answer.status_code == 400, item
        create(b, input=[sealed])  # it is bound to its id, and looked up nowhere


def test_a_websockets_own_ids_are_those_that_nobody_else_has(
    gateway: Gateway, upstream: Upstream
) -> None:
    """No event of an upstream makes an id the client's that the client chose itself or that another
    account owns."""

    async def talk(sock: Socket) -> None:
        while True:
            frame = await sock.recv()
            created, *_, completed = ws_events(1, frame)
            for name in ("msg_chosen", "msg_theirs", "msg_made"):
                item = {"type": "message", "id": name}
                added = {"type": "response.output_item.added", "item": item}
                await sock.send(created, added) if name == "msg_chosen" else await sock.send(added)
            await sock.send(completed)

    with gateway.client(gateway.new_key("b")) as b:
        made_by(b, upstream)
    upstream.talk = talk
    with websocket(gateway, gateway.new_key("a")) as a:

        def ask(items: list[Any], store: bool = False) -> str:
            create = {"type": "response.create", "store": store, **BODY, "input": items}
            a.send(json.dumps(create))
            while True:
                answer = json.loads(a.recv(timeout=100))
                if answer["type"] in ("response.completed", "error"):
                    return str(answer["type"])

        assert ask([said("msg_chosen")]) == "response.completed"
        outcomes = {
            name: ask([{"type": "item_reference", "id": name}])
            for name in ("msg_chosen", "msg_theirs", "msg_made")
        }
    assert outcomes == {
        "msg_chosen": "error",
        "msg_theirs": "error",
        "msg_made": "response.completed",
    }


def test_an_upstreams_event_without_an_id_makes_nothing_a_clients(
    gateway: Gateway, upstream: Upstream
) -> None:
    """A reference that nobody can own, such as a form's file id, has an empty id. An event without
    an id doesn't make that the account's, and each such event is billed."""

    async def talk(sock: Socket) -> None:
        *events, completed = ws_events(1, await sock.recv())
        stray = {"type": "response.completed", "response": {**completed["response"], "id": None}}
        await sock.send(*events, completed, stray, stray)
        await sock.recv()

    key = gateway.new_key()
    form = part('name="model"', b"gpt-up") + part('name="image[0][file_id]"', b"file_theirs")
    nested = {**said("x"), "content": [{"type": "item_reference", "id": "msg_theirs"}]}
    upstream.talk = talk
    with websocket(gateway, key) as socket, gateway.client(key) as client:
        socket.send(json.dumps({"type": "response.create", **BODY}))
        wait_until(lambda: len(gateway.rows()) == 3)
        assert {row["usage_source"] for row in gateway.rows()} == {"upstream"}

        def statuses() -> list[int]:
            return [
                client.post("/responses", json={**BODY, "input": [nested]}).status_code,
                client.post(
                    "/images/edits", content=form + b"--xyz--\r\n", headers=FORM
                ).status_code,
            ]

        assert statuses() == [400, 400]
        with contextlib.closing(sqlite3.connect(gateway.database)) as database:
            database.execute("""
                INSERT INTO stored_objects (id, account_id, upstream, created_at)
                SELECT '', account_id, 'test', 1 FROM keys""")
            database.commit()  # as an earlier version wrote it
        assert statuses() == [400, 400]


# Queries and headers


QUERIES = [
    "after=msg_theirs",
    "conversation[id]=conv_theirs",
    "conversation%5Bid%5D=conv_theirs",
    "a=1;previous_response_id=resp_theirs",
    "previous_response_id=resp_theirs",
    "%2570revious_response_id=resp_theirs",
    "Previous_Response_Id=resp_theirs",
    "include[]=x&model=gpt-dear",
    "api-version=2026-01-01",
    "beta=true",
]


def test_no_query_reaches_the_upstream_where_something_is_made(
    gateway: Gateway, upstream: Upstream
) -> None:
    key = gateway.new_key()
    upstream.talk = talk_of_nothing
    with gateway.client(key) as client:
        for query in QUERIES:
            for path in ("/responses", "/responses/compact", "/chat/completions"):
                body = {**BODY, "messages": []}
                assert client.post(f"{path}?{query}", json=body).status_code == 200
                assert upstream.requests[-1].path == f"/v1{path}"
            with websocket(gateway, key, f"?{query}"):
                assert upstream.requests[-1].path == "/v1/responses"


def test_a_stored_responses_query_passes_by_list(gateway: Gateway, upstream: Upstream) -> None:
    with gateway.client(gateway.new_key()) as client, gateway.client(gateway.new_key("b")) as b:
        made_by(client, upstream)

        def reaches(method: str, suffix: str, query: str) -> str | None:
            upstream.script = json_answer({"object": "list", "data": []})
            seen = len(upstream.requests)
            answer = client.request(method, f"/responses/resp_theirs{suffix}?{query}")
            if answer.status_code != 200:
                assert answer.status_code == 400, answer.text
                assert len(upstream.requests) == seen
                return None
            return upstream.requests[-1].path.partition("?")[2]

        for query in (
            "include[]=a.b&include[]=c",
            "stream=true&starting_after=4",
            "include_obfuscation=false",
            "include=reasoning.encrypted_content",
        ):
            assert reaches("GET", "", query) == query
        assert reaches("GET", "", "include%5B%5D=a&%73tream=tr%75e") == "include[]=a&stream=true"
        listing = "limit=5&order=desc&after=msg_theirs&before=web_search_call_theirs&include=x"
        assert reaches("GET", "/input_items", listing) == listing
        for name in ("after", "before", "%61fter"):
            for item_id in ("msg_unknown", "x%00", "resp_2"):
                assert reaches("GET", "/input_items", f"{name}={item_id}") is None
        twice = "after=msg_theirs&after=msg_2"
        assert reaches("GET", "/input_items", twice) is None
        for value in ("5%26after%3Dmsg_2", "5%2526x", "5;after=msg_2", "5+", "%FF", "é", "x" * 257):
            assert reaches("GET", "/input_items", f"limit={value}") is None, value
        for query in (
            "after=&before",
            "After=msg_2",
            "after[]=msg_2",
            "after%00=msg_2",
            "api-version=1",
            "after;=1",
        ):
            assert reaches("GET", "/input_items", query) == "", query
        for method, suffix in (("POST", "/cancel"), ("DELETE", "")):
            assert reaches(method, suffix, "stream=true&after=msg_theirs&x=y") == ""
        upstream.script = json_answer(response_object(id="resp_b", output=[]))
        create(b)
        answers = [
            b.get(f"/responses/resp_b/input_items?after={name}")
            for name in ("msg_theirs", "msg_unknow")
        ]
        assert answers[0].content == answers[1].content
        assert error(answers[0]) == (400, "invalid_request", "after")


@pytest.mark.front_door
def test_an_idempotency_key_is_its_accounts(gateway: Gateway, upstream: Upstream) -> None:
    """An upstream that honours the key repeats only the account's own responses."""
    kept: dict[str, bytes] = {}
    numbers = itertools.count(1)

    async def script(request: Received, reply: Reply) -> None:
        key = request.header("idempotency-key")
        assert key
        response = response_object(id=f"resp_{next(numbers)}", output=[])
        kept.setdefault(key, json.dumps(response).encode())
        await json_answer(kept[key])(request, reply)

    upstream.script = script
    a, b, again = gateway.new_key("a"), gateway.new_key("b"), gateway.new_key("a")

    def ask(key: str, value: str) -> str:
        with gateway.client(key) as client:
            return str(create(client, headers={"idempotency-key": value})["id"])

    first = ask(a, "order-17")
    assert ask(b, "order-17") != first
    assert ask(a, "order-18") != first
    gateway.kill()
    gateway.start()
    assert ask(again, "order-17") == first, "of the same account"
    assert all(re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", key) for key in kept)
    assert len(kept) == 3
    upstream.talk = talk_of_nothing
    for key in (a, b):
        with websocket(gateway, key, **{"idempotency-key": "order-17"}):
            pass
    sent = [each.header("idempotency-key") for each in upstream.requests[-2:]]
    assert sent[0] != sent[1]
    assert {*sent} <= kept.keys()


def test_headers_that_authorize_or_route_reach_no_upstream(
    gateway: Gateway, upstream: Upstream
) -> None:
    passed = (
        "x-openai-internal-codex-responses-lite",
        "x-openai-subagent",
        "x-openai-memgen-request",
        "x-codex-turn-state",
        "x-stainless-lang",
    )
    dropped = (
        "x-openai-organization",
        "x-openai-actor-authorization",
        "x-openai-account-routing-override",
        "x-openai-internal-codex-residency",
        "x-openai-internal-codex-responses-lite-x",
        "x-openai-fedramp",
        "x-openai-api-key",
        "x-openai-",
        "x-codex-routing-hint",
    )
    with gateway.client(gateway.new_key()) as client:
        headers = dict.fromkeys((*passed, *dropped), "canary")
        client.post("/responses", json=BODY, headers=headers)
    sent = {
        name.decode().lower() for name, value in upstream.requests[-1].headers if value == b"canary"
    }
    assert sent == set(passed)


# Forms


def part(head: str | bytes, value: bytes = b"x") -> bytes:
    head = head.encode() if isinstance(head, str) else head
    return b"--xyz\r\nContent-Disposition: form-data; %b\r\n\r\n%b\r\n" % (head, value)


NAMES = [
    "model ",
    " model",
    "model%20",
    "model+",
    "MODEL",
    "model[]",
    "model[0]",
    "model.x",
    "n[]",
    "n%00",
    "stream[]",
    "prompt[id]",
    "_charset_",
    "file_id%5B%5D",
    "image%5B%5D",
    "image[0]%5Bfile_id%5D",
    "image[0][file.id]",
    "\ufeffmodel",
    "n\u200b",
    "ｍodel",
    "n\u00a0",
    "n,",
    "n'",
    "a b",
]


AMBIGUOUS = [
    *(part(f'name="{name}"', b"10") for name in NAMES),
    part(b'name="n\0"', b"10"),
    part(b'name="n\t"', b"10"),
    part(b'name="model\0x"', b"gpt-dear"),
    part('name="model"; filename=""', b"gpt-dear"),
    part("name=\"model\"; filename*=utf-8''x", b"gpt-dear"),
    part('name="images"; filename=""', b'[{"file_id":"f"}]'),
    part("name=\"images\"; filename*=utf-8''x", b' \r\n{"file_id":"' + b"f" * 9000 + b'"}'),
    part('name="a"\r\nContent-Type: multipart/mixed; boundary=b'),
    part('name="a"\r\nContent-Type: application/x-www-form-urlencoded', b"file_id=f"),
    part('name="model"\r\nContent-Type: text/plain; charset=utf-16'),
    part('name="model"\r\nContent-Type: text/plain;charset="utf-7'),
    *(part('name="n"', value) for value in (b"0010", b"10.0", b" 10", b"+10", b"1e1", b"", b"0")),
]


def test_a_form_that_a_lenient_reader_takes_otherwise_is_refused(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    with gateway.client(key) as client:
        for body in AMBIGUOUS:
            answer = client.post("/images/edits", content=body + b"--xyz--\r\n", headers=FORM)
            assert error(answer)[:2] == (400, "invalid_request"), body
    assert not upstream.requests


HONEST = [
    part('name="image[]"; filename="a b\u00e9.png"\r\nContent-Type: image/png'),
    part("name=\"image\"; filename*=utf-8''%C3%A9.png\r\nContent-Type: image/png", b"\x89PNG{"),
    part('name="mask"; filename=""\r\nContent-Type: application/octet-stream', b""),
    part('name="prompt"\r\nContent-Type: text/plain; charset=UTF-8', b'{"file_id":"words"}'),
    part('name="n"', b"10") + part('name="svg[reasoning][effort]"', b"low"),
]


def test_an_honest_form_passes(gateway: Gateway, upstream: Upstream, key: str) -> None:
    upstream.script = json_answer({"created": 1, "data": []})
    with gateway.client(key) as client:
        for body in HONEST:
            answer = client.post("/images/edits", content=body + b"--xyz--\r\n", headers=FORM)
            assert answer.status_code == 200, answer.text


# Background


class Queue:
    """An upstream whose background responses end when the test says so."""

    def __init__(self) -> None:
        self.numbers = itertools.count(1)
        self.made: list[str] = []
        self.ended: set[str] = set()

    async def __call__(self, request: Received, reply: Reply) -> None:
        if request.method == "POST":
            response_id = f"resp_{next(self.numbers)}"
            self.made.append(response_id)
            await asyncio.sleep(0.05)
        else:
            response_id = request.path.rpartition("/")[2]
        done = response_id in self.ended
        answer = response_object(
            id=response_id, output=[], status="completed" if done else "queued"
        )
        await json_answer(answer if done else {**answer, "usage": None})(request, reply)


def test_one_background_response_too_many_counts_as_a_request(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    """Its body was read; else bodies would be read without a limit."""
    gateway = make_gateway("[limits.account]\nbackground = 1").start()
    upstream.script = Queue()
    with gateway.client(gateway.new_key("a", requests_per_minute=4)) as client:
        create(client, background=True)
        codes = [
            error(client.post("/responses", json={**BODY, "background": True}))[1] for _ in range(8)
        ]
    assert codes[0] == "concurrency_limit_exceeded"
    assert "rate_limit_exceeded" in codes


def test_an_unfinished_background_response_keeps_little_memory(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    """It needs the ids that the client chose until it ends, but not their text."""
    upstream.script = Queue()
    items = [said(f"{number}" + "x" * 1500) for number in range(10_000)]
    grown = []
    with gateway.client(key) as client:
        for _ in range(5):
            create(client, input=items, background=True)
            upstream.requests.clear()
            grown.append(gateway.rss())
    assert grown[4] - grown[1] < 20 << 20


def test_background_responses_have_a_limit_of_their_own(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    """The limit holds for simultaneous requests and across restarts; a response that ends makes
    room for another."""
    gateway = make_gateway("[limits.account]\nbackground = 5\nconcurrency = 0").start()
    key, other = gateway.new_key("a"), gateway.new_key("b")
    queue = Queue()
    upstream.script = queue

    def ask(key: str, **more: Any) -> httpx2.Response:
        with gateway.client(key, timeout=100) as client:
            return client.post("/responses", json={**BODY, "background": True, **more})

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: ask(key), range(40)))
    assert sorted(answer.status_code for answer in answers) == [200] * 5 + [429] * 35
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert error(refused)[:2] == (429, "concurrency_limit_exceeded")
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert refused.headers["x-ratelimit-limit-background"] == "5"
    assert len(queue.made) == 5
    assert ask(key, background=False).status_code == 200
    assert ask(other).status_code == 200, "of another account"
    gateway.kill()
    gateway.start()
    assert ask(key).status_code == 429
    queue.ended.add(queue.made[0])
    with gateway.client(key) as client:
        assert client.get(f"/responses/{queue.made[0]}").json()["status"] == "completed"
    assert [ask(key).status_code for _ in range(2)] == [200, 429]
    queue.ended.update(queue.made)
    wait_until(lambda: "pending" not in [row["outcome"] for row in gateway.rows()], 100)
    upstream.script = json_answer({"error": {"message": "x"}}, 400)
    assert [ask(key).status_code for _ in range(6)] == [400] * 6, "what came to nothing counts not"
    assert error(ask(key, background="true")) == (400, "invalid_request", "background")
    gateway.configure("[limits.account]\nbackground = 0")
    gateway.restart()
    upstream.script = queue
    assert {ask(key).status_code for _ in range(6)} == {200}


# All of it at random


def encoded(chance: random.Random, text: str) -> str:
    """Return a text with some characters percent-encoded, once or twice."""
    text = "".join(f"%{ord(each):02x}" if chance.random() < 0.1 else each for each in text)
    return text.replace("%", "%25") if chance.random() < 0.1 else text


def one_try(chance: random.Random, foreign: str) -> tuple[str, str, dict[str, str], bytes]:
    """Return method, target, headers and body of a request that names the object somewhere."""
    headers = {"content-type": "application/json"}
    body = json.dumps(BODY).encode()
    names = ["after", "before", "previous_response_id", "conversation[id]", "file_id", "x"]
    name, own = chance.choice(names), "/responses/resp_own"
    mark = chance.choice(["", "", " ", "[]", "%00", ";a", "\ufeff", ".x"])
    query = f"{encoded(chance, name + mark)}={encoded(chance, foreign)}"
    query = chance.choice(["", "limit=2&", "a;b&", "&&"]) + query
    way = chance.randrange(6)
    if way == 0:
        paths = ["/responses", "/responses/compact", "/chat/completions", "/images/generations"]
        return "POST", f"{chance.choice(paths)}?{query}", headers, body
    if way == 1:
        method, suffix = chance.choice(ROUTES[:1] + ROUTES[2:])
        return method, f"{own}{suffix}?{query}", headers, b""
    if way == 2:
        method, suffix = chance.choice(ROUTES)
        return method, f"/responses/{encoded(chance, foreign)}{suffix}", headers, b""
    if way == 3:
        odd = chance.choice(["x-openai-organization", "x-openai-actor-authorization", "cookie"])
        return "POST", "/responses", {**headers, odd: foreign, "idempotency-key": foreign}, body
    if way == 4:
        text = json.dumps({**BODY, **chance.choice(WAYS)}).replace('"ID"', json.dumps(foreign))
        return "POST", "/responses", headers, text.encode()
    names = ["file_id", "image[0][file_id]", "File_Ids", "container_id", "mask.file_id"]
    spoilt = chance.choice(["", " ", "%00", "[]", "\u200b", "%5B%5D"])
    head = f'name="{chance.choice(names)}{spoilt}"' + chance.choice(["", '; filename=""'])
    form = part(head, foreign.encode())
    if chance.random() < 0.5:
        form = part(f'name="x{spoilt}"', json.dumps({"file_id": foreign}).encode())
    return "POST", "/images/edits", FORM, form + b"--xyz--\r\n"


def test_nothing_of_anothers_reaches_the_upstream(gateway: Gateway, upstream: Upstream) -> None:
    chance = random.Random(20)
    with (
        gateway.client(gateway.new_key("a")) as a,
        gateway.client(gateway.new_key("b")) as b,
    ):
        theirs = made_by(b, upstream)
        upstream.script = json_answer(response_object(id="resp_own", output=[]))
        create(a)
        seen = len(upstream.requests)
        upstream.script = json_answer(response_object(id="resp_own", data=[], output=[]))
        served = 0
        for _ in range(600):
            method, target, headers, body = one_try(chance, chance.choice(theirs))
            url = httpx2.URL(f"{gateway.base_url}{target}")
            answer = a.request(method, url, headers=headers, content=body)
            assert answer.status_code in (200, 400, 404), (method, target, answer.text)
            served += answer.status_code == 200
        assert 50 < served < 400, "some reach the upstream, without what they name"
        assert len(upstream.requests) == seen + served
    for request in upstream.requests[seen:]:
        sent = b" ".join([request.path.encode(), request.body, *(v for _, v in request.headers)])
        assert b"theirs" not in re.sub(rb"%(25)*", b"%", sent), sent
