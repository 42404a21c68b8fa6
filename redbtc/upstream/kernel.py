"""Questions about a connection that asyncio has no answer to, but the kernel has."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import socket
import struct
import termios

NO_BYTES = bytes(4)  # 0 as a C int
KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 60, "TCP_KEEPCNT": 5}  # as OpenAI's SDKs set them


def acknowledged_bytes(transport: asyncio.BaseTransport) -> int | None:
    """Return how many bytes have reached the other side's kernel: tcpi_bytes_acked, at offset 120
    of tcp(7)'s struct tcp_info. Return None on systems other than Linux, and where the kernel does
    not count them."""
    try:
        sock = transport.get_extra_info("socket")
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 128)
        count = int(struct.unpack_from("=Q", info, 120)[0])
        return count if count > 1 else None  # the SYN counts as one: more were acknowledged before
    except (AttributeError, OSError, struct.error):
        return None


def has_unread(transport: asyncio.BaseTransport) -> bool:
    """Return whether bytes have arrived that were not read yet."""
    number = transport.get_extra_info("socket").fileno()
    return fcntl.ioctl(number, termios.FIONREAD, NO_BYTES) != NO_BYTES


def probe_when_idle(transport: asyncio.BaseTransport) -> None:
    """Let the kernel find out when the other side of an idle connection is gone."""
    sock = transport.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        with contextlib.suppress(AttributeError):  # not on every system
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
