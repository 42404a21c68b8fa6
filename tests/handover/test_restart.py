"""A reload to a program with another schema, and the end of the process at SIGTERM."""

from __future__ import annotations

import json
import signal
import socket
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import httpx2
import psutil
import pytest

from redbtc.store.schema import newest_version
from tests.handover.test_reload import RESPONSE
from tests.handover.test_takeover import HeldStream, post
from tests.helpers.gateway import PATIENCE_SECONDS, Gateway, MakeGateway, Process, wait_until
from tests.helpers.programs import add_section, copy_of_program
from tests.helpers.reloading import Adopted
from tests.helpers.upstream import Upstream, ws_like_openai
from tests.helpers.websocket_client import client as websocket

pytestmark = pytest.mark.promise_9

NEW_TABLE = "CREATE TABLE later (id INTEGER PRIMARY KEY) STRICT;"
WRONG = "CREATE TABLE later (id INTEGER PRIMARY KEY); INSERT INTO nowhere VALUES (1);"


@pytest.fixture
def program(tmp_path: Path) -> Path:
    return copy_of_program(tmp_path / "program")


@pytest.fixture
def gateway(
    tmp_path: Path, program: Path, upstream: Upstream, fork_server: None
) -> Iterator[Gateway]:
    gateway = Gateway(tmp_path / "gateway", upstream.url, root=program)
    yield gateway.start()
    gateway.close()


def version(gateway: Gateway) -> int:
    with closing(sqlite3.connect(f"{gateway.database.as_uri()}?mode=ro", uri=True)) as database:
        return int(database.execute("PRAGMA user_version").fetchone()[0])


def before_a_migration(gateway: Gateway, program: Path) -> Process:
    """Let the program have another schema, and return the gateway's process."""
    add_section(program, NEW_TABLE)
    assert gateway.process is not None
    return gateway.process


def test_a_migration_is_a_short_restart_in_which_nobody_is_refused(
    gateway: Gateway, program: Path, upstream: Upstream
) -> None:
    key = gateway.new_key()
    before = before_a_migration(gateway, program)
    with ThreadPoolExecutor(3) as pool, HeldStream(gateway, upstream, key) as stream:
        reloading = pool.submit(gateway.run, "reload", "--json")
        gateway.wait_for_log('"restarting"')
        waiting = [pool.submit(post, gateway, key) for _ in range(2)]
        time.sleep(0.5)  # they wait meanwhile, and are not refused
        assert before.poll() is None
        assert not any(each.done() for each in waiting)
        assert version(gateway) == newest_version()
        assert "response.completed" in stream.finish()
        assert before.wait() == 0
        done = reloading.result()
        assert done.returncode == 0, done.stderr
        assert "has to be migrated" in done.stderr
        assert '"restarts": true' in done.stdout
        assert [each.result().status_code for each in waiting] == [200, 200]
    gateway.process = Adopted(int(done.stdout.partition('"pid": ')[2].partition(",")[0]))
    assert version(gateway) == newest_version() + 1
    assert {row["outcome"] for row in gateway.rows()} == {"completed"}
    assert (
        len(list(gateway.folder.glob(f"redbtc.db.before-schema-{newest_version() + 1}"))) == 1
    )  # the copy of the old ledger


def test_a_migration_that_would_fail_changes_nothing(
    gateway: Gateway, program: Path, upstream: Upstream
) -> None:
    key, before = gateway.new_key(), version(gateway)
    add_section(program, WRONG)
    with HeldStream(gateway, upstream, key) as stream:
        done = gateway.run("reload")
        assert done.returncode == 1
        assert "could not be migrated: no such table: nowhere" in done.stderr
        assert version(gateway) == before
        assert not list(gateway.folder.glob("*.trial*"))
        assert "response.completed" in stream.finish()
    assert post(gateway, key).status_code == 200
    assert gateway.alive()


def test_sigterm_waits_for_the_process_that_ends_first(
    gateway: Gateway, program: Path, upstream: Upstream
) -> None:
    """systemd ends all that is left of a service when its main process has ended."""
    key = gateway.new_key()
    before = before_a_migration(gateway, program)
    with ThreadPoolExecutor(1) as pool, HeldStream(gateway, upstream, key) as stream:
        reloading = pool.submit(gateway.run, "reload", "--json")
        gateway.wait_for_log('"handed over"')
        handed_over = [line for line in gateway.log().splitlines() if '"handed over"' in line]
        new = Adopted(json.loads(handed_over[0])["pid"])
        gateway.process = new
        new.terminate()
        time.sleep(1)
        assert psutil.pid_exists(new.pid)
        assert before.poll() is None
        assert "response.completed" in stream.finish()
        assert before.wait() == 0
        new.wait()
        assert reloading.result().returncode == 1
    gateway.start()
    assert {row["outcome"] for row in gateway.rows()} == {"completed"}


NOT_OPENED = """

opened = try_to_open


async def try_to_open(stack, options, serving):
    if serving.joined is None and not os.path.exists("go"):
        raise StorageUnavailable("the disk is full")
    return await opened(stack, options, serving)
"""


def test_requests_are_refused_while_the_ledger_can_not_be_opened(
    gateway: Gateway, program: Path, upstream: Upstream
) -> None:
    key = gateway.new_key()
    add_section(program, NEW_TABLE)
    with (program / "redbtc/cli/serve.py").open("a") as script:
        script.write(NOT_OPENED)
    before = gateway.process
    assert before is not None
    with ThreadPoolExecutor(1) as pool, gateway.client(key) as kept:
        assert kept.post("/responses", json=RESPONSE).status_code == 200
        reloading = pool.submit(gateway.run, "reload", "--json")
        assert before.wait(PATIENCE_SECONDS) == 0
        for answer in (post(gateway, key), kept.post("/responses", json=RESPONSE)):
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "ledger_unavailable"
        assert gateway.get("/healthz").status_code == 200
        (gateway.folder / "go").touch()
        wait_until(lambda: post(gateway, key).status_code == 200)
        done = reloading.result()
        assert done.returncode == 0, done.stderr
    gateway.process = Adopted(json.loads(done.stdout)["pid"])


def test_a_copy_that_a_killed_process_has_left_is_removed(gateway: Gateway) -> None:
    gateway.terminate()
    left = [gateway.folder / f"redbtc.db.trial{suffix}" for suffix in ("", "-wal", "-shm")]
    for each in left:
        each.touch()
    gateway.start()
    assert not any(each.exists() for each in left)


# SIGTERM


def connects(gateway: Gateway) -> bool:
    try:
        socket.create_connection(("127.0.0.1", gateway.port)).close()
    except ConnectionRefusedError:
        return False
    return True


def test_sigterm_refuses_connections_while_streams_finish(
    gateway: Gateway, upstream: Upstream
) -> None:
    key = gateway.new_key()
    with HeldStream(gateway, upstream, key) as stream, gateway.client(key) as idle:
        assert idle.post("/responses", json=RESPONSE).status_code == 200
        gateway.terminate(wait=False)
        wait_until(lambda: not connects(gateway))
        with pytest.raises(httpx2.ConnectError):  # a client tries again at once
            idle.post("/responses", json=RESPONSE)
        assert "response.completed" in stream.finish()
    assert gateway.wait() == 0
    assert {row["outcome"] for row in gateway.rows()} == {"completed"}


def test_connections_are_accepted_until_a_balancer_has_noticed(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    gateway = make_gateway({"server": {"shutdown_delay_seconds": 3}}).start()
    key, upstream.talk = gateway.new_key(), ws_like_openai
    with HeldStream(gateway, upstream, key) as stream:
        began = time.monotonic()
        gateway.terminate(wait=False)
        wait_until(lambda: gateway.get("/readyz").status_code == 503)
        assert gateway.get("/readyz").json()["error"]["code"] == "draining"
        assert post(gateway, key).status_code == 200
        with websocket(gateway, key) as ws:
            ws.send()
            assert ws.completed()["status"] == "completed"
        wait_until(lambda: not connects(gateway))
        assert time.monotonic() - began >= 3
        assert "response.completed" in stream.finish()
    assert gateway.wait() == 0


def test_a_connection_without_a_request_gets_one_answer(
    gateway: Gateway, upstream: Upstream
) -> None:
    """Its first request may be on its way at SIGTERM; no more may follow for minutes."""
    key = gateway.new_key()
    with HeldStream(gateway, upstream, key) as stream:
        with socket.create_connection(("127.0.0.1", gateway.port)) as fresh:
            time.sleep(0.2)
            gateway.terminate(wait=False)
            wait_until(lambda: not connects(gateway))
            fresh.sendall(b"GET /healthz HTTP/1.1\r\nhost: g\r\n\r\n")
            answer = b""
            while more := fresh.recv(65536):  # until it is closed
                answer += more
        assert answer.startswith(b"HTTP/1.1 200")
        assert b"connection: close" in answer.lower()
        assert "response.completed" in stream.finish()
    assert gateway.wait() == 0


def test_a_second_sigterm_ends_it_at_once(gateway: Gateway, upstream: Upstream) -> None:
    key = gateway.new_key()
    with HeldStream(gateway, upstream, key):
        gateway.terminate(wait=False)
        gateway.wait_for_log('"draining"')
        gateway.signal(signal.SIGTERM)
        assert gateway.wait() == 128 + signal.SIGTERM
