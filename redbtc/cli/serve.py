"""The commands serve and check."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sqlite3
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import click
import msgspec
import orjson

from redbtc.billing.billing import Billing
from redbtc.billing.document_files import Document, read_documents
from redbtc.billing.price_changes import add_prices
from redbtc.billing.prices import Price
from redbtc.cli.first_run import dashboard_lines, import_example, welcome
from redbtc.cli.main import CommandContext, commands, json_option
from redbtc.codex.catalog import read_catalog
from redbtc.config import (
    LoadedSettings,
    Settings,
    missing_keys,
    url_of,
    with_demo,
)
from redbtc.errors import StorageUnavailable, UserError
from redbtc.gateway.reloading import publish_documents
from redbtc.gateway.service import Service
from redbtc.gateway.unopened_ledger import UnopenedLedger
from redbtc.money import NANOS
from redbtc.server.listening import address_of, listen, raise_descriptor_limit, server_for
from redbtc.store.database import Store
from redbtc.store.failures import DAMAGED_AT_START, LedgerDamaged, opening_error
from redbtc.store.files import DatabaseInUse, state_of
from redbtc.store.health import RETRY_SECONDS
from redbtc.store.opening import Serving
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
    first_run: bool
    accept_clock: bool
    as_json: bool


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
) -> Service:
    """Open the ledger, however long that takes, and say that the gateway serves. Raises
    UserError."""
    settings = options.settings
    billing = await open_ledger(stack, options, process)
    if options.demo:
        process.demo = await start_demo(stack)
        settings = with_demo(settings, process.demo)
    if options.first_run and not billing.prices.prices:
        await import_example(billing)
    if options.demo and billing.model_prices(DEMO_PRICE.model) is None:
        await add_prices(billing, [DEMO_PRICE], without_notice=None, by="demo")
    host, port = listeners[0].getsockname()[:2]
    url = f"{url_of(host, port)}/v1"
    log_start(url, listeners, billing.store, settings)
    if options.as_json:
        click.echo(orjson.dumps({"base_url": url, "pid": os.getpid()}))
    if not billing.prices.prices and settings.billing.unpriced_models == "refuse":
        reason = "requests for all models are refused; add prices with price import"
        log(logging.WARNING, "no prices", reason=reason)
    server = msgspec.structs.replace(settings.server, port=port)
    settings = msgspec.structs.replace(settings, server=server)
    path = options.loaded.database_path
    request_log = await stack.enter_async_context(
        RequestLog.open(path, settings, billing.store.time, log)
    )
    end_if_failed = process.end_if_failed
    service = Service(billing, settings, process.telemetry, end_if_failed, request_log)
    gateway = service.gateway
    if not options.as_json:
        await greet(service, url, settings, options)
    try:
        await gateway.resume()
    except (sqlite3.Error, StorageUnavailable) as error:
        if not billing.store.is_lost:  # a lost ledger serves nothing anyway
            raise UserError(f"{billing.store.path} can't be read: {error}") from None
    return service


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
            click.echo(await welcome(service.api, url, settings.upstreams, options.demo))
        click.echo(await dashboard_lines(service.api))
    except (sqlite3.Error, StorageUnavailable) as error:
        log(logging.ERROR, "no welcome", reason=str(error))


async def open_ledger(
    stack: contextlib.AsyncExitStack, options: ServeOptions, process: Process
) -> Billing:
    """Open the ledger, and publish what is new of the documents. Try again for as long as its disk
    is full or does not answer, and whenever a damaged file has been replaced. Raises UserError if
    trying again can't help."""
    database, path = options.settings.database, options.loaded.database_path
    serving = Serving(database.check_seconds, options.accept_clock, log, process.closing)
    said, unopened = "", UnopenedLedger(options.settings.billing, log)
    stack.push_async_callback(unopened.end, None)
    while True:
        tried = state_of(path)
        try:
            opening = Store.open(path, database.synchronous, serving)
            async with contextlib.AsyncExitStack() as opened:
                store = await opened.enter_async_context(opening)
                billing = await open_billing(store, options)
                await unopened.end(billing.messages)
                stack.push_async_exit(opened.pop_all())
                return billing
        except LedgerDamaged as error:
            unopened.note(str(error))
            if str(error) != said:
                said = str(error)
                log(logging.CRITICAL, "ledger damaged", reason=said, what_to_do=DAMAGED_AT_START)
            await asyncio.sleep(DAMAGED_FILE_SECONDS)
            while state_of(path) == tried:
                await asyncio.sleep(DAMAGED_FILE_SECONDS)
        except (StorageUnavailable, DatabaseInUse) as error:
            if not said and isinstance(error, DatabaseInUse):
                raise
            if str(error) != said:
                said = str(error)
                log(logging.ERROR, "ledger unavailable", reason=said)
            unopened.note(said)
            await asyncio.sleep(RETRY_SECONDS)


async def open_billing(store: Store, options: ServeOptions) -> Billing:
    """Read the prices from an open database, and publish what is new of the documents. Raises
    UserError."""
    settings = options.settings
    try:
        billing = await Billing.open(store, settings.billing)
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
                loaded, settings, documents, demo, first_run, accept_clock, as_json
            )
            status = runner.run(context.run(options))
    finally:
        LOG.flush()
    raise SystemExit(status)
