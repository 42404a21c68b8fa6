"""Who acts: roles, and what a running gateway offers to the admin API."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Protocol

from redbtc.admin.outputs import AtWork
from redbtc.admin.users import LoginSession
from redbtc.errors import UserError
from redbtc.store.accounts import Account
from redbtc.store.keys import Key

Rank = Literal["key", "viewer", "owner", "operator"]
RANKS = {"key": 0, "viewer": 1, "owner": 2, "operator": 3}


class Actor(NamedTuple):
    """Who wants something: a holder of a key, a member of an account, an operator."""

    name: str
    rank: Rank
    account_id: str | None = None  # None: all
    key: Key | None = None
    session: LoginSession | None = None
    network: str = ""


class Invalid(UserError):
    """What was sent is not of the form that is asked for; the message names the place, `field` the
    member, where it is about one."""

    def __init__(self, what: str, place: str = "") -> None:
        super().__init__(f"{what} - at `{place}`" if place else what)
        self.what = what
        self.field = place.rpartition(".")[2]


class TooLarge(UserError):
    """A body of more bytes than are wanted."""


class Forbidden(UserError):
    """Not for this actor, who may know that it is there."""


class Unauthorized(UserError):
    """Nobody is logged in, or shows a key."""


class RunningGateway(Protocol):
    """What is shown of the gateway at work, which it gives at assembly."""

    @property
    def example_model(self) -> str:
        """The one that examples name."""

    def serves(self, model: str) -> bool:
        """Whether an upstream is there for it."""

    def listed_models(self) -> set[str]:
        """Return the models that upstreams have listed so far."""

    def limits_of_key(self, key: Key) -> dict[str, Any]:
        """The limits in force for a key and its account, and what is left of them."""

    def limits_of_account(self, account: Account) -> dict[str, Any]:
        """Those of an account."""

    def cut(self, key_id: str) -> int:
        """End all that runs for a key; how many requests that were."""

    def set_back(self, at: int) -> None:
        """Let nothing that runs have begun later than `at`: the ledger's time is set back."""

    def at_work(self) -> AtWork:
        """Requests in flight and queued, what was refused, each upstream."""


class StoppedGateway:
    """A gateway that does not run: the operations are those of a command's own process."""

    example_model = ""

    def serves(self, _: str) -> bool:
        """Nothing is."""
        return False

    def listed_models(self) -> set[str]:
        """Return no models, since no upstream was asked."""
        return set()

    def limits_of_key(self, _: Key) -> dict[str, Any]:
        """Unknown: they are those of its settings."""
        return {}

    def limits_of_account(self, _: Account) -> dict[str, Any]:
        """Unknown, too."""
        return {}

    def cut(self, _: str) -> int:
        """Nothing runs."""
        return 0

    def set_back(self, _: int) -> None:
        """Nothing runs."""

    def at_work(self) -> AtWork:
        """Nothing."""
        return AtWork(False, in_flight=0, queued=0, uptime_seconds=0, refusals={}, upstreams=[])
