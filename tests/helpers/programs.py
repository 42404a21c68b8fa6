"""Another version of this program: a copy of the code with one more section in its schema."""

from __future__ import annotations

import shutil
from pathlib import Path

from redbtc.store.schema import TRIGGERS, newest_version, schema
from tests.helpers.gateway import ROOT

ADDED = "CREATE TABLE added_later (id INTEGER PRIMARY KEY) STRICT;"
PARTS = ("redbtc_proxy.py", "config.toml", "prices.toml")


def next_version(folder: Path, section: str = ADDED) -> Path:
    """Make a program in `folder` whose schema has one more section than this one's."""
    compiled = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "redbtc", folder / "redbtc", ignore=compiled)
    for name in PARTS:
        shutil.copy(ROOT / name, folder / name)
    sections, mark, triggers = schema().partition(TRIGGERS)
    more = f"\n-- version {newest_version() + 1}\n\n{section}\n"
    (folder / "schema.sql").write_text(f"{sections}{more}{mark}{triggers}")
    return folder
