"""ZIP archives that are sent while they are made."""

from __future__ import annotations

import asyncio
import hashlib
import io
import zipfile
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from typing import NamedTuple

import msgspec
import orjson
from msgspec import Struct

from redbtc.store.json_values import Moment
from redbtc.times import END_OF_TIME

STEP_BYTES = 8 << 10  # to compress takes about 0.2 ms, after which others have a turn
SENT_BYTES = 64 << 10
MANIFEST = "manifest.json"


class ExportedFile(NamedTuple):
    """A file of an archive. Its content is made while it is read."""

    name: str
    content: AsyncIterator[bytes]


class FileInManifest(Struct):
    """A file of an archive, with its size in bytes and its SHA-256."""

    name: str
    bytes: int
    sha256: str


class ManifestHead(Struct):
    """What an export is: of which account, as of which time, when and by whom it was begun, and
    whether stored content of requests is included."""

    account: str
    account_id: str
    as_of: Moment
    made_at: Moment
    made_by: str
    with_content: bool


class Manifest:
    """The list of an archive's files, which becomes its last file."""

    def __init__(self, head: ManifestHead) -> None:
        self._head = orjson.dumps(msgspec.to_builtins(head), option=orjson.OPT_INDENT_2)
        self._lines: list[bytes] = []

    def add(self, name: str, size: int, sha256: str) -> None:
        """Add a file to the list."""
        self._lines.append(msgspec.json.encode(FileInManifest(name, size, sha256)))

    def parts(self) -> Iterator[bytes]:
        """Yield the manifest as JSON, with a line for each file."""
        yield self._head.removesuffix(b"\n}") + b',\n  "files": ['
        for number, line in enumerate(self._lines):
            yield (b",\n    " if number else b"\n    ") + line
        yield b"\n  ]\n}\n"


class Sink(io.RawIOBase):
    """The end of an archive that is made, to which a ZipFile writes."""

    def __init__(self) -> None:
        self._waiting = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        before = len(self._waiting)
        self._waiting += memoryview(data)  # type: ignore[arg-type]  # as RawIOBase has it
        return len(self._waiting) - before

    def __len__(self) -> int:
        return len(self._waiting)

    def take(self) -> bytes:
        """Return what was written, and forget it."""
        taken = bytes(self._waiting)
        self._waiting.clear()
        return taken


def zip_entry(name: str, at: int) -> zipfile.ZipInfo:
    """Return the entry of a file that only its owner may read, dated `at` (milliseconds)."""
    moment = datetime.fromtimestamp(min(at, END_OF_TIME) / 1000, UTC)
    entry = zipfile.ZipInfo(name, (max(moment.year, 1980), *moment.timetuple()[1:6]))
    entry.external_attr = 0o600 << 16
    entry.compress_type = zipfile.ZIP_DEFLATED
    return entry


async def zip_parts(
    files: AsyncIterator[ExportedFile], at: int, head: ManifestHead | None = None
) -> AsyncIterator[bytes]:
    """Yield an archive of files, all dated `at` (milliseconds), with a manifest if `head` is given.
    It takes about 600 bytes of memory for each file."""
    sink = Sink()
    archive = zipfile.ZipFile(sink, "w")
    manifest = Manifest(head) if head else None
    async for file in files:
        digest, size = hashlib.sha256(), 0
        with archive.open(zip_entry(file.name, at), "w", force_zip64=True) as entry:
            async for step in steps_of(file.content):
                digest.update(step)
                size += len(step)
                entry.write(step)
                if len(sink) >= SENT_BYTES:
                    yield sink.take()
        if manifest:
            manifest.add(file.name, size, digest.hexdigest())
    if manifest:
        with archive.open(zip_entry(MANIFEST, at), "w", force_zip64=True) as entry:
            for part in manifest.parts():
                entry.write(part)
    archive.close()
    yield sink.take()


async def steps_of(content: AsyncIterator[bytes]) -> AsyncIterator[memoryview]:
    """Yield a file's content in steps that are quickly compressed, and give other tasks a turn of
    the event loop after each. Short pieces are joined: each step costs a call or two."""
    waiting = bytearray()
    async for piece in content:
        waiting += piece
        if len(waiting) < STEP_BYTES:
            continue
        whole, waiting = memoryview(waiting), bytearray()
        for at in range(0, len(whole), STEP_BYTES):
            yield whole[at : at + STEP_BYTES]
            await asyncio.sleep(0)
    yield memoryview(waiting)
