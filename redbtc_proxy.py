#!/usr/bin/env python3
"""RedBTC AI: an OpenAI-compatible API gateway that is small enough to read.

    authenticate ─► read ─► choose ─► admit ─► open ─► relay ─► settle ─► last byte

Clients point their base URL here. Each request is checked, held to its account's limits, forwarded
byte for byte to an upstream, and recorded: what the upstream says was used is committed before the
client sees the end of the answer. The code is in the package beside this file, by subject:

    redbtc/server/        the client's side of HTTP: connections, heads, bodies, WebSocket frames
    redbtc/gateway/       the path of a request, and the routes
    redbtc/handover/      a new process takes over from the running one
    redbtc/request_body/  what must be known of a request's body
    redbtc/limits/        requests in flight, requests and tokens per minute, memory for bodies
    redbtc/upstream/      the upstream side of HTTP: which upstream, and how to reach it
    redbtc/meter/         the usage in an answer
    redbtc/billing/       prices, spending, statements
    redbtc/store/         the ledger's database
    redbtc/admin/         the admin API, which commands and pages use
    redbtc/dashboard/     the pages
    redbtc/codex/         the model catalogue and the configuration of Codex CLI
    redbtc/cli/           the commands
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take 0.2 s
    from redbtc import start

    start.prepare()

import asyncio
import contextlib
import gc
import logging
import os
import signal
from typing import Any

from starlette.routing import Route, Router

from redbtc import start, waiting_process
from redbtc.admin.http import admin_app, local_actor
from redbtc.cli import commands
from redbtc.cli.serve import ServeOptions, open_service
from redbtc.config import (
    LoadedSettings,
    Settings,
    SettingsError,
    reload_settings,
    with_demo,
)
from redbtc.errors import UserError
from redbtc.gateway.admin_routes import finished_at_end, in_time
from redbtc.gateway.draining import drain
from redbtc.gateway.endpoints import METERED, RESPONSES
from redbtc.gateway.health import healthz
from redbtc.gateway.metered_route import MeteredRoute
from redbtc.gateway.plain_routes import AsApp, NotServed, get_route, unknown_url
from redbtc.gateway.reloading import apply_settings, publish_reloaded
from redbtc.gateway.service import Service
from redbtc.gateway.stored import stored_routes
from redbtc.gateway.websocket.session import serve_websocket
from redbtc.handover.handover import Handover
from redbtc.handover.joining import Joining
from redbtc.handover.listeners import Listeners, open_listeners
from redbtc.headers import header
from redbtc.refusals import Refusal
from redbtc.server.asgi import App, Receive, Scope, Send, request_of
from redbtc.server.connections import Connections
from redbtc.server.cors import CORS
from redbtc.server.guard import Guard
from redbtc.server.listening import Server, configured, server_for
from redbtc.server.unix_socket import AdminServer, socket_path
from redbtc.server.websocket_protocol import WebSocketProtocol
from redbtc.telemetry import LOG, Telemetry, log, shown_error
from redbtc.unexpected import log_unexpected_errors
from redbtc.upstream.upstreams import PING_SECONDS

EXIT_SOFTWARE = 70  # a task of the process has ended (EX_SOFTWARE of sysexits.h)


# ── Routes ───────────────────────────────────────────────────────────────────────────────────────


def metered_apps(service: Service) -> dict[str, App]:
    """Return the apps of POST requests that are metered, by path."""
    return {each.path: MeteredRoute(service.gateway, each) for each in METERED}


def other_apps(service: Service) -> App:
    """Return the app of all other requests."""
    models, health, admin = service.models, service.health_routes, service.admin_routes
    routes = [
        *stored_routes(service.gateway),
        get_route("/v1/models", models.list),
        get_route("/v1/models/{model:path}", models.show),
        get_route("/healthz", healthz),
        get_route("/readyz", health.readyz),
        get_route("/metrics", health.metrics),
        get_route("/status", health.status),
        *service.site_routes.routes,
        get_route("/admin/v1/me{rest:path}", admin.me),
        Route("/admin/v1/{rest:path}", AsApp(admin.admin)),
        Route("/dashboard{rest:path}", AsApp(admin.dashboard)),
    ]
    not_served = NotServed([each.path for each in METERED], routes, health)
    return Router(routes, redirect_slashes=False, default=not_served)


def websocket_app(service: Service, others: App) -> App:
    """Return the app of WebSockets: /v1/responses. `others` answers for all other paths."""

    async def session(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] != RESPONSES.path:
            await others(scope, receive, send)
            return
        request = request_of(scope)
        request.route = RESPONSES.path
        origin = header(request.headers, b"origin")
        if origin is not None and not service.health_routes.allows_origin(origin):  # RFC 6455 §10.2
            raise Refusal("origin_not_allowed")
        await serve_websocket(service.gateway, request, receive, send)

    return session


async def not_open(scope: Scope, receive: Receive, send: Send) -> None:
    """Serve requests while the ledger is not open yet."""
    if scope["path"] != "/healthz":
        raise Refusal("ledger_unavailable", headers=[(b"connection", b"close")])
    await healthz(scope, receive, send)


# ── The process ──────────────────────────────────────────────────────────────────────────────────


async def run(options: ServeOptions) -> int:
    """Run the gateway from start to end, and return the exit status. Raises UserError where it
    can't start."""
    settings = options.settings
    joining = await Joining.begin(options.loaded.database_path)
    process = GatewayProcess(options.loaded, settings, joining)
    async with contextlib.AsyncExitStack() as stack:
        listeners = open_listeners(settings.server, joining)
        opening = asyncio.create_task(
            open_service(stack, options, process, listeners.sockets, joining)
        )
        await process.serve(listeners, opening)
    if process.handover.is_over:
        LOG.flush()
        waiting_process.stay(process.handover.successor_pid)
    return process.status


class GatewayProcess:
    """The process that serves: its servers, its signals and its end. `open_service` calls `closing`
    and `end_if_failed`, and sets `demo`."""

    def __init__(self, loaded: LoadedSettings, settings: Settings, joining: Joining | None) -> None:
        self._loaded = loaded
        self._settings = settings
        self.telemetry = Telemetry()
        self.status = 0  # the exit status
        self._service: Service | None = None  # None until the ledger is open
        self.demo: str | None = None  # the URL of the demonstration upstream, where that is served
        self._opening: asyncio.Task[Service] | None = None
        self._reload_wanted = False
        self._publishing: asyncio.Task[None] | None = None  # of documents, after a reload
        self._guard = Guard({}, not_open, not_open, self.telemetry)
        self._connections = Connections(self._offers_websocket)
        self._servers: list[Server] = []
        self._server = self._public()
        self.handover = Handover(
            self._server, self._connections, joining, self._end_after, self.end_if_failed
        )
        self._draining: asyncio.Task[None] | None = None
        self._may_ignore_signal = False
        self._over = False  # the tasks may end
        handlers = {signal.SIGHUP: self._reload, signal.SIGUSR2: self.handover.on_signal}
        handlers |= dict.fromkeys((signal.SIGTERM, signal.SIGINT), self._terminate)
        add, passing_on = asyncio.get_running_loop().add_signal_handler, self.handover.passing_on
        for number, handle in handlers.items():
            add(number, passing_on, number, handle)
        start.finish()

    def _offers_websocket(self) -> bool:
        return self._service is not None and self._service.gateway.upstreams.offer_websocket()

    async def serve(self, listeners: Listeners, opening: asyncio.Task[Service]) -> None:
        """Serve until a signal ends it, or one of its tasks. Before `opening` is done, requests are
        refused; a process that takes over from another one waits. Raises UserError where the ledger
        can't be opened."""
        self._opening, self.handover.are_activated = opening, listeners.are_activated
        await self.handover.until_open(opening)
        if self._draining and not self.handover.must_serve:
            self._over = True
            return
        if opening.done():
            opening.result()
        else:
            log(logging.WARNING, "ledger not open yet", reason="requests are refused until it is")
            self.handover.serve_moved()
        try:
            async with asyncio.TaskGroup() as servers:
                servers.create_task(self._serve_gateway(opening))  # first, so that commands work
                servers.create_task(self._server.serve(listeners.sockets))
        except* UserError as group:
            raise group.exceptions[0] from None
        finally:
            self._over = True

    def closing(self) -> None:
        """Expect the end of the process if the files are closed because it has served. They are
        also closed when an attempt to open them has failed, which is repeated."""
        if self._over:
            start.end_soon(EXIT_SOFTWARE)

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

    async def _serve_gateway(self, opening: asyncio.Task[Service]) -> None:
        """Serve the gateway as soon as it is there, and its admin API on the Unix socket."""
        service = self._service = await opening
        gateway, store = service.gateway, service.gateway.store
        if self._reload_wanted:
            self._reload()
        for task in store.commits.tasks:
            task.add_done_callback(self._ended)
        service.start_tasks(self._ended)
        others = other_apps(service)
        self._guard.serve(metered_apps(service), others, websocket_app(service, others))
        gc.freeze()  # what is there now stays, as in start.finish
        with socket_path(store.path) as path:
            api = finished_at_end(gateway, in_time(gateway, admin_app(service.api, local_actor)))
            guarded = Guard({}, api, unknown_url, self.telemetry)
            server = AdminServer(configured(guarded, uds=path, proxy_headers=False))
            self._servers.append(server)
            self.handover.begin(service, server)
            with server.listening():
                await server.serve()
        self._over = True
        service.stop_tasks()

    def end_if_failed(self, task: asyncio.Task[Any]) -> None:
        """End the process if a task has failed."""
        if not task.cancelled() and task.exception():
            self._ended(task)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        """Log why a task that must not end has ended, and end the process, so that a supervisor
        starts it again."""
        if self._over:
            return
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        log(logging.CRITICAL, "task ended", task=task.get_name(), **shown_error(error))
        self.status = EXIT_SOFTWARE
        if self._service and task in self._service.gateway.store.commits.tasks:
            self._end_now()
        if not self._draining:
            self._draining = asyncio.create_task(self._drain(0.0))

    def _end_now(self) -> None:
        """End the process without waiting for anything. What is owed to the ledger is kept."""
        start.end_soon(EXIT_SOFTWARE)
        if self._service:
            self._service.gateway.store.commits.spill_now()
        LOG.flush()
        os._exit(self.status)

    def _terminate(self) -> None:
        """Drain at the first signal, and end at once at the second. If a reload began the draining,
        the first signal is ignored."""
        if self._draining and not self._may_ignore_signal:
            in_flight = self._service.gateway.in_flight.count if self._service else 0
            log(logging.WARNING, "terminated", in_flight=in_flight)
            self.status = 128 + signal.SIGTERM
            self._end_now()
        self._may_ignore_signal = False
        if not self._draining:
            server = self._settings.server
            draining = self._drain(server.drain_seconds, server.shutdown_delay_seconds)
            self._draining = asyncio.create_task(draining)

    def _end_after(self, seconds: float) -> None:
        """End the process as `_drain` does: another one serves."""
        self._may_ignore_signal = True
        self._draining = asyncio.create_task(self._drain(seconds))

    async def _drain(self, seconds: float, delay: float = 0.0) -> None:
        """Let what is in flight finish for up to `seconds`, and end the process. Before that, serve
        on for `delay` seconds."""
        await self.handover.give_up()
        if self._service:
            await drain(
                self._service.gateway,
                None if self.handover.is_over else self._server,
                self._connections,
                self.handover,
                delay=delay,
                seconds=seconds,
            )
            await self.handover.finish()
        elif self._opening:
            start.end_soon(EXIT_SOFTWARE)  # the disk may not answer
            self._opening.cancel()
        for server in self._servers:
            server.should_exit = True

    def _reload(self) -> None:
        """Read the settings again; a bad file changes nothing."""
        if self._service is None:
            self._reload_wanted = True
            return
        gateway = self._service.gateway
        try:
            new = reload_settings(self._loaded)
            new = with_demo(new, self.demo) if self.demo else new
            documents = apply_settings(gateway, new)
        except SettingsError as error:
            log(logging.ERROR, "reload refused", reason=str(error))
            return
        self._settings = new
        publishing = publish_reloaded(gateway.billing, documents, new)
        self._publishing = asyncio.create_task(publishing, name="publish")
        self._publishing.add_done_callback(self.end_if_failed)


def main() -> None:
    """Run the command line: redbtc-proxy, or python redbtc_proxy.py."""
    LOG.start()
    log_unexpected_errors()
    commands.main(run)


if __name__ == "__main__":
    main()
