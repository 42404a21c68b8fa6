"""The channels to the processes that this one has taken over from."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import sqlite3
from collections.abc import Awaitable, Callable, Collection
from typing import Any

from redbtc.errors import StorageUnavailable
from redbtc.gateway.gateway import Gateway
from redbtc.gateway.handover.predecessors import Predecessor
from redbtc.gateway.handover.state import EarlierState, InFlightReport, InFlightState
from redbtc.handover.channel import Channel, ChannelClosed
from redbtc.handover.messages import AbortElsewhere, EndElsewhere, ForgetBodies, Forgot, Moved
from redbtc.handover.moving import moved_connections
from redbtc.telemetry import log, shown_error

FORGET_SECONDS = 10
MESSAGE_NUMBER_BITS = 63
FOLLOW_RETRY_SECONDS = 1.0  # before what an ended process has left is seen to again

Adopt = Callable[[int, bytes], Awaitable[None]]  # serves a connection


class PredecessorChannel:
    """The channel to one of them. What it reports is noted until it ends."""

    def __init__(self, gateway: Gateway, channel: Channel, state: InFlightState) -> None:
        self.predecessor = Predecessor(gateway, state)
        self.keys = self.predecessor.keys
        self._channel = channel
        self._handling = asyncio.Lock()
        self._sending: set[asyncio.Task[None]] = set()
        self._forgetting: dict[int, asyncio.Future[None]] = {}

    async def follow(self, adopt: Adopt) -> None:
        """Note what it reports, and serve the connections that it leaves to this process, until it
        has ended. Cancelling loses nothing of this."""
        try:
            while True:
                async with self._handling:
                    while found := self._channel.take():
                        await self._handle(*found, adopt)
                await self._channel.fill()
        except ChannelClosed:
            await self._finish()

    async def _handle(self, message: object, files: list[int], adopt: Adopt) -> None:
        if isinstance(message, Moved):
            for connection in moved_connections(message, files):
                await adopt(*connection)
        elif isinstance(message, InFlightReport):
            await self._until_done(lambda: self.predecessor.note(message))
        elif isinstance(message, Forgot) and message.number in self._forgetting:
            done = self._forgetting[message.number]
            if not done.done():  # else nobody waits for it any more
                done.set_result(None)

    async def _finish(self) -> None:
        interrupted = len(self.predecessor.rows)
        await self._until_done(self.predecessor.end)
        for done in self._forgetting.values():
            if not done.done():
                done.set_result(None)  # it stores nothing more
        self._channel.close()
        pid = self.predecessor.pid
        if interrupted:
            log(logging.WARNING, "predecessor died", pid=pid, interrupted=interrupted)
        else:
            log(logging.INFO, "predecessor ended", pid=pid)

    async def _until_done(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do what must be done, however long the ledger fails."""
        while True:
            try:
                await work()
                return
            except (StorageUnavailable, OSError, sqlite3.Error) as error:
                log(logging.ERROR, "predecessor not followed", **shown_error(error))
                await asyncio.sleep(FOLLOW_RETRY_SECONDS)

    def abort(self, keys: Collection[str], owner_id: str) -> None:
        """Abort what it has in flight for keys, and background responses of a key or an account."""
        self._send(AbortElsewhere(list(keys), owner_id))

    def end(self) -> None:
        """Abort all that it has in flight."""
        self._send(EndElsewhere())

    async def forget_bodies(
        self, account_id: str, key_id: str | None, days: int | None, except_keys: Collection[str]
    ) -> None:
        """Let it erase stored bodies, as LogElsewhere says. Raises StorageUnavailable."""
        # By chance: this process may follow the other one in the place of an earlier process.
        number = secrets.randbits(MESSAGE_NUMBER_BITS)
        done = asyncio.get_running_loop().create_future()
        self._forgetting[number] = done
        try:
            message = ForgetBodies(number, account_id, key_id, days, list(except_keys))
            await self._send_if_open(message)
            async with asyncio.timeout(FORGET_SECONDS):
                await done
        except TimeoutError:
            raise StorageUnavailable(
                f"process {self.predecessor.pid}, which finishes its requests, has not answered "
                f"for {FORGET_SECONDS} s; try again"
            ) from None
        finally:
            del self._forgetting[number]

    def _send(self, message: AbortElsewhere | EndElsewhere) -> None:
        task = asyncio.create_task(self._send_if_open(message))
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def _send_if_open(self, message: AbortElsewhere | EndElsewhere | ForgetBodies) -> None:
        with contextlib.suppress(ChannelClosed):  # it has ended
            await self._channel.send(message)

    def leave(self) -> tuple[EarlierState, list[int]]:
        """Return its state for the process that takes over from this one, and the files that go
        with it. It does not count here any more; nothing may be handled meanwhile."""
        unread, files = self._channel.unread
        state = EarlierState(self.predecessor.state, unread, len(files))
        self.predecessor.release()
        return state, [self._channel.socket.fileno(), *files]

    def take_back(self, gateway: Gateway, left: EarlierState) -> None:
        """Count its state here again: no other process follows it."""
        self.predecessor = Predecessor(gateway, left.state)
        self.keys = self.predecessor.keys

    def paused(self) -> asyncio.Lock:
        """Return the lock within which nothing is handled."""
        return self._handling

    def close(self) -> None:
        """Close the channel here: another process has it now."""
        self._channel.close()


class Predecessors:
    """The processes that this one has taken over from and that have not ended."""

    def __init__(
        self,
        gateway: Gateway,
        adopt: Adopt,
        on_alone: Callable[[], None],
        on_task_end: Callable[[asyncio.Task[Any]], None],
    ) -> None:
        """`on_alone` is called when no other process writes any more, `on_task_end` with each task
        that has ended."""
        self._gateway = gateway
        self._adopt = adopt
        self._on_alone = on_alone
        self._on_task_end = on_task_end
        self._following: dict[PredecessorChannel, asyncio.Task[None]] = {}
        self._is_handing_over = False

    def __bool__(self) -> bool:
        return bool(self._following)

    def add(self, channel: PredecessorChannel) -> None:
        """Follow one of them until it ends."""
        self._gateway.in_flight.elsewhere.append(channel)
        self._gateway.request_log.elsewhere.append(channel)
        task = asyncio.create_task(self._follow(channel), name="predecessor")
        task.add_done_callback(self._on_task_end)
        self._following[channel] = task

    async def _follow(self, channel: PredecessorChannel) -> None:
        await channel.follow(self._adopt)
        self._remove(channel)
        self._tell_if_alone()

    def _tell_if_alone(self) -> None:
        if not (self._following or self._is_handing_over):
            self._on_alone()

    def begin_to_hand_over(self) -> None:
        """Don't call `on_alone` any more: another process is about to write as well."""
        self._is_handing_over = True

    def go_on(self) -> None:
        """Undo `begin_to_hand_over`: that process has ended."""
        self._is_handing_over = False
        self._tell_if_alone()

    def _remove(self, channel: PredecessorChannel) -> None:
        self._gateway.in_flight.elsewhere.remove(channel)
        self._gateway.request_log.elsewhere.remove(channel)
        del self._following[channel]

    def end(self) -> None:
        """Let all of them abort what they have in flight."""
        for channel in self._following:
            channel.end()

    async def leave(self) -> list[tuple[PredecessorChannel, EarlierState, list[int]]]:
        """Stop following them. Return each with what another process needs to follow it."""
        left = list[tuple[PredecessorChannel, EarlierState, list[int]]]()
        try:
            for channel, task in list(self._following.items()):
                async with channel.paused():
                    if channel in self._following:  # it has not ended meanwhile
                        left.append((channel, *channel.leave()))
                        task.cancel()
                        self._remove(channel)
        except BaseException:
            self.take_back(left)
            raise
        return left

    def take_back(self, left: list[tuple[PredecessorChannel, EarlierState, list[int]]]) -> None:
        """Follow those again that `leave` has returned."""
        for channel, state, _ in left:
            channel.take_back(self._gateway, state)
            self.add(channel)


def earlier_channels(
    gateway: Gateway, earlier: list[EarlierState], files: list[int]
) -> list[PredecessorChannel]:
    """Return the channels to processes that the one before this one has followed. `files` came with
    its state."""
    found = []
    for each in earlier:
        own, files = files[: each.files + 1], files[each.files + 1 :]
        channel = Channel(socket.socket(fileno=own[0]), each.unread, own[1:])
        found.append(PredecessorChannel(gateway, channel, each.state))
    for file in files:
        os.close(file)
    return found
