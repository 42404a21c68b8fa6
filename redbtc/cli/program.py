"""The commands that this program prints for people to copy: its own name, and its settings file."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import sys
from pathlib import Path

from redbtc.config import HERE, LoadedSettings

SCRIPTS = (".py", ".pyz")


def program_name() -> str:
    """Return how this program was called, as a command."""
    script = _shown(sys.argv[0])
    if Path(sys.argv[0]).suffix in SCRIPTS:
        return f"{_shown(sys.executable)} {script}"
    return script


def command_for(loaded: LoadedSettings) -> str:
    """Return how this program is called so that it uses the same settings."""
    named = os.environ.get("REDBTC_CONFIG")
    usual = Path(named).absolute() if named else HERE / "config.toml"
    if loaded.file in (None, usual):
        return program_name()
    return f"{program_name()} --config {_shown(str(loaded.file))}"


def _shown(path: str) -> str:
    """Return what stands for the path of a file in a command: its name if that is enough, or the
    path from the current folder if it is below that."""
    name = Path(path).name
    found = shutil.which(name)
    if found and os.path.samefile(found, path):
        return shlex.quote(name)
    relative = absolute = path
    with contextlib.suppress(FileNotFoundError):  # the current folder was removed
        relative, absolute = os.path.relpath(path), os.path.abspath(path)
    is_below = not relative.startswith(os.pardir)
    return shlex.quote(relative if is_below else absolute)
