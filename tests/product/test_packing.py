"""The sdist and the wheel: built from the same source, they are the same to the byte, and hold what
is published, no more and no less."""

from __future__ import annotations

import calendar
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.helpers.checkouts import make_checkout, run_module
from tests.helpers.gateway import ROOT, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.process]

SECRET = "canary.env"


class Built(NamedTuple):
    """A copy of the source, and what was built from it."""

    checkout: Path
    sdist: Path
    wheel: Path


def build(checkout: Path, umask: int) -> Built:
    folder = checkout.parent / "dist"
    run_module(checkout, "packing.dist", folder, umask=umask)
    return Built(checkout, next(folder.glob("*.tar.gz")), next(folder.glob("*.whl")))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """What is built from a copy that has a file which git does not know."""
    checkout = make_checkout(tmp_path_factory.mktemp("first") / "a", 0o022, 1_700_000_000)
    (checkout / SECRET).write_text("secret")
    (checkout / "redbtc" / SECRET).write_text("secret")
    return build(checkout, 0o022)


def sdist_names(path: Path) -> set[str]:
    with tarfile.open(path) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


def wheel_names(path: Path) -> set[str]:
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist())


def test_two_builds_are_the_same_to_the_byte(built: Built, tmp_path: Path) -> None:
    """Another folder, other modes, other dates of the files, at another time."""
    begun = built.sdist.stat().st_mtime
    wait_until(lambda: time.time() > begun + 2, why="for a date that all archives can tell apart")
    again = build(make_checkout(tmp_path / "another" / "name", 0o077, 1_600_000_000), 0o077)
    assert again.sdist.name == built.sdist.name
    assert again.sdist.read_bytes() == built.sdist.read_bytes()
    assert again.wheel.name == built.wheel.name
    assert again.wheel.read_bytes() == built.wheel.read_bytes()


def test_a_wheel_of_the_sdist_is_the_same(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tarfile.open(built.sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    with zipfile.ZipFile(built.wheel) as wheel:
        seconds = calendar.timegm(wheel.infolist()[0].date_time)
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    monkeypatch.setenv("SOURCE_DATE_EPOCH", str(seconds))
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    assert next(tmp_path.glob("*.whl")).read_bytes() == built.wheel.read_bytes()


def test_everything_is_in_them(built: Built) -> None:
    known = {
        str(path.relative_to(built.checkout))
        for path in built.checkout.rglob("*")
        if path.is_file() and path.name != SECRET and ".git" not in path.parts
    }
    not_published = {name for name in known if name.startswith(".ci/")}
    assert sdist_names(built.sdist) == known - not_published | {"PKG-INFO"}
    program = {name for name in known if name.startswith("redbtc")}
    data = {"schema.sql", "config.toml", "prices.toml"}
    data |= {name for name in known if name.startswith("deploy/")}
    packed = wheel_names(built.wheel)
    shared = {name.partition("/share/redbtc-proxy/")[2] for name in packed} - {""}
    assert {
        name for name in packed if ".data/" not in name and ".dist-info/" not in name
    } == program
    assert shared == data


def test_nothing_else_is_in_them(built: Built) -> None:
    names = sdist_names(built.sdist) | wheel_names(built.wheel)
    assert not [name for name in names if name.endswith((SECRET, ".pyc", ".db"))]


def test_without_a_date_nothing_is_built(tmp_path: Path) -> None:
    """An unpacked sdist has no commit."""
    (tmp_path / "packing").symlink_to(ROOT / "packing")
    probe = "import pathlib; from packing.source import source_date; source_date(pathlib.Path('.'))"
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Error: SOURCE_DATE_EPOCH is '', and . has no commit")
