"""The upstreams of the settings, and which of them may take a request."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterator, Mapping

from redbtc.refusals import Refusal
from redbtc.upstream.absences import ALL_MODELS, Absence
from redbtc.upstream.addresses import HostNames
from redbtc.upstream.candidates import Candidates, MovedSessions, PlaceQueue, ranked
from redbtc.upstream.change import UpstreamChange
from redbtc.upstream.health_report import can_serve
from redbtc.upstream.upstreams import Upstream
from redbtc.upstream_settings import UpstreamSettings


class Upstreams:
    """The members of the upstreams of the settings that are in force, in their order."""

    def __init__(
        self,
        settings: tuple[UpstreamSettings, ...],
        on_change: Callable[[UpstreamChange], None] = lambda _: None,
    ) -> None:
        """`on_change` is told of each change of a member's state. Raises SettingsError if a ca_file
        can't be read."""
        self._on_change = on_change
        self._queue: PlaceQueue[Upstream] = PlaceQueue()
        self.moved = MovedSessions()
        self._names = HostNames()
        self._closing: set[asyncio.Task[None]] = set()
        self._upstreams = [self._new(member) for table in settings for member in table.members]
        self._watch_health()

    def __iter__(self) -> Iterator[Upstream]:
        return iter(self._upstreams)

    def apply(self, settings: tuple[UpstreamSettings, ...]) -> None:
        """Use other settings from the next request on, and for requests that wait for a place.
        Members that connect as before keep their connections; the connections of the others end
        with their requests. A member whose ca_file has other contents does not connect as before.
        Raises SettingsError if one can't be read."""
        before = self._upstreams
        kept = {each.name: each for each in before}
        members = [member for table in settings for member in table.members]
        after = [self._renewed(member, kept.get(member.member_name)) for member in members]
        for upstream, member in zip(after, members, strict=True):
            upstream.follow(member)
        self._upstreams = after
        for upstream in before:
            if upstream not in self._upstreams:
                task = asyncio.create_task(upstream.close())
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)
        self._watch_health()
        self.let_last_serve()

    def let_last_serve(self) -> None:
        """End the rests after a limit for models that no other member can serve, after members were
        removed, here or by a restart."""
        for upstream in self._upstreams:
            health = upstream.health
            for rest in list(health.absences.rests.values()):
                if rest.is_limit and health.is_last(rest.model):
                    health.absences.end(rest)

    def _renewed(self, settings: UpstreamSettings, before: Upstream | None) -> Upstream:
        """Return the member `before` if it connects as these settings say, else a new one. Raises
        SettingsError if the settings' ca_file can't be read; that of others does not matter."""
        same_file = before and settings.ca_file == before.settings.ca_file
        if before and same_file and before.has_new_certificates():
            before = None
        if before and settings.connects_like(before.settings):
            return before
        return self._new(settings, before)

    def _new(self, settings: UpstreamSettings, before: Upstream | None = None) -> Upstream:
        """Return a new member. It goes on with the health of the one `before` if it is the same key
        for the same server."""
        upstream = Upstream(settings, self._names, self._on_change)
        if before and before.settings.destination == settings.destination:
            upstream.go_on_with(before.health)
        return upstream

    def _watch_health(self) -> None:
        """Let each member know whether another one could serve in its place."""
        self.are_several = len(self._upstreams) > 1
        self._operators = [each for each in self._upstreams if not each.is_client]
        self._clients = [each for each in self._upstreams if each.is_client]
        for upstream in self._upstreams:
            upstream.health.is_last = functools.partial(self._is_last, upstream)

    def _is_last(self, upstream: Upstream, model: str) -> bool:
        pool = self._clients if upstream.is_client else self._operators
        others = (each for each in pool if each is not upstream)
        others = (each for each in others if model == ALL_MODELS or each.serves(model))
        return not any(each.health.is_proven(model) for each in others)

    def restore(self, name: str, model: str, seconds: float, reason: str) -> None:
        """Let a member go on with a rest that an earlier process has begun, for `seconds` more."""
        for upstream in self._upstreams:
            if upstream.name == name:
                upstream.health.restore(model, seconds, reason)

    def change_in_flight(self, name: str, by: int) -> None:
        """Count `by` requests more in flight at a member, or fewer: those of another process that
        this one has taken over from."""
        for upstream in self._upstreams:
            if upstream.name == name:
                upstream.health.in_flight += by
                if by < 0:
                    self._queue.let_in(upstream)

    def outages(self) -> dict[str, Absence]:
        """Return the outages of members, by their names."""
        healths = ((each.name, each.health.absences.outage) for each in self._upstreams)
        return {name: outage for name, outage in healths if outage}

    def go_on_with(self, outages: Mapping[str, Absence]) -> None:
        """Go on with the outages that another process of this machine has found, except of a member
        that is the last one now."""
        for upstream in self._upstreams:
            outage, health = outages.get(upstream.name), upstream.health
            if outage and health.usable and not health.is_last(ALL_MODELS):
                outage.tries = 0
                health.absences.outage = outage
                upstream.go_on_with(health)

    def take_no_more(self) -> None:
        """Let requests take only the places that are taken already, where their number is limited:
        another process takes the others from now on."""
        for upstream in self._upstreams:
            if upstream.max_concurrency:
                upstream.max_concurrency = upstream.health.in_flight or -1

    def named(self, name: str) -> Upstream | None:
        """Return the member of that name. If the settings have none, return another member of the
        same upstream, a usable one if there is one: a key may have been removed, or several have
        replaced the only one. Return None if the settings don't have the upstream."""
        found = [upstream for upstream in self._upstreams if upstream.name == name]
        if not found:
            table = name.partition("/")[0]
            found = [upstream for upstream in self._upstreams if upstream.settings.name == table]
        return next((upstream for upstream in found if upstream.usable), next(iter(found), None))

    def candidates(
        self,
        model: str,
        session: bytes | None = None,
        *,
        replays: bool = False,
        websocket: bool = False,
        with_credential: bool = False,
    ) -> Candidates[Upstream]:
        """Return the members that may take a request for a model, over a WebSocket if `websocket`.
        `session` is what stands for the request's session; `replays`: see Candidates;
        `with_credential`: the client has sent its own. Raises Refusal if there is none."""
        pool = self._operators
        if self._clients and with_credential and self.are_clients(model):
            pool = self._clients
        usable, is_served = [], False
        for upstream in pool:
            if upstream.serves(model):
                is_served = True
                if upstream.usable:
                    usable.append(upstream)
        if not is_served:
            raise needs_credential(model) if self.are_clients(model) else does_not_exist(model)
        if not usable:
            raise Refusal("no_upstream", retry_after=5)
        if websocket:
            usable = speaking(usable)
        if len(usable) == 1:
            return Candidates(usable, model, self._queue)
        order = ranked(usable, session)
        return Candidates(
            order, model, self._queue, session=session, moved=self.moved, replays=replays
        )

    def are_clients(self, model: str) -> bool:
        """Return whether a request for a model goes to members with `credentials = "client"` if its
        client has sent a credential."""
        return any(upstream.serves(model) for upstream in self._clients)

    def are_free(self, model: str) -> bool:
        """Return whether requests for a model cost nothing, at whichever of the members that need a
        client's credential."""
        serving = [upstream for upstream in self._clients if upstream.serves(model)]
        return bool(serving) and all(upstream.is_free for upstream in serving)

    def for_handshake(
        self, session: bytes | None, with_credential: bool = False
    ) -> Candidates[Upstream]:
        """Return the members that a session over a WebSocket may be connected to, before its first
        request. Raises Refusal if there is none."""
        pool = self._clients if self._clients and with_credential else self._operators
        if not any(each.speaks_websocket for each in pool):
            raise Refusal("upgrade_required", headers=[(b"upgrade", b"websocket")])
        usable = [each for each in pool if each.usable and each.speaks_websocket]
        if not usable:
            raise Refusal("no_upstream", retry_after=5)
        order = ranked(usable, session)
        return Candidates(order, ALL_MODELS, self._queue, takes_place=False)

    def holders(
        self,
        name: str,
        model: str = ALL_MODELS,
        *,
        websocket: bool = False,
        with_credential: bool = False,
    ) -> Candidates[Upstream]:
        """Return the members that can be asked for what is stored at the member of that name: that
        one, then others of its organization. `with_credential`: it was stored with a credential of
        the client's own, and is not asked for with any other, whatever the settings say meanwhile.
        Raises Refusal if there is none."""
        holder = self.named(name)
        if holder is None or not holder.usable or holder.is_client != with_credential:
            raise Refusal("no_upstream", retry_after=60)
        pool = self._clients if with_credential else self._operators
        others = [each for each in pool if each is not holder and each.usable]
        found = [
            each
            for each in (holder, *others)
            if each.organization == holder.organization
            and (model == ALL_MODELS or each.serves(model))
        ]
        if not found:
            raise does_not_exist(model)
        if websocket:  # what is not stored is known to this member alone
            found = speaking([each for each in found if each is holder])
        return Candidates(found, model, self._queue, is_pinned=True)

    def can_serve(self) -> bool:
        """Return whether a request would probably be served, for some model."""
        return any(can_serve(upstream.health) for upstream in self._upstreams)

    def serve(self, model: str) -> bool:
        """Return whether an upstream serves the model."""
        return any(upstream.serves(model) for upstream in self._upstreams)

    def shown_to(self, with_credential: bool) -> list[Upstream]:
        """Return the members that a client can use. `with_credential`: it has sent its own."""
        return self._upstreams if with_credential else self._operators

    def listed_models(self) -> set[str]:
        """Return the models that upstreams have listed so far."""
        return {name for upstream in self._upstreams for name in upstream.listed}

    def offer_websocket(self) -> bool:
        """Return whether an upstream speaks WebSocket. If none does, an upgrade is answered 426."""
        return any(upstream.speaks_websocket for upstream in self._upstreams)


def does_not_exist(model: str) -> Refusal:
    """Return the refusal of a model that no upstream serves."""
    return Refusal("model_not_found", f"The model '{model}' does not exist here.", param="model")


def needs_credential(model: str) -> Refusal:
    """Return the refusal of a model that only clients with a credential of their own can use."""
    message = (
        f"The model '{model}' is served only with your own credential. Send the gateway's key in "
        "the header X-Gateway-Key (or another one that your administrator names), and your "
        "credential in Authorization."
    )
    return Refusal("model_not_found", message, param="model")


def speaking(members: list[Upstream]) -> list[Upstream]:
    """Return the members that speak WebSocket. Raises Refusal if none does."""
    found = [each for each in members if each.speaks_websocket]
    if not found:
        message = "No upstream serves this model over a WebSocket; use POST."
        raise Refusal("no_upstream", message)
    return found
