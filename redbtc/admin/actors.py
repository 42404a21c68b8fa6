"""Actors and their roles, refusals, and what the admin API needs of a running gateway."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple, Protocol

from redbtc.admin.outputs import AtWork, Reloaded, UpstreamAtWork, UpstreamRested
from redbtc.admin.users import LoginSession
from redbtc.codex.catalog import offered_models, read_catalog
from redbtc.codex.config_toml import CodexOffer, offer_of
from redbtc.config import Settings
from redbtc.errors import Conflict, NotFound, UserError
from redbtc.store.accounts import Account
from redbtc.store.keys import Key

Rank = Literal["key", "viewer", "owner", "operator"]
RANKS = {"key": 0, "viewer": 1, "owner": 2, "operator": 3}


class Invalid(UserError):
    """A refusal of malformed input. The message names the place in the input, and `field` the
    field, if the error is about one."""

    def __init__(self, what: str, place: str = "") -> None:
        super().__init__(f"{what} - at `{place}`" if place else what)
        self.what = what
        self.field = place.rpartition(".")[2]


class TooLarge(UserError):
    """A refusal of a body that has more bytes than allowed."""


class Forbidden(UserError):
    """A refusal of what the actor may know of but may not do."""


class Unauthorized(UserError):
    """A refusal of a request without an active API key or a valid session."""


class Actor(NamedTuple):
    """The holder of an API key, a member of an account, or an operator."""

    name: str
    rank: Rank
    account_id: str | None = None  # None: all accounts
    key: Key | None = None
    session: LoginSession | None = None
    network: str = ""

    @property
    def is_command(self) -> bool:
        """Return whether the actor is a command rather than a browser or the holder of a key."""
        return self.key is None and self.session is None

    def require(self, min_rank: Rank) -> None:
        """Raise Forbidden if the actor's role is lower than this."""
        if RANKS[self.rank] < RANKS[min_rank]:
            raise Forbidden("your role doesn't allow this")

    def required_account_id(self) -> str:
        """Return the id of the actor's account. Raises NotFound for an operator."""
        if self.account_id is None:
            raise NotFound("this needs an API key in the Authorization header")
        return self.account_id

    def required_key(self) -> Key:
        """Return the actor's API key. Raises NotFound if there is none."""
        if self.key is None:
            raise NotFound("this needs an API key in the Authorization header")
        return self.key

    def required_session(self) -> LoginSession:
        """Return the actor's session. Raises NotFound if there is none."""
        if self.session is None:
            raise NotFound("this needs a dashboard session; log in at /dashboard/login")
        return self.session


class RunningGateway(Protocol):
    """The methods of a gateway that the admin API calls."""

    @property
    def settings(self) -> Settings:
        """The settings in force."""

    @property
    def example_model(self) -> str:
        """The model that examples name."""

    def codex(self, own_login: bool | None) -> CodexOffer:
        """Return what the gateway offers to Codex CLI; see `offer_of`. Raises UserError."""

    def serves(self, model: str) -> bool:
        """Return whether an upstream serves the model."""

    def listed_models(self) -> set[str]:
        """Return the models that upstreams have listed so far."""

    def limits_of_key(self, key: Key) -> dict[str, Any]:
        """Return the limits in force for a key and its account, and what is left of them."""

    def limits_of_account(self, account: Account) -> dict[str, Any]:
        """Return the limits in force for an account, and what is left of them."""

    def abort_key(self, key_id: str) -> int:
        """Abort all requests of a key. Return their number."""

    async def abort_account(self, account_id: str) -> int:
        """Abort all that runs for an account, whose keys are revoked. Return how much that was."""

    async def end_account(self, account_id: str) -> bool:
        """Abort all that runs for an account, and wait for a while until it has ended. Return
        whether it has."""

    def set_back(self, at: int) -> None:
        """Set the ledger's time back to `at` (milliseconds): nothing in progress began later."""

    async def reload(self) -> Reloaded:
        """Let a new process take over. Raises Conflict or UserError if none does."""

    def checking(self) -> AbstractContextManager[None]:
        """Return a context, the end of which SIGTERM does not wait for."""

    def at_work(self) -> AtWork:
        """Return what is in flight, what was refused since the start, and the upstreams."""

    def rest_upstream(self, name: str, seconds: float, by: str) -> UpstreamRested:
        """Let an upstream rest for so long. Raises NotFound, or Conflict if it can't be used."""

    def resume_upstream(self, name: str, by: str) -> UpstreamAtWork:
        """End an upstream's rests and outage. Raises NotFound, or Conflict if it can't be used."""


class StoppedGateway:
    """The gateway of a command that works on the database by itself, because none is running."""

    example_model = ""

    def __init__(self, settings: Settings) -> None:
        """`settings` are those with which the gateway would start."""
        self.settings = settings

    def codex(self, own_login: bool | None) -> CodexOffer:
        """Return what the gateway would offer to Codex CLI. Raises UserError, also if its model
        catalogue can't be read."""
        models = offered_models(read_catalog(self.settings.codex.catalog))
        return offer_of(self.settings, own_login, models)

    def serves(self, model: str) -> bool:
        """Return whether an upstream would serve the model."""
        return any(each.serves(model) for each in self.settings.upstreams)

    def listed_models(self) -> set[str]:
        """Return no models, since no upstream was asked."""
        return set()

    def limits_of_key(self, _: Key) -> dict[str, Any]:
        """Return no limits, since only a running gateway counts requests."""
        return {}

    def limits_of_account(self, _: Account) -> dict[str, Any]:
        """Return no limits, since only a running gateway counts requests."""
        return {}

    def abort_key(self, _: str) -> int:
        """Return 0, since no request is in flight."""
        return 0

    async def abort_account(self, _: str) -> int:
        """Return 0, since no request is in flight."""
        return 0

    async def end_account(self, _: str) -> bool:
        """Return True, since nothing is in progress."""
        return True

    def set_back(self, _: int) -> None:
        """Do nothing, since nothing is in progress."""

    async def reload(self) -> Reloaded:
        """Raise Conflict, since there is nothing to reload."""
        raise Conflict("no gateway is running")

    def checking(self) -> AbstractContextManager[None]:
        """Return a context that does nothing, since a signal ends the command."""
        return nullcontext()

    def at_work(self) -> AtWork:
        """Return that nothing is in flight."""
        return AtWork(False, in_flight=0, queued=0, uptime_seconds=0, refusals={}, upstreams=[])

    def rest_upstream(self, name: str, seconds: float, by: str) -> UpstreamRested:
        """Raise Conflict, since no upstream is in use."""
        raise Conflict(f"no gateway runs, so {name!r} can't rest; start the gateway first")

    def resume_upstream(self, name: str, by: str) -> UpstreamAtWork:
        """Raise Conflict, since no upstream is in use."""
        raise Conflict(f"no gateway runs, so {name!r} can't resume; start the gateway first")
