"""Try a migration on a copy of the database, before the gateway that runs is ended for it."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from pathlib import Path

from redbtc.errors import UserError
from redbtc.locations import joined_models
from redbtc.store.backup import TRIAL_SUFFIXES, check_space, copy, suffixed
from redbtc.store.opening import run_migrations
from redbtc.store.schema import migrations, schema
from redbtc.store.writer import Writer


async def try_migration(database: Path, version: int) -> None:
    """Migrate a copy of the database, which is in use and has this schema, and remove the copy.
    Raises UserError if that fails."""
    trial = suffixed(database, TRIAL_SUFFIXES[0])
    try:
        await asyncio.to_thread(_copy, database, trial)
        writer = Writer(trial, "normal")
        async with writer:
            await writer.create_function("joined", 2, joined_models)
            sections = migrations(schema())
            due = [script for number, script in sorted(sections.items()) if number > version]
            await run_migrations(writer, due, max(sections))
    except (sqlite3.Error, OSError) as error:
        raise UserError(f"a copy of {database} could not be migrated: {error}") from None
    finally:
        _remove(database)


def _copy(database: Path, trial: Path) -> None:
    check_space(database, database.parent, migrating=True)
    _remove(database)
    file = os.open(trial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        copy(database, file, trial)
    finally:
        os.close(file)


def _remove(database: Path) -> None:
    for suffix in TRIAL_SUFFIXES:
        suffixed(database, suffix).unlink(missing_ok=True)
