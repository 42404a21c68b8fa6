"""The source to build from, and its date: the same bytes wherever and whenever it is built."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIRST_DATE = 315532800  # 1980-01-01, the first that a zip archive can name


def source_date(root: Path) -> int:
    """Return the date of all packed files, in seconds since 1970: $SOURCE_DATE_EPOCH, else that of
    the last commit."""
    given = os.environ.get("SOURCE_DATE_EPOCH", "")
    date = given or _git(root, "log", "-1", "--format=%ct")
    if not date.strip().isdecimal():
        sys.exit(
            f"Error: SOURCE_DATE_EPOCH is {given!r}, and {root} has no commit with a date. "
            "Set it to the seconds since 1970 that the packed files should have"
        )
    return max(int(date), FIRST_DATE)


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else ""


@contextlib.contextmanager
def exported(root: Path) -> Iterator[Path]:
    """Give a copy of the source with the modes that files have after a checkout: the files that git
    knows, as they are now, so that no other file of the folder is packed. Where git knows none, as
    in an unpacked sdist, all files."""
    before = os.umask(0o022)
    with tempfile.TemporaryDirectory(prefix="redbtc-build-") as name:
        try:
            copy = Path(name) / "source"
            known = _git(root, "ls-files", "-z").split("\0")[:-1]
            if known:
                _copy_files(root, copy, known)
            else:
                shutil.copytree(root, copy, ignore=shutil.ignore_patterns("__pycache__", ".venv"))
            yield copy
        finally:
            os.umask(before)


def _copy_files(root: Path, copy: Path, names: list[str]) -> None:
    for name in names:
        source, target = root / name, copy / name
        if source.is_file():  # not removed since
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            target.chmod(0o755 if source.stat().st_mode & 0o100 else 0o644)
