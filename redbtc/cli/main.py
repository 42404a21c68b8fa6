"""The command line: options and output that all commands share."""

from __future__ import annotations

import asyncio
import os
import re
import sqlite3
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

import click
import httpx2
import msgspec
import orjson

from redbtc.admin.http import ERROR_MESSAGES
from redbtc.cli.connect import connect
from redbtc.config import LoadedSettings, load_settings
from redbtc.errors import UserError
from redbtc.money import parse_limit
from redbtc.release import RELEASE
from redbtc.start import restore_signals
from redbtc.store.accounts import LIMITS
from redbtc.store.schema import newest_version

Run = Callable[
    ..., Coroutine[Any, Any, int]
]  # of ServeOptions: runs the gateway, returns the exit status


class CommandContext:
    """The options before the command, and the calls to the admin API. The settings file is read
    each time that `loaded` is used."""

    def __init__(self, config: str | None, run: Run) -> None:
        self._config = config
        self.run = run

    @property
    def loaded(self) -> LoadedSettings:
        return load_settings(self._config)

    def call(self, method: str, path: str, body: Any = None, query: Any = None) -> Any:
        """Send a request to the admin API and return the JSON of its answer. Raises UserError with
        the answer's error message."""
        content = None if body is None else msgspec.json.encode(body)

        async def ask() -> Any:
            async with connect(self.loaded) as client:
                response = await client.request(method, path, content=content, params=query)
                return content_of(response.status_code, response.content)

        return asyncio.run(ask())

    def follow(self, path: str, body: Any, on_line: Callable[[Any], None]) -> None:
        """Send a POST request to the admin API, and call `on_line` with each line of JSON of its
        answer, as it comes. Raises UserError with the answer's error message."""

        async def ask() -> None:
            content = msgspec.json.encode(body)
            async with (
                connect(self.loaded) as client,
                client.stream("POST", path, content=content) as response,
            ):
                if response.status_code != 200:
                    content_of(response.status_code, await response.aread())
                async for line in response.aiter_lines():
                    on_line(orjson.loads(line))

        asyncio.run(ask())

    def copy(self, path: str, query: Any, out: Any) -> None:
        """Copy the admin API's answer to a GET to `out`, as it comes."""

        async def ask() -> None:
            async with (
                connect(self.loaded) as client,
                client.stream("GET", path, params=query) as response,
            ):
                if response.status_code != 200:
                    content_of(response.status_code, await response.aread())
                async for chunk in response.aiter_bytes():
                    out.write(chunk)

        asyncio.run(ask())


def content_of(status: int, body: bytes) -> Any:
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise UserError(f"the gateway answered with status {status}; see its log") from None
    if status < 400:
        return content
    message = content["error"]["message"]
    if message == ERROR_MESSAGES[404]:
        message = "the running gateway has another version, without this command: restart it"
    raise UserError(message)


class LimitType(click.ParamType[Any]):
    """A number, or `default` for the default from config.toml."""

    name = "number"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if value == "default":
            return value
        if not re.fullmatch(r"\d{1,9}", value):
            self.fail(
                f"{value!r} is not valid: give a number up to 999999999, or 'default'", param, ctx
            )
        return int(value)


class AmountType(click.ParamType[Any]):
    """An amount of money, `unlimited`, or `default` for the default from config.toml."""

    name = "amount"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if value != "default":
            try:
                parse_limit(value)
            except UserError as error:
                self.fail(str(error), param, ctx)
        return value


Decorated = Callable[..., Any]
LIMIT_TEXTS = {
    "concurrency": "Maximum requests in flight. 0 means no limit.",
    "requests_per_minute": "Maximum requests per minute. 0 means no limit.",
    "tokens_per_minute": "Maximum tokens per minute. 0 means no limit.",
    "monthly_budget": "Maximum spending per calendar month (UTC): an amount, or unlimited.",
    "credit_limit": "How far the balance may go below zero: an amount, or unlimited.",
}


def limit_options(names: Iterable[str]) -> Callable[[Decorated], Decorated]:
    def decorate(function: Decorated) -> Decorated:
        for name in reversed(list(names)):
            option = "--" + name.replace("_", "-")
            kind = LimitType() if name in LIMITS else AmountType()
            function = click.option(option, type=kind, help=LIMIT_TEXTS[name])(function)
        return function

    return decorate


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def given(values: dict[str, Any]) -> dict[str, Any]:
    """Return the options that were given, with null for `default`, as the API expects it."""
    return {
        name: None if value == "default" else value
        for name, value in values.items()
        if value is not None
    }


CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def show(content: Any, as_json: bool, text: Callable[[], str]) -> None:
    click.echo(orjson.dumps(content, option=orjson.OPT_INDENT_2) if as_json else text())


def plain(text: str) -> str:
    """Return a text for the terminal: what users have named must not steer it."""
    return CONTROL_CHARACTERS.sub(lambda found: repr(found[0])[1:-1], text)


def cell(value: Any) -> str:
    """Return a value as text for the terminal, a dash for None."""
    value = ",".join(value) if isinstance(value, list) else value
    return "-" if value is None else plain(str(value))


def table(rows: Iterable[dict[str, Any]], columns: list[str]) -> str:
    """Return rows as lines of text, under the names of their columns."""
    lines = [columns] + [[cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def details(record: dict[str, Any]) -> str:
    width = max(len(name) for name in record)
    return "\n".join(f"{name.ljust(width)}  {cell(value)}" for name, value in record.items())


def show_version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    """Print the version of the program and of the schema that it writes, and end."""
    if wanted:
        click.echo(f"redbtc-proxy {RELEASE} (schema {newest_version()})")
        context.exit()


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--config",
    metavar="PATH",
    help="Read settings from PATH, not from $REDBTC_CONFIG or config.toml beside the program.",
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=show_version,
    help="Print the version of the program, and of the schema that it writes.",
)
@click.pass_context
def commands(context: click.Context, config: str | None) -> None:
    """RedBTC AI: an OpenAI-compatible API gateway."""
    context.obj = CommandContext(config, context.obj)
    if context.invoked_subcommand is None:
        context.invoke(commands.commands["serve"])
    elif context.invoked_subcommand != "serve":  # which handles signals in its own way
        restore_signals()


def main(run: Run) -> None:
    """Run the command line; exit 0 done, 1 refused or failed, 2 wrong usage. `run` serves."""
    try:
        commands(prog_name="redbtc-proxy", obj=run)
    except (UserError, sqlite3.Error, httpx2.HTTPError) as error:
        click.echo(f"Error: {error}", err=True)
        raise SystemExit(1) from None
    except FileNotFoundError:
        if current_folder_exists():
            raise
        click.echo("Error: the current folder was removed; change to another one", err=True)
        raise SystemExit(1) from None
    except UnicodeEncodeError:
        click.echo("Error: an argument is not valid UTF-8", err=True)
        raise SystemExit(2) from None


def current_folder_exists() -> bool:
    """Return whether the folder in which the command was given still exists."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True
