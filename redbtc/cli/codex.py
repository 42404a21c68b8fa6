"""The command codex: the configuration and the model catalogue of Codex CLI."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import click

from redbtc.cli.main import CommandContext, commands, given, json_option, show
from redbtc.codex.catalog import MAX_BODY, CatalogError, CatalogModel, parse_catalog, size_of
from redbtc.codex.config_toml import KEY_VARIABLE
from redbtc.config import LoadedSettings, is_web_address
from redbtc.errors import UserError

CATALOG_FILE = "codex-models.json"
CODEX_SECONDS = 30
MAX_ERROR = 200  # characters of what Codex says when it fails


@commands.group()
def codex() -> None:
    """Configure Codex CLI, and make its model catalogue."""


@codex.command("config")
@click.option(
    "--key", metavar="LABEL", help="Choose a model that the key with this label or id may use."
)
@click.option(
    "--own-login",
    is_flag=True,
    help="For users whose own ChatGPT login or API key goes to the upstream.  [default: only if "
    "all upstreams are for these]",
)
@json_option
@click.pass_obj
def codex_config(context: CommandContext, key: str | None, own_login: bool, as_json: bool) -> None:
    """Print what to put into Codex CLI's config.toml.

    It depends on the settings: on server.public_url, on whether an upstream offers WebSocket, on
    upstreams with credentials = "client", and on codex.catalog. Comments say why each line is
    there."""
    query = given({"key": key, "own_login": "true" if own_login else None})
    found = context.call("GET", "/admin/v1/codex-config", query=query)
    where = (
        f"# For ~/.codex/config.toml. The key is read from the environment variable {KEY_VARIABLE}."
    )
    show(found, as_json, lambda: f"{where}\n{found['config']}".rstrip())


@codex.command("catalog")
@click.option(
    "--output",
    metavar="FILE",
    help="Write to FILE.  [default: the file of codex.catalog, or else codex-models.json beside "
    "the settings file]",
)
@click.option(
    "--codex",
    "program",
    metavar="PATH",
    default="codex",
    help="Run Codex CLI from PATH.  [default: codex, as found by the shell]",
)
@json_option
@click.pass_obj
def codex_catalog(context: CommandContext, output: str | None, program: str, as_json: bool) -> None:
    """Make the model catalogue from an installed Codex CLI.

    Codex needs no login for this, and its own configuration is not used. An existing file is
    replaced only by a valid catalogue. A running gateway reads the file when it gets SIGHUP."""
    loaded = context.loaded
    text = printed_by(program)
    try:
        models = parse_catalog(text)
    except CatalogError as error:
        raise UserError(f"what {program} debug models printed can't be used: {error}") from None
    path = Path(output).absolute() if output else default_path(loaded)
    write_whole(path, text)
    made: dict[str, Any] = {
        "file": str(path),
        "models": [each.slug for each in models],
        "bytes": size_of(models),
    }
    show(made, as_json, lambda: made_text(loaded, path, models))


def printed_by(program: str) -> bytes:
    """Return what `codex debug models` prints, with an empty configuration. Raises UserError."""
    found = shutil.which(program)
    if found is None:
        raise UserError(f"{program}: not found; give the path of Codex CLI with --codex PATH")
    found = os.path.abspath(found)  # it runs in another directory
    with tempfile.TemporaryDirectory(prefix="redbtc-codex-") as home:
        kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
        try:
            done = subprocess.run(
                [found, "debug", "models"],
                env={**kept, "HOME": home, "CODEX_HOME": home},
                cwd=home,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=CODEX_SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise UserError(f"{found} printed nothing within {CODEX_SECONDS} s") from None
        except OSError as error:
            raise UserError(f"{found}: {error.strerror}") from None
    if done.returncode:
        said = (
            done.stderr.decode(errors="replace").strip().rpartition("\n")[2][:MAX_ERROR]
            or "it said nothing"
        )
        raise UserError(f"{found} debug models failed with status {done.returncode}: {said}")
    return done.stdout


def default_path(loaded: LoadedSettings) -> Path:
    """Return where the catalogue is written if no file is given."""
    place = loaded.settings.codex.catalog
    return Path(place) if place and not is_web_address(place) else loaded.folder / CATALOG_FILE


def write_whole(path: Path, text: bytes) -> None:
    """Write a file so that nobody ever reads a part of it. Raises UserError."""
    new = path.with_name(f".{path.name}.new")
    try:
        with new.open("wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        new.chmod(0o644)
        new.replace(path)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise UserError(f"{path}: {error.strerror}") from None


def made_text(loaded: LoadedSettings, path: Path, models: tuple[CatalogModel, ...]) -> str:
    size = size_of(models)
    lines = [f"Wrote {path}: {len(models)} models, {size} bytes."]
    if size > MAX_BODY:
        lines.append(
            f"Codex may ignore a catalogue of more than {MAX_BODY} bytes. Models without a price "
            "don't count: clients don't get them."
        )
    if loaded.settings.codex.catalog != str(path):
        shown = path.name if path.parent == loaded.folder else path
        lines.append(f'Put this into the settings, and reload:\n\n[codex]\ncatalog = "{shown}"\n')
        lines.append("Then give users the configuration that redbtc-proxy codex config prints.")
    return "\n".join(lines)
