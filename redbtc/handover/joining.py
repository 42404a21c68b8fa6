"""Take over from another process: the side of the new one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sqlite3
from pathlib import Path

from redbtc.errors import StorageUnavailable, UserError
from redbtc.gateway.handover.predecessors import read_again, restore_state
from redbtc.gateway.handover.state import GatewayState
from redbtc.gateway.service import Service
from redbtc.handover.channel import Channel, ChannelClosed
from redbtc.handover.child import VARIABLE
from redbtc.handover.messages import Go, Moved, NeedsRestart, Offer, Ready, Restart, Serves
from redbtc.handover.moving import moved_connections
from redbtc.handover.predecessors import Adopt, PredecessorChannel, earlier_channels
from redbtc.release import RELEASE
from redbtc.store.opening import JoinedFiles, SchemaChanges
from redbtc.store.trial import try_migration
from redbtc.store.turns import TurnsFile
from redbtc.systemd import report_status


class Joining:
    """A process that takes over from the one that has started it."""

    def __init__(self, channel: Channel, stderr: int) -> None:
        self._channel = channel
        self._stderr = stderr
        self.files: JoinedFiles | None = None  # None: the other process ends first
        self.listeners: list[socket.socket] = []
        self.are_activated = False
        self.admin_listener: int | None = None
        self.admin_file = (0, 0)  # its device and inode
        self.followed: set[str] = set()  # background responses that other processes follow
        self.turns: TurnsFile | None = None
        self._moved: list[tuple[int, bytes]] = []
        self._channels: list[PredecessorChannel] = []
        self._reporting: asyncio.Task[None] | None = None  # to systemd, until this process serves
        self.has_taken_over = False
        self._has_ended: asyncio.Event | None = None  # of the other process, where that ends first
        self._is_refusing = asyncio.Event()  # requests, since the ledger can't be opened

    @classmethod
    async def begin(cls, database: Path) -> Joining | None:
        """Return what the process that has started this one hands over, None if this process was
        started by something else. Raises UserError."""
        given = os.environ.pop(VARIABLE, "")
        if not given:
            return None
        end, stderr = map(int, given.split(","))
        for file in (end, stderr):
            os.set_inheritable(file, False)
        joining = cls(Channel(socket.socket(fileno=end)), stderr)
        try:
            offer, files = await joining._channel.receive()
        except ChannelClosed:
            raise gone() from None
        assert isinstance(offer, Offer)
        lock_file, database_file, turns_file, *rest = files
        turns = TurnsFile(turns_file)
        joining.files, joining.turns = JoinedFiles(lock_file, database_file, turns), turns
        listeners, admin = rest[: offer.listeners], rest[offer.listeners :]
        joining.listeners = [socket.socket(fileno=each) for each in listeners]
        joining.admin_listener = admin[0] if admin else None
        joining.are_activated, joining.admin_file = offer.are_activated, offer.admin_file
        if offer.database != str(database):
            raise UserError(
                f"database.path is {database}, but the running gateway uses {offer.database}; "
                "restart it to use another database"
            )
        return joining

    async def wait_for_end(self, changes: SchemaChanges, database: Path) -> None:
        """Wait until the other process has ended, since the ledger has to be migrated. Before that,
        migrate a copy: if that fails, so would the ledger. Raises UserError."""
        await try_migration(database, changes.before)
        try:
            needs = NeedsRestart(changes.before, changes.after, RELEASE, os.getpid())
            await self._channel.send(needs)
            message, _ = await self._channel.receive()
            assert isinstance(message, Restart)
        except ChannelClosed:
            raise gone() from None
        self.files = self.turns = None
        self._has_ended = asyncio.Event()
        self._speak()
        self._reporting = asyncio.create_task(report_status(migrating), name="systemd")
        with contextlib.suppress(ChannelClosed):
            while True:
                message, files = await self._channel.receive()
                if isinstance(message, Moved):
                    self._moved += moved_connections(message, files)
        self._channel.close()
        self._has_ended.set()

    def refuse(self) -> None:
        """Let requests be refused until the ledger can be opened."""
        self._is_refusing.set()

    async def until_open(self, opening: asyncio.Task[Service]) -> None:
        """Wait until `opening` is done or has failed once."""
        refusing = asyncio.create_task(self._is_refusing.wait(), name="refusing")
        try:
            await asyncio.wait([opening, refusing], return_when=asyncio.FIRST_COMPLETED)
        finally:
            refusing.cancel()

    async def until_ended(self) -> None:
        """Wait for the other process, if that ends for this one."""
        if self._has_ended:
            await self._has_ended.wait()

    async def take_over(self, service: Service) -> None:
        """Say that this process is ready, and take over. Raises UserError."""
        gateway = service.gateway
        try:
            await self._channel.send(Ready(RELEASE, os.getpid()))
            state, files = await self._channel.receive()
            assert isinstance(state, GatewayState)
            restore_state(service, state)
            assert self.turns is not None
            await gateway.request_log.share(self.turns)
            await read_again(gateway.billing)
            earlier = earlier_channels(gateway, state.earlier, files)
            last = PredecessorChannel(gateway, self._channel, state.in_flight)
            self._channels = [*earlier, last]
            self.followed.update(*(each.predecessor.followed for each in self._channels))
            await gateway.store.begin_run()
            await self._channel.send(Serves())
            message, _ = await self._channel.receive()
            assert isinstance(message, Go)
        except ChannelClosed:
            raise gone() from None
        except (StorageUnavailable, sqlite3.Error, OSError) as error:
            raise UserError(f"the ledger can't be taken over: {error}") from None
        self.has_taken_over = True
        self._speak()

    def _speak(self) -> None:
        """Write to the standard error of the other process from now on, not to that process."""
        os.dup2(self._stderr, 2)
        os.close(self._stderr)

    def stop_reporting(self) -> None:
        """Leave it to the service to tell systemd that this process works."""
        if self._reporting:
            self._reporting.cancel()

    def take_channels(self) -> list[PredecessorChannel]:
        """Return the channels to the processes that still finish their requests."""
        channels, self._channels = self._channels, []
        return channels

    async def serve_moved(self, adopt: Adopt) -> None:
        """Serve the connections that were moved before this process could serve."""
        moved, self._moved = self._moved, []
        for file, received in moved:
            await adopt(file, received)


async def migrating() -> str:
    """Return the state of a process that does not serve yet, for systemd."""
    return "Waiting for the process before this one, and migrating the ledger"


def gone() -> UserError:
    """Return the error of a process whose predecessor has ended, or has given it up."""
    return UserError("the process that has started this one does not hand over")
