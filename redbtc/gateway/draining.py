"""The end of a process: it admits nothing more, and lets what is in flight finish."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Protocol

from redbtc.gateway.gateway import Gateway
from redbtc.server.connections import Connections
from redbtc.server.listening import Server
from redbtc.systemd import notify
from redbtc.telemetry import log

STOPPING_SECONDS = 10  # for the rows of what is aborted when the process ends
DRAIN_LOOK_SECONDS = 0.05  # between two looks whether something is in flight


class Others(Protocol):
    """Other processes whose requests in flight end with those of this one."""

    @property
    def are_finishing(self) -> bool:
        """Return whether there are any."""

    def end(self) -> None:
        """Abort what they have in flight."""


async def drain(
    gateway: Gateway,
    server: Server | None,
    connections: Connections,
    others: Others,
    *,
    delay: float,
    seconds: float,
) -> None:
    """Tell monitors that this process ends, and serve on for `delay` seconds, until a balancer has
    noticed. Then accept no more connections, and let requests in flight finish within `seconds`,
    and clients read what was answered. Abort the rest, and checks of the database. `server` is None
    if another process accepts connections already: then checks may finish, too."""
    gateway.draining = True
    if server:
        notify("STOPPING=1")
    log(logging.INFO, "draining", in_flight=gateway.in_flight.count)
    await asyncio.sleep(delay)
    if server:
        server.stop_accepting()
        server.close_idle()
        connections.stay = False
    gateway.drain()

    def is_busy() -> bool:
        operations = gateway.operations - (gateway.checks if server else 0)
        return (
            gateway.in_flight.count + operations > 0 or connections.unsent or others.are_finishing
        )

    await wait_while(gateway, is_busy, seconds)
    log(logging.INFO, "stopping", in_flight=gateway.in_flight.count)
    others.end()
    if gateway.in_flight.count:
        gateway.stop()
    await wait_while(
        gateway, lambda: gateway.in_flight.count > 0 or others.are_finishing, STOPPING_SECONDS
    )


async def wait_while(gateway: Gateway, holds: Callable[[], bool], seconds: float) -> None:
    """Wait until a condition does not hold any more, for at most so many seconds."""
    deadline = time.monotonic() + seconds
    while holds() and time.monotonic() < deadline:
        gateway.store.give_up_if_failing()
        await asyncio.sleep(DRAIN_LOOK_SECONDS)
