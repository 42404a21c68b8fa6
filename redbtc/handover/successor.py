"""Hand over to a new process: the side of the old one. Until the new process serves, every failure
leaves the old one as it was."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import AsyncIterator
from typing import NamedTuple, TypeVar

from redbtc.errors import StorageUnavailable
from redbtc.gateway.background_leaving import LeftResponses
from redbtc.gateway.gateway import Gateway
from redbtc.gateway.handover.telling import Reporter, state_to_tell
from redbtc.gateway.service import Service
from redbtc.handover.channel import Channel, ChannelClosed
from redbtc.handover.child import Child, NotTakenOver
from redbtc.handover.messages import (
    AbortElsewhere,
    EndElsewhere,
    Go,
    NeedsRestart,
    Offer,
    Ready,
    Restart,
    Serves,
)
from redbtc.handover.moving import LeavingConnections
from redbtc.handover.predecessors import PredecessorChannel, Predecessors
from redbtc.server.connections import Connections
from redbtc.server.listening import Server
from redbtc.server.unix_socket import AdminServer
from redbtc.store.turns import new_turns

T = TypeVar("T")

START_SECONDS = 600  # for the new process to be ready; it may migrate a copy of the ledger
HANDOVER_SECONDS = 10  # for each further step
REPORT_SECONDS = 0.02  # between two reports, unless looking for changes takes long:
REPORT_SHARE = 0.02  # of the time may be spent on it


class Parts(NamedTuple):
    """The parts of this process that are handed over."""

    service: Service
    server: Server
    connections: Connections
    admin_server: AdminServer
    predecessors: Predecessors
    are_activated: bool  # the listeners of `server` are those of systemd
    turns: int | None  # the file for turns to write, if another process writes already


class Successor:
    """The process that takes over from this one, from `start` on."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._gateway: Gateway = parts.service.gateway
        self._leaving: LeavingConnections | None = None
        self._is_abandoned = False
        self._reporter: Reporter | None = None  # None: the process begins when this one has ended
        self._left: list[PredecessorChannel] = []
        self.needs_restart: NeedsRestart | None = None
        self.version = ""
        self.pid = 0

    async def start(self) -> None:
        """Start the process, and wait until it is ready. Raises NotTakenOver."""
        own, other = socket.socketpair()
        try:
            self._child = await asyncio.to_thread(Child, other)
        except OSError as error:
            own.close()
            raise NotTakenOver(f"can't start a new process: {error.strerror}") from None
        finally:
            other.close()
        self._channel = Channel(own)
        store = self._gateway.store
        self._listeners = [each.dup() for each in self._parts.server.listeners]
        admin = self._parts.admin_server.listener
        if self._parts.turns is None:
            self._turns = new_turns(str(store.path.parent))
        else:
            self._turns = self._parts.turns
        files = [*store.locks, self._turns, *(each.fileno() for each in self._listeners)]
        if admin is not None:
            files.append(admin)
        offer = Offer(
            database=str(store.path),
            listeners=len(self._listeners),
            has_admin=admin is not None,
            are_activated=self._parts.are_activated,
        )
        async with self._ended_on_failure(START_SECONDS, "it was not ready"):
            await self._channel.send(offer, files)
            answer, _ = await self._channel.receive()
        assert isinstance(answer, (Ready, NeedsRestart))
        self.pid = answer.pid
        if isinstance(answer, NeedsRestart):
            self.needs_restart = answer
        else:
            self.version = answer.version

    @contextlib.asynccontextmanager
    async def _ended_on_failure(self, seconds: float, what: str) -> AsyncIterator[None]:
        """End the process if it does not answer, within so many seconds or at all, and raise
        NotTakenOver."""
        reason = ""
        try:
            async with asyncio.timeout(seconds):
                yield
                return
        except TimeoutError:
            reason = f"{what} after {seconds} s"
        except ChannelClosed:
            pass
        except BaseException:
            await self.abandon()
            raise
        said = await self.abandon()
        raise NotTakenOver(f"the new process can't take over: {reason or said}")

    async def abandon(self) -> str:
        """End the process: it does not take over. Return why it has ended, if it had."""
        if self._is_abandoned:
            return ""
        self._is_abandoned = True
        self._channel.close()
        for each in self._listeners:
            each.close()
        if self._parts.turns is None:
            os.close(self._turns)
        return await asyncio.to_thread(self._child.end)

    # Handing over

    async def hand_over(self) -> float:
        """Let the process take over, and return for how many seconds new requests had to wait. When
        this returns, the process serves. Raises NotTakenOver, and then this one goes on as
        before."""
        began = time.monotonic()
        try:
            async with contextlib.AsyncExitStack() as undo:
                await self._stop_admitting(undo)
                await self._share(undo)
                async with self._ended_on_failure(HANDOVER_SECONDS, "it did not serve"):
                    await self._channel.send(self._state, self._state_files)
                    answer, _ = await self._channel.receive()
                    assert isinstance(answer, Serves)
                    await self._channel.send(Go())
                undo.pop_all()
        except (StorageUnavailable, OSError) as error:
            await self.abandon()
            raise NotTakenOver(f"the ledger can't be handed over: {error}") from None
        except BaseException:
            await self.abandon()
            raise
        seconds = time.monotonic() - began
        self._leave_rest()
        return seconds

    async def hand_over_at_the_end(self) -> None:
        """Let the process open the ledger when this one has ended, and take connections until then.
        Raises NotTakenOver, and then this process goes on as before."""
        async with self._ended_on_failure(HANDOVER_SECONDS, "it did not answer"):
            await self._channel.send(Restart())
        self._parts.server.stop_accepting()
        self._leaving = LeavingConnections(self._parts.server, self._parts.connections)
        self._leave_rest()

    def _leave_rest(self) -> None:
        self._child.let_go()
        self._parts.admin_server.leave()
        for each in self._listeners:
            each.close()

    async def _stop_admitting(self, undo: contextlib.AsyncExitStack) -> None:
        parts, again = self._parts, [each.dup() for each in self._listeners]
        parts.server.stop_accepting()
        undo.push_async_callback(parts.server.accept_on, again)
        leaving = self._leaving = LeavingConnections(parts.server, parts.connections)
        undo.push_async_callback(leaving.take_back)
        leaving.take_all()
        sessions = list(self._gateway.websockets)
        for session in sessions:
            session.move()
        deadline = time.monotonic() + HANDOVER_SECONDS
        while any(each.has_waiting for each in sessions) and time.monotonic() < deadline:
            await asyncio.sleep(0.001)
        if not await leaving.until_ended(max(0.0, deadline - time.monotonic())):
            raise NotTakenOver(f"a request could not be moved within {HANDOVER_SECONDS} s")

    async def _share(self, undo: contextlib.AsyncExitStack) -> None:
        """Stop what only one process may do, begin to write in turns, and take the state."""
        parts, gateway = self._parts, self._gateway
        if not gateway.store.healthy:
            raise StorageUnavailable(gateway.store.failure)
        undo.callback(parts.service.start_sole_tasks)
        parts.service.stop_sole_tasks()
        background = LeftResponses(gateway.background)
        undo.push_async_callback(background.take_back)
        await background.begin()
        undo.callback(self._take_back_ledger)
        gateway.store.share(self._turns)
        await gateway.request_log.share(self._turns)
        left = await parts.predecessors.leave()
        undo.callback(parts.predecessors.take_back, left)
        self._state = state_to_tell(parts.service, background, [each for _, each, _ in left])
        self._state_files = [file for _, _, files in left for file in files]
        self._reporter = Reporter(gateway, background, self._state.in_flight)
        self._left = [channel for channel, _, _ in left]

    def _take_back_ledger(self) -> None:
        store = self._gateway.store
        store.take_back()
        if self._parts.turns is None:
            store.write_alone()
            self._gateway.request_log.write_alone()

    # Afterwards

    async def follow(self) -> None:
        """Hand over connections, report what ends here if the process wants to know, and abort what
        it asks for, until it has ended."""
        for channel in self._left:
            channel.close()
        if self._reporter:
            self._gateway.upstreams.take_no_more()
        with contextlib.suppress(ChannelClosed):
            await asyncio.gather(self._report(), self._listen())

    async def _report(self) -> None:
        while True:
            began = time.monotonic()
            await self.report()
            took = time.monotonic() - began
            await asyncio.sleep(max(REPORT_SECONDS, took / REPORT_SHARE))

    async def report(self) -> None:
        """InFlightReport what has changed, and hand over the connections that can be. Raises
        ChannelClosed."""
        assert self._leaving is not None
        if self._reporter and (report := self._reporter.report()):
            await self._channel.send(report)
        self._leaving.take_all()
        await self._leaving.send(self._channel)

    async def finish(self) -> None:
        """InFlightReport for the last time: nothing is in flight any more."""
        with contextlib.suppress(ChannelClosed):
            await self.report()

    async def _listen(self) -> None:
        while True:
            message, _ = await self._channel.receive()
            if isinstance(message, AbortElsewhere):
                for key_id in message.keys:
                    self._gateway.in_flight.abort_key(key_id)
                self._gateway.background.cancel(message.owner_id)
            elif isinstance(message, EndElsewhere):
                self._gateway.stop()
