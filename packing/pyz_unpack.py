"""Unpack redbtc-proxy.pyz once, and run the program from there.

Python can't load extension modules from an archive, so the files must lie in a folder: in
`redbtc-proxy` in the user's cache folder, which only this user may read and write. Each build has a
folder of its own there, with a lock beside it:

- A process holds the lock shared for as long as it runs, and exclusively while it unpacks. So two
  first starts at the same time unpack once, and a new build removes only folders that are not used.
- Files are unpacked into a folder with another name, which is then renamed. What an interrupted
  start leaves behind is removed by the next one.
- Each start compares the sizes of all files with a list: a loss of power can cut files that were
  just written, and programs that clean caches remove single files. Waiting for the disk instead
  would take half a minute where it is busy.

This file is in the archive as it is here, and imports nothing that is not in Python itself.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import json
import os
import shutil
import signal
import stat
import sys
import time
import zipfile
from pathlib import Path
from typing import Any, NoReturn

ARCHIVE = Path(__file__).absolute().parent.parent
PROGRAM = "redbtc-proxy"
CACHE = "REDBTC_CACHE"  # the environment variable with the folder to unpack into
PARTIAL = ".partial"
SIZES = "sizes.json"  # in the folder, the size of each file
BUSY_SECONDS = 10  # for other starts, which look at the files at the same time


def main() -> None:
    """Make sure that the program is unpacked, then run it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while unpacking, end silently
    folder = unpacked_folder()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.path[:] = [str(folder), *(each for each in sys.path if each != str(ARCHIVE))]
    sys.path_importer_cache.clear()
    settings = ARCHIVE.with_name("config.toml")  # what lies beside redbtc_proxy.py elsewhere
    if settings.is_file():
        os.environ.setdefault("REDBTC_CONFIG", str(settings))
    from redbtc.__main__ import main as run

    run()


def fail(text: str) -> NoReturn:
    """End with one line on standard error and status 1."""
    sys.exit(f"Error: {text}")


def unpacked_folder() -> Path:
    """Return the folder with the files for this Python, which are unpacked if they are not."""
    with zipfile.ZipFile(ARCHIVE) as archive:
        contents = json.loads(archive.read("contents.json"))
        suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
        if suffix not in contents["builds"]:
            fail(no_build(contents))
        parent = cache_folder() / PROGRAM
        try:
            make_private(parent)
            folder = parent / f"{contents['version']}-{contents['digest'][:16]}{suffix}"
            hold(folder, archive, contents["builds"][suffix])
            return folder
        except OSError as error:
            fail(
                f"can't unpack into {parent}: {error.strerror}. Set {CACHE} to a folder that "
                "only this user may write to"
            )


def no_build(contents: dict[str, Any]) -> str:
    """Return why this Python can't run the archive."""
    import platform  # here: it takes time to load

    version = ".".join(map(str, sys.version_info[:2]))
    found = f"{platform.python_implementation()} {version} on {sys.platform} {platform.machine()}"
    return (
        f"this is {found} ({importlib.machinery.EXTENSION_SUFFIXES[0]}); {ARCHIVE.name} is for "
        f"{contents['supports']}. Elsewhere, install the package with pipx"
    )


def cache_folder() -> Path:
    """Return the folder for what can be made again: $REDBTC_CACHE, that of systemd's
    CacheDirectory=, or the user's."""
    for name in (CACHE, "CACHE_DIRECTORY", "XDG_CACHE_HOME"):
        if os.path.isabs(os.environ.get(name, "")):
            return Path(os.environ[name])
    home = os.path.expanduser("~")
    if not os.path.isabs(home):
        fail(f"this user has no home folder to unpack into. Set {CACHE} to an absolute path")
    return Path(home, ".cache")


def make_private(folder: Path) -> None:
    """Make a folder that only this user may use. Fail if there is one that others may write to:
    they could replace the program. Raises OSError."""
    if not folder.is_dir():
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        fail(f"{folder} is not a folder. Remove it, or set {CACHE} to another place")
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        owner, mode = found.st_uid, stat.S_IMODE(found.st_mode)
        fail(
            f"{folder} belongs to user {owner} and has mode {mode:04o}; it must belong to user "
            f"{os.geteuid()}, and nobody else may write to it. Remove it, or set {CACHE} to "
            "another place"
        )


def hold(folder: Path, archive: zipfile.ZipFile, wheels: list[str]) -> None:
    """Hold the lock of a folder until this process ends, and unpack what it lacks. Raises
    OSError."""
    import fcntl  # here: only some platforms have it

    lock = open_lock(folder)
    fcntl.flock(lock, fcntl.LOCK_SH)
    deadline = time.monotonic() + BUSY_SECONDS
    while not is_whole(folder):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                fail(
                    f"{folder} lacks files, and a program that runs from it does not end. Restart "
                    f"that one, or set {CACHE} to another folder"
                )
            time.sleep(0.05)
        else:
            if not is_whole(folder):
                unpack(archive, wheels, folder)
                remove_others(folder)
        fcntl.flock(lock, fcntl.LOCK_SH)  # another build may take the lock before, and remove it


def is_whole(folder: Path) -> bool:
    """Return whether a folder has all its files."""
    try:
        sizes = json.loads((folder / SIZES).read_bytes())
        return all(os.stat(f"{folder}/{name}").st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def open_lock(folder: Path) -> int:
    """Return a descriptor of a folder's lock file, above those of standard input, output and error,
    which may be closed. Raises OSError."""
    import fcntl

    path = f"{folder}.lock"
    try:
        opened = os.open(path, os.O_RDONLY)  # the disk may have become read-only
    except FileNotFoundError:
        opened = os.open(path, os.O_RDONLY | os.O_CREAT, 0o600)
    lock = fcntl.fcntl(opened, fcntl.F_DUPFD_CLOEXEC, 3)
    os.close(opened)
    return lock


def unpack(archive: zipfile.ZipFile, wheels: list[str], folder: Path) -> None:
    """Unpack these wheels into a folder, in place of what is there. Raises OSError."""
    partial = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    before = os.umask(0o077)
    try:
        for name in wheels:
            with archive.open(f"wheels/{name}") as file, zipfile.ZipFile(file) as wheel:
                wheel.extractall(partial)
        for data in partial.glob("*.data/data"):  # what pip puts into the environment's folder
            shutil.copytree(data, partial, dirs_exist_ok=True)
        files = [path for path in partial.rglob("*") if path.is_file()]
        sizes = {str(path.relative_to(partial)): path.stat().st_size for path in files}
        (partial / SIZES).write_text(json.dumps(sizes))
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.umask(before)


def remove_others(folder: Path) -> None:
    """Remove the folders of other builds that no process uses."""
    import fcntl

    build = folder.name.partition(".cpython")[0]
    for other in folder.parent.iterdir():
        if other.name.startswith(build) or not other.is_dir():
            continue
        with contextlib.suppress(OSError):
            lock = open_lock(other.with_name(other.name.removesuffix(PARTIAL)))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(other, ignore_errors=True)
            finally:
                os.close(lock)
