"""Hand over to a new process: the side of the old one. Until the new process serves, every failure
leaves the old one as it was."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sqlite3
import time
from collections.abc import AsyncIterator
from typing import NamedTuple

from redbtc.errors import StorageUnavailable
from redbtc.gateway.background_leaving import LeftResponses
from redbtc.gateway.gateway import Gateway
from redbtc.gateway.handover.telling import Reporter, state_to_tell
from redbtc.gateway.service import Service
from redbtc.handover.channel import MAX_FILES, Channel, ChannelClosed
from redbtc.handover.child import Child, NotTakenOver
from redbtc.handover.finishing import FinishingProcess
from redbtc.handover.messages import Go, NeedsRestart, Offer, Ready, Restart, Serves
from redbtc.handover.moving import LeavingConnections
from redbtc.handover.predecessors import PredecessorChannel, Predecessors
from redbtc.server.connections import Connections
from redbtc.server.listening import Server
from redbtc.server.unix_socket import AdminServer
from redbtc.store.turns import TurnsFile, new_turns

START_SECONDS = 600  # for the new process to be ready; it may migrate a copy of the ledger
HANDOVER_SECONDS = 10  # for each further step
REQUEST_LOG_SECONDS = 60  # for what uses the request log


class Parts(NamedTuple):
    """The parts of this process that are handed over."""

    service: Service
    server: Server
    connections: Connections
    admin_server: AdminServer
    predecessors: Predecessors
    are_activated: bool  # the listeners of `server` are those of systemd
    turns: TurnsFile | None  # the file for turns to write, if another process writes already


class Successor:
    """The process that takes over from this one, from `start` on."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._gateway: Gateway = parts.service.gateway
        self._leaving: LeavingConnections | None = None
        self._is_abandoned = False
        self._has_stopped = False  # nobody admits requests until the process serves or has ended
        self._reporter: Reporter | None = None  # None: the process begins when this one has ended
        self._left: list[PredecessorChannel] = []
        self.needs_restart: NeedsRestart | None = None
        self.version = ""
        self.pid = 0

    async def start(self) -> None:
        """Start the process, and wait until it is ready. Raises NotTakenOver."""
        try:
            offer, files = self._offer()
        except OSError as error:
            raise NotTakenOver(f"can't hand over the files: {error.strerror}") from None
        try:
            own, other = socket.socketpair()
            with contextlib.closing(other), contextlib.ExitStack() as undo:
                undo.callback(own.close)
                self._child = await asyncio.to_thread(Child, other)
                undo.pop_all()
        except (OSError, RuntimeError) as error:  # RuntimeError: no more threads
            self._close_files()
            raise NotTakenOver(f"can't start a new process: {error}") from None
        self._channel = Channel(own)
        async with self._ended_on_failure(START_SECONDS, "it was not ready"):
            await self._channel.send(offer, files)
            answer, _ = await self._channel.receive()
        assert isinstance(answer, (Ready, NeedsRestart))
        self.pid = answer.pid
        self.version = answer.version
        if isinstance(answer, NeedsRestart):
            self.needs_restart = answer

    def _offer(self) -> tuple[Offer, list[int]]:
        """Open what the process gets, and return the message and the files. Raises OSError."""
        parts, store = self._parts, self._gateway.store
        with contextlib.ExitStack() as undo:
            self._turns = parts.turns or new_turns(str(store.path.parent))
            dups = (contextlib.closing(each.dup()) for each in parts.server.listeners)
            self._listeners = [undo.enter_context(each) for each in dups]
            undo.pop_all()
        admin = parts.admin_server.listener
        files = [*store.locks, self._turns.fileno(), *(each.fileno() for each in self._listeners)]
        if admin is not None:
            files.append(admin)
        offer = Offer(
            database=str(store.path),
            listeners=len(self._listeners),
            are_activated=parts.are_activated,
            admin_file=parts.admin_server.file,
        )
        return offer, files

    def _close_files(self) -> None:
        for each in self._listeners:
            each.close()

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
        self._close_files()
        return await asyncio.to_thread(self._child.end, at_once=self._has_stopped)

    # Handing over

    async def hand_over(self) -> float:
        """Let the process take over, and return for how many seconds new requests had to wait. When
        this returns, the process serves. Raises NotTakenOver, and then this one goes on as
        before."""
        try:
            async with contextlib.AsyncExitStack() as undo:
                predecessors = self._parts.predecessors
                undo.callback(predecessors.go_on)
                predecessors.begin_to_hand_over()
                await self._share_request_log()
                began = time.monotonic()
                await self._stop_admitting(undo)
                async with asyncio.timeout(HANDOVER_SECONDS):
                    await self._share(undo)
                async with self._ended_on_failure(HANDOVER_SECONDS, "it did not serve"):
                    await self._channel.send(self._state, self._state_files)
                    answer, _ = await self._channel.receive()
                    assert isinstance(answer, Serves)
                    await self._channel.send(Go())
                undo.pop_all()
        except (StorageUnavailable, OSError, sqlite3.Error) as error:
            await self.abandon()
            reason = str(error) or "its disk does not answer"
            raise NotTakenOver(f"the ledger can't be handed over: {reason}") from None
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

    async def _share_request_log(self) -> None:
        """Begin to use the request log in turns. Before that, what uses it has to be complete, such
        as an erasure. Raises NotTakenOver."""
        try:
            async with asyncio.timeout(REQUEST_LOG_SECONDS):
                await self._gateway.request_log.share(self._turns)
        except TimeoutError:
            raise NotTakenOver(
                f"the request log was in use for more than {REQUEST_LOG_SECONDS} s; try again later"
            ) from None

    async def _stop_admitting(self, undo: contextlib.AsyncExitStack) -> None:
        self._has_stopped = True
        parts, again = self._parts, [each.dup() for each in self._listeners]
        undo.callback(setattr, self._gateway, "admits", True)
        self._gateway.admits = False
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
        undo.callback(background.take_back)
        await background.begin()
        left = await parts.predecessors.leave()
        undo.callback(parts.predecessors.take_back, left)
        undo.callback(gateway.store.take_back)
        await gateway.store.share(self._turns)
        self._state = state_to_tell(parts.service, background, [each for _, each, _ in left])
        self._state_files = [file for _, _, files in left for file in files]
        if len(self._state_files) > MAX_FILES:
            raise NotTakenOver("too many processes still finish their requests; try again later")
        self._reporter = Reporter(gateway, background, self._state.in_flight)
        self._left = [channel for channel, _, _ in left]

    # Afterwards

    def finishing(self) -> FinishingProcess:
        """Return this process as one that finishes its requests: the new one serves."""
        assert self._leaving is not None, "it was handed over"
        return FinishingProcess(
            self._gateway, self._channel, self._leaving, self._reporter, self._left, self.pid
        )
