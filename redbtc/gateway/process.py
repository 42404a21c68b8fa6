"""The gateway as a process: its servers, its signals, its end."""

from __future__ import annotations

import asyncio
import gc
import heapq
import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

import msgspec

from redbtc.admin import http
from redbtc.admin.http import served
from redbtc.billing.webhook import post_for_ever
from redbtc.config import Loaded, Settings, SettingsError, UpstreamSettings, reload_settings
from redbtc.errors import UserError
from redbtc.gateway.exchange import PRESERVE_GROWTH, PRESERVE_SECONDS
from redbtc.gateway.handlers import unknown_url
from redbtc.gateway.routes import apps_of, not_open
from redbtc.gateway.state import DEMO, Gateway
from redbtc.gateway.vitals import watch_size
from redbtc.server.connections import Connections
from redbtc.server.cors import CORS
from redbtc.server.guard import Guard
from redbtc.server.listening import Server, configured, server_for
from redbtc.server.unix_socket import AdminServer, socket_path
from redbtc.server.websocket_protocol import WebSocketProtocol
from redbtc.slices import with_turns
from redbtc.start import end_soon, finish
from redbtc.store.clock import watch_clock
from redbtc.telemetry import LOG, Telemetry, log, shown_error
from redbtc.upstream.upstreams import PING_SECONDS

OPENING_SECONDS = 2.0  # if the ledger is not open after them, requests are answered without it
STOPPING_SECONDS = 10  # for the rows of what is cut off when the process ends
WATCH_SECONDS = 0.25
EXIT_SOFTWARE = 70  # a task of the process has ended (EX_SOFTWARE of sysexits.h)


class GatewayProcess:
    """The gateway as a process: its servers, its signals, its end."""

    def __init__(self, loaded: Loaded, settings: Settings) -> None:
        self._loaded = loaded
        self._settings = settings
        self.watch = Telemetry()
        self.status = 0  # that the process exits with
        self._gateway: Gateway | None = None  # None until its ledger is open
        self.demo: str | None = None  # the URL of the demonstration upstream, where that is served
        self._opening: asyncio.Task[Gateway] | None = None
        self._reload_wanted = False
        self._guard = Guard({}, not_open, not_open, self.watch)
        self._servers: list[Server] = []
        self._connections = Connections(self._offers_websocket)
        self._draining: asyncio.Task[None] | None = None
        self._over = False  # the tasks may end
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._terminate)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        finish()

    def _offers_websocket(self) -> bool:
        return self._gateway is not None and self._gateway.offers_websocket()

    async def serve(self, listeners: list[socket.socket], opening: asyncio.Task[Gateway]) -> None:
        """Serve until a signal ends it, or one of its tasks. Before `opening` is done, requests are
        refused. Raises UserError where the ledger can't be opened."""
        self._opening = opening
        await asyncio.wait([opening], timeout=OPENING_SECONDS)
        if self._draining:
            self._over = True
            return
        if opening.done():
            opening.result()
        else:
            log(logging.WARNING, "ledger not open yet", reason="requests are refused until it is")
        try:
            async with asyncio.TaskGroup() as servers:
                servers.create_task(self._serve_gateway(opening))  # first, so that commands work
                servers.create_task(self._public().serve(listeners))
        except* UserError as group:
            raise group.exceptions[0] from None
        finally:
            self._over = True

    def closing(self) -> None:
        """Expect the end of the process if the files are closed because it has served. They are
        also closed when an attempt to open them has failed, which is repeated."""
        if self._over:
            end_soon(EXIT_SOFTWARE)

    def _public(self) -> Server:
        app = CORS(self._guard, lambda: self._settings.server.cors_origins)
        server = server_for(
            app,
            self._connections,
            proxy_headers=True,
            forwarded_allow_ips=list(self._settings.server.trusted_proxies),
            ws=WebSocketProtocol,
            ws_per_message_deflate=False,
            ws_ping_interval=PING_SECONDS,
            ws_ping_timeout=60,
        )
        self._servers.append(server)
        return server

    async def _serve_gateway(self, opening: asyncio.Task[Gateway]) -> None:
        """Serve the gateway as soon as it is there, and its admin API on the Unix socket."""
        gateway = self._gateway = await opening
        if self._reload_wanted:
            self._reload()
        tasks = [
            *gateway.store.commits.tasks,
            asyncio.create_task(post_for_ever(gateway.books, log), name="webhook"),
            asyncio.create_task(preserve(gateway), name="preserve"),
            asyncio.create_task(watch_clock(gateway.store.clock, log), name="clock"),
            asyncio.create_task(watch_size(gateway.store), name="size"),
            asyncio.create_task(gateway.vitals.watch_loop(), name="loop lag"),
            asyncio.create_task(watch_log(), name="log"),
        ]
        for task in tasks:
            task.add_done_callback(self._ended)
        gateway.unended.ended = self._failed
        self._guard.lead_to(*apps_of(gateway))
        gc.freeze()  # what is there now stays, as in redbtc_start.finish
        with socket_path(gateway.store.path) as path:
            api = gateway.in_time(served(gateway.api, http.local))
            guarded = Guard({}, api, unknown_url, self.watch)
            local = AdminServer(configured(guarded, uds=path, proxy_headers=False))
            self._servers.append(local)
            with local.listening():
                await local.serve()
        self._over = True
        for task in tasks[2:]:
            task.cancel()

    def _failed(self, task: asyncio.Task[Any]) -> None:
        """End the process if a task has failed."""
        if not task.cancelled() and task.exception():
            self._ended(task)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        """A task that must not end has ended: say why, and end the process, so that a supervisor
        starts it again."""
        if self._over:
            return
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        log(logging.CRITICAL, "task ended", task=task.get_name(), **shown_error(error))
        self.status = EXIT_SOFTWARE
        if self._gateway and task in self._gateway.store.commits.tasks:
            self._end_now()
        if not self._draining:
            self._draining = asyncio.create_task(self._drain(0))

    def _end_now(self) -> None:
        """End the process without waiting for anything. What is owed to the ledger is kept."""
        end_soon(EXIT_SOFTWARE)
        if self._gateway:
            self._gateway.store.commits.spill_now()
        LOG.flush()
        os._exit(self.status)

    def _terminate(self) -> None:
        if self._draining:
            in_flight = self._gateway.in_flight if self._gateway else 0
            log(logging.WARNING, "terminated", in_flight=in_flight)
            self.status = 128 + signal.SIGTERM
            self._end_now()
        self._draining = asyncio.create_task(self._drain(self._settings.server.drain_seconds))

    async def _drain(self, seconds: float) -> None:
        """Admit no new requests; those in flight may finish, and clients may read what was
        answered, for so many seconds."""
        if self._gateway:
            await self._drain_gateway(self._gateway, seconds)
        elif self._opening:
            end_soon(EXIT_SOFTWARE)  # the disk may not answer
            self._opening.cancel()
        for server in self._servers:
            server.should_exit = True

    async def _drain_gateway(self, gateway: Gateway, seconds: float) -> None:
        gateway.draining = True
        log(logging.INFO, "draining", in_flight=gateway.in_flight)
        await self._wait_while(self._is_busy, gateway, seconds)
        log(logging.INFO, "stopping", in_flight=gateway.in_flight)
        if gateway.in_flight:
            gateway.stop()
        await self._wait_while(lambda gateway: gateway.in_flight > 0, gateway, STOPPING_SECONDS)

    async def _wait_while(
        self, holds: Callable[[Gateway], bool], gateway: Gateway, seconds: float
    ) -> None:
        deadline = time.monotonic() + seconds
        while holds(gateway) and time.monotonic() < deadline:
            gateway.store.give_up_if_failing()
            await asyncio.sleep(0.05)

    def _is_busy(self, gateway: Gateway) -> bool:
        return gateway.in_flight > 0 or self._connections.unsent

    def _reload(self) -> None:
        """Read the settings again; a bad file changes nothing."""
        if self._gateway is None:
            self._reload_wanted = True
            return
        old = self._gateway.settings
        try:
            new = reload_settings(self._loaded)
        except SettingsError as error:
            log(logging.ERROR, "reload refused", reason=str(error))
            return
        if self.demo:
            new = with_demo(new, self.demo)
        self._settings = new
        self._gateway.apply(new)
        LOG.level = getattr(logging, new.server.log_level.upper())
        fixed = [
            name
            for name, before, after in (
                ("server.host", old.server.hosts, new.server.hosts),
                ("server.port", old.server.port, new.server.port),
                ("server.trusted_proxies", old.server.trusted_proxies, new.server.trusted_proxies),
                ("database", old.database, new.database),
                ("billing.currency", old.billing.currency, new.billing.currency),
            )
            if before != after
        ]
        log(logging.INFO, "reloaded", needs_restart=fixed)
        for line in missing_keys(new):
            log(logging.WARNING, "unusable", reason=line)


def with_demo(settings: Settings, url: str) -> Settings:
    """The settings with the demonstration upstream in place of all others."""
    demo = UpstreamSettings(name=DEMO, base_url=url, api_key_env="")
    return msgspec.structs.replace(settings, upstreams=(demo,))


def missing_keys(settings: Settings) -> list[str]:
    """What can't be used, since the environment has no key for it."""
    wanted = {f"upstream {upstream.name}": upstream.api_key_env for upstream in settings.upstreams}
    wanted["billing.webhook_url"] = settings.billing.webhook_secret_env
    return [
        f"{what}: the environment has no {variable}"
        for what, variable in wanted.items()
        if variable and not os.environ.get(variable)
    ]


async def watch_log() -> None:
    """Raise what has ended the log's thread, which must not happen."""
    while LOG.works:
        await asyncio.sleep(WATCH_SECONDS)
    if LOG.failure:
        raise LOG.failure


# At most this number or this share of the running requests is preserved in a second, whichever is
# more: each takes 0.1 ms.
MAX_PRESERVED, MAX_PRESERVED_SHARE = 20, 0.05


async def preserve(gateway: Gateway) -> None:
    """Keep what requests in flight have used so far, for as long as the gateway runs."""
    while True:
        await asyncio.sleep(PRESERVE_SECONDS)
        try:
            if gateway.store.healthy:
                await preserve_some(gateway, time.monotonic())
        except Exception as error:  # that should not happen, and must not end this
            log(logging.ERROR, "not preserved", error=type(error).__name__)


async def preserve_some(gateway: Gateway, now: float) -> None:
    """Keep what requests in flight have used so far, of those first of which the smallest part is
    kept. `now` is by the monotonic clock."""
    await gateway.unended.preserve(now)
    most = max(MAX_PRESERVED, round(MAX_PRESERVED_SHARE * len(gateway.running)))
    growth = {each: each.growth_since_preserved(now) for each in gateway.running}
    due = [each for each, times in growth.items() if times >= PRESERVE_GROWTH]
    async for each in with_turns(heapq.nlargest(most, due, key=lambda each: growth[each])):
        await each.preserve()
