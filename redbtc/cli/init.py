"""The command init."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from redbtc.cli.main import commands, json_option, show
from redbtc.cli.program import command_for
from redbtc.config import load_settings, shipped
from redbtc.errors import UserError

FILES = ("config.toml", "prices.toml")


@commands.command(short_help="Make a folder with settings and example prices.")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@json_option
def init(folder: Path, as_json: bool) -> None:
    """Make a folder for a gateway: settings with comments, and example prices.

    What is there already is never changed."""
    folder = folder.absolute()
    write_files(folder)
    loaded = load_settings(str(folder / "config.toml"))
    settings = loaded.settings
    upstream_variables = [each.api_key_env for each in settings.upstreams if each.api_key_env]
    command = command_for(loaded)
    made: dict[str, Any] = {
        "config": str(loaded.file),
        "prices": str(folder / "prices.toml"),
        "database": str(loaded.database_path),
        "variables": upstream_variables,
        "start": f"{command} serve --first-run",
        "dashboard": f"{settings.dashboard_url}/dashboard/",
    }
    show(made, as_json, lambda: next_steps(made, command))


def write_files(folder: Path) -> None:
    """Write the files into a folder, which is made if it is missing. Raises UserError if one of
    them is there already, and writes none then."""
    paths = [folder / name for name in FILES]
    for path in paths:
        if os.path.lexists(path):
            raise UserError(
                f"{path} exists already, and nothing was changed. Choose another folder, or move "
                "it away"
            )
    path, written = folder, []
    try:
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=0o700)  # for the ledger
        for path in paths:
            write_new(path, shipped(path.name).read_bytes())
            written.append(path)
    except OSError as error:
        for each in written:
            each.unlink(missing_ok=True)
        raise UserError(f"{path}: {error.strerror}") from None


def write_new(path: Path, content: bytes) -> None:
    """Write a file that only the user may read: the whole of it, or none. Raises OSError, also if
    it exists."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
    except OSError:
        path.unlink(missing_ok=True)
        raise


def next_steps(made: dict[str, Any], command: str) -> str:
    """Return what to do with the new folder."""
    exports = "\n".join(f"   export {name}=…" for name in made["variables"])
    return f"""Made {made["config"]} (settings) and {made["prices"]} (example prices).

1. Read both, and change what you need. Secrets don't belong there, but in the environment:

{exports}

2. Start the gateway. The first start imports the prices, creates an account and an API key, and
   prints a link to set the operator's password.

   {made["start"]}

   Without an upstream's key, add --demo to see canned answers.
3. Open the dashboard at {made["dashboard"]}. If something is wrong, this says what:

   {command} check

The ledger is {made["database"]}."""
