"""The Unix socket beside the database, through which commands reach a running gateway.

Only the gateway's user may connect. If the socket's file is removed or replaced while the gateway
runs, the gateway makes it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from redbtc.server.listening import Server
from redbtc.telemetry import log

MAX_SOCKET_PATH = 100  # bytes; sun_path holds 108 on Linux, 104 on macOS
TICKS = 5  # of uvicorn's, 0.1 s each, between two looks at the file


@contextlib.contextmanager
def socket_path(database: Path) -> Iterator[str]:
    """Give the path of the socket. A path that is too long for a socket leads through a descriptor
    of its folder, which is open meanwhile."""
    path = f"{database}.sock"
    with contextlib.ExitStack() as stack:
        if len(os.fsencode(path)) > MAX_SOCKET_PATH:
            folder = os.open(database.parent, os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, folder)
            path = f"/proc/self/fd/{folder}/{database.name}.sock"
        yield path


def _make(path: str) -> None:
    """Replace whatever is at `path` by an unused socket of mode 0600, which uvicorn takes over with
    its mode."""
    Path(path).unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as placeholder:
        placeholder.bind(path)
    os.chmod(path, 0o600)


def _identity(path: str) -> tuple[int, int] | None:
    """Return the device and inode of a file, None if it can't be found. The inode of a socket is
    not used again while a process listens on it."""
    with contextlib.suppress(OSError):
        found = os.stat(path)
        return found.st_dev, found.st_ino
    return None


class AdminServer(Server):
    """The server of the admin API on the Unix socket beside the database."""

    _file: tuple[int, int] | None = None
    _given: socket.socket | None = None  # that another process has listened on
    _is_left = False  # another process listens now
    _failure = ""  # why the last attempt to listen failed

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Remove the socket file at the end."""
        try:
            yield
        finally:
            if not self._is_left:
                with contextlib.suppress(OSError):
                    os.unlink(self._path)

    @property
    def listener(self) -> int | None:
        """The open socket that it listens on, None if it could not be made."""
        return self.servers[0].sockets[0].fileno() if self.servers and not self._failure else None

    @property
    def file(self) -> tuple[int, int]:
        """Return the device and inode of its file as it was made."""
        return self._file or (0, 0)

    def take(self, listener: int, file: tuple[int, int]) -> None:
        """Listen on a socket that another process has listened on, with the `file` of that."""
        self._given, self._file = socket.socket(fileno=listener), file

    def leave(self) -> None:
        """Leave the socket to another process. Connections that are open go on."""
        self._is_left = True
        self.stop_accepting()

    @property
    def _path(self) -> str:
        return str(self.config.uds)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen on a new socket. If that fails, `on_tick` tries again."""
        self.servers = []
        if self._given:
            await self.lifespan.startup()
            loop = asyncio.get_running_loop()
            self.servers = [await loop.create_unix_server(self.protocol, sock=self._given)]
        else:
            await self._listen()
        self.started = True

    async def on_tick(self, counter: int) -> bool:
        """Listen again if the socket file was removed or replaced. Uvicorn calls this ten times a
        second."""
        if (
            counter % TICKS == 0
            and not self._is_left
            and (self._failure or _identity(self._path) != self._file)
        ):
            await self._listen_again()
        return await super().on_tick(counter)

    async def _listen_again(self) -> None:
        """Listen on a new socket. Connections that are open go on."""
        for server in self.servers:
            server.close()
        if await self._listen():
            log(logging.WARNING, "socket made again", path=self._path)

    async def _listen(self) -> bool:
        """Make the socket and listen on it. Return False if that fails, and log each reason
        once."""
        try:
            _make(self._path)
            await super().startup()
        except OSError as error:
            if str(error) != self._failure:
                self._failure = str(error)
                log(logging.ERROR, "commands can't connect", reason=self._failure)
            return False
        self._file, self._failure = _identity(self._path), ""
        return True
