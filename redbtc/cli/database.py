"""The command db."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from redbtc.cli.main import CommandContext, commands, given, json_option, show
from redbtc.errors import UserError
from redbtc.store.backup import back_up, plain_errors, restore
from redbtc.store.backup_record import (
    note_backup,
    note_begun_backup,
    note_failed_backup,
    record_file,
)
from redbtc.store.consistency import CHECKS
from redbtc.store.files import lock_database, take_lock_file
from redbtc.store.versions import refuse_newer
from redbtc.times import iso_time


@commands.group()
def db() -> None:
    """Manage the database."""


@db.command("check")
@json_option
@click.pass_obj
def db_check(context: CommandContext, as_json: bool) -> None:
    """Check the whole database for damage. Exits with 1 if there is any."""
    found = context.call("POST", "/admin/v1/db/check")
    show(found, as_json, lambda: "\n".join(found["problems"]) or "The database is intact.")
    if not found["ok"]:
        raise SystemExit(1)


MAX_NICENESS = 19


@db.command("backup")
@click.argument("path")
@click.option(
    "--keep",
    type=click.IntRange(1),
    metavar="N",
    help="Keep the newest N backups, including this one, and remove older ones.",
)
@click.option(
    "--with-request-log",
    is_flag=True,
    help="Copy the stored bodies of requests as well, to PATH.request_log.db.",
)
@json_option
@click.pass_obj
def db_backup(
    context: CommandContext, path: str, keep: int | None, with_request_log: bool, as_json: bool
) -> None:
    """Copy the database to PATH and verify the copy. The gateway may be running.

    The SHA-256 is written to PATH.sha256. If PATH is a folder, the backup is named after the time.
    Otherwise, an earlier backup at PATH is replaced or, with --keep, renamed to PATH.1, PATH.2 and
    so on."""
    os.nice(MAX_NICENESS)  # the gateway comes first
    database = context.loaded.database_path
    refuse_newer(database)  # of which nothing is touched
    try:
        note_begun_backup(database, path)
        made = back_up(database, path, keep, with_request_log=with_request_log)
    except UserError as error:
        with contextlib.suppress(OSError, UserError):  # one line says what is wrong
            note_failed_backup(database, str(error))
        raise
    with recording(database):
        note_backup(database, made)
    text = "Backup {path}: {bytes} bytes, {requests} requests, schema {schema}, in {seconds} s."
    lines = [text.format(**made._asdict())]
    if with_request_log:
        lines.append(f"Request log: {made.request_log or 'none, since nothing is stored'}")
    show(made._asdict(), as_json, lambda: "\n".join(lines))


@contextlib.contextmanager
def recording(database: Path) -> Iterator[None]:
    """Say on standard error that what became of a backup can't be recorded. The backup counts."""
    try:
        with plain_errors("The backup was not recorded"):
            yield
    except UserError as error:
        file = record_file(database)
        click.echo(
            f"{error}. check and the webhook don't know of it: let this user write {file}", err=True
        )


@db.command("restore")
@click.argument("path")
@json_option
@click.pass_obj
def db_restore(context: CommandContext, path: str, as_json: bool) -> None:
    """Restore the database from the backup at PATH.

    Stop the gateway first. The backup is verified before it replaces the database. The replaced
    database is kept beside the new one."""
    started = time.monotonic()
    database = context.loaded.database_path
    os.umask(0o077)
    with contextlib.ExitStack() as stack:
        stack.enter_context(plain_errors(f"{path} was not restored"))
        stack.enter_context(take_lock_file(database))
        if database.exists():
            stack.enter_context(lock_database(database))
        restored = restore(database, path, CHECKS)
    done = {
        "database": str(database),
        "restored_from": path,
        "replaced": str(restored.replaced) if restored.replaced else None,
        "bytes": restored.bytes,
        **restored.contents._asdict(),
        "latest_request_at": iso_time(restored.contents.latest_request_at),
    }
    try:
        done |= context.call("POST", "/admin/v1/db/check")
    except UserError as error:
        done |= {"ok": False, "problems": [str(error)]}
    done["seconds"] = round(time.monotonic() - started, 3)
    show(done, as_json, lambda: restored_text(done))
    if not done["ok"]:
        raise SystemExit(1)


def restored_text(done: dict[str, Any]) -> str:
    latest = done["latest_request_at"]
    until = f", newest from {latest}" if latest else ""
    lines = [f"Restored {done['database']}: {done['requests']} requests{until}."]
    if done["replaced"]:
        lines.append(f"The replaced database is kept: {done['replaced']}")
    return "\n".join([*lines, *(done["problems"] or ["The database is intact."])])


def time_text(found: dict[str, Any]) -> str:
    """Return what `db set-time` did, or would do."""
    at, moved = found["time"], found["moved"]
    if not moved:
        return f"Nothing in the ledger is dated after {at}."
    rows = "\n".join(f"  {table}: {count}" for table, count in moved.items())
    what = "Moved to" if found["done"] else "Dated after"
    return f"{what} {at}, rows by table:\n{rows}"


@db.command("set-time")
@click.argument("time", required=False)
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@json_option
@click.pass_obj
def db_set_time(context: CommandContext, time: str | None, yes: bool, as_json: bool) -> None:
    """Move ledger entries dated after TIME to TIME.

    TIME is an ISO 8601 time, or a duration ago; the default is now. Use this to repair a ledger
    with entries in the future, after the system clock was ahead. Costs do not change. This can't be
    undone."""
    path, body = "/admin/v1/db/set-time", given({"time": time})
    found = context.call("POST", path, {**body, "preview": True})
    if found["moved"] and not yes:
        click.echo(time_text(found), err=True)
        click.confirm("Move all of these entries?", abort=True, err=True)
    found = context.call("POST", path, body)
    show(found, as_json, lambda: time_text(found))


PURGED = {
    "requests": "requests",
    "stored_objects": "ids of stored objects",
    "changes": "entries of the log of changes",
    "logged_requests": "requests' bodies",
    "logged_bytes": "bytes of requests' bodies",
    "accounts": "terminated accounts",
}


def purge_text(found: dict[str, Any]) -> str:
    """Return what `db purge` did, or would do."""
    what = "Erased" if found["done"] else "Would erase"
    counts = [f"  {count} {PURGED[name]}" for name, count in found["erased"].items() if count]
    first = f"{what}:" if counts else "Nothing is old enough to be erased."
    return "\n".join([first, *counts, *found["still_to_do"]])


@db.command("purge")
@click.option("--dry-run", is_flag=True, help="Only count the rows that would be erased.")
@click.option(
    "--accept-clock",
    is_flag=True,
    help="Trust the ledger's time, even if it has just gone ahead by more than a day.",
)
@json_option
@click.pass_obj
def db_purge(context: CommandContext, dry_run: bool, accept_clock: bool, as_json: bool) -> None:
    """Erase now what is older than [retention] allows. The gateway may be running.

    A running gateway does so by itself once a day. Exits with 1 if something is still to do. This
    can't be undone."""
    body = {"preview": dry_run, "accept_clock": accept_clock}
    found = context.call("POST", "/admin/v1/db/purge", body)
    show(found, as_json, lambda: purge_text(found))
    if found["still_to_do"]:
        raise SystemExit(1)
