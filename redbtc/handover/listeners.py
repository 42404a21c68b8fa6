"""The sockets that a gateway listens on."""

from __future__ import annotations

import socket
from typing import NamedTuple

from redbtc.config import ServerSettings
from redbtc.errors import UserError
from redbtc.handover.joining import Joining
from redbtc.server.listening import listen
from redbtc.systemd import inherited_sockets


class Listeners(NamedTuple):
    """The sockets that the gateway listens on. If `are_activated`, they are those that systemd has
    opened, whatever the settings say."""

    sockets: list[socket.socket]
    are_activated: bool


def open_listeners(settings: ServerSettings, joining: Joining | None) -> Listeners:
    """Return the sockets of systemd if there are any, else those that the settings ask for. Sockets
    of the process that this one takes over from are used again. Raises UserError."""
    if joining and joining.are_activated:
        return Listeners(joining.listeners, True)
    if activated := inherited_sockets():
        for each in activated:
            if each.family == socket.AF_UNIX:
                raise UserError(
                    f"systemd has opened the Unix socket {each.getsockname()}, but clients can "
                    "only use TCP: give ListenStream= a port in the .socket unit"
                )
        return Listeners(activated, True)
    offered = joining.listeners if joining else []
    sockets = listen(settings.hosts, settings.port, offered=offered)
    for each in offered:  # an open one would take connections that nobody serves
        each.close()
    return Listeners(sockets, False)
