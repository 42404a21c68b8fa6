"""Copies of the source, as clones of other people would be, and what is built from them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.helpers.gateway import ROOT

COMMITTED = "2026-01-02T03:04:05Z"  # the date of the one commit of each copy


def _git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.com"]
    env = os.environ | {"GIT_COMMITTER_DATE": COMMITTED, "GIT_AUTHOR_DATE": COMMITTED}
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout


def make_checkout(folder: Path, umask: int, changed_at: int) -> Path:
    """Return a repository with the files of this one, as they are now, with the modes that `umask`
    leaves and the date of their last change, in seconds since 1970."""
    before = os.umask(umask)
    try:
        for name in _git(ROOT, "ls-files", "-z").split("\0")[:-1]:
            if not (ROOT / name).is_file():
                continue
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target)
            target.chmod((ROOT / name).stat().st_mode & 0o777 & ~umask)
            os.utime(target, (changed_at, changed_at))
        _git(folder, "init", "--quiet")
        _git(folder, "add", "--all")
        _git(folder, "commit", "--quiet", "--message", "Copy")
        return folder
    finally:
        os.umask(before)


def run_module(folder: Path, module: str, *arguments: str | Path, umask: int = 0o022) -> str:
    """Run a module of a copy, and return what it prints. Raises AssertionError if it fails."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    env = {name: value for name, value in os.environ.items() if name != "SOURCE_DATE_EPOCH"}
    done = subprocess.run(command, cwd=folder, env=env, umask=umask, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
