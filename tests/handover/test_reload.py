"""A new process takes over from the running one: `redbtc-proxy reload` and SIGUSR2."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import sqlite3
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.helpers.gateway import ROOT, Gateway, MakeGateway, wait_until
from tests.helpers.logins import new_user
from tests.helpers.programs import copy_of_program
from tests.helpers.reloading import Adopted, reload
from tests.helpers.steady_load import CountingUpstream, SteadyLoad
from tests.helpers.upstream import (
    Received,
    Reply,
    Upstream,
    json_answer,
    response_object,
    response_pieces,
)

pytestmark = pytest.mark.promise_9

RESPONSE = {"model": "m", "input": "Hi"}
STREAM = {**RESPONSE, "stream": True}


def held_until(release: threading.Event) -> Any:
    """A script that sends the first half of a stream, and the rest once it is released."""

    async def script(request: Received, reply: Reply) -> None:
        if not request.json().get("stream"):
            await json_answer(response_object())(request, reply)
            return
        pieces = response_pieces(["a", "b"])
        await reply.head(headers={"content-type": "text/event-stream"})
        for piece in pieces[:2]:
            await reply.send(piece)
        await reply.wait(release)
        for piece in pieces[2:]:
            await reply.send(piece)
        await reply.end()

    return script


@pytest.mark.slow
def test_a_load_that_never_stops_notices_nothing(make_gateway: MakeGateway) -> None:
    """The promise in small; bench/reload.py has 50 reloads under 200 clients."""

    async def run() -> tuple[SteadyLoad, CountingUpstream, Gateway]:
        async with CountingUpstream() as upstream:
            gateway = make_gateway(
                {
                    "limits": {"queue_seconds": 120, "account": {"concurrency": 0}},
                    "upstreams": [
                        {"name": name, "base_url": url, "models": [models], "api_key_env": ""}
                        for name, url, models in (
                            ("http", upstream.url, "h*"),
                            ("sockets", upstream.socket_url, "w*"),
                        )
                    ],
                }
            )
            await asyncio.to_thread(gateway.start)
            many = await asyncio.to_thread(gateway.new_key, "many")
            few = await asyncio.to_thread(lambda: gateway.new_key("few", concurrency=2))
            load = SteadyLoad(gateway.port)
            load.add("stream", 10, many, "h", seconds=3)
            load.add("json", 5, many, "h")
            load.add("connections", 3, many, "h")
            load.add("websocket", 4, many, "w")
            load.add("json", 3, few, "h-few")
            load.add("stream", 3, few, "h-few", seconds=1)
            await asyncio.sleep(1)
            for _ in range(6):
                await asyncio.to_thread(reload, gateway)
            await load.stop()
        return load, upstream, gateway

    load, upstream, gateway = asyncio.run(run())
    assert not load.failed
    assert load.moved >= 6
    assert min(load.done.values()) > 10
    assert upstream.most_at_once["h-few"] == 2
    rows = gateway.rows()
    assert Counter(row["requested_model"] for row in rows) == upstream.served
    assert {(row["outcome"], row["usage_source"]) for row in rows} == {("completed", "upstream")}
    assert len({row["response_id"] for row in rows}) == len(rows) == load.done.total()
    assert gateway.run("db", "check").returncode == 0


def test_the_old_process_finishes_what_it_has_and_ends_with_0(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    release = threading.Event()
    upstream.script = held_until(release)
    with gateway.client(key) as client, client.stream("POST", "/responses", json=STREAM) as stream:
        lines = stream.iter_lines()
        next(lines)
        before = reload(gateway)
        assert gateway.pid != before.pid
        with gateway.client(key) as other:  # answered by the new process
            assert other.post("/responses", json=RESPONSE).status_code == 200
        assert before.poll() is None
        release.set()
        assert any("response.completed" in line for line in lines)
    assert before.wait() == 0
    assert {row["outcome"] for row in gateway.rows()} == {"completed"}
    gateway.wait_for_log('"predecessor ended"')
    assert not list(gateway.folder.glob("*.owed-*"))


def whole_answer(connection: socket.socket) -> bytes:
    """Read an answer with a Content-Length."""
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += connection.recv(65536)
    head, _, body = answer.partition(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
    while len(body) < length:
        body += connection.recv(65536)
    return head + body


def test_a_connection_goes_on_in_the_new_process(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    """Whether it is idle, or has sent a part of a head or of a body."""
    text = json.dumps(RESPONSE)
    request = (
        f"POST /v1/responses HTTP/1.1\r\nHost: g\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n{text}"
    ).encode()
    with gateway.connect() as connection:
        for part in (request, b""), (request[:20], request[20:]), (request[:-9], request[-9:]):
            connection.sendall(part[0])
            time.sleep(0.1)  # its bytes have arrived
            before = reload(gateway)
            connection.sendall(part[1])
            assert whole_answer(connection).startswith(b"HTTP/1.1 200 ")
            assert before.wait() == 0
    assert len(upstream.requests) == 3


def test_sigusr2_reloads_with_the_settings_on_the_disk(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    gateway = make_gateway().start()
    key = gateway.new_key()
    with Upstream() as other:
        gateway.config.write_text(gateway.config.read_text().replace(upstream.url, other.url))
        before = gateway.process
        assert before is not None
        gateway.expected_dead = True
        gateway.signal(signal.SIGUSR2)
        assert before.wait() == 0
        with gateway.client(key) as client:
            assert client.post("/responses", json=RESPONSE).status_code == 200
        assert len(other.requests) == 1
        assert not upstream.requests
        gateway.process = Adopted(int(gateway.log().partition('over","pid":')[2].partition(",")[0]))


WHOLE = ""  # the whole text of a file is replaced
JOINING, KILL = "redbtc/handover/joining.py", "os.kill(os.getpid(), 9)"
SPOILT = {  # what is replaced by what in a file, and what the reason says
    "settings": ("config.toml", WHOLE, "[server]\nprot = 1\n", "prot"),
    "a port": (
        "config.toml",
        WHOLE,
        '[server]\nhost = "192.0.2.1"\n',
        "can't listen on 192.0.2.1",
    ),
    "code": ("redbtc/admin/api.py", WHOLE, "this is no Python\n", "SyntaxError"),
    "a crash at the start": (JOINING, WHOLE, "import os; os.abort()\n", "signal 6"),
    "a crash before it is ready": (
        JOINING,
        "await self._channel.send(Ready(",
        KILL + "((",
        "signal 9",
    ),
    "a crash with the state": (JOINING, "await gateway.store.begin_run()", KILL, "signal 9"),
    "a late failure": (
        JOINING,
        "await gateway.store.begin_run()",
        'raise OSError("no room")',
        "no room",
    ),
}


@pytest.mark.parametrize("spoilt", SPOILT)
def test_a_new_process_that_cannot_serve_changes_nothing(
    tmp_path: Path, upstream: Upstream, fork_server: None, spoilt: str
) -> None:
    root = copy_of_program(tmp_path / "program")
    settings = {"limits": {"queue_seconds": 120}}
    gateway = Gateway(tmp_path / "gateway", upstream.url, settings, root=root).start()
    key, release = gateway.new_key(concurrency=1), threading.Event()
    idle_key = gateway.new_key("idle")
    upstream.script = held_until(release)
    name, old, new, reason = SPOILT[spoilt]
    file = gateway.config if name == "config.toml" else root / name
    try:
        with (
            ThreadPoolExecutor(1) as pool,
            gateway.client(idle_key) as idle,
            gateway.client(key) as client,
            client.stream("POST", "/responses", json=STREAM) as stream,
        ):
            lines = stream.iter_lines()
            next(lines)
            assert idle.post("/responses", json=RESPONSE).status_code == 200
            waiting = pool.submit(post_once, gateway, key)  # for the place of the stream
            wait_until(lambda: gateway.metrics()["redbtc_queued"] == 1)
            before, kept = gateway.pid, file.read_text()
            assert old in kept
            file.write_text(kept.replace(old, new) if old else new)
            done = gateway.run("reload") if name == "config.toml" else run_elsewhere(gateway)
            assert (done.returncode, done.stderr[:7]) == (1, "Error: ")
            assert reason in done.stderr
            file.write_text(kept)
            assert gateway.alive()
            assert gateway.pid == before
            assert idle.post("/responses", json=RESPONSE).status_code == 200
            release.set()
            assert any("response.completed" in line for line in lines)
            assert waiting.result() == 200
        assert [row["outcome"] for row in gateway.rows()] == ["completed"] * 4
        assert not list(gateway.folder.glob("*.owed-*"))
        assert gateway.terminate() == 0
        assert not list(gateway.folder.glob("*.owed*"))
    finally:
        gateway.kill()


def test_a_new_process_that_is_too_late_does_not_serve(
    tmp_path: Path, upstream: Upstream, fork_server: None
) -> None:
    """It has the state and the sockets, but the old process has stopped waiting for it."""
    root = copy_of_program(tmp_path / "program")
    successor, joining = root / "redbtc/handover/successor.py", root / JOINING
    successor.write_text(
        successor.read_text().replace("HANDOVER_SECONDS = 10", "HANDOVER_SECONDS = 1")
    )
    gateway = Gateway(tmp_path / "gateway", upstream.url, root=root).start()
    key, serves = gateway.new_key(), "await self._channel.send(Serves())"
    joining.write_text(
        joining.read_text().replace(serves, f'__import__("time").sleep(2.5); {serves}')
    )
    try:
        done = run_elsewhere(gateway)
        assert done.returncode == 1
        assert "it did not serve after 1 s" in done.stderr
        assert not psutil.Process(gateway.pid).children()
        assert [post_once(gateway, key) for _ in range(3)] == [200] * 3
        assert gateway.log().count('"serving"') == 1
        assert gateway.terminate() == 0
    finally:
        gateway.kill()


def test_a_reload_during_the_start_is_done_after_it(gateway: Gateway, key: str) -> None:
    gateway.terminate()
    with contextlib.closing(sqlite3.connect(gateway.database)) as other:
        other.execute("BEGIN EXCLUSIVE")
        gateway.start()
        assert post_once(gateway, key) == 503
        gateway.signal(signal.SIGUSR2)
        time.sleep(0.2)
        other.rollback()
    gateway.wait_for_log('"handed over"')
    assert gateway.process is not None
    assert gateway.process.wait() == 0
    pid = json.loads([line for line in gateway.log().splitlines() if '"handed over"' in line][-1])
    gateway.process = Adopted(pid["pid"])
    assert post_once(gateway, key) == 200


WITHOUT_RELOAD = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from redbtc.admin import http

http.OPERATIONS = [each for each in http.OPERATIONS if each.path != "/reload"]
"""


def test_a_version_that_knows_no_reload(make_gateway: MakeGateway) -> None:
    gateway = make_gateway()
    gateway.prelude = WITHOUT_RELOAD
    gateway.start()
    done = gateway.run("reload")
    assert (done.returncode, done.stdout) == (1, "")
    assert "another version, without this command: restart it" in done.stderr
    assert gateway.alive()


SLOWLY = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import asyncio
from redbtc.billing.billing import Billing

payments = Billing.payments

async def slowly(*values):
    await asyncio.sleep(4)
    return await payments(*values)

Billing.payments = slowly
"""


def test_commands_and_pages_are_answered_by_the_process_that_has_begun(
    make_gateway: MakeGateway,
) -> None:
    """They are not in flight at an upstream, and can take a while: db purge, account terminate."""
    gateway = make_gateway()
    gateway.prelude = SLOWLY
    gateway.start()
    login = new_user(gateway, "a@example.com")
    with ThreadPoolExecutor(2) as pool, contextlib.closing(login.client):
        asked = pool.submit(gateway.api, "GET", "/payments")
        shown = pool.submit(login.get, "/admin/v1/payments")
        time.sleep(0.2)
        before = reload(gateway)
        assert not asked.done()
        assert asked.result() == {"payments": []}
        assert shown.result().json() == {"payments": []}
        assert before.wait() == 0


LINGERS = """
self._channel.close()
            open("asleep", "w").write(str(os.getpid()))
            import time
            time.sleep(300)
"""


def test_requests_are_settled_while_a_new_process_that_lingers_is_ended(
    tmp_path: Path, upstream: Upstream, fork_server: None
) -> None:
    """It has the file for turns, and is killed before the old process writes without them."""
    root = copy_of_program(tmp_path / "program")
    child, joining = root / "redbtc/handover/child.py", root / JOINING
    child.write_text(child.read_text().replace("CHILD_END_SECONDS = 10", "CHILD_END_SECONDS = 2"))
    gateway = Gateway(tmp_path / "gateway", upstream.url, root=root).start()
    key, release = gateway.new_key(), threading.Event()
    upstream.script = held_until(release)
    old = "await gateway.store.begin_run()"
    assert old in joining.read_text()
    joining.write_text(joining.read_text().replace(old, f"{old}\n            {LINGERS.strip()}"))
    try:
        with (
            ThreadPoolExecutor(1) as pool,
            gateway.client(key) as client,
            client.stream("POST", "/responses", json=STREAM) as stream,
        ):
            lines = stream.iter_lines()
            next(lines)
            done = pool.submit(run_elsewhere, gateway)
            wait_until((gateway.folder / "asleep").exists)
            time.sleep(0.2)  # the old process has noticed
            release.set()
            assert any("response.completed" in line for line in lines)
            assert not done.done()
            assert done.result().returncode == 1
        assert not psutil.pid_exists(int((gateway.folder / "asleep").read_text()))
        assert post_once(gateway, key) == 200
        assert [row["outcome"] for row in gateway.rows()] == ["completed"] * 2
        assert "ledger" not in gateway.flushed_log()
        assert not list(gateway.folder.glob("*.owed-*"))
    finally:
        gateway.kill()


STARTS_SLOWLY = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
if "REDBTC_HANDOVER" in os.environ:
    open("starting", "w").close()
    while not os.path.exists("go"):
        time.sleep(0.01)
"""


def test_a_socket_for_commands_that_was_made_again_meanwhile(make_gateway: MakeGateway) -> None:
    """The new process has the listener of the socket before that, to which no file leads."""
    gateway = make_gateway()
    gateway.prelude = STARTS_SLOWLY
    gateway.start()
    path = Path(f"{gateway.database}.sock")
    with ThreadPoolExecutor(1) as pool:
        reloaded = pool.submit(reload, gateway)
        wait_until((gateway.folder / "starting").exists)
        path.unlink()
        gateway.wait_for_log('"socket made again"')
        (gateway.folder / "go").touch()
        reloaded.result()
    wait_until(lambda: gateway.run("account", "list").returncode == 0)
    assert gateway.log().count('"socket made again"') == 2


def test_another_database_needs_a_restart(gateway: Gateway, key: str) -> None:
    gateway.configure({"database": {"path": "other.db"}})
    gateway.signal(signal.SIGUSR2)
    gateway.wait_for_log('"not reloaded"')
    assert "restart it to use another database" in gateway.log()
    assert post_once(gateway, key) == 200


def post_once(gateway: Gateway, key: str) -> int:
    with gateway.client(key) as client:
        return client.post("/responses", json=RESPONSE).status_code


SLEEP = "import time; open('asleep', 'w').close(); time.sleep(300)\n"


def test_one_reload_at_a_time_and_sigterm_ends_it(
    tmp_path: Path, upstream: Upstream, fork_server: None
) -> None:
    root = copy_of_program(tmp_path / "program")
    gateway = Gateway(tmp_path / "gateway", upstream.url, root=root).start()
    key = gateway.new_key()
    (root / JOINING).write_text(SLEEP)
    try:
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(run_elsewhere, gateway)
            wait_until((gateway.folder / "asleep").exists)
            second = run_elsewhere(gateway)
            assert (second.returncode, "another reload is under way" in second.stderr) == (1, True)
            assert post_once(gateway, key) == 200
            children = psutil.Process(gateway.pid).children()
            assert len(children) == 1
            assert gateway.terminate() == 0
            assert first.result().returncode == 1
        assert not children[0].is_running()
    finally:
        gateway.kill()


def run_elsewhere(gateway: Gateway) -> Any:
    """Run `reload` with the program of this repository: that of the gateway is spoilt."""
    own, gateway._script = gateway._script, str(ROOT / "redbtc_proxy.py")
    try:
        return gateway.run("reload")
    finally:
        gateway._script = own
