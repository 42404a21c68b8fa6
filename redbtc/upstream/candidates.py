"""The choice among the members of the upstreams, for one request.

Members are tried by priority, then by health, then by affinity: a session has the same first choice
as long as the settings stay, on every gateway and after every restart, since nothing but the
session's name, the members' names and their weights decides (weighted rendezvous hashing). Adding
or removing a member moves only the sessions that it gets or had. A session that was served
elsewhere for a while returns, unless it replays encrypted content that its first choice can't read
(`MovedSessions`).

A member that has `max_concurrency` requests in flight is passed over. If all are full, a request
waits for the first place that comes free (`PlaceQueue`).
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import random
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from typing import Generic, Protocol, TypeVar

from redbtc.refusals import Refusal
from redbtc.upstream.absences import NOT_TRIED, Tried, end_tries
from redbtc.upstream.health import MemberHealth

MAX_MOVED = 10_000
LOOK_SECONDS = 0.25  # a member can come back while requests wait for another one's place


class Member(Protocol):
    """What the choice must know of a member."""

    name: str
    health: MemberHealth
    in_flight: int  # requests that it has places for, under the settings that it has
    max_concurrency: int  # how many may be in flight; 0: any number, negative: none

    @property
    def priority(self) -> int:
        """The members with the lowest are tried first."""

    @property
    def weight(self) -> int:
        """The share among members of equal priority."""

    @property
    def organization(self) -> str:
        """Members of one organization can read each other's encrypted content."""


AnyMember = TypeVar("AnyMember", bound=Member)


def is_full(member: Member) -> bool:
    """Return whether a member has as many requests in flight as it may have."""
    return bool(member.max_concurrency) and member.max_concurrency <= member.health.in_flight


def session_hash(account_id: str, name: str) -> bytes:
    """Return what stands for an account's session in the choice."""
    return hashlib.blake2b(f"{account_id}\0{name}".encode(), digest_size=16).digest()


def ranked(members: Sequence[AnyMember], session: bytes | None) -> list[AnyMember]:
    """Sort members by priority, then by the session's affinity; without a session, at random. Each
    member is first with a chance in proportion to its weight."""
    if len(members) == 1:
        return list(members)

    def order(member: Member) -> tuple[int, float]:  # Efraimidis and Spirakis, 2006
        if session is None:
            chance = 1 - random.random()
        else:
            digest = hashlib.blake2b(member.name.encode(), digest_size=8, key=session).digest()
            chance = (int.from_bytes(digest, "big") + 1) / (1 << 64)
        return member.priority, -math.log(chance) / member.weight

    return sorted(members, key=order)


class MovedSessions:
    """The sessions that were served last by another member than their first choice, and by which:
    what they replay of its encrypted content, only its organization can read. The oldest are
    forgotten first."""

    def __init__(self) -> None:
        self._moved: OrderedDict[bytes, str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._moved)

    def member_of(self, session: bytes) -> str | None:
        """Return the name of the member that served the session last, None if that was its first
        choice, as far as is known."""
        return self._moved.get(session)

    def known(self) -> dict[bytes, str]:
        """Return the sessions, the oldest first."""
        return dict(self._moved)

    def add(self, moved: Mapping[bytes, str]) -> None:
        """Add sessions that another process knew."""
        self._moved.update(moved)

    def note(self, session: bytes, first_choice: str, served_by: str) -> None:
        """Note which member has served a session."""
        if served_by == first_choice:
            self._moved.pop(session, None)
            return
        self._moved[session] = served_by
        self._moved.move_to_end(session)
        if len(self._moved) > MAX_MOVED:
            self._moved.popitem(last=False)


class PlaceQueue(Generic[AnyMember]):
    """The requests that wait for a place at one of several members, the first in front."""

    def __init__(self) -> None:
        self.waiting: OrderedDict[asyncio.Future[None], Candidates[AnyMember]] = OrderedDict()
        self._timer: asyncio.TimerHandle | None = None

    async def wait(self, candidates: Candidates[AnyMember]) -> None:
        """Wait until the candidates have been given a member. Cancelling the wait takes none."""
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = loop.create_future()
        self.waiting[turn] = candidates
        self._look_later(loop)
        try:
            await turn
        except asyncio.CancelledError:
            self.waiting.pop(turn, None)
            candidates.give_back()  # the turn may have come in the same instant
            raise

    def let_in(self, freed: AnyMember | None = None) -> None:
        """Give free places to those in front who can use them. `freed`: only this member may have
        one."""
        for turn, candidates in list(self.waiting.items()):
            if freed is not None and is_full(freed):
                return
            if turn.done() or candidates.take_any():
                del self.waiting[turn]
                if not turn.done():
                    turn.set_result(None)

    def _look_later(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._timer is None:
            self._timer = loop.call_later(LOOK_SECONDS, self._look, loop)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        self.let_in()
        if self.waiting:
            self._look_later(loop)


class Candidates(Generic[AnyMember]):
    """The members that may take one request, the first to try in front, and the one that it has a
    place at: `member`. Leaving `with` gives the place back."""

    def __init__(
        self,
        members: list[AnyMember],
        model: str,
        queue: PlaceQueue[AnyMember],
        *,
        session: bytes | None = None,
        moved: MovedSessions | None = None,
        replays: bool = False,
        is_pinned: bool = False,
        takes_place: bool = True,
    ) -> None:
        """`members` are in order of affinity, and not empty. `replays`: the request has content
        that only one organization can read: that of the first, or of the member that the session
        was moved to. `is_pinned`: it needs what is stored at the first. `takes_place`: it counts
        for `max_concurrency`."""
        self.members = members
        self.model = model
        self.is_pinned = is_pinned
        self.member: AnyMember | None = None
        self._tried: Tried = NOT_TRIED
        self._takes_place = takes_place
        self._left = members
        self._queue = queue
        self._session = session
        self._moved = moved
        if replays and session and moved and (name := moved.member_of(session)):
            self._left = self._moved_first(name)
        self._readers = self._left[0].organization if replays else ""  # of encrypted content

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.give_back()

    def _moved_first(self, name: str) -> list[AnyMember]:
        """Return the members with the one in front whose encrypted content the session has."""
        first = self.members[0]
        found = [each for each in self.members if each.name == name]
        if not found or found[0].organization == first.organization:
            return self.members
        return found + [each for each in self.members if each is not found[0]]

    def prefer(self, connected: Collection[AnyMember]) -> None:
        """Try those members first, of the ones with the priority of the first one, that the session
        has a connection to."""
        first = self._left[0].priority

        def order(member: AnyMember) -> tuple[int, bool]:
            return member.priority, not (member.priority == first and member in connected)

        if not self.is_pinned and len(self._left) > 1 and self._left[0] not in connected:
            self._left = sorted(self._left, key=order)
            self._readers = self._readers and self._left[0].organization

    def take_now(self) -> bool:
        """Take a place at the first member that may serve, and return True. Return False if those
        that may are full. Raises Refusal if there is none."""
        first = self._left[0]
        if self._queue.waiting:
            if not self.are_full:
                self._queue.let_in()  # those who wait come first
        elif first.health.is_steady and (
            not first.max_concurrency or first.health.in_flight < first.max_concurrency
        ):  # the usual case
            self.member = first
            first.in_flight += self._takes_place
            first.health.in_flight += self._takes_place
            return True
        if self.take_any():
            return True
        if not self._usable():
            raise self._none_left()
        return False

    def take_any(self) -> bool:
        """Take a place as `take_free` does. If no member may serve, let the one serve again whose
        outage ends first, but rather one that can be reached. Return whether there was one."""
        usable = self._usable()
        if not usable:
            out = [each.health for each in self._left if each.health.is_only_out(self.model)]
            if not out:
                return False
            min(out, key=lambda each: each.absences.outage_left).come_back_as_last()
            usable = self._usable()
        return self._take_first(usable)

    def take_free(self) -> bool:
        """Take a place at the first member that may serve and is not full; return whether there
        was one."""
        return self._take_first(self._usable())

    def _take_first(self, usable: list[AnyMember]) -> bool:
        for member in usable:
            if not (self._takes_place and is_full(member)):
                self.member = member
                member.in_flight += self._takes_place
                member.health.in_flight += self._takes_place
                self._tried = member.health.begin(self.model)
                return True
        return False

    async def take_in_turn(self) -> None:
        """Wait for a place. Cancelling the wait takes none."""
        await self._queue.wait(self)

    def _usable(self, urgent: bool = False) -> list[AnyMember]:
        """Return the members that have not been tried and may serve. Those of other organizations
        are left out as long as one that can read the request's content is there."""
        model = self.model
        usable = [each for each in self._left if each.health.may_serve(model, urgent)]
        if self.is_pinned and not usable:
            usable = [each for each in self._left if each.health.is_only_out(model)]
        if self._readers:
            readers = [each for each in usable if each.organization == self._readers]
            return readers or usable
        return usable

    def _none_left(self) -> Refusal:
        """Return the refusal of a request that no member may serve now."""
        usable = [each.health for each in self.members if each.health.usable]
        wait = min([health.absences.seconds_left(self.model) for health in usable], default=5.0)
        if usable and all(health.absences.are_limits(self.model) for health in usable):
            message = "The upstream's rate limit is reached. Try again later."
            return Refusal("rate_limit_exceeded", message, retry_after=wait)
        return Refusal("no_upstream", retry_after=wait)

    def go_on(self) -> bool:
        """Take a place at the next member that may serve and is not full, in exchange for the place
        that the request has. If there is none, try one that is out, at times. Return whether there
        was one; if not, the request keeps its place."""
        before, tried = self.member, self._tried
        self._left = [each for each in self._left if each is not before]
        if not (self.take_free() or self._take_first(self._usable(urgent=True))):
            return False
        if before:
            self._leave(before, tried)
        return True

    @property
    def are_full(self) -> bool:
        """Return whether there are members that may serve, but none has a place."""
        usable = self._usable()
        return bool(usable) and all(map(is_full, usable))

    async def go_on_in_turn(self) -> None:
        """Give back the place, and wait for one at the next member. (Requests that kept theirs
        could wait for each other.) Cancelling the wait takes none."""
        self.give_back()
        await self._queue.wait(self)

    def give_back(self) -> None:
        """Give back the place, if there is one."""
        member, self.member = self.member, None
        tried, self._tried = self._tried, NOT_TRIED
        if member:
            self._leave(member, tried)

    def _leave(self, member: AnyMember, tried: Tried) -> None:
        member.in_flight -= self._takes_place
        member.health.in_flight -= self._takes_place
        if tried:
            end_tries(tried)
        if self._queue.waiting:
            self._queue.let_in(member)

    # What the member does with the request

    @property
    def may_be_unreadable(self) -> bool:
        """Return whether the request has encrypted content that the member can't read, as far as is
        known: it belongs to another organization."""
        readers = self._readers
        return bool(readers and self.member and self.member.organization != readers)

    def answer(self, serves: bool = True) -> None:
        """Note that the member has begun to answer, with anything but a failure. `serves`: not with
        an error either."""
        member = self.member
        assert member is not None
        member.health.answer(self.model, self._tried)
        if serves and self._session is not None and self._moved is not None:
            self._moved.note(self._session, self.members[0].name, member.name)

    def succeed(self, first_byte_ms: float | None) -> None:
        """Note that the member has answered to the end. `first_byte_ms`: how long after it was
        asked the first byte came; None if that is not known."""
        if self.member:
            self.member.health.past.succeed(first_byte_ms)

    def seconds_of_limit(self) -> float:
        """Return in how many seconds one of the members can be asked again that have reached their
        limits; infinity if none has."""
        limited = [
            each.health for each in self.members if each.health.absences.are_limits(self.model)
        ]
        return min([each.absences.seconds_left(self.model) for each in limited], default=math.inf)

    def fail(self, code: str, torn: bool = False) -> None:
        """Note that the request failed at the member, and why. `torn`: its answer had begun."""
        if self.member:
            self.member.health.fail(self.model, code, self._tried, torn)

    def reject(self, code: str) -> None:
        """Note that the member has rejected its key, and with which code."""
        if self.member:
            self.member.health.reject(self.model, code, self._tried)

    def limit(self, code: str, retry_after: float | None) -> None:
        """Note that a limit of the member is reached; see MemberHealth.limit."""
        if self.member:
            self.member.health.limit(self.model, code, retry_after, self._tried)
