"""The state that crosses from the old process to the new one, and accidents on the way."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import psutil
import pytest
from msgspec import Struct

from redbtc.errors import StorageUnavailable
from redbtc.gateway.background_leaving import LeftResponses
from redbtc.gateway.background_response import Stage
from redbtc.gateway.handover.telling import changed, not_less
from redbtc.handover.channel import Channel
from redbtc.handover.messages import Forgot, Moved
from redbtc.handover.moving import moved_connections
from redbtc.handover.predecessors import Predecessors
from redbtc.histogram import Histogram
from redbtc.locations import ObjectLocation
from redbtc.store.database import Store
from redbtc.store.objects import Objects
from redbtc.store.writer import Writer
from tests.handover.test_reload import RESPONSE, STREAM, held_until
from tests.helpers.gateway import ROOT, Gateway, MakeGateway, toml, wait_until
from tests.helpers.reloading import reload
from tests.helpers.turns import steer
from tests.helpers.upstream import (
    Received,
    Reply,
    Socket,
    Upstream,
    json_answer,
    response_object,
    ws_events,
)
from tests.helpers.webhook import SECRET, receiving
from tests.helpers.websocket_client import client

pytestmark = pytest.mark.promise_4


class HeldStream:
    """A stream of which the end is held back."""

    def __init__(self, gateway: Gateway, upstream: Upstream, key: str, **more: Any) -> None:
        self.release = threading.Event()
        upstream.script = held_until(self.release)
        self._client = gateway.client(key)
        self._stream = self._client.stream("POST", "/responses", json={**STREAM, **more})

    def __enter__(self) -> HeldStream:
        self.response = self._stream.__enter__()
        self.lines = self.response.iter_lines()
        next(self.lines)
        return self

    def finish(self) -> str:
        """Let it end, and return the rest of it."""
        self.release.set()
        return "".join(self.lines)

    def __exit__(self, *_: object) -> None:
        self.release.set()
        self._stream.__exit__(None, None, None)
        self._client.close()


def post(gateway: Gateway, key: str, **more: Any) -> httpx2.Response:
    with gateway.client(key) as client:
        return client.post("/responses", json={**RESPONSE, **more})


def test_a_place_counts_until_the_old_process_says_that_it_is_free(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    gateway = make_gateway({"limits": {"queue_seconds": 0.1}}).start()
    key = gateway.new_key(concurrency=1)
    with HeldStream(gateway, upstream, key) as stream:
        reload(gateway)
        reload(gateway)  # a third process counts what is in flight in the first
        assert post(gateway, key).json()["error"]["code"] == "concurrency_limit_exceeded"
        assert "response.completed" in stream.finish()
    wait_until(lambda: post(gateway, key).status_code == 200)


def test_rates_go_on(make_gateway: MakeGateway) -> None:
    gateway = make_gateway().start()
    key = gateway.new_key(requests_per_minute=2)
    assert [post(gateway, key).status_code for _ in range(2)] == [200, 200]
    reload(gateway)
    assert post(gateway, key).json()["error"]["code"] == "rate_limit_exceeded"


PRICED = {
    "billing": {"unpriced_models": "refuse", "default_credit_limit": "0"},
}


def test_a_request_that_waits_for_an_upstream_is_charged_once(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    """Each process charges it, and the one before puts its charge back."""
    up = {"name": "up", "base_url": upstream.url, "models": ["*"], "api_key_env": ""}
    gateway = make_gateway({"upstreams": [{**up, "max_concurrency": 1}]}).start()
    key = gateway.new_key(requests_per_minute=3)
    with HeldStream(gateway, upstream, key) as stream, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(post, gateway, key)
        wait_until(lambda: gateway.metrics()["redbtc_queued"] == 1)
        for _ in range(2):
            reload(gateway)
            wait_until(lambda: gateway.metrics()["redbtc_queued"] == 1)
        stream.finish()
        answer = waiting.result()
        assert answer.status_code == 200
        assert answer.headers["x-ratelimit-remaining-requests"] == "1"


STAYS = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from redbtc.handover import moving

leave = moving.leave

def leave_later(protocol):
    stays = protocol.connection.state == "serving" and os.path.exists("stay")
    return None if stays else leave(protocol)

moving.leave = leave_later
"""


def test_a_request_that_can_t_move_yet_is_not_admitted_by_the_old_process(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    """Such as while no descriptor is free: the old process does not know the limits any more."""
    gateway = make_gateway()
    gateway.prelude = STAYS
    gateway.start()
    key = gateway.new_key(concurrency=1)
    with HeldStream(gateway, upstream, key) as stream, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(post, gateway, key)
        wait_until(lambda: gateway.metrics()["redbtc_queued"] == 1)
        (gateway.folder / "stay").touch()
        reload(gateway)
        stream.finish()
        time.sleep(1)  # its place is free
        assert not waiting.done()
        (gateway.folder / "stay").unlink()
        assert waiting.result().status_code == 200
    assert [row["outcome"] for row in gateway.rows()] == ["completed"] * 2


def test_a_background_response_is_left_once() -> None:
    """Its request can end while it is left with all others."""
    removed = list[Any]()
    response: Any = SimpleNamespace(
        stage=Stage.ALONE,
        settling=None,
        is_left=False,
        hold=SimpleNamespace(release=lambda: None),
        row=SimpleNamespace(response_id="resp_1"),
    )
    background: Any = SimpleNamespace(
        tasks=set(), responses={"resp_1": response}, left=None, remove=removed.append
    )
    left = LeftResponses(background)
    asyncio.run(left.begin())
    left.add(response)
    assert removed == [response]
    assert left.take_new() == []


def test_durations_of_a_version_with_other_limits_are_ignored() -> None:
    durations, others = Histogram((1, 2)), Histogram((1, 2, 3))
    durations.observe(1.5)
    others.observe(2.5)
    before = durations.numbers
    durations.add(others.numbers)
    assert durations.numbers == before
    durations.add(before)
    assert durations.numbers == [2 * each for each in before]


PATIENTLY = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from redbtc.handover import successor

successor.HANDOVER_SECONDS = 1000
"""


def test_a_turn_that_waits_for_another_one_keeps_nobody_waiting(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    gateway = make_gateway()
    gateway.prelude = PATIENTLY
    gateway.start()
    key, release = gateway.new_key(), threading.Event()

    async def talk(ws: Socket) -> None:
        created, delta, completed = ws_events(1, await ws.recv())
        await ws.send(created, delta)
        while not release.is_set():
            await asyncio.sleep(0.01)
        await ws.send(completed)

    upstream.talk = talk
    with client(gateway, key) as ws:
        ws.send()
        ws.until("response.output_text.delta")
        ws.send()
        time.sleep(0.2)  # it waits
        reload(gateway)
        release.set()
        assert ws.completed()["status"] == "completed"
        refused = ws.until("error")
        assert refused["error"]["code"] == "websocket_connection_limit_reached"
        assert ws.closed() == 1008


def test_a_hold_counts_until_the_request_has_its_cost(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    gateway = make_gateway(PRICED).start()
    key = gateway.new_key()
    gateway.cli("price", "add", "m", "--input", "1", "--output", "1000")
    gateway.cli("payment", "add", "test", "1.5")
    more = {"max_output_tokens": 1000}  # at most 1 USD
    STREAM.update(more)
    try:
        with HeldStream(gateway, upstream, key) as stream:
            reload(gateway)
            assert post(gateway, key, **more).json()["error"]["code"] == "insufficient_quota"
            assert "response.completed" in stream.finish()
    finally:
        del STREAM["max_output_tokens"]
    wait_until(lambda: post(gateway, key, **more).status_code == 200)
    shown = gateway.cli("account", "show", "test")
    rows = gateway.rows()
    assert len(rows) == 2
    spent = sum(round(float(row["cost"]) * 10**9) for row in rows)
    assert round(float(shown["balance"]) * 10**9) == 1_500_000_000 - spent
    assert float(shown["held"]) == 0


def test_no_response_is_steered_in_a_process_that_does_not_know_the_balance(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    """The new process may have held what is left for other requests."""
    done = threading.Event()

    async def talk(sock: Socket) -> None:
        created, delta, completed = ws_events(1, await sock.recv())
        await sock.send(created, delta)
        while not done.is_set():
            await asyncio.sleep(0.01)
        await sock.send(completed)

    upstream.talk = talk
    gateway = make_gateway(PRICED).start()
    key = gateway.new_key()
    gateway.cli("price", "add", "*", "--input", "0", "--output", "1000")
    gateway.cli("payment", "add", "test", "2.5")
    with client(gateway, key) as ws:
        ws.send(max_output_tokens=1000)  # at most 1 USD
        ws.until("response.output_text.delta")
        reload(gateway)
        with HeldStream(gateway, upstream, key, max_output_tokens=1000) as stream:
            ws.raw(steer(1))
            assert ws.recv(20)["error"]["code"] == "draining"
            assert gateway.cli("account", "show", "test")["held"] == "2"
            done.set()
            assert ws.completed()["id"] == "resp_ws_1"
            assert "response.completed" in stream.finish()


def test_a_compromised_key_cuts_what_the_old_process_has(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    with HeldStream(gateway, upstream, key) as stream:
        reload(gateway)
        key_id = gateway.cli("key", "list", "test")["keys"][0]["id"]
        revoked = gateway.cli("key", "revoke", "--compromised", key_id)
        assert revoked["cut"] == 1
        with pytest.raises(httpx2.HTTPError):
            for _ in stream.lines:
                pass
    wait_until(lambda: gateway.row()["outcome"] == "client_disconnected")


def saved(gateway: Gateway) -> int:
    """The number of requests whose progress is saved."""
    with contextlib.closing(
        sqlite3.connect(f"{gateway.database.as_uri()}?mode=ro", uri=True)
    ) as db:
        (number,) = db.execute("SELECT count(*) FROM unsettled").fetchone()
    return int(number)


def test_a_killed_old_process_leaves_nothing_taken(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    gateway = make_gateway({"limits": {"queue_seconds": 0.1}, **PRICED}).start()
    key = gateway.new_key(concurrency=1)
    gateway.cli("price", "add", "m", "--input", "1", "--output", "1000")
    gateway.cli("payment", "add", "test", "1000")
    with HeldStream(gateway, upstream, key) as stream:
        before = reload(gateway)
        wait_until(lambda: saved(gateway) == 1)  # its progress
        assert post(gateway, key).json()["error"]["code"] == "concurrency_limit_exceeded"
        before.kill()
        before.wait()
        with pytest.raises(httpx2.HTTPError):
            for _ in stream.lines:
                pass
    gateway.wait_for_log('"predecessor died"')
    assert post(gateway, key).status_code == 200
    interrupted, completed = gateway.rows()
    assert interrupted["outcome"] == "interrupted"
    assert completed["outcome"] == "completed"
    shown = gateway.cli("account", "show", "test")
    assert float(shown["held"]) == 0
    spent = sum(float(row["cost"] or 0) for row in (interrupted, completed))
    assert abs(1000 - spent - float(shown["balance"])) < 1e-9
    assert not list(gateway.folder.glob("*.owed-*"))
    gateway.restart()
    assert len(gateway.rows()) == 2


def test_files_that_a_process_may_not_have_are_missing_where_they_were_sent() -> None:
    """Else the next client's connection would get what was received from another one."""

    async def exchange() -> None:
        own, other = socket.socketpair()
        sending, receiving_end = Channel(own), Channel(other)
        sent = [os.memfd_create(str(number)) for number in range(21)]
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        try:
            await sending.send(Moved([str(number).encode() for number in range(20)]), sent[:20])
            await sending.send(Moved([b"20"]), sent[20:])
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(sent) + 11, limits[1]))
            first, files = await receiving_end.receive()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        second, more = await receiving_end.receive()
        connections = [*moved_connections(first, files), *moved_connections(second, more)]
        assert 1 <= len(connections) < 21
        for file, received in connections:
            assert os.readlink(f"/proc/self/fd/{file}").startswith(f"/memfd:{received.decode()} ")
        assert connections[-1][1] == b"20"
        for each in [*sent, *(file for file, _ in connections)]:
            os.close(each)
        sending.close()
        receiving_end.close()

    asyncio.run(exchange())


def test_a_message_of_a_newer_version_is_skipped() -> None:
    """The new process may know messages that the old one does not."""

    async def exchange() -> None:
        own, other = socket.socketpair()
        sending, receiving_end = Channel(own), Channel(other)
        file = os.memfd_create("file")
        unheard: Any = Unheard(1)
        await sending.send(unheard, [file])
        await sending.send(Forgot(2))
        assert await receiving_end.receive() == (Forgot(2), [])
        sending.close()
        receiving_end.close()
        os.close(file)

    asyncio.run(exchange())


class Unheard(Struct, tag="unheard", array_like=True):
    number: int


class Following:
    """A stand-in for the channel to a process that this one has taken over from."""

    def __init__(self) -> None:
        self.handling = asyncio.Lock()
        self.has_ended = asyncio.Event()
        self.fails = False
        self.taken_back = 0

    async def follow(self, adopt: Any) -> None:
        await self.has_ended.wait()

    def paused(self) -> asyncio.Lock:
        return self.handling

    def leave(self) -> tuple[Any, list[int]]:
        if self.fails:
            raise OSError("no descriptor")
        return None, []

    def take_back(self, gateway: Any, state: Any) -> None:
        self.taken_back += 1


def followed(number: int) -> tuple[Predecessors, list[Any], list[str]]:
    """Processes that are followed, and what happens to them."""
    happened = list[str]()
    lists = SimpleNamespace(elsewhere=[])
    gateway: Any = SimpleNamespace(in_flight=lists, request_log=SimpleNamespace(elsewhere=[]))

    def on_end(task: asyncio.Task[Any]) -> None:
        happened.append("cancelled" if task.cancelled() else "ended")

    adopt: Any = None
    found = Predecessors(gateway, adopt, lambda: happened.append("alone"), on_end)
    channels: list[Any] = [Following() for _ in range(number)]
    for each in channels:
        found.add(each)
    return found, channels, happened


def test_one_that_ends_while_all_are_left_is_not_left() -> None:
    async def leave() -> None:
        found, channels, happened = followed(2)
        async with channels[0].handling:
            leaving = asyncio.create_task(found.leave())
            await asyncio.sleep(0.01)
            channels[0].has_ended.set()
            await asyncio.sleep(0.01)
        assert [each for each, _, _ in await leaving] == channels[1:]
        await asyncio.sleep(0.01)
        assert happened == ["ended", "cancelled"]
        assert not found

    asyncio.run(leave())


def test_if_one_can_t_be_left_all_are_followed_again() -> None:
    async def leave() -> None:
        found, channels, happened = followed(2)
        channels[1].fails = True
        with pytest.raises(OSError, match="no descriptor"):
            await found.leave()
        for each in channels:
            each.has_ended.set()
        await asyncio.sleep(0.01)
        assert channels[0].taken_back == 1
        assert happened.count("ended") == 2
        assert happened.count("alone") == 1
        assert not found

    asyncio.run(leave())


def test_nobody_writes_alone_while_another_process_takes_over() -> None:
    """The new process and the last of the old ones could write at the same instant."""

    async def hand_over() -> None:
        found, channels, happened = followed(2)
        found.begin_to_hand_over()
        for each in channels:
            each.has_ended.set()
        await asyncio.sleep(0.01)
        assert not found
        assert "alone" not in happened
        found.go_on()
        assert happened.count("alone") == 1

    asyncio.run(hand_over())


TURNS = f"""
import os, sys, threading, time
sys.path.insert(0, {str(ROOT)!r})
from redbtc.store.turns import LEDGER, REQUEST_LOG_DATABASE, WriteTurns, new_turns

file, counts, end = new_turns("."), [0, 0], time.monotonic() + 2
is_child = os.fork() == 0

def work(database, seconds):
    turns = WriteTurns(file, database)
    while time.monotonic() < end:
        turns.take()
        time.sleep(seconds)
        turns.give_back()
        counts[database] += 1

threads = [
    threading.Thread(target=work, args=(LEDGER, 0.003)),
    threading.Thread(target=work, args=(REQUEST_LOG_DATABASE, 0.010)),
]
for each in threads:
    each.start()
for each in threads:
    each.join()
os._exit(0 if min(counts) > 5 else 1) if is_child else None
_, status = os.wait()
sys.exit(status or min(counts) <= 5)
"""


def test_two_threads_of_each_process_have_turns(tmp_path: Path) -> None:
    """The system takes it for a deadlock if a thread of each waits for a thread of the other."""
    command = [sys.executable, "-c", TURNS]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


SLOW_BEGINS = f"""
import asyncio, os, sys
sys.path.insert(0, {str(ROOT)!r})
from redbtc.gateway import admitted_request

begin_row = admitted_request.begin_row

async def slow(store, row):
    await begin_row(store, row)
    await asyncio.sleep(60)

if "REDBTC_HANDOVER" not in os.environ:
    admitted_request.begin_row = slow
"""


def test_a_row_that_was_just_begun_is_closed(make_gateway: MakeGateway, upstream: Upstream) -> None:
    """The old process is killed when the row is on the disk, and before it knows that."""
    gateway = make_gateway()
    gateway.prelude = SLOW_BEGINS
    key = gateway.start().new_key()

    def ask() -> None:
        with contextlib.suppress(httpx2.HTTPError):
            post(gateway, key)

    request = threading.Thread(target=ask)
    request.start()
    wait_until(lambda: [each["outcome"] for each in gateway.rows()] == ["pending"])
    before = reload(gateway)
    before.kill()
    gateway.wait_for_log('"predecessor died"')
    request.join()
    assert gateway.row()["outcome"] == "interrupted"


SOON = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from redbtc.handover import finishing

finishing.ORPHAN_SECONDS = 1
"""


def test_a_killed_new_process_leaves_the_way_free(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    """The old one still writes, so no gateway can start until it has ended."""
    gateway = make_gateway()
    gateway.prelude = SOON
    key = gateway.start().new_key()
    with HeldStream(gateway, upstream, key) as stream:
        before = reload(gateway)
        gateway.kill()
        gateway.wait_for_log('"successor died"')
        with pytest.raises(httpx2.HTTPError):
            for _ in stream.lines:
                pass
    assert before.wait() == 0
    gateway.past.clear()
    upstream.script = json_answer(response_object())
    gateway.start()
    assert post(gateway, key).status_code == 200
    first, second = gateway.rows()
    assert (first["outcome"], second["outcome"]) == ("interrupted", "completed")


def test_a_background_response_is_asked_for_by_the_new_process(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    gateway = make_gateway().start()
    key, done = gateway.new_key(), threading.Event()
    asked = 0

    async def script(request: Received, reply: Reply) -> None:
        nonlocal asked
        if request.method == "POST":
            created = response_object("gpt-up", None, "queued") | {"background": True}
            await json_answer(created)(request, reply)
            return
        asked += 1
        status = "completed" if done.is_set() else "in_progress"
        answer = response_object("gpt-up", status=status) if done.is_set() else None
        await json_answer(answer or response_object("gpt-up", None, status))(request, reply)

    upstream.script = script
    assert post(gateway, key, background=True).status_code == 200
    before = reload(gateway)
    assert before.wait() == 0
    done.set()
    wait_until(lambda: gateway.row()["outcome"] == "completed")
    assert gateway.row()["usage_source"] == "upstream"
    assert len(gateway.rows()) == 1


def test_a_change_counts_once_it_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new process reads the ledger again when the old one says that it has changed something,
    such as a payment: before the commit, there is nothing new to read."""
    write = Writer._write

    def slowly(self: Writer, *values: Any) -> list[int]:
        time.sleep(0.2)
        return write(self, *values)

    async def run() -> None:
        async with Store.open(tmp_path / "redbtc.db", "normal") as store:
            monkeypatch.setattr(Writer, "_write", slowly)
            changing = asyncio.create_task(store.transact(("DELETE FROM sessions", ()), by="x"))
            await asyncio.sleep(0.1)
            assert store.changes == 0
            await changing
            assert store.changes == 1
            with pytest.raises(StorageUnavailable):
                await store.transact(("DELETE FROM sessions", ()), by="x", seconds=0.1)
            assert store.changes == 1
            await asyncio.sleep(0.2)
            assert store.changes == 2

    asyncio.run(run())


def test_growth_ends_once_the_ledger_has_what_was_added(tmp_path: Path) -> None:
    """A conversation's tokens are written without waiting for the disk."""

    async def run() -> None:
        async with Store.open(tmp_path / "redbtc.db", "normal") as store:
            objects = Objects(store)
            objects.grow({"conv_1": 5, "conv_2": 7})
            before = objects.growing()
            objects.own(["conv_1"], "acct_1", ObjectLocation("test", tokens=5))
            objects.stop_growing({"conv_1": 5})
            assert objects.are_writing
            assert not_less(before, objects.growing()) == before
            await store.settle_time()
            await asyncio.sleep(0)
            assert not objects.are_writing
            assert changed(before, objects.growing()) == {"conv_1": 0}

    asyncio.run(run())


def test_an_upstream_that_is_out_stays_out(make_gateway: MakeGateway, upstream: Upstream) -> None:
    with Upstream() as broken:

        async def fail(_: Received, reply: Reply) -> None:
            await reply.head(500, framing="length:0")

        broken.script = fail
        gateway = make_gateway(
            {
                "upstreams": [
                    {"name": "broken", "base_url": broken.url, "api_key_env": "", "priority": 1},
                    {"name": "good", "base_url": upstream.url, "api_key_env": "", "priority": 2},
                ]
            }
        ).start()
        key = gateway.new_key()
        while states(gateway)["broken"] != "out":
            assert post(gateway, key).status_code == 200
        asked = len(broken.requests)
        reload(gateway)
        assert states(gateway) == {"broken": "out", "good": "up"}
        assert post(gateway, key).status_code == 200
        assert len([each for each in broken.requests if each.method == "POST"]) <= asked


def states(gateway: Gateway) -> dict[str, str]:
    """The state of each upstream."""
    return {each["name"]: each["state"] for each in gateway.cli("upstream", "list")["upstreams"]}


def test_logged_bodies_are_whole(make_gateway: MakeGateway, upstream: Upstream) -> None:
    """Both processes write the log of bodies while the old one finishes its requests."""
    gateway = make_gateway().start()
    key = gateway.new_key()
    gateway.cli("account", "log", "test", "--days", "1")
    with HeldStream(gateway, upstream, key) as stream:
        reload(gateway)
        other = post(gateway, key).headers["x-redbtc-request-id"]
        request_id = stream.response.headers["x-redbtc-request-id"]
        rest = stream.finish()
        assert "response.completed" in rest
    wait_until(lambda: "response.completed" in shown(gateway, request_id))
    assert "request log unavailable" not in gateway.log()
    wait_until(lambda: '"completed"' in shown(gateway, other))


def test_erased_bodies_do_not_come_back_from_the_old_process(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    gateway = make_gateway().start()
    key = gateway.new_key()
    gateway.cli("account", "log", "test", "--days", "1")
    with HeldStream(gateway, upstream, key, instructions="canary-of-the-prompt") as stream:
        before = reload(gateway)
        request_id = stream.response.headers["x-redbtc-request-id"]
        gateway.cli("account", "log", "test", "--off", "--purge")
        assert "response.completed" in stream.finish()
    assert before.wait() == 0
    gateway.wait_for_log('"predecessor ended"')
    assert gateway.run("usage", "show", request_id, "--response").returncode == 1
    for file in gateway.folder.glob("request_log.db*"):
        for text in (b"canary", b"response.completed"):
            assert text not in file.read_bytes()


SLOW_ERASURE = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from redbtc.store.request_log import log

erase_all_of = log.erase_all_of

def slowly(*values, **more):
    open("erasing", "w").close()
    while not os.path.exists("go"):
        time.sleep(0.01)
    return erase_all_of(*values, **more)

log.erase_all_of = slowly
"""


def test_requests_do_not_wait_for_a_long_use_of_the_request_log(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    """An erasure can take minutes. Only the reload waits for it."""
    gateway = make_gateway()
    gateway.prelude = SLOW_ERASURE
    gateway.start()
    key = gateway.new_key()
    gateway.cli("account", "log", "test", "--days", "1")
    assert post(gateway, key).status_code == 200
    with ThreadPoolExecutor(2) as pool:
        erased = pool.submit(gateway.run, "account", "log", "test", "--off", "--purge")
        wait_until((gateway.folder / "erasing").exists)
        reloaded = pool.submit(reload, gateway)
        pid = gateway.pid
        wait_until(lambda: psutil.Process(pid).children())
        for _ in range(20):
            assert post(gateway, key).status_code == 200
            time.sleep(0.1)
        assert not reloaded.done()
        (gateway.folder / "go").touch()
        assert erased.result().returncode == 0
        assert reloaded.result().wait() == 0
    assert post(gateway, key).status_code == 200


def shown(gateway: Gateway, request_id: str) -> str:
    """The stored body of an answer."""
    return gateway.run("usage", "show", request_id, "--response").stdout


def test_metrics_go_on_and_count_what_the_old_process_finishes(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    name = 'redbtc_requests_total{outcome="completed",route="/v1/responses",status="200"}'
    with HeldStream(gateway, upstream, key) as stream:
        assert post(gateway, key).status_code == 200
        reload(gateway)
        assert post(gateway, key).status_code == 200
        assert gateway.metrics()[name] == 2
        stream.finish()
    wait_until(lambda: gateway.metrics()[name] == 3)
    assert gateway.metrics()['redbtc_request_seconds_count{route="/v1/responses"}'] == 3


NO_FILES = f"""
import errno, sys
sys.path.insert(0, {str(ROOT)!r})
from redbtc.handover import successor

def new_turns(folder):
    raise OSError(errno.EMFILE, "Too many open files")

successor.new_turns = new_turns
"""


def test_without_descriptors_nothing_has_begun(make_gateway: MakeGateway, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        gateway = make_gateway(NOTIFY_SOCKET=str(tmp_path / "notify"))
        gateway.prelude = NO_FILES
        gateway.start()
        done = gateway.run("reload")
        assert (done.returncode, done.stderr) == (
            1,
            "Error: can't hand over the files: Too many open files\n",
        )
        gateway.signal(signal.SIGUSR2)
        gateway.wait_for_log('"not reloaded"')
        assert psutil.Process(gateway.pid).children() == []
        systemd.settimeout(5)
        told: list[str] = []
        while told.count("READY=1") < 3:
            told += systemd.recv(4096).decode().partition("\n")[:1]
        assert [each for each in told if not each.startswith("STATUS")] == [
            "READY=1",
            *["RELOADING=1", "READY=1"] * 2,
        ]


def test_the_webhook_is_not_told_that_an_outage_is_over(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    """The new process knows of it, as the old one did, and tells when it is over."""

    async def fail(request: Received, reply: Reply) -> None:
        status = 500 if request.header("authorization") == "Bearer bad" else 200
        await json_answer(response_object(), status)(request, reply)

    upstream.script = fail
    names = {"bad": 1, "good": 2}
    upstreams = [
        {"name": name, "base_url": upstream.url, "api_key_env": name.upper(), "priority": number}
        for name, number in names.items()
    ]
    with receiving() as hook:
        billing = f'[billing]\nunpriced_models = "free"\n{hook.settings()}'
        gateway = make_gateway(
            f"{billing}{toml({'upstreams': upstreams})}", BAD="bad", GOOD="good", HOOK_SECRET=SECRET
        ).start()
        key = gateway.new_key()
        for _ in range(6):
            assert post(gateway, key).status_code == 200
        wait_until(lambda: [each.told for each in hook.accepted] == [("upstream.out", "bad")])
        for _ in range(2):
            reload(gateway)
            assert gateway.metrics()['redbtc_upstream_state{state="out",upstream="bad"}'] == 1
        assert gateway.run("upstream", "resume", "bad").returncode == 0
        wait_until(lambda: len(hook.accepted) > 1)
        time.sleep(0.5)
        told = [(*each.told, each.content["data"]["reason"]) for each in hook.accepted]
        assert told == [
            ("upstream.out", "bad", told[0][2]),
            ("upstream.back", "bad", told[1][2]),
        ]
        assert told[1][2] != "restarted"
