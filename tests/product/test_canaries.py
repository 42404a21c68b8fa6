"""In default mode no byte of a prompt or an answer is written: 10,000 canaries in requests of every
kind, over good and bad paths, while each system call that writes is traced. Then every byte of
every file is searched."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.helpers.canaries import files_with_parts, new_canary, parts_in
from tests.helpers.content import ALL, Quoting, Ways, settings
from tests.helpers.gateway import Gateway, MakeGateway
from tests.helpers.tracing import WriteTrace
from tests.helpers.upstream import Upstream

pytestmark = [pytest.mark.promise_6, pytest.mark.slow]

CANARIES = 10_000
CLIENTS = 6
# What may be opened for writing: "-shm" is shared memory of SQLite, and io_uring libuv's.
OPENED = {"redbtc.db", *(f"redbtc.db{each}" for each in ("-wal", "-shm", "-journal"))}
OPENED |= {"redbtc.db.lock", "redbtc.db.owed", "backup.db.partial", "backup.db.partial-sha256"}
BESIDES = {"/dev/null", "anon_inode:[io_uring]"}
SORTED = re.compile(r"/tmp/etilqs_[0-9a-f]+$")  # where SQLite sorts
# Prompts reach the log, and a file that is gone at once, which only the trace can find.
LEAKING = """
import os, sys, tempfile
def trace(frame, event, _):
    if frame.f_code.co_qualname == "RequestBody.__init__":
        text = bytes(frame.f_locals["text"])
        os.write(2, text)
        with tempfile.TemporaryFile() as file:
            file.write(text)
sys.setprofile(trace)
"""
MakeTraced = Callable[..., tuple[Gateway, WriteTrace]]


@pytest.fixture
def make_traced(make_gateway: MakeGateway, upstream: Upstream, tmp_path: Path) -> MakeTraced:
    def make(prelude: str = "") -> tuple[Gateway, WriteTrace]:
        temporary = tmp_path / "tmp"
        temporary.mkdir()
        gateway = make_gateway(settings(upstream), TMPDIR=str(temporary))
        gateway.prelude = prelude
        trace = WriteTrace(gateway, tmp_path / "trace")
        gateway.start()
        trace.note_start()
        return gateway, trace

    return make


def written(gateway: Gateway, temporary: Path) -> dict[str, list[bytes]]:
    """Return the parts of canaries in the files of the gateway, and of its folder for others."""
    return files_with_parts(gateway.folder, temporary)


def test_no_content_is_written(make_traced: MakeTraced, upstream: Upstream, tmp_path: Path) -> None:
    quoting, temporary = Quoting(upstream), tmp_path / "tmp"
    gateway, trace = make_traced()
    key = gateway.new_key()

    def work(_: int) -> int:
        with Ways(gateway, key) as ways:
            while len(ways.made) < CANARIES / CLIENTS:
                for way in ALL:
                    answer = way(ways)
                    assert answer, way
            return len(ways.made)

    with ThreadPoolExecutor(CLIENTS) as pool:
        assert sum(pool.map(work, range(CLIENTS))) >= CANARIES
    assert len(quoting.received) > CANARIES / 2, "the others are in requests that are refused"
    outcomes = {row["outcome"] for row in gateway.rows()}
    assert outcomes == {"completed", "upstream_error", "upstream_failed", "client_disconnected"}
    shown = json.dumps([gateway.rows(), gateway.api("GET", "/changes"), gateway.cli("usage")])
    shown += gateway.get("/metrics").text + gateway.get("/status").text
    assert parts_in(shown.encode()) == []
    gateway.cli("db", "backup", str(gateway.folder / "backup.db"))
    gateway.flushed_log()
    assert written(gateway, temporary) == {}
    kill_in_flight(gateway, key)
    assert written(gateway, temporary) == {}
    check(gateway, trace)
    assert gateway.start().terminate() == 0
    assert "interrupted" in {row["outcome"] for row in gateway.rows()}
    assert written(gateway, temporary) == {}


def kill_in_flight(gateway: Gateway, key: str) -> None:
    """Kill the gateway while answers stream whose progress is saved."""
    with contextlib.ExitStack() as stack, Ways(gateway, key) as ways:
        for _ in range(3):
            ways.begin_endless(stack)
        time.sleep(1.5)  # progress is saved after a second
        gateway.kill()


def check(gateway: Gateway, trace: WriteTrace) -> None:
    """Check all that the gateway has done to files."""
    trace.read()
    assert len(trace.called("pwrite64")) > 100
    assert parts_in(b"\n".join(trace.to_clients_and_upstreams)), "content is seen where it is sent"
    assert trace.leaks() == []
    allowed = {str(gateway.folder / name) for name in OPENED} | BESIDES
    opened = trace.opened_for_writing() - allowed
    assert not [path for path in opened if not SORTED.search(path)], "other files"
    assert trace.called("sendfile", "copy_file_range", "splice", "vmsplice", "tee") == []
    assert trace.called("io_submit", "memfd_create", "setxattr", "fsetxattr", "lsetxattr") == []
    assert len(trace.called("execve")) == 1


def test_a_leak_would_be_found(make_traced: MakeTraced, tmp_path: Path) -> None:
    gateway, trace = make_traced(LEAKING)
    with gateway.client(gateway.new_key()) as client:
        body = {"model": "gpt-fine", "input": new_canary()}
        assert client.post("/responses", json=body).status_code == 200
    assert set(written(gateway, tmp_path / "tmp")) == {str(gateway.folder / "stderr")}
    gateway.kill()
    trace.read()
    leaking = {line.partition(b">")[0] for line in trace.elsewhere if parts_in(line)}
    assert len(leaking) == 2, "its standard error, and the file that is gone"
    assert str(tmp_path / "tmp") in trace.opened_for_writing()
