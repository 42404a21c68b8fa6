"""An upgrade of an installed program, and the way back, with the commands of docs/operating.md."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from redbtc.release import RELEASE
from redbtc.store.schema import newest_version
from tests.helpers.gateway import ROOT
from tests.helpers.programs import NEXT_RELEASE, copy_of_program, next_version
from tests.product.test_docs import DOCS, blocks

pytestmark = [pytest.mark.promise_9, pytest.mark.slow, pytest.mark.process]

NEWEST = newest_version()


def test_the_release_has_one_number() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == RELEASE
    assert f"\n## {RELEASE}" in (ROOT / "CHANGELOG.md").read_text()


def wheel_of(program: Path, folder: Path) -> Path:
    """Build the wheel of a program."""
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder), "-t", "wheel"]
    done = subprocess.run(command, cwd=program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


class Installed:
    """A program that pip has installed into a folder, with its settings and its ledger beside."""

    def __init__(self, folder: Path) -> None:
        self._packages = folder / "packages"
        self._folder = folder / "etc"
        self._folder.mkdir()
        (self._folder / "config.toml").write_text("")
        self.database = self._folder / "redbtc.db"

    def install(self, wheel: Path) -> None:
        command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", str(wheel)]
        command += ["--target", str(self._packages), "--upgrade", "--ignore-installed"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def __call__(self, *words: str, status: int = 0) -> str:
        """Run a command; return what it has printed."""
        script = self._packages / "bin" / "redbtc-proxy"
        config = ["--config", str(self._folder / "config.toml")]
        env = {**os.environ, "PYTHONPATH": str(self._packages), "OPENAI_API_KEY": "sk"}
        command = [sys.executable, str(script), *config, *words]
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=self._folder)
        assert done.returncode == status, done.stderr
        return done.stdout + done.stderr


def test_an_installed_program_is_upgraded_and_goes_back(tmp_path: Path) -> None:
    now = wheel_of(copy_of_program(tmp_path / "this"), tmp_path / "now")
    later = wheel_of(next_version(tmp_path / "next"), tmp_path / "later")
    program = Installed(tmp_path)
    program.install(now)
    assert program("--version") == f"redbtc-proxy {RELEASE} (schema {NEWEST})\n"
    program("account", "add", "before")
    program.install(later)
    assert program("--version") == f"redbtc-proxy {NEXT_RELEASE} (schema {NEWEST + 1})\n"
    assert "ok" in program("check").splitlines()
    assert not list(program.database.parent.glob("*before-schema*")), "check migrates nothing"
    said = program("account", "add", "after")
    assert f"Migrated the database from schema {NEWEST} to {NEWEST + 1} in" in said
    program.install(now)
    refused = program("account", "list", status=1).removeprefix("Error: ").strip()
    assert refused in program("check", status=2)
    command = re.search(r"redbtc-proxy (db restore \S+)", refused)
    assert command
    assert command[1].replace(str(program.database.parent), "/var/lib/redbtc-proxy") == way_back()
    assert "The database is intact." in program(*command[1].split())
    accounts = program("account", "list")
    assert "before" in accounts
    assert "after" not in accounts


def way_back() -> str:
    """Return the command of docs/operating.md, for the schema after the newest."""
    (code,) = [each for each in blocks(DOCS / "operating.md", "sh") if "before-schema-" in each]
    lines = code.splitlines()
    assert [line.split()[0] for line in lines] == ["systemctl", "redbtc-proxy", "systemctl"]
    written = lines[1].removeprefix("redbtc-proxy ")
    return re.sub(r"\d+$", str(NEWEST + 1), written)
