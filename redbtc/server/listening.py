"""Listen for clients, and start uvicorn's server with the gateway's protocol."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress
import logging
import resource
import socket
from collections.abc import Iterator, Sequence
from typing import Any

import uvicorn

from redbtc.errors import UserError
from redbtc.server.connections import Connections
from redbtc.server.protocol import HTTPProtocol


def raise_descriptor_limit() -> int:
    """Raise the limit of open files to the hard limit; return the limit that is now in force."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS allows less than its hard limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


BACKLOG = 2048  # connections that wait to be accepted
START_PAUSE = 0.005  # seconds between two looks whether a server has started


class Server(uvicorn.Server):
    """A uvicorn server that leaves signals to the gateway."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    listeners: Sequence[socket.socket] = ()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen on sockets, as uvicorn does."""
        self.listeners = sockets or ()
        await super().startup(sockets)

    async def accept_on(self, listeners: Sequence[socket.socket]) -> None:
        """Accept connections again."""
        self.listeners, loop = listeners, asyncio.get_running_loop()
        self.servers = [
            await loop.create_server(self.protocol, sock=each, backlog=BACKLOG)
            for each in listeners
        ]

    def stop_accepting(self) -> None:
        """Accept no more connections. Those that are open go on."""
        for server in self.servers:
            server.close()

    def close_idle(self) -> None:
        """Close connections on which no request is being served, and others after the response that
        is under way. New ones are not closed: their first request may be on its way."""
        for each in list(self.server_state.connections):
            if isinstance(each, HTTPProtocol) and not each.connection.is_new:
                each.shutdown()

    async def adopt(self, connection: int, received: bytes) -> None:
        """Serve a connection, given its open file, that was left to this process, with the bytes
        that were received and not served."""
        while not self.started:
            await asyncio.sleep(START_PAUSE)
        loop = asyncio.get_running_loop()
        sock = socket.socket(fileno=connection)
        try:
            await loop.connect_accepted_socket(lambda: self.protocol(received), sock)
        except OSError:  # the client is gone
            sock.close()

    def protocol(self, received: bytes | None = None) -> asyncio.Protocol:
        """Return the protocol of a connection; `received` as HTTPProtocol takes it."""
        made: Any = self.config.http_protocol_class
        protocol: asyncio.Protocol = made(
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
            received=received,
        )
        return protocol


def server_for(app: Any, connections: Connections | None = None, **options: Any) -> Server:
    """Return a uvicorn server for the app, as `configured` describes it."""
    return Server(configured(app, connections, **options))


def configured(app: Any, connections: Connections | None = None, **options: Any) -> uvicorn.Config:
    """Return the configuration of a server without uvicorn's log, headers and WebSockets. `options`
    are uvicorn's."""
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)
    usual: dict[str, Any] = {
        "http": functools.partial(HTTPProtocol, connections or Connections()),
        "lifespan": "off",
        "interface": "asgi3",
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "date_header": False,
        "ws": "none",
        "timeout_graceful_shutdown": 1,
    }
    return uvicorn.Config(app, **usual | options)


def listen(
    hosts: Sequence[str], port: int, tries: int = 10, offered: Sequence[socket.socket] = ()
) -> list[socket.socket]:
    """Return a listening socket for each address, all on the same port. Port 0 means a free one: up
    to `tries` are tried until one is free at every address. "::" means all addresses of IPv6 and
    IPv4, unless an IPv4 address is listed as well. (IPv4 gets a socket of its own: on a shared one
    its clients would appear as ::ffff:192.0.2.1.) Of the `offered` sockets, which listen already,
    those at these addresses are used. Raises UserError where listening fails."""
    if all(":" in host for host in hosts) and any(is_any_address(host) for host in hosts):
        hosts = [*hosts, "0.0.0.0"]
    listeners: list[socket.socket] = []
    try:
        for host in hosts:
            chosen = listeners[0].getsockname()[1] if listeners else port
            found = [each for each in offered if listens_on(each, host, chosen)]
            listeners.append(found[0].dup() if found else _listen_on(host, chosen))
    except UserError:
        for listener in listeners:
            listener.close()
        if port == 0 and listeners and tries > 1:
            return listen(hosts, port, tries - 1, offered)
        raise
    return listeners


def listens_on(listener: socket.socket, host: str, port: int) -> bool:
    """Return whether a socket listens at an address. Port 0 is any port."""
    at, at_port = listener.getsockname()[:2]
    with contextlib.suppress(OSError):
        found = socket.getaddrinfo(host, None, listener.family, socket.SOCK_STREAM)
        return port in (0, at_port) and any(each[4][0] == at for each in found)
    return False


def is_any_address(host: str) -> bool:
    """Return whether a host is "::" or "0.0.0.0", in any spelling."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_unspecified
    return False


def _listen_on(host: str, port: int) -> socket.socket:
    family, where = (socket.AF_INET6, f"[{host}]") if ":" in host else (socket.AF_INET, host)
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise UserError(f"can't listen on {where}:{port}: {error.strerror}") from None


def address_of(listener: socket.socket) -> str:
    """Return a socket's host and port in the form that URLs use."""
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
