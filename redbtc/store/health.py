"""The state of the ledger: whether changes can be committed."""

from __future__ import annotations

import logging
from typing import Literal

from redbtc.store.failures import LogFunction

RETRY_SECONDS = 0.25  # between two tries to write something


Health = Literal[  # states of the ledger
    "well",  # commits succeed
    "failing",  # the last commit failed or takes too long; it is tried again
    "lost",  # this process writes nothing more into the file
]


class LedgerState:
    """The state of the ledger. Only `enter` changes it."""

    def __init__(self, log: LogFunction) -> None:
        self.health: Health = "well"
        self.healthy = True  # whether commits succeed
        self.failure = ""  # why they don't
        self._log = log

    def enter(self, health: Health, reason: str = "") -> None:
        """Change the state and log the change. A lost ledger stays lost."""
        before = self.health
        if before == health or before == "lost":
            return
        self.health, self.healthy, self.failure = health, health == "well", reason
        if health == "well":
            self._log(logging.INFO, "ledger recovered")
        elif health == "failing":
            self._log(logging.ERROR, "ledger unavailable", reason=reason)
