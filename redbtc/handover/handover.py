"""The handovers of a process: from the one before it, and to the next one at a reload."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable

from redbtc.admin.outputs import Reloaded
from redbtc.errors import Conflict
from redbtc.gateway.service import Service
from redbtc.handover.child import NotTakenOver
from redbtc.handover.joining import Joining
from redbtc.handover.predecessors import Predecessors
from redbtc.handover.successor import Parts, Successor
from redbtc.server.connections import Connections
from redbtc.server.listening import Server
from redbtc.server.unix_socket import AdminServer
from redbtc.systemd import ends_service, notify, reloading
from redbtc.telemetry import log
from redbtc.waiting_process import tell_children

RESTART_SECONDS = 30.0  # for requests in flight, if the ledger has to be migrated


class Handover:
    """The handovers of a process, at most one reload at a time."""

    def __init__(
        self,
        server: Server,
        connections: Connections,
        joining: Joining | None,
        end: Callable[[float | None], None],
    ) -> None:
        """`end` is called when another process serves: this one is to finish what is in flight
        within so many seconds (None: as the settings say)."""
        self._server = server
        self._connections = connections
        self._joining = joining
        self._end = end
        self.are_activated = False  # the listeners are those of systemd
        self._parts: Parts | None = None
        self._reloading: asyncio.Task[Reloaded] | None = None
        self._on_signal: asyncio.Task[None] | None = None
        self._serving_moved: asyncio.Task[None] | None = None
        self._following: asyncio.Task[None] | None = None
        self._successor: Successor | None = None  # that serves

    # From the process before

    def begin(self, service: Service, admin_server: AdminServer) -> None:
        """Begin to serve, with what the process before this one hands over."""
        gateway, joining, server = service.gateway, self._joining, self._server
        turns = joining.turns if joining else None
        predecessors = Predecessors(gateway, server.adopt, self._write_alone)
        self._parts = Parts(
            service=service,
            server=server,
            connections=self._connections,
            admin_server=admin_server,
            predecessors=predecessors,
            are_activated=self.are_activated,
            turns=turns,
        )
        gateway.reload = self.reload
        if joining:
            if joining.admin_listener is not None:
                admin_server.take(joining.admin_listener)
            joining.stop_reporting()
            for channel in joining.take_channels():
                predecessors.add(channel)
            self._serving_moved = asyncio.create_task(joining.serve_moved(server.adopt))
        if joining is None or joining.files is None:  # else the process before this one says so
            notify("READY=1", f"MAINPID={os.getpid()}")

    def _write_alone(self) -> None:
        """No other process writes any more."""
        assert self._parts is not None
        gateway = self._parts.service.gateway
        gateway.store.write_alone()
        gateway.request_log.write_alone()
        self._parts = self._parts._replace(turns=None)

    def __bool__(self) -> bool:
        """Return whether a process before this one still finishes its requests."""
        return self._parts is not None and bool(self._parts.predecessors)

    def end(self) -> None:
        """Let the processes before this one abort what they have in flight."""
        if self._parts:
            self._parts.predecessors.end()

    # To the next process

    @property
    def is_over(self) -> bool:
        """Return whether another process serves."""
        return self._successor is not None

    @property
    def successor_pid(self) -> int:
        """Return the id of the process that serves."""
        assert self._successor is not None, "another process serves"
        return self._successor.pid

    def passing_on(self, number: int, handle: Callable[[], None]) -> None:
        """Handle a signal. The first process of a container gets those that are meant for the
        gateway: once another process serves, it passes them on to that one as well."""
        if self.is_over and os.getpid() == 1:
            tell_children(number)
        handle()

    def on_signal(self) -> None:
        """Reload. How that ends is in the log."""
        if self.is_over:
            return
        self._on_signal = asyncio.create_task(self._try(), name="reload")

    async def _try(self) -> None:
        try:
            await self.reload()
        except (NotTakenOver, Conflict) as error:
            log(logging.ERROR, "not reloaded", reason=str(error))

    async def reload(self) -> Reloaded:
        """Let a new process take over. Raises NotTakenOver; or Conflict if this one is not serving
        alone, or is about to end. Then it goes on as before."""
        if self._reloading:
            raise Conflict("another reload is under way")
        if self._parts is None or self._parts.service.gateway.draining:
            raise Conflict("the gateway is starting or stopping; try again")
        if ends_service():
            raise NotTakenOver(
                "systemd would end the service with this process: set Type=notify and "
                "NotifyAccess=all in its unit (deploy/redbtc-proxy.service has them), or restart it"
            )
        notify(*reloading())
        self._reloading = asyncio.create_task(self._reload(self._parts), name="reload")
        try:
            return await asyncio.shield(self._reloading)
        except BaseException:  # also one that nobody has thought of: systemd would wait for ever
            if not self.is_over:
                notify("READY=1")
            raise
        finally:
            if self._reloading.done():
                self._reloading = None

    async def give_up(self) -> None:
        """End a reload that is under way: this process is about to end."""
        if self._reloading:
            self._reloading.cancel()
            with contextlib.suppress(asyncio.CancelledError, NotTakenOver):
                await self._reloading

    async def _reload(self, parts: Parts) -> Reloaded:
        successor = Successor(parts)
        await successor.start()
        restart = successor.needs_restart
        if restart:
            before, after = restart.schema_before, restart.schema_after
            log(logging.WARNING, "restarting", schema_before=before, schema_after=after)
            await successor.hand_over_at_the_end()
            log(logging.INFO, "handed over", pid=successor.pid)
        else:
            waited = await successor.hand_over()
            log(logging.INFO, "handed over", pid=successor.pid, paused_ms=round(waited * 1000))
        # This process says it: systemd may believe no process but the main one (NotifyAccess=main),
        # and waits at a stop only for its own child, which the new process is only now.
        notify(f"MAINPID={successor.pid}", *([] if restart else ["READY=1"]))
        self._successor = successor
        self._following = asyncio.create_task(successor.follow(), name="successor")
        seconds = RESTART_SECONDS if restart else None
        self._end(seconds)
        return Reloaded(
            pid=successor.pid,
            version=successor.version,
            restarts=restart is not None,
            seconds=seconds,
        )

    async def finish(self) -> None:
        """Tell the process that serves what is left to tell, before this one ends."""
        if self._successor:
            await self._successor.finish()
