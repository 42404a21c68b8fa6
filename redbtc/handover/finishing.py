"""Finish the requests of a process that another one has taken over from."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence

from redbtc.errors import StorageUnavailable
from redbtc.gateway.gateway import Gateway
from redbtc.gateway.handover.telling import Reporter
from redbtc.handover.channel import Channel, ChannelClosed
from redbtc.handover.messages import AbortElsewhere, EndElsewhere, ForgetBodies, Forgot
from redbtc.handover.moving import LeavingConnections
from redbtc.handover.predecessors import PredecessorChannel
from redbtc.telemetry import log

FINISH_SECONDS = 60  # for the last report, and connections with large bodies
ORPHAN_SECONDS = 30  # for requests in flight, if the new process has died
REPORT_SECONDS = 0.02  # between two reports, unless looking for changes takes long:
REPORT_SHARE = 0.02  # of the time may be spent on it


class FinishingProcess:
    """This process, while it finishes its requests and another one serves."""

    def __init__(
        self,
        gateway: Gateway,
        channel: Channel,
        leaving: LeavingConnections,
        reporter: Reporter | None,
        left: Sequence[PredecessorChannel],
        successor_pid: int,
    ) -> None:
        """`reporter` is None if the other process begins to serve when this one has ended. `left`
        are the channels that the other process has now."""
        self.successor_pid = successor_pid
        self._gateway = gateway
        self._channel = channel
        self._leaving = leaving
        self._reporter = reporter
        self._left = left
        self._forgetting: set[asyncio.Task[None]] = set()

    async def follow(self) -> None:
        """Hand over connections, report what ends here if the process wants to know, and abort what
        it asks for, until it has ended. Then nobody serves, and no gateway can start before this
        process has ended: abort what does not end before long."""
        for channel in self._left:
            channel.close()
        if self._reporter:
            self._gateway.upstreams.take_no_more()
        works = [asyncio.create_task(self._report()), asyncio.create_task(self._listen())]
        done, rest = await asyncio.wait(works, return_when=asyncio.FIRST_COMPLETED)
        for each in rest:
            each.cancel()
        for each in done:
            with contextlib.suppress(ChannelClosed):
                each.result()
        log(logging.ERROR, "successor died", pid=self.successor_pid, seconds=ORPHAN_SECONDS)
        await asyncio.sleep(ORPHAN_SECONDS)
        self._gateway.stop()

    async def _report(self) -> None:
        while True:
            began = time.monotonic()
            await self.report()
            took = time.monotonic() - began
            await asyncio.sleep(max(REPORT_SECONDS, took / REPORT_SHARE))

    async def report(self) -> bool:
        """Report what has changed, and hand over the connections that can be. Return whether there
        were any. Raises ChannelClosed."""
        if self._reporter and (report := self._reporter.report()):
            await self._channel.send(report)
        self._leaving.take_all()
        return await self._leaving.send(self._channel)

    async def finish(self) -> None:
        """Report for the last time: nothing is in flight any more."""
        with contextlib.suppress(ChannelClosed, TimeoutError):
            async with asyncio.timeout(FINISH_SECONDS):
                while await self.report():
                    pass

    async def _listen(self) -> None:
        while True:
            message, _ = await self._channel.receive()
            if isinstance(message, AbortElsewhere):
                for key_id in message.keys:
                    self._gateway.in_flight.abort_key(key_id)
                self._gateway.background.cancel(message.owner_id)
            elif isinstance(message, EndElsewhere):
                self._gateway.stop()
            elif isinstance(message, ForgetBodies):
                task = asyncio.create_task(self._forget(message), name="forget bodies")
                self._forgetting.add(task)
                task.add_done_callback(self._forgetting.discard)

    async def _forget(self, message: ForgetBodies) -> None:
        """Do what the message asks for, and say when it is done. Otherwise, the other process says
        that it is not."""
        bodies, account_id, key_id = self._gateway.request_log, message.account_id, message.key_id
        with contextlib.suppress(StorageUnavailable, ChannelClosed):
            if message.days is None:
                await bodies.erase(account_id, key_id)
            else:
                await bodies.shorten(account_id, key_id, message.days, message.except_keys)
            await self._channel.send(Forgot(message.number))
