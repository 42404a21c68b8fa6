"""The event loop of a gateway."""

from __future__ import annotations

import socket
import sys
from typing import Any

import uvloop

from redbtc.upstream.addresses import HostNames, ResolvedAddress, literal_addresses, with_port

CAN_CLEAN_UP = sys.version_info >= (3, 13)


class EventLoop(uvloop.Loop):
    """uvloop's event loop, but a library that asks it for a host's addresses (httpx2, for upstreams
    that need it and for the webhook) gets them as redbtc/upstream/addresses.py finds them."""

    def __init__(self) -> None:
        super().__init__()
        self._names = HostNames()

    async def create_unix_server(self, *arguments: Any, **options: Any) -> Any:
        """Listen on a Unix socket. Its file stays when the server is closed, as with Python before
        3.13: another process may listen on the same socket."""
        if CAN_CLEAN_UP:
            options.setdefault("cleanup_socket", False)
        return await super().create_unix_server(*arguments, **options)

    async def getaddrinfo(  # type: ignore[override]
        self,
        host: bytes | str | None,
        port: bytes | str | int | None,
        *,
        family: int = 0,
        type: int = 0,
        proto: int = 0,
        flags: int = 0,
    ) -> list[ResolvedAddress]:
        """Return what socket.getaddrinfo does. Raises OSError, UnicodeError."""
        if type != socket.SOCK_STREAM or not isinstance(port, int) or proto or flags or not host:
            found: Any = await super().getaddrinfo(
                host, port, family=family, type=type, proto=proto, flags=flags
            )
            return list(found)
        name = host.decode() if isinstance(host, bytes) else host
        addresses = literal_addresses(name, port)
        if not addresses:
            addresses = [with_port(each, port) for each in await self._names[name].addresses()]
        of_family = [each for each in addresses if family in (socket.AF_UNSPEC, each[0])]
        if not of_family:
            raise socket.gaierror(socket.EAI_NONAME, "no address of this family")
        return of_family
