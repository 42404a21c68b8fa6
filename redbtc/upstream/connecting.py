"""Connecting to an upstream, for HTTP and WebSocket: the name, the addresses, TLS."""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import httpx2
from aiohappyeyeballs import start_connection

from redbtc.upstream.addresses import HostNames, ResolvedAddress, literal_addresses, with_port
from redbtc.upstream.certificates import system_context
from redbtc.upstream.failures import ConnectTimedOut

NEXT_ADDRESS_SECONDS = 0.25  # until the next address is tried beside one that does not answer
DEFAULT_PORTS = {"http": 80, "https": 443}

T = TypeVar("T")


class Connector:
    """Connects to hosts. The addresses of a host are tried one after the other, as RFC 8305 has it:
    the next one as soon as one has failed, and after NEXT_ADDRESS_SECONDS beside those that have
    not answered. The first that answers is used."""

    def __init__(self, names: HostNames, context: ssl.SSLContext | None) -> None:
        """`context` is the TLS context, None for one that trusts the system's certificates."""
        self._names = names
        self._context = context
        self._making_context = asyncio.Lock()

    async def connect(
        self, url: httpx2.URL, timeout: float | None, open_on: Callable[..., Awaitable[T]]
    ) -> T:
        """Connect to the host of a URL and return what `open_on(sock=…, ssl=…, server_hostname=…)`
        returns, all within `timeout` seconds. The arguments are those of asyncio's
        create_connection. Raises OSError: socket.gaierror if the host's name is not resolved, in
        time as well, ConnectTimedOut; and what `open_on` raises."""
        host, port = url.raw_host.decode("ascii"), url.port or DEFAULT_PORTS[url.scheme]
        addresses = literal_addresses(host, port)
        try:
            async with asyncio.timeout(timeout):
                if not addresses:
                    found = await self._names[host].addresses()
                    addresses = [with_port(each, port) for each in found]
                context = await self.tls_context() if url.scheme == "https" else None
                sock = await self._race(host, addresses)
                name = host if context else None
                return await open_on(sock=sock, ssl=context, server_hostname=name)
        except TimeoutError as error:
            if not addresses:
                raise socket.gaierror(socket.EAI_AGAIN, "no answer in time") from error
            raise ConnectTimedOut("no connection in time") from error

    async def _race(self, host: str, addresses: Sequence[ResolvedAddress]) -> socket.socket:
        """Return a socket that is connected to one of a host's addresses. Raises OSError."""
        try:
            return await start_connection(addresses, happy_eyeballs_delay=NEXT_ADDRESS_SECONDS)
        except BaseException as error:  # a timeout as well
            self._names[host].distrust()
            if isinstance(error, RuntimeError):  # of uvloop's
                raise OSError(str(error)) from error
            # If addresses failed in different ways, the error has the numbers only in its text.
            # What the host itself has answered says most.
            if type(error) is OSError and f"[Errno {errno.ECONNREFUSED}]" in str(error):
                raise ConnectionRefusedError(errno.ECONNREFUSED, str(error)) from error
            raise

    async def tls_context(self) -> ssl.SSLContext:
        """Return the TLS context for upstreams. The one that trusts the system's certificates is
        made once, when it is needed, in a thread. Raises OSError."""
        async with self._making_context:
            if self._context is None:
                try:
                    self._context = await asyncio.to_thread(system_context)
                except RuntimeError as error:  # no thread can be started
                    raise OSError(str(error)) from error
        return self._context
