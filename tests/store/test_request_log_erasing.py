"""Erasing bodies of requests: nothing of them is left in any file, also while another program reads
and after kill -9 at any step, and all other bodies stay."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from redbtc.store.request_log import erasing
from redbtc.store.request_log.frames import FRAME_BYTES
from redbtc.store.request_log.replacing import use_copy
from redbtc.times import DAY
from tests.helpers.gateway import PATIENCE_SECONDS, ROOT
from tests.store.logged import (
    NOW,
    LogUnderTest,
    Reader,
    is_in_files,
    key_of,
    open_log,
    random_bytes,
    settings_with,
)
from tests.store.test_backup import KILL

pytestmark = pytest.mark.promise_6

KIB = 1024
KEPT, DOOMED = random_bytes(30 * KIB), random_bytes(FRAME_BYTES + 9 * KIB)
TEXT = b"".join(b"word %d of a text that is long enough to be compressed, " % i for i in range(999))


async def fill(tested: LogUnderTest) -> None:
    """Log requests of which req_1 and req_4 are erased next, and the others stay."""
    await tested.add("req_0", KEPT, key=key_of("acct_2"))
    await tested.add("req_1", DOOMED, TEXT, key=key_of("acct_1", days=1))
    await tested.add("req_2", b"2", KEPT, key=key_of("acct_1", "key_2"))
    await tested.add("req_3", KEPT, key=key_of("acct_2"))
    await tested.add("req_4", DOOMED, key=key_of("acct_1", days=1))


async def assert_erased(folder: Path, tested: LogUnderTest) -> None:
    assert not is_in_files(folder, DOOMED)
    assert not is_in_files(folder, TEXT)
    assert await tested.log.read("req_1") is None
    assert await tested.log.ids_of("acct_1") == ["req_2"]
    assert await tested.log.ids_of("acct_2") == ["req_0", "req_3"]
    assert await tested.bodies("req_0") == (KEPT, None)
    assert await tested.bodies("req_2") == (b"2", KEPT)
    assert await tested.bodies("req_3") == (KEPT, None)


async def by_erasing(tested: LogUnderTest) -> int:
    return (await tested.log.erase("acct_1", "key_1")).requests


async def by_expiring(tested: LogUnderTest) -> int:
    tested.pass_days(1)
    assert await tested.log.read("req_1") is None, "what has expired is not shown"
    assert await tested.log.ids_of("acct_1") == ["req_2"]
    return (await tested.purge())[0]


async def by_shortening(tested: LogUnderTest) -> int:
    tested.pass_days(0.5)
    await tested.log.shorten("acct_1", "key_1", 0)
    return (await tested.purge())[0]


ERASING = [by_erasing, by_expiring, by_shortening]


@pytest.mark.parametrize("erase", ERASING)
@pytest.mark.parametrize("with_reader", [False, True])
def test_what_is_erased_is_in_no_file(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    erase: Callable[[LogUnderTest], object],
    with_reader: bool,
) -> None:
    monkeypatch.setattr(erasing, "READER_SECONDS", 0.2)
    monkeypatch.setattr(erasing, "LONG_READER_SECONDS", 0.2)

    async def run() -> None:
        async with open_log(tmp_path) as tested:
            await fill(tested)
            assert is_in_files(tmp_path, DOOMED)
            assert is_in_files(tmp_path, TEXT)
            file = tmp_path / "request_log.db"
            reader = Reader(file) if with_reader else None
            names = (file, f"{file}-wal") if with_reader else ()
            held = [os.open(name, os.O_RDONLY) for name in names]
            assert await erase(tested) == 2  # type: ignore[misc]
            for descriptor in held:
                assert os.fstat(descriptor).st_size == 0, "what the reader has open is empty"
                os.close(descriptor)
            await assert_erased(tmp_path, tested)
            await tested.add("req_9", b"after")
            if reader:
                assert reader.finish() in ("disk I/O error", "database disk image is malformed")
            assert await tested.bodies("req_9") == (b"after", None)
            assert await tested.purge() == (0, 0)
        async with open_log(tmp_path) as tested:
            if erase is not by_erasing:
                tested.pass_days(1)
            await tested.log.erase("acct_1", "key_1")
            await assert_erased(tmp_path, tested)

    asyncio.run(run())
    assert sorted(os.listdir(tmp_path)) == ["request_log.db", "request_log.db.lock"]


def test_a_reader_that_ends_soon_keeps_the_file(tmp_path: Path) -> None:
    async def run() -> None:
        async with open_log(tmp_path) as tested:
            await fill(tested)
            file = (tmp_path / "request_log.db").stat().st_ino
            with Reader(tmp_path / "request_log.db") as reader:
                under_way = asyncio.ensure_future(by_erasing(tested))
                while await tested.log.ids_of("acct_1") != ["req_2"]:
                    pass
                assert int(reader.finish()) > len(DOOMED), "it read all that it had begun to read"
            assert await under_way == 2
            assert (tmp_path / "request_log.db").stat().st_ino == file
            await assert_erased(tmp_path, tested)

    asyncio.run(run())


def test_a_reader_that_begins_at_once_does_not_lock_the_new_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(erasing, "READER_SECONDS", 0.1)
    with contextlib.ExitStack() as stack:

        def use_and_read(path: Path) -> None:
            use_copy(path)
            stack.enter_context(Reader(path))

        monkeypatch.setattr("redbtc.store.request_log.file.use_copy", use_and_read)

        async def run() -> None:
            async with open_log(tmp_path) as tested:
                await fill(tested)
                with Reader(tmp_path / "request_log.db"):
                    assert await by_erasing(tested) == 2
                await assert_erased(tmp_path, tested)
                await tested.add("req_9", b"after")
                assert await tested.bodies("req_9") == (b"after", None)
                assert tested.lines.events == []

        asyncio.run(run())


def test_bodies_are_written_while_others_are_erased(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Erasing is done in small steps, and waits for a reader without holding up anything."""
    monkeypatch.setattr(erasing, "READER_SECONDS", 0.5)

    async def run() -> None:
        async with open_log(tmp_path) as tested:
            await fill(tested)
            with Reader(tmp_path / "request_log.db"):
                under_way = asyncio.ensure_future(by_erasing(tested))
                for number in range(20):
                    recording = tested.log.recording(key_of("acct_3"), f"req_1{number}")
                    assert recording
                    recording.request(b"%d" % number)
                    recording.end()
                while tested.log.written < 25:
                    assert not under_way.done()
                    await asyncio.sleep(0.01)
                await under_way
            await assert_erased(tmp_path, tested)
            for number in range(20):
                assert await tested.bodies(f"req_1{number}") == (b"%d" % number, None)

    asyncio.run(run())


def test_what_waits_and_what_is_in_flight_is_erased_too(tmp_path: Path) -> None:
    async def run() -> None:
        async with open_log(tmp_path) as tested:
            await tested.add("req_0", KEPT, key=key_of("acct_2"))
            names = {"written": "key_1", "waiting": "key_1", "fresh": "key_1", "other": "key_2"}
            made = {
                name: tested.log.recording(key_of(key_id=key_id), name)
                for name, key_id in names.items()
            }
            recordings = {name: each for name, each in made.items() if each}
            recordings["written"].request(DOOMED)
            await tested.log.ids_of("")
            recordings["waiting"].request(DOOMED)
            recordings["other"].request(KEPT)
            await tested.log.erase("acct_1", "key_1")
            for recording in recordings.values():
                recording.response(DOOMED if recording.key_id == "key_1" else KEPT)
                recording.end()
            assert await tested.log.ids_of("acct_1") == ["other"]
            assert await tested.bodies("other") == (KEPT, KEPT)
            assert not is_in_files(tmp_path, DOOMED)
            assert tested.log.waiting_bytes == 0
            await tested.add("req_1", b"later")
            assert await tested.bodies("req_1") == (b"later", None)

    asyncio.run(run())


def test_days_can_only_become_fewer(tmp_path: Path) -> None:
    async def run() -> None:
        async with open_log(tmp_path) as tested:
            in_flight = tested.log.recording(key_of("acct_1", "key_1", 10), "req_0")
            assert in_flight
            await tested.add("req_1", b"1", key=key_of("acct_1", "key_1", 10))
            await tested.add("req_2", b"2", key=key_of("acct_1", "key_2", 10))
            await tested.add("req_3", b"3", key=key_of("acct_2", "key_3", 10))
            await tested.add("req_4", b"4", key=key_of("acct_1", "key_1", 3))
            await tested.log.shorten("acct_1", "key_1", 5)
            await tested.log.shorten("acct_1", None, 20)
            await tested.log.shorten("acct_1", "key_2", 7)
            in_flight.request(b"0")
            in_flight.end()
            days = {"req_0": 5, "req_1": 5, "req_2": 7, "req_3": 10, "req_4": 3}
            for request_id, expected in days.items():
                found = await tested.log.read(request_id)
                assert found
                assert found.expires_at == NOW + expected * DAY
            await tested.log.shorten("acct_1", None, 4)
            tested.pass_days(4)
            assert (await tested.purge())[0] == 4
            assert await tested.log.ids_of("acct_2") == ["req_3"]

    asyncio.run(run())


def test_the_operators_maximum_applies_to_what_is_stored(tmp_path: Path) -> None:
    async def run() -> None:
        async with open_log(tmp_path) as tested:
            await tested.add("req_1", DOOMED, key=key_of(days=30))
            tested.pass_days(2)
            await tested.add("req_2", KEPT, key=key_of(days=30))
            tested.log.apply(settings_with(days_max=2))
            assert await tested.log.read("req_1") is None
            assert await tested.log.ids_of("acct_1") == ["req_2"]
            assert (await tested.purge())[0] == 1
            assert not is_in_files(tmp_path, DOOMED)
            await tested.add("req_3", b"3", key=key_of(days=30))
            found = await tested.log.read("req_3")
            assert found
            assert found.expires_at == NOW + 4 * DAY
            tested.log.apply(settings_with(days_max=0))
            assert await tested.log.ids_of("acct_1") == []
            assert (await tested.purge())[0] == 2
            assert not is_in_files(tmp_path, KEPT)

    asyncio.run(run())


def test_after_a_clock_that_was_ahead_bodies_expire_in_time(tmp_path: Path) -> None:
    async def run() -> None:
        async with open_log(tmp_path) as tested:
            tested.pass_days(1000)
            await tested.add("req_1", DOOMED, key=key_of(days=10))
            tested.pass_days(-1000)
            await tested.purge()
            assert await tested.bodies("req_1") == (DOOMED, None)
            tested.pass_days(10)
            assert (await tested.purge())[0] == 1
            assert not is_in_files(tmp_path, DOOMED)

    asyncio.run(run())


def test_a_purge_with_nothing_to_erase_writes_nothing(tmp_path: Path) -> None:
    def state() -> list[tuple[str, int, int]]:
        return sorted(
            (file.name, file.stat().st_mtime_ns, file.stat().st_size)
            for file in tmp_path.iterdir()
            if not file.name.endswith("-shm")
        )

    async def run() -> None:
        async with open_log(tmp_path) as tested:
            await fill(tested)
            before = state()
            assert await tested.purge() == (0, 0)
            assert state() == before

    asyncio.run(run())


# ── kill -9 ──────────────────────────────────────────────────────────────────────────────────────

# Erases in copies of a folder, killed before its first, second, … call to the system, until it ends
# by itself. A connection of the child's own is the reader. Prints how many copies there are.
ERASE_AND_KILL = (
    KILL
    + """
import itertools, shutil, sqlite3
from pathlib import Path
from redbtc.store.request_log import file as module
from redbtc.store.request_log import erasing
CALLS = "open replace unlink ftruncate fsync getppid".split()
erasing.READER_SECONDS = 0
module.READER_PAUSE = 0
module.ERASED_AT_ONCE = 1
template, copies, with_reader = sys.argv[1:]
for number in itertools.count():
    folder = Path(copies, str(number))
    shutil.copytree(template, folder)
    child = os.fork()
    if not child:
        log = module.LogFile(folder / "request_log.db", 1 << 30)
        reader = sqlite3.connect(folder / "request_log.db", isolation_level=None)
        if with_reader == "True":
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM parts").fetchall()
        kill_after(number, CALLS)
        for _ in erasing.erase_all_of(log, "acct_1", "key_1"):
            os.getppid()  # may be killed here, too
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
print(number + 1)
"""
)


@pytest.mark.slow
@pytest.mark.parametrize("with_reader", [False, True])
def test_an_erasure_that_is_killed_at_any_step_is_completed(
    tmp_path: Path, with_reader: bool
) -> None:
    template, copies = tmp_path / "template", tmp_path / "copies"
    template.mkdir()
    copies.mkdir()

    async def begin() -> None:
        async with open_log(template) as tested:
            await fill(tested)

    async def complete(folder: Path) -> bool:
        was_in_files = is_in_files(folder, DOOMED)
        async with open_log(folder) as tested:
            if was_in_files and await tested.log.read("req_1"):
                await by_erasing(tested)  # it was killed before it had begun
            else:
                await tested.purge()
            await assert_erased(folder, tested)
        assert sorted(os.listdir(folder)) == ["request_log.db", "request_log.db.lock"]
        return was_in_files

    asyncio.run(begin())
    command = [sys.executable, "-c", ERASE_AND_KILL, str(template), str(copies), str(with_reader)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.returncode == 0, done.stderr
    number = int(done.stdout)
    assert number > (12 if with_reader else 2)
    found = [asyncio.run(complete(copies / str(each))) for each in range(number)]
    assert found[0]
    assert not found[-1]


ERASE_FOR_EVER = f"""
import asyncio, os, sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from tests.store.logged import key_of, open_log
from redbtc.store.request_log import erasing
erasing.READER_SECONDS = 0.0
async def run():
    async with open_log(Path(sys.argv[1])) as tested:
        await tested.add("req_kept", b"kept" * 10_000, key=key_of("acct_2"))
        for number in range(10**9):
            await tested.add(f"req_{{number}}", os.urandom(1000) * 200)
            print(number, flush=True)
            await tested.log.erase("acct_1")
asyncio.run(run())
"""


@pytest.mark.slow
def test_a_process_killed_at_random_leaves_a_whole_file(tmp_path: Path) -> None:
    async def check(folder: Path) -> None:
        async with open_log(folder) as tested:
            assert await tested.bodies("req_kept") == (b"kept" * 10_000, None)
            await tested.log.erase("acct_1")
            assert await tested.log.ids_of("acct_1") == []
        with contextlib.closing(sqlite3.connect(folder / "request_log.db")) as database:
            assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)

    for number in range(6):
        folder = tmp_path / str(number)
        folder.mkdir()
        command = [sys.executable, "-c", ERASE_FOR_EVER, str(folder)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout
            child.stdout.readline()
            with Reader(folder / "request_log.db") if number % 2 else contextlib.nullcontext():
                for _ in range(number):
                    child.stdout.readline()
                child.send_signal(signal.SIGKILL)
                child.wait(PATIENCE_SECONDS)
        asyncio.run(check(folder))
