"""The limits within which a session's messages are read."""

from __future__ import annotations

from redbtc.deadlines import Deadline
from redbtc.gateway.gateway import Gateway
from redbtc.limits.memory import Reservation
from redbtc.store.keys import Key


class MessageIntake:
    """The limits of one connection, as the server reads them (`Intake`)."""

    def __init__(self, gateway: Gateway, key: Key) -> None:
        self._gateway = gateway
        self.reservation = Reservation(gateway.limiter, key, gateway.settings)
        self.deadline = Deadline(gateway.deadlines)
        self.small_frames = gateway.limiter.small_frames(key)
        self.max_bytes = 0
        self.message_seconds = 0.0
        self.renew()

    def renew(self) -> None:
        """Bring the limits of the next message up to date with the settings."""
        settings = self.reservation.settings = self._gateway.settings
        self.max_bytes = settings.server.max_body_bytes
        self.message_seconds = settings.server.body_timeout_seconds
