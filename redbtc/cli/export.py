"""The command account export: fetches the parts of an export one by one, and makes one archive of
them. What is unfinished is kept in a folder beside it, so that an export can be interrupted at any
time: the same command goes on with it.

    FILE.zip.partial/plan.json      what is exported, as of which instant
    FILE.zip.partial/00012.zip      a part that is complete
    FILE.zip.partial/new            what is being written
    FILE.zip                        the archive, once it is complete and verified
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import time
import zipfile
from collections.abc import AsyncIterable, Callable, Iterator
from pathlib import Path
from typing import IO, Any

import click
import httpx2
import msgspec

from redbtc.admin.api_export import ExportPlan, PlannedPart
from redbtc.admin.zip_stream import MANIFEST, Manifest, ManifestHead, zip_entry
from redbtc.cli.accounts import account, path_of_account
from redbtc.cli.connect import connect
from redbtc.cli.main import CommandContext, content_of, json_option, show
from redbtc.config import LoadedSettings
from redbtc.errors import UserError
from redbtc.store.backup import sync_folder
from redbtc.times import parse_time

COPY_BYTES = 1 << 20
SHOWN_EVERY_SECONDS = 1  # between two lines of progress, except on a terminal
GO_ON = "Give the same command again to go on where it stopped."


@account.command("export")
@click.argument("name")
@click.option(
    "--to", "file", required=True, metavar="FILE.zip", help="Write the archive to this file."
)
@json_option
@click.pass_obj
def account_export(context: CommandContext, name: str, file: str, as_json: bool) -> None:
    """Write all that is stored of an account into one ZIP archive.

    It has the account, its logins and keys without secrets, usage, statements, payments, notices,
    changes and stored content, as JSON and CSV, and a manifest with the SHA-256 of each file. If
    the command is interrupted, give it again: it goes on where it stopped."""
    target = Path(file).absolute()
    try:
        found = asyncio.run(export(context.loaded, name, target))
    except KeyboardInterrupt:
        raise UserError(f"the export was interrupted. {GO_ON}") from None
    except (OSError, httpx2.HTTPError, zipfile.BadZipFile) as error:
        what = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(f"the export was interrupted: {what}. {GO_ON}") from None
    text = "Exported {account} as of {as_of}: {path}, {files} files, {bytes} bytes."
    show(found, as_json, lambda: text.format(**found))


async def export(loaded: LoadedSettings, name: str, target: Path) -> dict[str, Any]:
    """Export an account into the file `target`. Return what was written. Raises UserError, OSError,
    httpx2.HTTPError."""
    os.umask(0o077)
    folder = target.with_name(f"{target.name}.partial")
    if target.exists() and not folder.exists():
        raise UserError(f"{target} exists already; remove it, or name another file")
    if not target.parent.is_dir():
        raise UserError(f"the folder {target.parent} does not exist")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.geteuid():
        raise UserError(f"{folder} belongs to another user; name another file")
    folder.chmod(0o700)
    with locked(folder):
        unfinished = UnfinishedExport(folder)
        plan = unfinished.plan()
        if plan and name not in (plan.account, plan.account_id):
            raise UserError(
                f"{folder} is the unfinished export of account {plan.account!r}; finish that, "
                "remove the folder, or name another file"
            )
        if target.exists():
            if not plan or not is_archive_of(plan, target):
                raise UserError(f"{target} exists already; remove it, or name another file")
        else:
            async with connect(loaded) as client:
                plan = plan or await unfinished.begin(client, name)
                await unfinished.fetch(client, plan)
            unfinished.join(plan, target)
        unfinished.remove()
    return {"account": plan.account, "as_of": plan.as_of, **facts_of(target)}


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other commands out of a folder. Raises UserError if another one is at work there. If the
    folder could not be filled, it is removed again."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another command is writing this export ({folder})") from None
    else:
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                folder.rmdir()  # only if it is empty
    finally:
        os.close(descriptor)


class ExportProgress:
    """Lines on standard error that say how much is done."""

    def __init__(self, plan: ExportPlan) -> None:
        self._account = plan.account
        self._files = sum(part.files for part in plan.parts)
        self._shown_at = 0.0
        self.files = 0
        self.bytes = 0

    def show(self, always: bool = False) -> None:
        """Show how much is done, if that is due."""
        if not always and time.monotonic() - self._shown_at < SHOWN_EVERY_SECONDS:
            return
        self._shown_at = time.monotonic()
        done = f"Exporting {self._account}: {self.files} of {self._files} files"
        click.echo(f"{done}, {self.bytes / 1e6:.1f} MB", err=True)


class UnfinishedExport:
    """The folder of an export that is not complete."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._plan_file = folder / "plan.json"
        self._new = folder / "new"

    def plan(self) -> ExportPlan | None:
        """Return the plan of an export that was interrupted, None if there is none."""
        with contextlib.suppress(FileNotFoundError):
            return msgspec.json.decode(self._plan_file.read_bytes(), type=ExportPlan)
        return None

    async def begin(self, client: httpx2.AsyncClient, name: str) -> ExportPlan:
        """Fetch the plan of an export, and keep it. Raises UserError."""
        answer = await client.get(path_of_account(name, "/export"))
        content_of(answer.status_code, answer.content)
        self._clear()
        with self._replacing(self._plan_file) as out:
            out.write(answer.content)
        return msgspec.json.decode(answer.content, type=ExportPlan)

    async def fetch(self, client: httpx2.AsyncClient, plan: ExportPlan) -> None:
        """Fetch the parts that are missing. Raises UserError."""
        progress = ExportProgress(plan)
        for number, part in enumerate(plan.parts):
            file = self._file_of(number)
            if file.exists():
                progress.bytes += file.stat().st_size
            else:
                await self._fetch_part(client, plan, part, file, progress)
            progress.files += part.files
        progress.show(always=True)

    async def _fetch_part(
        self,
        client: httpx2.AsyncClient,
        plan: ExportPlan,
        part: PlannedPart,
        file: Path,
        progress: ExportProgress,
    ) -> None:
        query = {"as_of": plan.as_of}
        if part.requests:
            query["requests"] = ",".join(part.requests)
        path = path_of_account(plan.account_id, f"/export/{part.name}")
        async with client.stream("GET", path, params=query) as answer:
            if answer.status_code != 200:
                content_of(answer.status_code, await answer.aread())
            with self._replacing(file) as out:
                await copy_stream(answer.aiter_bytes(), out, progress)

    def join(self, plan: ExportPlan, target: Path) -> None:
        """Make one archive of all parts, verify it, and put it in its place."""
        click.echo(f"Writing and verifying {target}", err=True)
        at = parse_time(plan.as_of, 0, relative_to_past=True)
        with self._new.open("wb") as out:
            with zipfile.ZipFile(out, "w") as archive:
                manifest = Manifest(head_of(plan))
                for number in range(len(plan.parts)):
                    self._add_part(self._file_of(number), archive, manifest, at)
                with archive.open(zip_entry(MANIFEST, at), "w") as last:
                    last.writelines(manifest.parts())
            out.flush()
            verify_archive(self._new)
            os.fsync(out.fileno())
        self._new.rename(target)
        sync_folder(target.parent)

    def _add_part(self, file: Path, archive: zipfile.ZipFile, manifest: Manifest, at: int) -> None:
        """Copy the files of a part into the archive. A part that can't be read is removed, so that
        it is fetched again. Raises zipfile.BadZipFile."""
        try:
            with zipfile.ZipFile(file) as part:
                for entry in part.infolist():
                    new = zip_entry(entry.filename, at)
                    with (
                        part.open(entry) as source,
                        archive.open(new, "w", force_zip64=True) as copy,
                    ):
                        size, digest = copy_hashed(source, copy.write)
                    manifest.add(entry.filename, size, digest)
        except zipfile.BadZipFile:
            file.unlink()
            raise

    def remove(self) -> None:
        """Remove the folder. The plan goes last: as long as there is one, this can be repeated."""
        self._clear()
        self._plan_file.unlink()
        self._folder.rmdir()

    def _clear(self) -> None:
        """Remove all files but the plan."""
        for file in self._folder.iterdir():
            if file != self._plan_file:
                file.unlink()

    def _file_of(self, number: int) -> Path:
        return self._folder / f"{number:05}.zip"

    @contextlib.contextmanager
    def _replacing(self, file: Path) -> Iterator[IO[bytes]]:
        """Open a new file that becomes `file` once it is written and on disk."""
        with self._new.open("wb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        self._new.rename(file)
        sync_folder(self._folder)


async def copy_stream(
    parts: AsyncIterable[bytes], out: IO[bytes], progress: ExportProgress
) -> None:
    """Write what comes, and show the progress."""
    async for part in parts:
        out.write(part)
        progress.bytes += len(part)
        progress.show()


def copy_hashed(source: IO[bytes], write: Callable[[bytes], object]) -> tuple[int, str]:
    """Pass all of a file to `write`. Return its size and its SHA-256."""
    digest, size = hashlib.sha256(), 0
    while data := source.read(COPY_BYTES):
        digest.update(data)
        size += len(data)
        write(data)
    return size, digest.hexdigest()


def verify_archive(file: Path) -> None:
    """Read an archive again and compare it with its manifest. Raises UserError."""
    with zipfile.ZipFile(file) as archive:
        listed = msgspec.json.decode(archive.read(MANIFEST))["files"]
        names = [each["name"] for each in listed]
        good = [*names, MANIFEST] == archive.namelist() and len(set(names)) == len(names)
        for each in listed:
            with archive.open(each["name"]) as content:
                good = good and copy_hashed(content, len) == (each["bytes"], each["sha256"])
    if not good:
        raise UserError(f"what was written is not what was sent; the disk may be damaged. {GO_ON}")


def head_of(plan: ExportPlan) -> ManifestHead:
    """Return what the manifest says of an export besides its files."""
    return ManifestHead(*(getattr(plan, name) for name in ManifestHead.__struct_fields__))


def is_archive_of(plan: ExportPlan, file: Path) -> bool:
    """Return whether a file is the complete archive of an export."""
    with contextlib.suppress(zipfile.BadZipFile, KeyError, OSError, msgspec.MsgspecError):
        with zipfile.ZipFile(file) as archive:
            written = msgspec.json.decode(archive.read(MANIFEST), type=ManifestHead)
        return written == head_of(plan)
    return False


def facts_of(file: Path) -> dict[str, Any]:
    """Return the path, the size, the SHA-256 and the number of files of an archive."""
    with file.open("rb") as content:
        size, digest = copy_hashed(content, len)
    with zipfile.ZipFile(file) as archive:
        files = len(archive.namelist())
    return {"path": str(file), "bytes": size, "sha256": digest, "files": files}
