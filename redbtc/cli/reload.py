"""The command reload."""

from __future__ import annotations

from typing import Any

import click

from redbtc.cli.main import CommandContext, commands, json_option, show


@commands.command(short_help="Let a new process of the gateway take over.")
@json_option
@click.pass_obj
def reload(context: CommandContext, as_json: bool) -> None:
    """Let a new process of the gateway take over; no request is refused.

    The new process has the program and the settings that are on the disk now, and the environment
    of the one that runs. That one has server.drain_seconds to finish its requests. If the new
    process can't serve, this command says why, with exit status 1, and nothing changes.

    If the new program has to migrate the ledger, the gateway restarts: requests in flight have 30
    seconds to finish, and new ones wait until it serves again."""
    found = context.call("POST", "/admin/v1/reload")
    if found["restarts"]:
        click.echo(
            "The ledger has to be migrated, so the gateway restarts. Requests in flight have "
            f"{found['seconds']:g} s to finish; new ones wait.",
            err=True,
        )
        context.call("GET", "/admin/v1/upstreams")  # is answered by the new process
    show(found, as_json, lambda: reloaded_text(found))


def reloaded_text(found: dict[str, Any]) -> str:
    version = f" (version {found['version']})" if found["version"] else ""
    if found["restarts"]:
        return f"Process {found['pid']} serves now{version}, and the ledger is migrated."
    return f"Process {found['pid']} serves now{version}. The one before it finishes its requests."
