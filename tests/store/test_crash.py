"""Promise 3 under fire: kill -9, a full disk, a locked database, signals."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import threading
import time
from collections import Counter
from decimal import Decimal
from pathlib import Path

import httpx2
import pytest

from redbtc.store.database import Store
from tests.helpers.gateway import (
    PATIENCE_SECONDS,
    Gateway,
    MakeGateway,
    wait_for_length,
    wait_until,
)
from tests.helpers.tools import needs
from tests.helpers.upstream import (
    Received,
    Reply,
    Upstream,
    json_answer,
    openai_like,
    response_object,
    response_pieces,
    stream,
)
from tests.store.faults import RESPONSE, fill, post

pytestmark = [pytest.mark.promise_3, pytest.mark.promise_6]

KILLS = 50
CLIENTS = 24


@pytest.mark.slow
def test_kill_9_loses_nothing_and_counts_nothing_twice(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    """Each answer has an id of its own; clients note those whose end they saw."""
    gateway = make_gateway("[limits.account]\nconcurrency = 0").start()
    key = gateway.new_key("a")
    gateway.cli("account", "set", "a", "--credit-limit", "0", "--monthly-budget", "1000000")
    gateway.cli("price", "add", "gpt-up", "--input", "1.25", "--output", "10.000001")
    gateway.cli("payment", "add", "a", "1000000", "--reference", "first")
    numbers = iter(range(10**9))
    lock = threading.Lock()

    async def script(request: Received, reply: Reply) -> None:
        with lock:
            number = f"resp_{next(numbers)}"
        if request.json().get("stream"):
            pieces = response_pieces(["a"] * random.randrange(4))
            whole = [piece.replace(b'"resp_1"', f'"{number}"'.encode()) for piece in pieces]
            await stream(whole, random.random() * 0.01)(request, reply)
        else:
            await json_answer(response_object(id=number))(request, reply)

    upstream.script = script
    complete: list[str] = []
    stop = threading.Event()

    def client(number: int) -> None:
        while not stop.is_set():
            try:
                with gateway.client(key) as session:
                    while not stop.is_set():
                        streamed = bool(random.getrandbits(1))
                        answer = session.post("/responses", json={**RESPONSE, "stream": streamed})
                        if answer.status_code == 503:  # a commit took longer than 2 s
                            assert "ledger_unavailable" in answer.text
                            continue
                        assert answer.status_code == 200, answer.text
                        text = answer.text
                        assert not streamed or "response.completed" in text
                        complete.append(text.split('"resp_')[1].split('"')[0])
            except httpx2.HTTPError:
                time.sleep(0.01)

    threads = [threading.Thread(target=client, args=(n,)) for n in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(KILLS):
            enough = len(complete) + random.randrange(5, 60)
            wait_for_length(complete, enough)
            time.sleep(random.random() * 0.02)
            gateway.kill()
            gateway.start()
    finally:
        stop.set()
        for thread in threads:
            thread.join(PATIENCE_SECONDS)
    wait_until(lambda: gateway.metrics()["redbtc_in_flight"] == 0)
    rows = gateway.rows()
    outcomes = Counter(row["outcome"] for row in rows)
    recorded = Counter(row["response_id"] for row in rows if row["outcome"] == "completed")
    assert max(recorded.values()) == 1, "counted twice"
    lost = {f"resp_{number}" for number in complete} - set(recorded)
    assert not lost, f"{len(lost)} of {len(complete)} lost"
    assert outcomes["pending"] == 0
    assert outcomes["interrupted"] > 0
    reached = len(upstream.requests)
    assert len(rows) >= reached, "every request that reached the upstream has a row"
    sources = {row["usage_source"] for row in rows if row["outcome"] == "interrupted"}
    assert sources <= {"none", "estimated"}
    assert all((row["cost"] is None) == (row["usage_source"] == "none") for row in rows)
    costs = sum(Decimal(row["cost"]) for row in rows if row["cost"])
    assert costs > 0
    account = gateway.cli("account", "show", "a")
    assert Decimal(account["balance"]) == Decimal(account["available"]) == 1_000_000 - costs
    months = sorted({row["month"] for row in rows})
    statements = [gateway.cli("statement", "a", month) for month in months]
    assert Decimal(statements[-1]["closing_balance"]) == 1_000_000 - costs
    assert sum(statement["totals"]["requests"] for statement in statements) == len(rows)
    assert gateway.cli("db", "check")["ok"]


@pytest.mark.front_door
def test_a_stopped_gateways_crash_is_visible_to_commands(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    release = threading.Event()

    async def script(request: Received, reply: Reply) -> None:
        await reply.wait(release)

    upstream.script = script

    def post() -> None:
        with gateway.client(key) as client, pytest.raises(httpx2.HTTPError):
            client.post("/responses", json=RESPONSE)

    thread = threading.Thread(target=post)
    thread.start()
    wait_until(lambda: upstream.in_flight)
    assert [row["outcome"] for row in gateway.rows()] == ["pending"]
    gateway.kill()
    thread.join()
    assert [row["outcome"] for row in gateway.rows()] == ["interrupted"]
    release.set()


def test_one_commit_answers_all_who_ask_whether_the_ledger_is_well(tmp_path: Path) -> None:
    """Anybody may ask /readyz, and each commit waits for the disk."""

    async def test() -> None:
        async with Store.open(tmp_path / "redbtc.db", "normal") as store:
            store.commits.committed_at -= 2
            before = store.commits.count
            assert all(await asyncio.gather(*[store.can_commit() for _ in range(100)]))
            assert store.commits.count == before + 1

    asyncio.run(test())


def test_a_locked_database_is_a_503_and_recovers_by_itself(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    lock = sqlite3.connect(gateway.database, isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    assert post(gateway, key) == (503, "ledger_unavailable")
    assert post(gateway, key) == (503, "ledger_unavailable")
    assert gateway.get("/readyz").status_code == 503
    assert gateway.metrics()["redbtc_ledger_healthy"] == 0
    assert not upstream.requests, "nothing is served unmetered"
    lock.execute("ROLLBACK")
    lock.close()
    wait_until(lambda: gateway.get("/readyz").status_code == 200)
    assert post(gateway, key)[0] == 200
    assert [row["outcome"] for row in gateway.rows()] == ["completed"]
    assert gateway.flushed_log().count("ledger unavailable") == 1, "said once"
    wait_until(lambda: gateway.log().count("ledger recovered") == 1)


def test_a_client_that_leaves_while_its_row_is_begun_costs_nothing(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    lock = sqlite3.connect(gateway.database, isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    with gateway.begin(key, RESPONSE):
        wait_until(lambda: gateway.metrics()["redbtc_in_flight"] == 1)
    wait_until(lambda: gateway.connections() == 0)
    lock.execute("ROLLBACK")
    lock.close()
    wait_until(lambda: gateway.metrics()["redbtc_in_flight"] == 0)
    assert gateway.rows() == []
    assert not upstream.requests


@pytest.mark.process
def test_a_full_disk_is_a_503_and_recovers_by_itself(tmp_path: Path, upstream: Upstream) -> None:
    if os.getuid():
        pytest.skip("mounting a small tmpfs takes root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        [needs("mount"), "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    gateway = Gateway(tmp_path / "gateway", upstream.url, f'[database]\npath = "{disk}/redbtc.db"')
    gateway.database = disk / "redbtc.db"
    try:
        gateway.start()
        key = gateway.new_key()
        assert post(gateway, key)[0] == 200
        release = threading.Event()

        async def script(request: Received, reply: Reply) -> None:
            await reply.wait(release)
            await openai_like(request, reply)

        upstream.script = script
        results: list[tuple[int, str]] = []
        thread = threading.Thread(target=lambda: results.append(post(gateway, key)))
        thread.start()
        wait_until(lambda: upstream.in_flight)
        filler = disk / "filler"
        fill(filler)
        release.set()  # it has to be settled on a full disk
        why = "the write-ahead log's own room is used up at last"
        wait_until(lambda: post(gateway, key) == (503, "ledger_unavailable"), why=why)
        served = len(upstream.requests)
        assert post(gateway, key) == (503, "ledger_unavailable")
        assert len(upstream.requests) == served
        filler.unlink()
        wait_until(lambda: post(gateway, key)[0] == 200)
        thread.join(PATIENCE_SECONDS)
        assert results[0][0] == 200, "what was in flight has got its end"
        rows = gateway.rows()
        assert {row["outcome"] for row in rows} == {"completed"}
        assert len(rows) == len(upstream.requests)
        assert gateway.terminate() == 0
    finally:
        gateway.expected_dead = True
        gateway.close()
        subprocess.run([needs("umount"), "-l", disk], check=False)


@pytest.mark.front_door
def test_sigterm_drains(gateway: Gateway, upstream: Upstream, key: str) -> None:
    release = threading.Event()

    async def script(request: Received, reply: Reply) -> None:
        await reply.wait(release)
        await openai_like(request, reply)

    upstream.script = script
    results: list[tuple[int, str]] = []
    thread = threading.Thread(target=lambda: results.append(post(gateway, key)))
    thread.start()
    wait_until(lambda: upstream.in_flight)
    gateway.signal(signal.SIGTERM)
    wait_until(lambda: "draining" in gateway.log())
    with pytest.raises(httpx2.ConnectError):
        post(gateway, key)
    release.set()
    assert gateway.wait() == 0
    thread.join()
    assert results == [(200, "")]
    assert [row["outcome"] for row in gateway.rows()] == ["completed"]
    assert not Path(f"{gateway.database}.sock").exists()


def test_sigterm_waits_for_who_reads_slowly(gateway: Gateway, upstream: Upstream, key: str) -> None:
    """The list is longer than what the kernel keeps of it for the client."""
    models = [{"id": f"m{number}", "object": "model"} for number in range(92_000)]
    upstream.script = json_answer({"object": "list", "data": models})
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(PATIENCE_SECONDS)
        client.connect(("127.0.0.1", gateway.port))
        head = f"GET /v1/models HTTP/1.1\r\nHost: g\r\nAuthorization: Bearer {key}\r\n\r\n"
        client.sendall(head.encode())
        got = client.recv(1000)
        gateway.signal(signal.SIGTERM)
        wait_until(lambda: "draining" in gateway.log())
        time.sleep(2)  # longer than connections are given to close once nothing is in flight
        while part := client.recv(1 << 20):
            got += part
    assert len(json.loads(got.partition(b"\r\n\r\n")[2])["data"]) == len(models)
    assert gateway.wait() == 0


def test_a_second_sigterm_ends_it_at_once(gateway: Gateway, upstream: Upstream, key: str) -> None:
    async def script(request: Received, reply: Reply) -> None:
        await reply.wait(request.closed)

    upstream.script = script

    def leave() -> None:
        with gateway.client(key) as client, pytest.raises(httpx2.HTTPError):
            client.post("/responses", json=RESPONSE)

    thread = threading.Thread(target=leave)
    thread.start()
    wait_until(lambda: upstream.in_flight)
    gateway.signal(signal.SIGTERM)
    wait_until(lambda: "draining" in gateway.log())
    gateway.signal(signal.SIGTERM)
    gateway.wait()
    thread.join()
    assert [row["outcome"] for row in gateway.rows()] == ["interrupted"]


def test_a_second_gateway_refuses_to_start(gateway: Gateway) -> None:
    done = gateway.run("serve", "--port", "0")
    assert done.returncode == 1
    assert "in use" in done.stderr
    assert "Traceback" not in done.stderr
    assert gateway.alive()


def test_a_taken_port_is_said_plainly(gateway: Gateway, make_gateway: MakeGateway) -> None:
    done = make_gateway().run("serve", "--port", str(gateway.port))
    assert done.returncode == 1
    assert "can't listen on" in done.stderr
    assert "Traceback" not in done.stderr


def test_sighup_reloads_and_a_bad_file_changes_nothing(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    gateway.configure("[server]\nmax_body_bytes = 1024\n")
    gateway.signal(signal.SIGHUP)
    wait_until(lambda: '"reloaded"' in gateway.log())
    with gateway.client(key) as client:
        large = client.post("/responses", json={**RESPONSE, "input": "x" * 2000})
        assert large.status_code == 413
        gateway.configure("[server]\nmax_body_bites = 5\n")
        gateway.signal(signal.SIGHUP)
        wait_until(lambda: "reload refused" in gateway.log())
        assert "server.max_body_bites" in gateway.log()
        assert client.post("/responses", json=RESPONSE).status_code == 200


def test_a_client_that_stops_in_mid_body_leaves_no_trace(gateway: Gateway, key: str) -> None:
    head = (
        f"POST /v1/responses HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {key}\r\n"
        "content-type: application/json\r\ncontent-length: 1000\r\n\r\n{"
    ).encode()
    with gateway.client(key) as client:
        client.get("/models")  # what is opened once is open now
        before = gateway.open_files()
    for _ in range(50):
        with gateway.connect() as sock:
            sock.sendall(head)
    wait_until(lambda: gateway.open_files() <= before)
    assert not gateway.rows()


def test_a_database_of_another_program_is_left_alone(make_gateway: MakeGateway) -> None:
    gateway = make_gateway()
    with sqlite3.connect(gateway.database) as other:
        other.execute("CREATE TABLE theirs (x)")
    other.close()
    before = gateway.database.read_bytes()
    for command in (["serve"], ["account", "list"]):
        done = gateway.run(*command)
        assert done.returncode == 1
        assert "another program" in done.stderr
    assert gateway.run("check").returncode == 2
    assert gateway.database.read_bytes() == before


def test_a_newer_database_is_left_alone(make_gateway: MakeGateway) -> None:
    gateway = make_gateway()
    gateway.cli("account", "add", "x")
    with sqlite3.connect(gateway.database) as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    done = gateway.run("serve")
    assert done.returncode == 1
    assert "newer version" in done.stderr


def test_canaries_are_nowhere(make_gateway: MakeGateway, upstream: Upstream) -> None:
    """Promise 6: no byte of prompt, completion, key or upstream key in any file or output."""
    gateway = make_gateway('[server]\nlog_level = "debug"').start()
    key = gateway.new_key()
    prompt, completion = "canary-prompt-8f3a", "canary-completion-77b1"
    body = {"model": "m", "input": prompt, "messages": [{"role": "user", "content": prompt}]}
    outputs = b""

    async def broken(request: Received, reply: Reply) -> None:
        await reply.head(200, [("content-type", "text/event-stream")])
        await reply.send(f'data: {{"choices":[{{"delta":"{completion}'.encode())
        reply.tear()

    scripts = [
        json_answer({"id": "r", "output": [{"text": completion}], "usage": {"input_tokens": 1}}),
        json_answer({"error": {"message": completion}}, 500),
        json_answer(f"<{completion}".encode()),
        stream([f'data: {{"delta":"{completion}"}}\n\n'.encode(), b"data: [DONE]\n\n"]),
        broken,
    ]
    for script in scripts:
        upstream.script = script
        for path in ("/responses", "/chat/completions"):
            for streamed in (True, False):
                with gateway.client(key) as client:
                    try:
                        client.post(path, json={**body, "stream": streamed})
                        bad = client.post(path, content=f'{{"model":"{prompt}'.encode())
                        wrong = client.post(
                            path, json={**body, "stream": prompt, "model": {"x": prompt}}
                        )
                        outputs += bad.content + wrong.content
                    except httpx2.HTTPError:
                        pass
    headers = {"authorization": f"Bearer {key[:-1]}", "x-canary": prompt}
    outputs += gateway.get(f"/v1/models?{prompt}", headers=headers).content
    outputs += gateway.get(f"/{prompt}", headers=headers).content
    outputs += gateway.get("/metrics").content
    for arguments in (["usage"], ["account", "list"], ["key", "list", "test"], ["check"]):
        outputs += gateway.run(*arguments).stdout.encode()
    gateway.terminate()
    for file in gateway.folder.rglob("*"):
        if file.is_file() and file != gateway.config:
            outputs += file.read_bytes()
    assert len(gateway.rows()) == 20
    for canary in (prompt, completion, key, key[10:53], "sk-upstream-canary"):
        assert canary.encode() not in outputs, canary


def test_what_the_gateway_writes_is_its_users_alone(gateway: Gateway) -> None:
    for file in gateway.folder.glob("redbtc.db*"):
        assert file.stat().st_mode & 0o077 == 0, file


@pytest.mark.process
def test_a_long_folder_name_is_no_obstacle(tmp_path: Path, upstream: Upstream) -> None:
    folder = tmp_path / ("x" * 120)
    gateway = Gateway(folder, upstream.url).start()
    try:
        assert gateway.cli("account", "add", "me")["name"] == "me"
        assert gateway.terminate() == 0
    finally:
        gateway.close()
        shutil.rmtree(folder)
