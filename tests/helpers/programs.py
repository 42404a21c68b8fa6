"""Another version of this program: a copy of the code with one more section in its schema, and a
release number of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

from redbtc.release import RELEASE
from redbtc.store.schema import TRIGGERS, newest_version, schema
from tests.helpers.gateway import ROOT

ADDED = "CREATE TABLE added_later (id INTEGER PRIMARY KEY) STRICT;"
NEXT_RELEASE = "99.0.0"
PARTS = (
    *("redbtc_proxy.py", "schema.sql", "config.toml", "prices.toml", "pyproject.toml"),
    "README.md",
)


def copy_of_program(folder: Path) -> Path:
    """Copy this program, so that a test can change it."""
    compiled = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "redbtc", folder / "redbtc", ignore=compiled)
    shutil.copytree(ROOT / "deploy", folder / "deploy")
    for name in PARTS:
        shutil.copy(ROOT / name, folder / name)
    return folder


def next_version(folder: Path, section: str = ADDED) -> Path:
    """Make a program in `folder` whose schema has one more section than this one's."""
    copy_of_program(folder)
    add_section(folder, section)
    for file in (folder / "pyproject.toml", folder / "redbtc" / "release.py"):
        file.write_text(file.read_text().replace(f'"{RELEASE}"', f'"{NEXT_RELEASE}"', 1))
    return folder


def add_section(program: Path, sql: str) -> None:
    """Add a version to the schema of a program."""
    sections, mark, triggers = schema().partition(TRIGGERS)
    more = f"\n-- version {newest_version() + 1}\n\n{sql}\n"
    (program / "schema.sql").write_text(f"{sections}{more}{mark}{triggers}")
