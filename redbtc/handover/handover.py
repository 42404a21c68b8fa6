"""The handovers of a process: from the one before it, and to the next one at a reload."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from typing import Any

from redbtc.admin.outputs import Reloaded
from redbtc.errors import Conflict, UserError
from redbtc.gateway.service import Service
from redbtc.handover.child import NotTakenOver
from redbtc.handover.finishing import FinishingProcess
from redbtc.handover.joining import Joining
from redbtc.handover.predecessors import Predecessors
from redbtc.handover.successor import Parts, Successor
from redbtc.server.connections import Connections
from redbtc.server.listening import Server
from redbtc.server.unix_socket import AdminServer
from redbtc.systemd import ends_service, notify, reloading
from redbtc.telemetry import log, shown_error
from redbtc.waiting_process import tell_children

OPENING_SECONDS = 2.0  # if the ledger is not open after them, requests are answered without it
SERVING_SECONDS = 0.01  # between two looks whether this process serves
RESTART_SECONDS = 30.0  # for requests in flight, if the ledger has to be migrated


class Handover:
    """The handovers of a process, at most one reload at a time."""

    def __init__(
        self,
        server: Server,
        connections: Connections,
        joining: Joining | None,
        end: Callable[[float], None],
        on_task_end: Callable[[asyncio.Task[Any]], None],
    ) -> None:
        """`end` is called when another process serves: this one is to finish what is in flight
        within so many seconds. `on_task_end` is called with each task that has ended."""
        self._server = server
        self._connections = connections
        self._joining = joining
        self._end = end
        self._on_task_end = on_task_end
        self.are_activated = False  # the listeners are those of systemd
        self._parts: Parts | None = None
        self._is_wanted = False  # a signal to reload came before this process served
        self._reloading: asyncio.Task[Reloaded] | None = None
        self._on_signal: asyncio.Task[None] | None = None
        self._serving_moved: asyncio.Task[None] | None = None
        self._following: asyncio.Task[None] | None = None
        self._finishing: FinishingProcess | None = None  # another process serves

    # From the process before

    async def until_open(self, opening: asyncio.Task[Service]) -> None:
        """Wait until `opening` is done, or requests are to be refused until it is."""
        if self._joining:
            await self._joining.until_open(opening)
        await asyncio.wait([opening], timeout=OPENING_SECONDS)

    def begin(self, service: Service, admin_server: AdminServer) -> None:
        """Begin to serve, with what the process before this one hands over."""
        gateway, joining, server = service.gateway, self._joining, self._server
        turns = joining.turns if joining else None
        predecessors = Predecessors(gateway, server.adopt, self._write_alone, self._on_task_end)
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
                admin_server.take(joining.admin_listener, joining.admin_file)
            joining.stop_reporting()
            for channel in joining.take_channels():
                predecessors.add(channel)
            self.serve_moved()
        if joining is None or joining.files is None:  # else the process before this one says so
            notify("READY=1", f"MAINPID={os.getpid()}")
        if self._is_wanted:
            self.on_signal()

    @property
    def must_serve(self) -> bool:
        """Return whether this process has taken over from another one."""
        return self._joining is not None and self._joining.has_taken_over

    def serve_moved(self) -> None:
        """Serve the connections that were moved before this process could serve."""
        if self._joining:
            serving = self._joining.serve_moved(self._server.adopt)
            self._serving_moved = asyncio.create_task(serving, name="moved connections")
            self._serving_moved.add_done_callback(self._on_task_end)

    def _write_alone(self) -> None:
        """No other process writes any more."""
        assert self._parts is not None
        gateway = self._parts.service.gateway
        gateway.store.write_alone()
        gateway.request_log.write_alone()
        self._parts = self._parts._replace(turns=None)

    @property
    def are_finishing(self) -> bool:
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
        return self._finishing is not None

    @property
    def successor_pid(self) -> int:
        """Return the id of the process that serves."""
        assert self._finishing is not None, "another process serves"
        return self._finishing.successor_pid

    def passing_on(self, number: int, handle: Callable[[], None]) -> None:
        """Handle a signal. The first process of a container gets those that are meant for the
        gateway: once another process serves, it passes them on to that one as well."""
        if self.is_over and os.getpid() == 1:
            tell_children(number)
        handle()

    def on_signal(self) -> None:
        """Reload. How that ends is in the log."""
        self._is_wanted = self._parts is None
        if not (self.is_over or self._is_wanted):
            self._on_signal = asyncio.create_task(self._try(), name="reload")

    async def _try(self) -> None:
        try:
            await self.reload()
        except UserError as error:
            log(logging.ERROR, "not reloaded", reason=str(error))
        except Exception as error:
            log(
                logging.ERROR, "not reloaded", reason="a fault of the gateway", **shown_error(error)
            )

    async def reload(self) -> Reloaded:
        """Let a new process take over. Raises NotTakenOver; or Conflict if this one is starting,
        reloading or about to end. Then it goes on as before."""
        if self._reloading:
            raise Conflict("another reload is under way")
        if self._parts is None or self._parts.service.gateway.draining:
            raise Conflict("the gateway is starting or stopping; try again")
        if ends_service():
            raise NotTakenOver(
                "systemd would end the service with this process: set Type=notify in its unit "
                "(deploy/redbtc-proxy.service has it), or restart it"
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
        """End a reload that is under way, and begin none: this process is about to end. Wait for
        the process before this one if that ends for it, and until this one serves if it has taken
        over: systemd ends all others with it."""
        if self._joining:
            await self._joining.until_ended()
        while self.must_serve and not self._parts:
            await asyncio.sleep(SERVING_SECONDS)
        if self._parts:
            self._parts.service.gateway.draining = True
        if self._reloading:
            self._reloading.cancel()
            await asyncio.wait([self._reloading])

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
        self._finishing = successor.finishing()
        self._following = asyncio.create_task(self._finishing.follow(), name="successor")
        self._following.add_done_callback(self._on_task_end)
        # This process says it: systemd may believe no process but the main one (NotifyAccess=main),
        # and waits at a stop only for its own child, which the new process is only now.
        notify(f"MAINPID={successor.pid}", *([] if restart else ["READY=1"]))
        seconds = float(parts.service.gateway.settings.server.drain_seconds)
        if restart:
            seconds = min(seconds, RESTART_SECONDS)
        self._end(seconds)
        return Reloaded(
            pid=successor.pid,
            version=successor.version,
            restarts=restart is not None,
            seconds=seconds,
        )

    async def finish(self) -> None:
        """Tell the process that serves what is left to tell, before this one ends."""
        if self._finishing:
            await self._finishing.finish()
