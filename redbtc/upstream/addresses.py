"""The addresses of hosts: those of the upstreams, and the webhook's.

Names are looked up in threads of their own, one for each host at a time: a name server that does
not answer then delays no other host. (uvloop looks names up in libuv's four threads, which all
names share; asyncio in the threads that everything else shares.) Addresses are used for
FRESH_SECONDS and then looked up again. The last addresses that were found are kept for as long as
looking them up fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import threading
from collections.abc import Sequence
from typing import Any

FRESH_SECONDS = 5.0  # addresses that were found are used for so long without looking them up again
LOOK_UP_AGAIN_SECONDS = 1.0  # from the end of a look-up that failed or was of no use to the next
STALE_SECONDS = 0.25  # from the start of a look-up until the last good addresses are used

# As socket.getaddrinfo returns it: family, type, protocol, "", and host and port.
ResolvedAddress = tuple[int, int, int, str, tuple[Any, ...]]


class HostName:
    """A host's name, and what is known of its addresses."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._found: Sequence[ResolvedAddress] = ()  # by the last look-up that has succeeded
        self._fresh_until = -math.inf
        self._next_at = -math.inf  # the earliest time of the next look-up
        self._started_at = 0.0
        self._failure: OSError | None = None  # of the last look-up
        self._look_up: asyncio.Future[None] | None = None  # the one that is in flight

    async def addresses(self) -> Sequence[ResolvedAddress]:
        """Return the host's addresses. Wait for a look-up if none are known, and for a moment if
        they are not fresh. Raises OSError if none are known and the look-up fails."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        if now < self._fresh_until:
            return self._found
        if self._look_up is None and now >= self._next_at:
            self._start(loop)
        if self._look_up is not None:
            left = max(0.0, self._started_at + STALE_SECONDS - now) if self._found else None
            await asyncio.wait([self._look_up], timeout=left)
        if not self._found:
            assert self._failure is not None
            raise type(self._failure)(*self._failure.args)
        return self._found

    def distrust(self) -> None:
        """Look the addresses up again before they are used the next time, though not more often
        than once in LOOK_UP_AGAIN_SECONDS: none of them could be connected to."""
        self._fresh_until = -math.inf

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start a look-up in a thread of its own. Fail at once if no thread can be started."""
        self._look_up, self._started_at = loop.create_future(), loop.time()

        def look_up() -> None:
            found: Sequence[ResolvedAddress] | Exception
            try:
                found = socket.getaddrinfo(self._name, None, type=socket.SOCK_STREAM)
            except Exception as error:  # whatever it is, it must end the look-up
                found = error
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(self._finish, found, loop)

        try:
            threading.Thread(target=look_up, name=f"look up {self._name}", daemon=True).start()
        except RuntimeError as error:
            self._finish(OSError(str(error)), loop)

    def _finish(
        self, found: Sequence[ResolvedAddress] | Exception, loop: asyncio.AbstractEventLoop
    ) -> None:
        assert self._look_up is not None
        self._next_at = loop.time() + LOOK_UP_AGAIN_SECONDS
        if isinstance(found, OSError):
            self._failure = found
        elif isinstance(found, Exception):  # such as UnicodeError, for what can't be a name
            self._failure = socket.gaierror(socket.EAI_NONAME, str(found))
        else:
            self._found, self._fresh_until = found, loop.time() + FRESH_SECONDS
        self._look_up.set_result(None)
        self._look_up = None


class HostNames:
    """The names of hosts that have been looked up. They are those of the settings, so few."""

    def __init__(self) -> None:
        self._names: dict[str, HostName] = {}

    def __getitem__(self, name: str) -> HostName:
        if name not in self._names:
            self._names[name] = HostName(name)
        return self._names[name]


def literal_addresses(host: str, port: int) -> Sequence[ResolvedAddress]:
    """Return the address that a host is written as, or no address if it is a name."""
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except (OSError, UnicodeError):
        return []


def with_port(address: ResolvedAddress, port: int) -> ResolvedAddress:
    """Return an address that was looked up without a port, with a port."""
    family, kind, protocol, name, (host, _, *rest) = address
    return family, kind, protocol, name, (host, port, *rest)
