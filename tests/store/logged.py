"""The request log under test: keys that have requests logged, and a search for what is in files."""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from redbtc.config import RequestLogSettings, RetentionSettings, Settings
from redbtc.store.keys import Key
from redbtc.store.request_log import RequestLog
from redbtc.store.request_log.frames import LOCAL_BYTES, framed
from redbtc.times import DAY

NOW = 1_796_000_000_000  # when all tests begin
STEP = 1 << 10  # bytes of a content, of which one window is searched for; a page has 4 KiB
WINDOW = 16  # bytes that are enough to know a content by
RANDOM = random.Random(7)
random_bytes = RANDOM.randbytes


def settings_with(days_max: int = 30, **request_log: int) -> Settings:
    return Settings(
        retention=RetentionSettings(request_log_days_max=days_max),
        request_log=RequestLogSettings(**request_log),
    )


def key_of(account_id: str = "acct_1", key_id: str = "key_1", days: int | None = 10) -> Key:
    """Return a key whose requests are logged for so many days."""
    values: dict[str, Any] = dict.fromkeys(Key._fields)
    return Key(**{**values, "id": key_id, "account_id": account_id, "log_days": days})


class LogLines:
    """What a request log has logged."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.fields: list[dict[str, Any]] = []

    def __call__(self, level: int, event: str, **fields: Any) -> None:
        self.events.append(event)
        self.fields.append(fields)


class LogUnderTest:
    """An open request log whose time is set by the test."""

    def __init__(self, log: RequestLog, lines: LogLines, clock: list[int]) -> None:
        self.log = log
        self.lines = lines
        self._clock = clock

    def pass_days(self, days: float) -> None:
        self._clock[0] += int(days * DAY)

    async def purge(self) -> tuple[int, int]:
        purged = await self.log.purge(self._clock[0])
        return purged.requests, purged.bytes

    async def add(
        self, request_id: str, request: bytes = b"", response: bytes = b"", key: Key | None = None
    ) -> None:
        """Log a request and wait until it is written, or dropped."""
        recording = self.log.recording(key or key_of(), request_id)
        assert recording
        if request:
            recording.request(request)
        if response:
            recording.response(response)
        recording.end()
        await self.log.ids_of("")

    async def bodies(self, request_id: str) -> tuple[bytes | None, bytes | None] | None:
        found = await self.log.read(request_id)
        return (found.request, found.response) if found else None


@contextlib.asynccontextmanager
async def open_log(folder: Path, settings: Settings | None = None) -> AsyncIterator[LogUnderTest]:
    lines, clock = LogLines(), [NOW]
    given = settings or settings_with()
    async with RequestLog.open(folder / "redbtc.db", given, lambda: clock[0], lines) as log:
        yield LogUnderTest(log, lines, clock)


READER = """
import sqlite3, sys, time
while True:
    database = sqlite3.connect(sys.argv[1], isolation_level=None)
    try:
        database.execute("BEGIN")
        database.execute("SELECT count(*) FROM parts").fetchone()
        break
    except sqlite3.DatabaseError:  # the file is being replaced
        database.close()
        time.sleep(0.005)
print("reading", flush=True)
sys.stdin.readline()
try:
    print(sum(len(content) for (content,) in database.execute("SELECT content FROM parts")))
    database.execute("COMMIT")
except sqlite3.DatabaseError as error:
    print(error)
database.close()
"""


class Reader:
    """Another program with a read transaction, which keeps all pages as they are."""

    def __init__(self, file: Path) -> None:
        command = [sys.executable, "-c", READER, str(file)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout
        assert self._process.stdout.readline() == "reading\n"

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()

    def finish(self) -> str:
        """Let it read all that it can and end. Return what it says."""
        if self._process.poll() is None:
            return self._process.communicate("\n")[0].strip()
        return ""


def windows_of(content: bytes) -> list[bytes]:
    """Return what would show that a content, or a beginning of it, is stored: bytes of it, and of
    it as it is compressed."""
    texts = [content, framed(content)[LOCAL_BYTES + 12 :].rstrip(bytes(1))]
    return [text[at : at + WINDOW] for text in texts for at in range(0, len(text) - WINDOW, STEP)]


def is_in_files(folder: Path, content: bytes) -> bool:
    """Return whether some of the content is in any file of a folder."""
    windows = windows_of(content)
    assert windows
    files = [file.read_bytes() for file in folder.iterdir() if file.is_file()]
    return any(window in file for file in files for window in windows)
