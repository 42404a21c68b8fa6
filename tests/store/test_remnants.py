"""Nothing of a deleted row is left in the database's file once that is scrubbed."""

from __future__ import annotations

import asyncio
import contextlib
import random
import sqlite3
from collections.abc import Sequence
from pathlib import Path

import pytest

from redbtc.store.database import Store
from redbtc.store.remnants import gap_of, pages_with_remnants
from redbtc.store.writer import Writer

pytestmark = pytest.mark.promise_6

ADD_ACCOUNT = "INSERT INTO accounts (id, name, created_at) VALUES (?, ?, 1)"
ADD = "INSERT INTO stored_objects (id, account_id, upstream, created_at) VALUES (?, ?, 'test', 1)"
MARK = b"leaving"


def marks(folder: Path) -> int:
    """Return how often MARK is in any file."""
    return sum(each.read_bytes().count(MARK) for each in folder.iterdir() if each.is_file())


async def fill(store: Store, chance: random.Random) -> None:
    """Add objects of two accounts, whose pages are split again and again, and delete all those of
    one of the accounts, which have the mark."""
    for name in ("stays", "leaves"):
        await store.transact((ADD_ACCOUNT, (name, name)), by="test")
    for _ in range(60):
        rows = []
        for _ in range(60):
            leaves = chance.randrange(2)
            mark = MARK.decode() if leaves else "another"
            text = f"{chance.randbytes(16).hex()}{mark}{'x' * chance.randrange(300)}"
            rows.append((ADD, (text, ("stays", "leaves")[leaves])))
        await store.transact(*rows)
    await store.transact(("DELETE FROM stored_objects WHERE account_id = 'leaves'", ()))


async def problems(store: Store) -> list[str]:
    return [row[0] async for row in store.rows("PRAGMA integrity_check") if row[0] != "ok"]


def test_rows_that_were_moved_and_deleted_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scrub() -> None:
        async with Store.open(tmp_path / "redbtc.db", "normal") as store:
            await fill(store, random.Random(1))
            with monkeypatch.context() as without:
                without.setattr("redbtc.store.writer.zero_gaps", lambda *_: None)
                assert await store.scrub(5, 0)
            assert marks(tmp_path), "SQLite alone leaves some"
            monkeypatch.setattr("redbtc.store.wal.SCRUB_PAGES", 7)  # several steps
            assert await store.scrub(5, 0)
            assert marks(tmp_path) == 0
            assert not await problems(store)
            # The connection that writes has no old page in its memory, which it would write back.
            await store.transact(("UPDATE stored_objects SET created_at = 2", ()))
            assert marks(tmp_path) == 0
            assert not await problems(store)

    asyncio.run(scrub())


def test_commits_wait_only_where_something_is_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large file without remnants is read beside commits: each step that keeps them waiting also
    waits for the disk."""
    zeroed: list[int] = []

    async def zero(writer: Writer, file: int, pages: Sequence[int]) -> bool:
        zeroed.append(len(pages))
        done: bool = await zero_gaps(writer, file, pages)
        return done

    zero_gaps = Writer.zero_gaps
    monkeypatch.setattr(Writer, "zero_gaps", zero)
    monkeypatch.setattr("redbtc.store.wal.SCRUB_PAGES", 7)

    async def scrub() -> None:
        async with Store.open(tmp_path / "redbtc.db", "normal") as store:
            await fill(store, random.Random(1))
            assert await store.scrub(5, 0)
            assert zeroed[0] == 0
            assert max(zeroed) >= 7
            zeroed.clear()
            assert await store.scrub(5, 0)
            assert zeroed == [0], "the WAL is emptied once"

    asyncio.run(scrub())


@pytest.mark.parametrize("header", [{20: 8}, {55: 1}, {16: 0, 17: 0}])
def test_pages_of_other_kinds_are_left_alone(tmp_path: Path, header: dict[int, int]) -> None:
    """Bytes that an extension reserves, an auto-vacuum's pages, and what is no database."""
    path = tmp_path / "x.db"
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE a (b)")
        database.commit()
    content = bytearray(path.read_bytes())
    content[3000] = 1
    with path.open("r+b") as file:
        file.write(content)
        file.flush()
        assert pages_with_remnants(file.fileno(), 1, 9) == [1]
        for at, value in header.items():
            content[at] = value
        file.seek(0)
        file.write(content)
        file.flush()
        assert pages_with_remnants(file.fileno(), 1, 9) is None


def test_another_programs_reader_is_waited_for(tmp_path: Path) -> None:
    async def scrub() -> None:
        async with Store.open(tmp_path / "redbtc.db", "normal") as store:
            await store.transact((ADD_ACCOUNT, ("leaves", MARK.decode())), by="test")
            with contextlib.closing(sqlite3.connect(tmp_path / "redbtc.db")) as other:
                other.execute("BEGIN")
                other.execute("SELECT count(*) FROM accounts").fetchall()
                await store.transact(("UPDATE accounts SET name = 'x'", ()), by="test")
                assert not await store.scrub(0.1, 0)
                scrubbing = asyncio.create_task(store.scrub(60, 0))
                await asyncio.sleep(0)
                assert not scrubbing.done()
            assert await scrubbing

    asyncio.run(scrub())


@pytest.mark.parametrize(
    ("page", "gap"),
    [
        (b"\x0d\0\0\0\1\0\x10\0" + b"\0\x10" + b"remn" + b"\0\0" + b"cell", (10, 16)),
        (b"\x0a\0\0\0\0\0\x10\0" + b"remnants" + b"rest", (8, 16)),
        (b"\x05\0\0\0\0\0\x10\0" + b"page" + b"gap." + b"rest", (12, 16)),
        (b"\x0d\0\0\0\1\0\x10\0" + b"\0\x0c" + b"a cell above", (0, 0)),
        (b"\x0d\0\0\0\1\0\x60\0" + b"\0\x10" + b"beyond the end", (0, 0)),
        (b"\0\0\0\1" + b"content of an overflow page", (0, 0)),
    ],
)
def test_gaps_are_found(page: bytes, gap: tuple[int, int]) -> None:
    assert gap_of(page, 0) == gap
