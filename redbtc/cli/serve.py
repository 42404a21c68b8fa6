"""The command serve."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import click
import msgspec
import orjson

from redbtc.billing.billing import Billing
from redbtc.billing.document_files import Document, read_documents
from redbtc.billing.overviews import has_traffic_beside
from redbtc.billing.price_changes import add_prices
from redbtc.billing.prices import Price
from redbtc.cli.first_run import dashboard_lines, import_example, welcome
from redbtc.cli.main import CommandContext, commands, json_option
from redbtc.cli.program import command_for
from redbtc.codex.catalog import read_catalog
from redbtc.config import (
    DEMO,
    LoadedSettings,
    Settings,
    lacks_all_keys,
    missing_keys,
    url_of,
    with_demo,
)
from redbtc.errors import StorageUnavailable, UserError
from redbtc.gateway.reloading import publish_documents, publish_reloaded
from redbtc.gateway.service import Service
from redbtc.gateway.unopened_ledger import UnopenedLedger
from redbtc.money import NANOS
from redbtc.server.listening import address_of, listen, raise_descriptor_limit, server_for
from redbtc.store.database import Store
from redbtc.store.failures import DAMAGED_AT_START, LedgerDamaged, opening_error
from redbtc.store.files import DatabaseInUse, state_of
from redbtc.store.health import RETRY_SECONDS
from redbtc.store.opening import JoinedFiles, SchemaChanges, Serving
from redbtc.store.request_log import RequestLog
from redbtc.telemetry import LOG, Telemetry, log
from redbtc.upstream.certificates import check_ca_files
from redbtc.upstream.event_loop import EventLoop

DAMAGED_FILE_SECONDS = 0.25  # between two looks at a database file that is damaged
DEMO_PRICE = Price(
    "redbtc-demo*",
    input=NANOS,
    output=4 * NANOS,
    max_output_tokens=1000,
    source="made up for the demonstration",
)


class ServeOptions(NamedTuple):
    """The options of the command serve."""

    loaded: LoadedSettings
    settings: Settings
    documents: list[Document]  # of [site]
    demo: bool
    demo_if_unused: bool  # serve the demonstration if no other upstream has had a request
    first_run: bool
    accept_clock: bool
    as_json: bool


class TakingOver(Protocol):
    """The process that this one takes over from, as far as opening the ledger needs it."""

    files: JoinedFiles | None  # None: that process ends first
    followed: set[str]  # background responses whose requests are in flight in other processes

    async def wait_for_end(self, changes: SchemaChanges, database: Path) -> None:
        """Wait until the other process has ended. Raises UserError."""

    async def take_over(self, service: Service) -> None:
        """Say that this process is ready, and take over. Raises UserError."""

    def refuse(self) -> None:
        """Let requests be refused until the ledger can be opened."""


class Process(Protocol):
    """The process, as far as opening the ledger needs it."""

    telemetry: Telemetry
    demo: str | None  # the URL of the demonstration upstream, where that is served

    def closing(self) -> None:
        """Expect the end of the process if the files are closed because it has served."""

    def end_if_failed(self, task: asyncio.Task[Any]) -> None:
        """End the process if a task has failed."""


async def open_service(
    stack: contextlib.AsyncExitStack,
    options: ServeOptions,
    process: Process,
    listeners: list[socket.socket],
    joining: TakingOver | None,
) -> Service:
    """Open the ledger, however long that takes, and say that the gateway serves. With `joining`,
    take over from another process. Raises UserError."""
    settings = options.settings
    billing = await open_ledger(stack, options, process, joining)
    takes_over = joining is not None and joining.files is not None
    if options.demo_if_unused and not await has_traffic_beside(billing.store, DEMO):
        options = options._replace(demo=True)
    if options.demo:
        process.demo = await start_demo(stack)
        settings = with_demo(settings, process.demo)
    if not takes_over:
        await prepare_ledger(billing, options)
    host, port = listeners[0].getsockname()[:2]
    url = f"{url_of(host, port)}/v1"
    server = msgspec.structs.replace(settings.server, port=port)
    settings = msgspec.structs.replace(settings, server=server)
    path = options.loaded.database_path
    request_log = await stack.enter_async_context(
        RequestLog.open(path, settings, billing.store.time, log)
    )
    end_if_failed = process.end_if_failed
    service = Service(billing, settings, process.telemetry, end_if_failed, request_log)
    gateway = service.gateway
    if joining and takes_over:
        await joining.take_over(service)
        await publish_reloaded(billing, options.documents, settings)
    log_start(url, listeners, billing.store, settings)
    if not billing.prices.prices and settings.billing.unpriced_models == "refuse":
        reason = "requests for all models are refused; add prices with price import"
        log(logging.WARNING, "no prices", reason=reason)
    if options.as_json and not joining:
        click.echo(orjson.dumps({"base_url": url, "pid": os.getpid()}))
    elif not joining:
        await greet(service, url, settings, options)
    try:
        await gateway.resume(joining.followed if joining else ())
    except (sqlite3.Error, StorageUnavailable) as error:
        if not billing.store.is_lost:  # a lost ledger serves nothing anyway
            raise UserError(f"{billing.store.path} can't be read: {error}") from None
    return service


async def prepare_ledger(billing: Billing, options: ServeOptions) -> None:
    """Add the prices that a first run or a demonstration needs. Raises UserError."""
    if options.first_run and not billing.prices.prices:
        await import_example(billing, options.loaded)
    if options.demo and billing.model_prices(DEMO_PRICE.model) is None:
        await add_prices(billing, [DEMO_PRICE], without_notice=None, by="demo")


def log_start(
    url: str, listeners: Sequence[socket.socket], store: Store, settings: Settings
) -> None:
    """Log that the gateway serves, and what an operator should know of its start."""
    listening = [address_of(each) for each in listeners]
    interrupted = store.interrupted
    log(logging.INFO, "serving", url=url, listening=listening, interrupted_before=interrupted)
    ahead = -store.clock.offset // 1000
    if ahead > 60:
        log(logging.WARNING, "the clock is behind the ledger", seconds=ahead)
    if store.migrated:
        log(logging.INFO, "migrated", **store.migrated._asdict())
    if store.replaced:
        log(logging.INFO, "restore finished", replaced=str(store.replaced))
    for line in missing_keys(settings):
        log(logging.WARNING, "unusable", reason=line)


async def greet(service: Service, url: str, settings: Settings, options: ServeOptions) -> None:
    """Print where the dashboard is and, on the first run, how to begin."""
    try:
        if options.first_run:
            command = command_for(options.loaded)
            click.echo(await welcome(service.api, url, settings.upstreams, options.demo, command))
        click.echo(await dashboard_lines(service.api))
    except (sqlite3.Error, StorageUnavailable) as error:
        log(logging.ERROR, "no welcome", reason=str(error))


async def open_ledger(
    stack: contextlib.AsyncExitStack,
    options: ServeOptions,
    process: Process,
    joining: TakingOver | None,
) -> Billing:
    """Open the ledger, and publish what is new of the documents. Try again for as long as its disk
    is full or does not answer, and whenever a damaged file has been replaced. With `joining`, open
    it beside the process that has it open, if it need not be migrated. Raises UserError if trying
    again can't help."""
    database, path = options.settings.database, options.loaded.database_path
    serving = Serving(database.check_seconds, options.accept_clock, log, process.closing)
    if joining:
        serving.joined = joining.files
        try:
            return await try_to_open(stack, options, serving)
        except SchemaChanges as changes:
            await joining.wait_for_end(changes, path)
            serving.joined = None
        except (StorageUnavailable, LedgerDamaged) as error:
            raise UserError(str(error)) from None
    said, unopened = "", UnopenedLedger(options.settings.billing, log)
    stack.push_async_callback(unopened.end, None)
    while True:
        tried = state_of(path)
        try:
            billing = await try_to_open(stack, options, serving)
            await unopened.end(billing.messages)
            return billing
        except LedgerDamaged as error:
            unopened.note(str(error))
            if joining:
                joining.refuse()
            if str(error) != said:
                said = str(error)
                log(logging.CRITICAL, "ledger damaged", reason=said, what_to_do=DAMAGED_AT_START)
            await asyncio.sleep(DAMAGED_FILE_SECONDS)
            while state_of(path) == tried:
                await asyncio.sleep(DAMAGED_FILE_SECONDS)
        except (StorageUnavailable, DatabaseInUse) as error:
            if not (said or joining) and isinstance(error, DatabaseInUse):
                raise
            if joining:
                joining.refuse()
            if str(error) != said:
                said = str(error)
                log(logging.ERROR, "ledger unavailable", reason=said)
            unopened.note(said)
            await asyncio.sleep(RETRY_SECONDS)


async def try_to_open(
    stack: contextlib.AsyncExitStack, options: ServeOptions, serving: Serving
) -> Billing:
    """Open the ledger until the end of `stack`. Raises UserError, StorageUnavailable."""
    path = options.loaded.database_path
    async with contextlib.AsyncExitStack() as opened:
        opening = Store.open(path, options.settings.database.synchronous, serving)
        store = await opened.enter_async_context(opening)
        billing = await open_billing(store, options, publish=serving.joined is None)
        stack.push_async_exit(opened.pop_all())
        return billing


async def open_billing(store: Store, options: ServeOptions, *, publish: bool) -> Billing:
    """Read the prices from an open database, and with `publish`, publish what is new of the
    documents. Raises UserError."""
    settings = options.settings
    try:
        billing = await Billing.open(store, settings.billing)
        if publish:
            await publish_documents(billing, options.documents, settings)
        return billing
    except sqlite3.Error as error:
        raise opening_error(store.path, error) from None


async def start_demo(stack: contextlib.AsyncExitStack) -> str:
    """Serve the demonstration upstream on a free port of loopback, and return its base URL."""
    from redbtc import demo  # here: it takes time to load, and most gateways don't serve it

    listeners = listen(["127.0.0.1"], 0)
    server = server_for(demo.app())
    serving = asyncio.create_task(server.serve(listeners))

    async def stop() -> None:
        server.should_exit = True
        await serving

    stack.push_async_callback(stop)
    return f"http://{address_of(listeners[0])}/v1"


@commands.command()
@click.option(
    "--host",
    "hosts",
    multiple=True,
    metavar="ADDRESS",
    help="Listen on this address instead of server.host. Can be repeated.",
)
@click.option(
    "--port", type=click.IntRange(0, 65535), help="Listen on this port instead of server.port."
)
@click.option(
    "--demo", is_flag=True, help="Forward to a built-in demonstration upstream with canned answers."
)
@click.option(
    "--demo-if-no-key",
    is_flag=True,
    help="Like --demo, but only if the environment has no upstream's API key, and no upstream has "
    "had a request yet.",
)
@click.option("--first-run", is_flag=True, help="Create an account and a key if there are none.")
@click.option(
    "--accept-clock",
    is_flag=True,
    help="Trust the system clock, even if it is a day behind the ledger or jumps.",
)
@json_option
@click.pass_obj
def serve(
    context: CommandContext,
    hosts: tuple[str, ...],
    port: int | None,
    demo: bool,
    demo_if_no_key: bool,
    first_run: bool,
    accept_clock: bool,
    as_json: bool,
) -> None:
    """Run the gateway (default command)."""
    loaded = context.loaded
    listening = {"host": hosts or None, "port": port}
    given = {name: value for name, value in listening.items() if value is not None}
    server = msgspec.structs.replace(loaded.settings.server, **given)
    settings = msgspec.structs.replace(loaded.settings, server=server)
    demo_if_unused = demo_if_no_key and lacks_all_keys(settings)
    if not demo:
        check_ca_files(settings.upstreams)
    read_catalog(settings.codex.catalog)
    documents = read_documents(settings.site)
    raise_descriptor_limit()
    os.umask(0o077)  # only the gateway's user may read what it writes
    LOG.level = getattr(logging, server.log_level.upper())
    try:
        with asyncio.Runner(loop_factory=EventLoop) as runner:
            options = ServeOptions(
                loaded=loaded,
                settings=settings,
                documents=documents,
                demo=demo,
                demo_if_unused=demo_if_unused,
                first_run=first_run,
                accept_clock=accept_clock,
                as_json=as_json,
            )
            status = runner.run(context.run(options))
    finally:
        LOG.flush()
    raise SystemExit(status)
