"""The connection of commands to the admin API."""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import os
import ssl
import time
from collections.abc import AsyncIterator

import click
import httpx2

from redbtc.admin.actors import StoppedGateway
from redbtc.admin.api import API
from redbtc.admin.http import USER_HEADER, admin_app, local_actor
from redbtc.billing.billing import Billing
from redbtc.cli.in_process import InProcess
from redbtc.config import LoadedSettings
from redbtc.errors import UserError
from redbtc.server.unix_socket import socket_path
from redbtc.store.database import Store
from redbtc.store.files import DatabaseInUse
from redbtc.store.opening import Migrated
from redbtc.store.request_log import RequestLog

PATIENCE_SECONDS = 5


@contextlib.asynccontextmanager
async def connect(loaded: LoadedSettings) -> AsyncIterator[httpx2.AsyncClient]:
    """Connect to the admin API of the running gateway, or serve it in this process if none runs.
    Wait for a gateway that is just starting or stopping. Raises UserError."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        async with contextlib.AsyncExitStack() as stack:
            path = stack.enter_context(socket_path(loaded.database_path))
            try:
                if await _answers(path):
                    no_tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # reads no certificates: 30 ms
                    transport: httpx2.AsyncBaseTransport = httpx2.AsyncHTTPTransport(
                        verify=no_tls, uds=path
                    )
                else:
                    store = await stack.enter_async_context(_open(loaded))
                    for line in opening(store):
                        click.echo(line, err=True)
                    billing = await Billing.open(store, loaded.settings.billing)
                    stopped = StoppedGateway(loaded.settings)
                    request_log = await stack.enter_async_context(
                        RequestLog.open(loaded.database_path, loaded.settings)
                    )
                    api = API(billing, stopped, loaded.settings.dashboard_url, request_log)
                    transport = InProcess(admin_app(api, local_actor))
            except DatabaseInUse:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.05)
                continue
            yield await stack.enter_async_context(
                httpx2.AsyncClient(
                    transport=transport,
                    base_url="http://gateway",
                    headers={USER_HEADER: user_name().encode()},
                    timeout=None,
                    trust_env=False,
                )
            )
            return


def _open(loaded: LoadedSettings) -> contextlib.AbstractAsyncContextManager[Store]:
    os.umask(0o077)
    return Store.open(loaded.database_path, loaded.settings.database.synchronous)


def opening(store: Store) -> list[str]:
    """Return lines for people that say what opening the database has changed."""
    lines = [migration_text(store.migrated)] if store.migrated else []
    if store.replaced:
        lines.append(
            f"An interrupted restore was finished. The replaced database is kept: {store.replaced}"
        )
    return lines


def migration_text(migrated: Migrated) -> str:
    before, after, seconds, copy, no_copy = migrated
    text = f"Migrated the database from schema {before} to {after} in {seconds} s."
    return f"{text} A copy of the old one is kept: {copy}" if copy else f"{text} {no_copy}"


async def _answers(path: str) -> bool:
    try:
        _, writer = await asyncio.open_unix_connection(path)
    except (FileNotFoundError, ConnectionRefusedError):
        return False
    except OSError as error:
        raise UserError(f"the gateway's socket {path}: {error.strerror}") from None
    writer.close()
    await writer.wait_closed()
    return True


def user_name() -> str:
    """Return the name of the user who gives this command, for the log of changes."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"
