"""A change of what a member may be used for, as redbtc/upstream tells the gateway of it."""

from __future__ import annotations

from typing import NamedTuple


class UpstreamChange(NamedTuple):
    """A change of the state of a member, which is one upstream with one of its keys."""

    upstream: str  # the member's name, such as "openai" or "openai/KEY_A"
    state: str  # its state now: "up", "resting", "out" or "unusable"
    was: str  # its state before
    reason: str  # a code: an upstream's error code, a cause such as "refused", or "credentials"
    model: str  # the model that a rest of it begins or ends for; "" for all models
    seconds: float | None  # for how long at most, from now; each rest that begins has a number
    by: str  # the operator who did it, or "" for the gateway itself

    @property
    def is_end(self) -> bool:
        """Return whether an outage or a rest is over. The member can still rest for other models:
        then its state is "resting"."""
        return self.state == "up" or (self.state == "resting" and self.seconds is None)

    @property
    def is_outage(self) -> bool:
        """Return whether the member serves no model now. (If a rest for one model begins or ends
        during a rest for all, the change does not show that.)"""
        return not self.is_end and (self.state != "resting" or not self.model)
