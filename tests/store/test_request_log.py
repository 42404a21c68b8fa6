"""The request log's engine: bodies come back exactly, nothing waits for it, whatever the disk does,
and no secret is stored."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gzip
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from redbtc.config import RequestLogSettings, Settings
from redbtc.errors import StorageUnavailable
from redbtc.store.files import FILE_CHECK_SECONDS
from redbtc.store.keys import new_key
from redbtc.store.request_log import file as file_module
from redbtc.store.request_log import log as log_module
from redbtc.store.request_log import states, worker
from redbtc.store.request_log.file import LogFile
from redbtc.store.request_log.frames import FRAME_BYTES, framed, unframed
from redbtc.upstream_settings import UpstreamSettings
from tests.helpers.gateway import PATIENCE_SECONDS, ROOT, wait_until
from tests.store.logged import (
    NOW,
    RANDOM,
    Reader,
    is_in_files,
    key_of,
    open_log,
    random_bytes,
    settings_with,
    windows_of,
)

pytestmark = pytest.mark.promise_6

KIB = 1024


def cut(content: bytes, size: int) -> list[bytes]:
    """Cut a content into parts of random sizes."""
    parts = []
    while content:
        at = RANDOM.randrange(1, size)
        parts.append(content[:at])
        content = content[at:]
    return parts


# ── What is stored ───────────────────────────────────────────────────────────────────────────────


def test_bodies_come_back_exactly(tmp_path: Path) -> None:
    """Whatever their size, parts and content, and however many pass at the same time."""
    sizes = [1, 100, 5 * KIB, FRAME_BYTES - 1, FRAME_BYTES, 3 * FRAME_BYTES + 7, 700 * KIB]
    bodies = {
        f"req_{number}": (random_bytes(RANDOM.choice(sizes)), b"data: 1\n\n" * number * 100)
        for number in range(1, 15)
    }

    async def run() -> None:
        async with open_log(tmp_path) as tested:
            turns: list[Callable[[], None]] = []
            for request_id, (request, response) in bodies.items():
                recording = tested.log.recording(key_of(), request_id)
                assert recording
                recording.encodings[1] = "gzip"
                for part in cut(request, 2 * FRAME_BYTES):
                    turns.append(functools.partial(recording.request, part))
                for part in cut(response, 3000):
                    turns.append(functools.partial(recording.response, part))
                turns.append(recording.end)
            for turn in turns:
                turn()
                if RANDOM.random() < 0.05:
                    await asyncio.sleep(0)
            assert await tested.log.ids_of("acct_1") == list(bodies)
            for request_id, expected in bodies.items():
                assert await tested.bodies(request_id) == expected
            found = await tested.log.read("req_3")
            assert found
            assert found.is_complete
            assert (found.account_id, found.key_id, found.logged_at) == ("acct_1", "key_1", NOW)
            assert (found.request_bytes, found.response_bytes) == tuple(map(len, bodies["req_3"]))
            assert (found.request_encoding, found.response_encoding) == ("", "gzip")
            assert await tested.log.read("req_99") is None
            assert (tested.log.written, tested.log.dropped) == (len(bodies), 0)
            assert tested.log.waiting_bytes == 0
        async with open_log(tmp_path) as tested:
            for request_id, expected in bodies.items():
                assert await tested.bodies(request_id) == expected

    asyncio.run(run())
    assert sorted(os.listdir(tmp_path)) == ["request_log.db", "request_log.db.lock"]
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o600}


def test_nothing_is_made_before_a_body_is_stored(tmp_path: Path) -> None:
    async def run() -> None:
        async with open_log(tmp_path, settings_with(days_max=0)) as tested:
            assert tested.log.recording(key_of(), "req_1") is None
        async with open_log(tmp_path) as tested:
            assert tested.log.recording(key_of(days=None), "req_1") is None
            assert await tested.log.read("req_1") is None
            assert await tested.log.ids_of("acct_1") == []
            assert await tested.purge() == (0, 0)
            assert (await tested.log.erase("acct_1")).requests == 0
            recording = tested.log.recording(key_of(), "req_1")
            assert recording
            recording.end()
            assert await tested.log.ids_of("acct_1") == []
        assert os.listdir(tmp_path) == []

    asyncio.run(run())


def test_of_a_longer_body_the_beginning_is_stored(tmp_path: Path) -> None:
    content = random_bytes(10 * KIB)

    async def run() -> None:
        async with open_log(tmp_path, settings_with(max_body_bytes=4 * KIB)) as tested:
            recording = tested.log.recording(key_of(), "req_1")
            assert recording
            recording.request(content)
            for part in cut(content, 500):
                recording.response(part)
            recording.end()
            found = await tested.log.read("req_1")
            assert found
            assert (found.request, found.response) == (content[: 4 * KIB], content[: 4 * KIB])
            assert (found.request_bytes, found.response_bytes) == (10 * KIB, 10 * KIB)
            assert not found.is_complete
            await tested.add("req_2", content[: 4 * KIB], content[: 4 * KIB])
            found = await tested.log.read("req_2")
            assert found
            assert found.is_complete
            assert tested.log.dropped == 0

    asyncio.run(run())


def test_small_parts_are_stored_together(tmp_path: Path) -> None:
    async def run() -> None:
        async with open_log(tmp_path) as tested:
            recording = tested.log.recording(key_of(), "req_1")
            assert recording
            events = [b'data: {"delta": "word %d"}\n\n' % number for number in range(9000)]
            for event in events:
                recording.response(event)
            recording.end()
            assert await tested.bodies("req_1") == (None, b"".join(events))
            assert tested.log.file_bytes < 0.75 * len(b"".join(events))

    asyncio.run(run())
    with contextlib.closing(sqlite3.connect(tmp_path / "request_log.db")) as database:
        assert database.execute("SELECT count(*) FROM parts").fetchone()[0] <= 4


CHILD = f"""
import asyncio, sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from redbtc.store.request_log import states
from tests.store.logged import key_of, open_log
states.GATHER_SECONDS = 0.05
async def run():
    async with open_log(Path(sys.argv[1])) as tested:
        await tested.add("req_0", b"whole")
        recording = tested.log.recording(key_of(), "req_1")
        recording.request(b"asked")
        for number in range(10**9):
            recording.response(b"%09d\\n" % number)
            if number % 100 == 0:
                print(number, flush=True)
                await asyncio.sleep(0.02)
asyncio.run(run())
"""


def test_after_kill_9_what_had_passed_is_there(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout
        while int(child.stdout.readline()) < 3000:
            pass
        child.send_signal(signal.SIGKILL)

    async def run() -> None:
        async with open_log(tmp_path) as tested:
            assert await tested.bodies("req_0") == (b"whole", None)
            found = await tested.log.read("req_1")
            assert found
            assert not found.is_complete
            assert found.response
            expected = b"".join(b"%09d\n" % number for number in range(10_000))
            assert expected.startswith(found.response)
            assert len(found.response) > 10_000

    asyncio.run(run())


def test_content_is_never_on_pages_that_sqlite_copies() -> None:
    """SQLite keeps copies of rows in unused space of a table's pages, even with secure_delete."""
    pages_of_tables = (2, 5, 10, 13)  # first bytes, see "B-tree Pages" in SQLite's file format
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        database.execute("PRAGMA page_size = 4096")
        database.execute("CREATE TABLE parts (id INTEGER PRIMARY KEY, l, body, content)")
        contents = [random_bytes(size) for size in [*range(1, 9000, 97), FRAME_BYTES, 200_000]]
        for number, content in enumerate(contents):
            values = number * 10**9, number % 2, framed(content)
            database.execute("INSERT INTO parts (l, body, content) VALUES (?, ?, ?)", values)
        rows = database.execute("SELECT content FROM parts ORDER BY id").fetchall()
        assert [unframed(row) for (row,) in rows] == contents
        whole = database.serialize()
    pages = [whole[at : at + 4096] for at in range(4096, len(whole), 4096)]
    tables = b"".join(page for page in pages if page[0] in pages_of_tables)
    assert len(tables) >= 4096
    for content in contents:
        assert not any(window in tables for window in windows_of(content))
    assert sum(any(tables[at : at + 64]) for at in range(0, len(tables), 64)) < len(tables) / 64 / 3


# ── The size of the file ─────────────────────────────────────────────────────────────────────────


def test_the_oldest_requests_leave_first(tmp_path: Path) -> None:
    limit = 1 << 20
    contents = {f"req_{number}": random_bytes(40 * KIB) for number in range(60)}

    async def run() -> None:
        async with open_log(tmp_path, settings_with(max_bytes=limit)) as tested:
            largest = 0
            for request_id, content in contents.items():
                await tested.add(request_id, content)
                sizes = [file.stat().st_size for file in tmp_path.glob("request_log.db*")]
                wal_index = tmp_path / "request_log.db-shm"
                largest = max(largest, sum(sizes) - wal_index.stat().st_size)
            assert limit / 2 < largest <= limit
            kept = await tested.log.ids_of("acct_1")
            assert kept == list(contents)[-len(kept) :]
            assert 10 < len(kept) < 25
            for request_id in kept:
                assert await tested.bodies(request_id) == (contents[request_id], None)
            await tested.purge()
            for request_id in contents.keys() - set(kept):
                assert not is_in_files(tmp_path, contents[request_id])
            await tested.add("req_huge", random_bytes(2 * limit))
            assert (tmp_path / "request_log.db").stat().st_size <= limit
            await tested.add("req_last", b"last")
            assert (await tested.log.ids_of("acct_1"))[-1] == "req_last"

    asyncio.run(run())


def test_a_smaller_limit_applies_to_what_is_stored(tmp_path: Path) -> None:
    contents = {f"req_{number}": random_bytes(100 * KIB) for number in range(40)}

    async def run() -> None:
        async with open_log(tmp_path) as tested:
            for request_id, content in contents.items():
                await tested.add(request_id, content)
            tested.log.apply(settings_with(max_bytes=1 << 20))
            requests, size = await tested.purge()
            kept = await tested.log.ids_of("acct_1")
            assert kept == list(contents)[requests:]
            assert size > requests * 100 * KIB
            assert (tmp_path / "request_log.db").stat().st_size < 1 << 20

    asyncio.run(run())


# ── A disk that is slow, full or not there ───────────────────────────────────────────────────────


def test_a_disk_that_hangs_holds_nothing_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is bounded, parts are dropped and counted, and what is stored is a beginning."""
    hanging, go_on = threading.Event(), threading.Event()
    write = LogFile.write

    def hang(*given: Any) -> None:
        hanging.set()
        go_on.wait(PATIENCE_SECONDS)
        write(*given)

    monkeypatch.setattr(LogFile, "write", hang)
    monkeypatch.setattr(log_module, "MAX_WAITING_BYTES", 1 << 20)
    contents = [random_bytes(10 * KIB) for _ in range(300)]

    async def run() -> None:
        async with open_log(tmp_path, settings_with(max_body_bytes=256 * KIB)) as tested:
            first = tested.log.recording(key_of(), "req_0")
            assert first
            first.request(b"x" * FRAME_BYTES)
            await asyncio.to_thread(hanging.wait, PATIENCE_SECONDS)
            recordings = [tested.log.recording(key_of(), f"req_{i}") for i in range(1, 301)]
            for recording, content in zip(recordings, contents, strict=True):
                assert recording
                recording.request(content)
                for part in cut(content, 3000):
                    recording.response(part)
                recording.end()
            assert tested.log.waiting_bytes <= 1 << 20
            dropped = tested.log.dropped
            assert 200 < dropped < 290
            first.request(b"y")
            first.end()
            assert tested.log.dropped == dropped + 1
            go_on.set()
            whole = 0
            for number, content in enumerate(contents, 1):
                found = await tested.log.read(f"req_{number}")
                if found is None:
                    continue
                whole += found.is_complete
                assert content.startswith(found.request or b"")
                assert content.startswith(found.response or b"")
                assert found.is_complete == (found.request == content == found.response)
                assert found.request_bytes == len(content)
            assert whole == 300 - dropped
            found = await tested.log.read("req_0")
            assert found
            assert (found.request, found.is_complete) == (b"x" * FRAME_BYTES, False)
            assert tested.log.waiting_bytes == 0
            await tested.add("req_last", b"last")
            assert await tested.bodies("req_last") == (b"last", None)

    asyncio.run(run())


def test_closing_does_not_wait_for_a_disk_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging, go_on = threading.Event(), threading.Event()

    def hang(*_: Any) -> None:
        hanging.set()
        go_on.wait(PATIENCE_SECONDS)
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(LogFile, "write", hang)
    monkeypatch.setattr(log_module, "LOG_CLOSE_SECONDS", 0.05)

    async def run() -> threading.Thread:
        async with open_log(tmp_path) as tested:
            recording = tested.log.recording(key_of(), "req_1")
            assert recording
            recording.request(b"x" * FRAME_BYTES)
            await asyncio.to_thread(hanging.wait, PATIENCE_SECONDS)
        recording.request(b"more")
        recording.end()
        return next(each for each in threading.enumerate() if each.name == "request log")

    thread = asyncio.run(run())
    assert thread.is_alive()
    assert thread.daemon, "the process would not end"
    go_on.set()
    thread.join(PATIENCE_SECONDS)


def test_what_waits_is_written_at_the_end(tmp_path: Path) -> None:
    async def run() -> None:
        async with open_log(tmp_path) as tested:
            recording = tested.log.recording(key_of(), "req_1")
            assert recording
            recording.response(b"torn")
        async with open_log(tmp_path) as tested:
            found = await tested.log.read("req_1")
            assert found
            assert (found.response, found.is_complete) == (b"torn", False)

    asyncio.run(run())


def foreign(file: Path) -> None:
    with contextlib.closing(sqlite3.connect(file)) as database:
        database.execute("CREATE TABLE theirs (x)")
        database.commit()


def too_new(file: Path) -> None:
    with contextlib.closing(LogFile(file, 1 << 30)) as log:
        log.database.execute("PRAGMA user_version = 99")


def damaged(file: Path) -> None:
    with contextlib.closing(LogFile(file, 1 << 30)):
        pass
    with file.open("r+b") as opened:
        opened.seek(4096)
        opened.write(b"\x07" * (file.stat().st_size - 4096))


PROBLEMS: dict[str, Callable[[Path], Any]] = {
    "another program": foreign,
    "newer version": too_new,
    "malformed": damaged,
    "not a database": lambda file: file.write_bytes(b"x" * 9000),
    "unable to open": Path.mkdir,
}


@pytest.mark.parametrize("said", PROBLEMS)
def test_a_file_that_cant_be_used_is_logged_once_and_can_be_moved_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    monkeypatch.setattr(worker, "REOPEN_SECONDS", 0.0)
    file = tmp_path / "request_log.db"
    PROBLEMS[said](file)
    before = file.read_bytes() if file.is_file() else b""

    async def run() -> None:
        async with open_log(tmp_path) as tested:
            for number in range(3):
                with pytest.raises(StorageUnavailable, match="request log is unavailable"):
                    await tested.add(f"req_{number}", b"x")
            assert tested.log.dropped == 3
            assert tested.lines.events == ["request log unavailable"]
            assert said in tested.lines.fields[0]["reason"]
            with pytest.raises(StorageUnavailable, match=said):
                await tested.log.erase("acct_1")
            file.rename(tmp_path / "moved")
            await tested.add("req_4", b"stored")
            assert await tested.bodies("req_4") == (b"stored", None)
            assert tested.lines.events == ["request log unavailable", "request log available"]
            assert tested.log.dropped == 3

    asyncio.run(run())
    assert not before or (tmp_path / "moved").read_bytes() == before


def test_another_programs_lock_costs_only_what_comes_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_module, "LOCK_WAIT_MS", 1)
    monkeypatch.setattr(worker, "REOPEN_SECONDS", 0.0)

    async def run() -> None:
        async with open_log(tmp_path) as tested:
            await tested.add("req_1", b"first")
            torn = tested.log.recording(key_of(), "req_2")
            assert torn
            torn.request(b"a" * FRAME_BYTES)
            await tested.log.ids_of("")
            file = tmp_path / "request_log.db"
            with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as database:
                database.execute("BEGIN IMMEDIATE")
                torn.request(b"b" * FRAME_BYTES)
                with contextlib.suppress(StorageUnavailable):
                    await tested.log.ids_of("")
                database.execute("COMMIT")
            torn.request(b"c")
            torn.end()
            await tested.add("req_3", b"third")
            assert await tested.bodies("req_1") == (b"first", None)
            assert await tested.bodies("req_3") == (b"third", None)
            found = await tested.log.read("req_2")
            assert found
            assert not found.is_complete
            assert set(found.request or b"") == {ord("a")}, "no hole is hidden"
            assert tested.log.dropped == 1

    asyncio.run(run())


def test_a_full_disk_costs_only_what_comes_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "REOPEN_SECONDS", 0.0)
    content = random_bytes(300 * KIB)
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)

    async def run() -> None:
        async with open_log(tmp_path) as tested:
            await tested.add("req_1", b"first")
            resource.setrlimit(resource.RLIMIT_FSIZE, (200 * KIB, usual[1]))
            try:
                with contextlib.suppress(StorageUnavailable):
                    await tested.add("req_2", content)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, usual)
            await tested.add("req_3", content)
            assert await tested.log.read("req_2") is None
            assert await tested.bodies("req_1") == (b"first", None)
            assert await tested.bodies("req_3") == (content, None)
            assert tested.log.dropped == 1
            assert tested.lines.events == ["request log unavailable", "request log available"]

    asyncio.run(run())


def test_two_processes_never_share_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "REOPEN_SECONDS", 0.0)

    async def run() -> None:
        async with open_log(tmp_path) as first:
            await first.add("req_1", b"first")
            async with open_log(tmp_path) as second:
                with pytest.raises(StorageUnavailable, match="in use"):
                    await second.add("req_2", b"second")
                assert second.log.dropped == 1
            await first.add("req_3", b"third")
            assert await first.log.ids_of("acct_1") == ["req_1", "req_3"]

    asyncio.run(run())


@pytest.mark.parametrize("with_reader", [False, True])
def test_a_removed_wal_file_loses_nothing(tmp_path: Path, with_reader: bool) -> None:
    """A program that had the replaced file open may remove it by its name."""

    async def run() -> None:
        async with open_log(tmp_path) as tested:
            for number in range(6):
                await tested.add(f"req_{number}", b"%d" % number)
                if number in (2, 4):
                    (tmp_path / "request_log.db-wal").unlink()
                    (tmp_path / "request_log.db-shm").unlink()
                    await asyncio.sleep(FILE_CHECK_SECONDS)
        async with open_log(tmp_path) as tested:
            for number in range(6):
                assert await tested.bodies(f"req_{number}") == (b"%d" % number, None)

    async def begin() -> None:
        async with open_log(tmp_path) as tested:
            await tested.add("req_before", b"x")

    asyncio.run(begin())
    with Reader(tmp_path / "request_log.db") if with_reader else contextlib.nullcontext():
        asyncio.run(run())


# ── Secrets ──────────────────────────────────────────────────────────────────────────────────────

CREDENTIAL = "sk-proj-" + "Ab3_" * 40


@pytest.fixture
def with_credential(monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("TEST_UPSTREAM_KEY", f" {CREDENTIAL} ")
    monkeypatch.setenv("TEST_HEADER", "header/secret")
    monkeypatch.setenv("TEST_SHORT", "a")
    upstreams = (
        UpstreamSettings(name="a", api_key_env="TEST_UPSTREAM_KEY"),
        UpstreamSettings(
            name="b", api_key_envs=("TEST_SHORT",), headers={"x": "Token {env:TEST_HEADER}"}
        ),
    )
    return Settings(upstreams=upstreams)


@pytest.mark.parametrize("kind", ["key", "credential", "header"])
def test_a_body_with_a_secret_is_not_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_credential: Settings, kind: str
) -> None:
    """Wherever its parts are cut, and whenever they are written."""
    secret = {"key": new_key(), "credential": CREDENTIAL, "header": "header/secret"}[kind].encode()
    before, after = random_bytes(3000), random_bytes(2000)
    body = before + secret + after

    async def run() -> None:
        async with open_log(tmp_path, with_credential) as tested:
            for at in range(len(before), len(before) + len(secret) + 1, 3):
                await check(tested, at)
            assert tested.log.withheld > 4
            await tested.purge()
            assert not is_in_files(tmp_path, before), "what was written before is removed"
            assert not is_in_files(tmp_path, secret + bytes(WINDOW_OF_SECRET))

    async def check(tested: Any, at: int) -> None:
        recording = tested.log.recording(key_of(), f"req_{at}")
        recording.request(b"harmless")
        recording.response(body[:at])
        if at % 2:
            await tested.log.ids_of("")  # writes it
            for file in tmp_path.iterdir():
                assert secret[:WINDOW_OF_SECRET] not in file.read_bytes()
        recording.response(body[at:])
        recording.end()
        found = await tested.log.read(f"req_{at}")
        assert found
        assert (found.request, found.response) == (b"harmless", None)
        assert (found.request_withheld, found.response_withheld) == (False, True)
        assert found.response_bytes == len(body)
        assert not found.is_complete

    asyncio.run(run())


WINDOW_OF_SECRET = 8


def test_a_secret_in_a_compressed_body_is_found_in_its_text(tmp_path: Path) -> None:
    text = b"x" * 200_000 + new_key().encode() + b"y" * 1000

    async def run() -> None:
        async with open_log(tmp_path) as tested:
            recording = tested.log.recording(key_of(), "req_1")
            assert recording
            recording.encodings = ["gzip", "gzip"]
            recording.request(gzip.compress(text))
            coder = zlib.compressobj(wbits=31)
            for at in range(0, len(text), 50):
                part = text[at : at + 50]
                recording.response(coder.compress(part))
                if at % 30_000 == 0:
                    await tested.log.ids_of("")
            recording.response(coder.flush())
            recording.end()
            found = await tested.log.read("req_1")
            assert found
            assert (found.request_withheld, found.response_withheld) == (True, True)
            assert (found.request, found.response) == (None, None)
            assert tested.log.withheld == 1

    asyncio.run(run())


@pytest.mark.parametrize("kind", ["key", "credential"])
def test_a_body_that_is_cut_within_a_secret_ends_before_it(
    tmp_path: Path, with_credential: Settings, kind: str
) -> None:
    secret = (new_key() if kind == "key" else CREDENTIAL).encode()
    limited = msgspec.structs.replace(
        with_credential, request_log=RequestLogSettings(max_body_bytes=KIB)
    )
    before = b"." * (KIB - len(secret) + 1)

    async def run() -> None:
        async with open_log(tmp_path, limited) as tested:
            await tested.add("req_1", before + secret)
            assert await tested.bodies("req_1") == (before, None)
            whole = before + secret[:-1]
            await tested.add("req_2", whole)
            assert await tested.bodies("req_2") == (whole, None)

    asyncio.run(run())


@pytest.mark.parametrize("size", range(45, 50))
def test_a_key_that_begins_in_what_looks_like_a_key_is_found(tmp_path: Path, size: int) -> None:
    async def run() -> None:
        async with open_log(tmp_path) as tested:
            await tested.add("req_1", f"{new_key()[: 10 + size]}{new_key()}".encode())
            found = await tested.log.read("req_1")
            assert found
            assert found.request_withheld

    asyncio.run(run())


def test_what_only_looks_like_a_key_is_stored(tmp_path: Path, with_credential: Settings) -> None:
    key = new_key()
    wrong = key[:-1] + ("A" if key[-1] != "A" else "B")
    body = f"sk-redbtc-{wrong}{key[:-1]} {CREDENTIAL[:-1]} a".encode()

    async def run() -> None:
        async with open_log(tmp_path, with_credential) as tested:
            await tested.add("req_1", body)
            assert await tested.bodies("req_1") == (body, None)
            assert tested.log.withheld == 0

    asyncio.run(run())


def test_parts_are_gathered_for_a_while_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(states, "GATHER_SECONDS", 0.1)

    async def run() -> None:
        async with open_log(tmp_path) as tested:
            recording = tested.log.recording(key_of(), "req_1")
            assert recording
            recording.response(b"x" * 1000)
            await asyncio.to_thread(wait_until, lambda: tested.log.file_bytes > 0)
            assert tested.log.waiting_bytes == 0

    asyncio.run(run())
