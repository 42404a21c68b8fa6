"""Ten members that fail, are limited, rest and return, and thousands of requests, in virtual time.

The gateway's own choice is at work: Upstreams, Candidates, PlaceQueue, MemberHealth and Failover.
Around it, everything is drawn from a seed: what the members answer (`Faults`), what clients and
operators do (`Simulation`). What must hold is checked at every place that is given (`Referee`),
from what can be seen outside: the settings, the changes that were reported, and who was given which
place when.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import math
import random
from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import msgspec
import pytest

from redbtc.config import FailoverSettings
from redbtc.gateway import failover
from redbtc.gateway.failover import NO_MODEL, NO_MODEL_SECONDS, Failover, judge
from redbtc.refusals import Refusal
from redbtc.upstream.absences import ALL_MODELS, Tried
from redbtc.upstream.candidates import Candidates, PlaceQueue, session_hash
from redbtc.upstream.change import UpstreamChange
from redbtc.upstream.configured import Upstreams
from redbtc.upstream.health import BY_HAND, CREDENTIALS, QUOTA, SLOW, MemberHealth
from redbtc.upstream.upstreams import Upstream
from redbtc.upstream_settings import UpstreamSettings
from tests.helpers.virtual_time import run_in_virtual_time

pytestmark = [pytest.mark.promise_4, pytest.mark.promise_9]

MODELS = ("gpt-a", "gpt-b")
FAULTS_END = 400.0
LONGEST_PAUSE = 1800.0  # of all rests and outages: that of a quota
QUEUE_SECONDS = 20.0
EPSILON = 1e-6
BROKEN = ("500", "503", "529")
KINDS = (
    *(*BROKEN, "refused", "dns", "connect_timeout", "hang", "torn"),
    *("401", "limit", "told", "told", "quota", "no model"),
)


# ── The upstreams ────────────────────────────────────────────────────────────────────────────────


class Fault(NamedTuple):
    """What a member answers from `start` to `end`."""

    kind: str
    start: float
    end: float


class Answer(NamedTuple):
    """What a request got from a member: a status, or why there is none."""

    status: int | None
    code: str | None = None
    told: float | None = None
    cause: str = ""
    torn: bool = False


class Faults:
    """What each member answers at each time."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._of: dict[str, list[Fault]] = {}
        self._all_down = rng.uniform(50, 300) if rng.random() < 0.5 else math.inf
        self._shared_kind = rng.choice(KINDS)  # of the fault that all have at the same time

    def of(self, name: str, now: float) -> str:
        """Return the kind of fault that a member has now, "" for none."""
        return next((each.kind for each in self._list(name) if each.start <= now < each.end), "")

    def _list(self, name: str) -> list[Fault]:
        if name not in self._of:
            rng, at, found = self._rng, 0.0, []
            if self._all_down < FAULTS_END:
                found.append(Fault(self._shared_kind, self._all_down, self._all_down + 40))
            while (at := at + rng.expovariate(1 / 90)) < FAULTS_END:
                end = min(FAULTS_END, at + rng.uniform(3, 120))
                found.append(Fault(rng.choice(KINDS), at, end))
                at = end
            self._of[name] = found
        return self._of[name]

    async def ask(self, name: str, model: str, rng: random.Random) -> Answer:
        """Answer a request as the member does, after some time."""
        loop = asyncio.get_running_loop()
        kind = self.of(name, loop.time())
        if kind == "refused":
            return Answer(None, cause=kind)
        if kind in SLOW:
            await asyncio.sleep(2 if kind == "dns" else 5)
            return Answer(None, cause=kind)
        if kind == "hang":
            await asyncio.sleep(30)
            return Answer(None, cause="first_byte_timeout")
        await asyncio.sleep(rng.uniform(0.05, 0.5))
        kind = self.of(name, loop.time())
        if kind in BROKEN:
            return Answer(int(kind))
        if kind == "401":
            return Answer(401, "invalid_api_key")
        if kind == "limit":
            return Answer(429, "rate_limit_exceeded")
        if kind == "told":
            now = loop.time()
            end = next(each.end for each in self._list(name) if each.start <= now < each.end)
            return Answer(429, "rate_limit_exceeded", rng.choice((1, 1, 10)) * (end - now))
        if kind == "quota":
            return Answer(429, QUOTA)
        if kind == "no model" and model == MODELS[1]:
            return Answer(403, NO_MODEL)
        return Answer(rng.choice((200, 200, 200, 400)), torn=kind == "torn")


# ── What must hold ───────────────────────────────────────────────────────────────────────────────


@dataclass(eq=False)
class Request:
    """What a request needs, and where it has been."""

    number: int
    model: str
    order: list[str]  # the members, the first choice in front
    session: bytes | None = None
    home: str = ""  # the organization that alone can read it, if there is one
    is_pinned: bool = False
    first_choice: str = ""  # without what replaying asks for
    places: list[str] = field(default_factory=list)  # the members that it has a place at
    has_turn: bool = False  # it has waited, and has been given a place
    task: asyncio.Task[Any] | None = None  # that waits
    tried: set[str] = field(default_factory=set)


@dataclass
class Pause:
    """A rest or an outage that was reported."""

    since: float
    until: float
    needs_success: bool
    reason: str
    is_reachable: bool = True
    tried_at: float = -math.inf
    trying: set[int] = field(default_factory=set)  # the numbers of requests

    def is_over(self, now: float) -> bool:
        """Return whether a request may be sent."""
        return now >= self.until - EPSILON and self.is_reachable and not self.trying


class Seen:
    """What has been reported of a member."""

    def __init__(self) -> None:
        self.out: Pause | None = None
        self.rests: dict[str, Pause] = {}
        self.back_at = -math.inf  # when it was the last one that could serve

    def pauses(self, model: str, now: float) -> list[Pause]:
        """Return what is in force for a model."""
        rests = [self.rests.get(ALL_MODELS), self.rests.get(model)]
        found = [each for each in rests if each and (each.needs_success or each.until > now)]
        return [self.out, *found] if self.out else found

    def allows(self, model: str, now: float) -> bool:
        """Return whether a request for the model may be sent."""
        return all(each.is_over(now) for each in self.pauses(model, now))

    def is_only_out(self, model: str, now: float) -> bool:
        """Return whether nothing but an outage is in force."""
        pauses = self.pauses(model, now)
        return bool(self.out) and all(each is self.out or each.is_over(now) for each in pauses)

    def allows_early(self, model: str, now: float) -> bool:
        """Return whether a request may be sent if all others have failed."""
        out = self.out
        if out is None or out.trying or not out.is_reachable:
            return False
        return self.is_only_out(model, now) and now >= max(out.since, out.tried_at) + 1 + EPSILON


class Referee:
    """Checks what must hold at every place that is given."""

    def __init__(self, now: Any) -> None:
        self.now = now
        self.settings: dict[str, UpstreamSettings] = {}
        self.serving: list[str] = []  # the members of the settings that are in force
        self.seen: dict[str, Seen] = {}
        self.in_flight: Counter[str] = Counter()
        self.requests: dict[Candidates[Upstream], Request] = {}
        self.waiting: list[Request] = []
        self.served_at: dict[str, float] = {}
        self.moved: dict[bytes, str] = {}
        self.judged = ""  # the model of the request whose answer is being judged
        self.outcomes: Counter[str] = Counter()

    def apply(self, settings: tuple[UpstreamSettings, ...]) -> None:
        """Note which settings are in force."""
        self.serving = [each.name for each in settings]
        self.settings |= {each.name: each for each in settings}
        for name in self.serving:
            self.seen.setdefault(name, Seen())

    def order_for(self, model: str, session: bytes) -> list[str]:
        """Return the members that serve a model, as the documentation sorts them."""

        def cost(name: str) -> tuple[int, float]:
            digest = hashlib.blake2b(name.encode(), digest_size=8, key=session).digest()
            chance = (int.from_bytes(digest, "big") + 1) / 2**64
            return self.settings[name].priority, -math.log(chance) / self.settings[name].weight

        return sorted((each for each in self.serving if self._serves(each, model)), key=cost)

    def _serves(self, name: str, model: str) -> bool:
        return not {"*", model}.isdisjoint(self.settings[name].models)

    def organization(self, name: str) -> str:
        return self.settings[name].organization or name

    def is_full(self, name: str) -> bool:
        return 0 < self.settings[name].max_concurrency <= self.in_flight[name]

    def usable(self, request: Request) -> list[str]:
        """Return the members that a request may be sent to now, full ones as well."""
        left = [each for each in request.order if each not in request.tried]
        now, model = self.now(), request.model
        found = [each for each in left if self.seen[each].allows(model, now)]
        if request.is_pinned and not found:
            found = [each for each in left if self.seen[each].is_only_out(model, now)]
        at_home = [each for each in found if self.organization(each) == request.home]
        return at_home or found

    def free(self, request: Request) -> list[str]:
        """Return the members at which a request can have a place now."""
        return [each for each in self.usable(request) if not self.is_full(each)]

    def took(self, candidates: Candidates[Upstream]) -> None:
        """Check a place that was given. Nothing has been noted of it so far."""
        request, member = self.requests[candidates], candidates.member
        assert member is not None
        name, now = member.name, self.now()
        assert len(request.places) <= bool(request.tried), "a request has two places"
        assert name not in request.tried, "a member is asked twice"
        free, seen = self.free(request), self.seen[name]
        if name in free:
            assert name == free[0], f"{name} before {free[0]}: the session moves without need"
        else:
            assert not self.is_full(name), f"{name} has too many requests"
            assert not free, f"{name} is asked early, and {free} are free: {request}"
            assert request.tried, f"{name} is asked though it is away: {seen.__dict__}"
            assert seen.allows_early(request.model, now + 2 * EPSILON), (
                f"{name} is asked too early: {request}"
            )
        # A member that is back as the last one is back for this request. One that fails over does
        # so at once, if it can.
        if seen.back_at < now and (request in self.waiting or not request.tried):
            self._check_turn(request, name)
        request.has_turn = True
        request.places.append(name)
        request.tried.add(name)
        self.in_flight[name] += 1
        for each in seen.pauses(request.model, now):
            each.trying.add(request.number)
            each.tried_at = now

    def _check_turn(self, request: Request, name: str) -> None:
        for other in self.waiting:
            if other is request:
                return
            if other.task and other.task.cancelling():
                continue  # its time is over, or its client has left
            assert other.has_turn or name not in self.free(other), (
                f"{name} is given to {request} before {other}"
            )

    def left(self, candidates: Candidates[Upstream], member: Upstream) -> None:
        """Note that a place is about to be given back."""
        request = self.requests[candidates]
        request.places.remove(member.name)
        self.in_flight[member.name] -= 1
        seen = self.seen[member.name]
        for each in (seen.out, *seen.rests.values()):
            if each:
                each.trying.discard(request.number)

    def note(self, change: UpstreamChange) -> None:
        """Note what is reported of a member, and check that it is never the last one."""
        seen, now = self.seen.setdefault(change.upstream, Seen()), self.now()
        reason, model = change.reason, change.model
        if reason == "resumed by hand":
            seen.out = None
            seen.rests.clear()
        elif reason == "last one":
            seen.out, seen.back_at = None, now
        elif change.was == "out" and change.state != "out":  # it may rest on
            seen.out = None
        elif change.seconds is None:
            if reason != CREDENTIALS:
                rest = seen.rests.pop(model, None)
                assert rest is None or rest.needs_success or now >= rest.until - EPSILON, (
                    f"too early: {change}"
                )
        elif model or reason in (QUOTA, BY_HAND):
            if reason != BY_HAND:
                self._check_not_last(change)
            seen.rests[model] = Pause(now, now + change.seconds, reason == QUOTA, reason)
        elif seen.out and abs(now + change.seconds - seen.out.until) < EPSILON:
            seen.out.reason, seen.out.is_reachable = reason, reason not in SLOW
        else:
            if seen.out is None:
                self._check_not_last(change)
            assert 30 <= change.seconds <= 300
            seen.out = Pause(now, now + change.seconds, True, reason, reason not in SLOW, now)

    def is_last(self, name: str, model: str) -> bool:
        """Return whether no other member surely serves a model."""
        others = [each for each in self.serving if each != name and self._serves(each, model)]
        return all(self.seen[each].pauses(model, self.now()) for each in others)

    def _check_not_last(self, change: UpstreamChange) -> None:
        rest = self.seen[change.upstream].rests.get(change.model)
        is_new = rest is None or not rest.needs_success
        last = is_new and self.is_last(change.upstream, self.judged)
        assert not last, f"{change.upstream} is the last one"

    def check_end(self, request: Request) -> None:
        """Check that there is no member left that a request could be sent to."""
        assert not self.free(request), f"{self.free(request)} could be asked: {request}"
        if not self.usable(request):
            left = [each for each in request.order if each not in request.tried]
            for each in left:
                early = self.seen[each].allows_early(request.model, self.now())
                assert self.is_full(each) or not early, f"{each} could be asked early: {request}"


# ── Clients and operators ────────────────────────────────────────────────────────────────────────


def tables(rng: random.Random) -> list[UpstreamSettings]:
    """Return the settings of ten members."""
    return [
        UpstreamSettings(
            name=f"m{number}",
            base_url=f"http://m{number}.invalid",
            api_key_env="",
            priority=rng.choice((1, 1, 1, 2, 3)),
            weight=rng.choice((1, 2, 5)),
            organization=rng.choice(("", "", "red", "blue")),
            max_concurrency=rng.choice((0, 1, 1, 2, 3)),
            models=rng.choice((("*",), MODELS[:1], MODELS)),
        )
        for number in range(10)
    ]


class Simulation:
    """One run."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.loop = asyncio.get_running_loop()
        self.faults = Faults(random.Random(f"{seed} faults"))
        self.referee = Referee(self.loop.time)
        self.settings = tables(self.rng)
        self.failover = FailoverSettings(attempts=self.rng.choice((10, 3)), budget_seconds=60)
        self.sessions = [session_hash("acct", f"{seed} {number}") for number in range(200)]
        self.tasks: set[asyncio.Task[None]] = set()
        self.numbers = 0
        self.broken: list[Exception] = []  # the first one is raised
        self.loop.set_exception_handler(self._note_broken)
        self.referee.apply(tuple(self.settings))
        self.upstreams = Upstreams(tuple(self.settings), self.referee.note)

    async def run(self) -> None:
        """Let faults happen for a while, and see that all members serve again after that."""
        helpers = [asyncio.create_task(each) for each in (self._operate(), self._reload())]
        while self.loop.time() < FAULTS_END:
            burst = self.loop.time() % 100 < 10
            await asyncio.sleep(self.rng.expovariate(12 if burst else 1.5))
            self._start(MODELS[self.rng.random() < 0.3])
        await asyncio.gather(*helpers)
        self._apply([msgspec.structs.replace(each, priority=1, weight=1) for each in self.settings])
        end = self.loop.time() + LONGEST_PAUSE
        while (now := self.loop.time()) < end + 200:
            await asyncio.sleep(8 if now < end else 1)
            self._start(MODELS[0])
        await asyncio.gather(*self.tasks)
        assert not self.broken
        self._check_recovered(end)

    def _note_broken(self, _: object, context: dict[str, Any]) -> None:
        self.broken.append(context.get("exception") or RuntimeError(context["message"]))

    def _apply(self, settings: list[UpstreamSettings]) -> None:
        self.settings = settings
        self.referee.apply(tuple(settings))
        self.upstreams.apply(tuple(settings))

    async def _reload(self) -> None:
        """Change, remove and add members."""
        rng = self.rng
        await asyncio.sleep(rng.uniform(50, 150))
        changed = [msgspec.structs.replace(each, weight=3) for each in self.settings[:5]]
        self._apply(changed + self.settings[5:])
        await asyncio.sleep(rng.uniform(50, 100))
        self._apply(rng.sample(self.settings, 9))
        await asyncio.sleep(rng.uniform(50, 100))
        added = msgspec.structs.replace(self.settings[0], name="m10", base_url="http://m10.invalid")
        self._apply([*self.settings, added])

    async def _operate(self) -> None:
        """Rest and resume members by hand."""
        while self.loop.time() < FAULTS_END - 80:
            await asyncio.sleep(self.rng.uniform(20, 60))
            health = self.rng.choice(list(self.upstreams)).health
            if self.rng.random() < 0.6:
                health.rest(self.rng.uniform(5, 80), by="operator")
            else:
                health.resume(by="operator")

    def _start(self, model: str) -> None:
        if self.broken:
            raise self.broken[0]
        self.numbers += 1
        task = self.loop.create_task(self._serve(self.numbers, model))
        self.tasks.add(task)
        if self.rng.random() < 0.03:  # its client leaves
            self.loop.call_later(self.rng.uniform(0, 10), task.cancel)

    async def _serve(self, number: int, model: str) -> None:
        rng, referee = random.Random(f"{self.failover} {number}"), self.referee
        candidates, request = self._choose(number, model, rng)
        referee.requests[candidates] = request
        try:
            if await self._take(candidates, request):
                outcome = await self._answer(candidates, request, rng)
                referee.outcomes[outcome] += 1
        except asyncio.CancelledError:
            referee.outcomes["left"] += 1
        except AssertionError as error:
            self.broken.append(error)
        finally:
            candidates.give_back()

    def _choose(
        self, number: int, model: str, rng: random.Random
    ) -> tuple[Candidates[Upstream], Request]:
        referee, kind = self.referee, rng.random()
        if kind < 0.1:
            name = rng.choice(referee.order_for(model, b""))
            candidates = self.upstreams.holders(name, model)
            order = [each.name for each in candidates.members]
            assert order[0] == name
            assert {referee.organization(each) for each in order} == {referee.organization(name)}
            return candidates, Request(number, model, order, is_pinned=True)
        if kind < 0.3:
            candidates = self.upstreams.candidates(model)
            return candidates, Request(number, model, [each.name for each in candidates.members])
        index = rng.randrange(len(self.sessions))
        session, replays = self.sessions[index], index % 3 == 0
        candidates = self.upstreams.candidates(model, session, replays=replays)
        order, home = referee.order_for(model, session), ""
        if len(order) == 1:  # there is nothing to choose
            return candidates, Request(number, model, order)
        first = order[0]
        assert [each.name for each in candidates.members] == order
        if replays:
            moved = referee.moved.get(session, "")
            home = referee.organization(moved if moved in order else order[0])
            if moved in order and home != referee.organization(order[0]):
                order = [moved, *(each for each in order if each != moved)]
        return candidates, Request(number, model, order, session, home, first_choice=first)

    async def _take(self, candidates: Candidates[Upstream], request: Request) -> bool:
        """Take a place; return whether there was one."""
        referee = self.referee
        try:
            is_taken = candidates.take_now()
        except Refusal as refusal:
            referee.check_end(request)
            assert not referee.usable(request)
            now, seen = self.loop.time(), [referee.seen[each] for each in request.order]
            assert not any(each.is_only_out(request.model, now) for each in seen)
            referee.outcomes[refusal.code] += 1
            return False
        if is_taken:
            if not request.places:  # the short way of the usual case
                referee.took(candidates)
            return True
        referee.check_end(request)
        try:
            async with asyncio.timeout(QUEUE_SECONDS):
                await candidates.take_in_turn()
            return True
        except TimeoutError:
            referee.outcomes["overloaded"] += 1
            return False

    async def _answer(
        self, candidates: Candidates[Upstream], request: Request, rng: random.Random
    ) -> str:
        """Ask one member after the other, as the relay does. Return what the client gets."""
        going: Failover[Any] = Failover(
            self.failover, self.loop.time(), certain_only=candidates.is_pinned
        )
        attempts, began = 1, self.loop.time()
        while True:
            member = candidates.member
            assert member is not None
            assert request.places == [member.name], "it is at another member as well"
            if member.health.known_failure:
                answer = Answer(None, cause="known")
            else:
                answer = await self.faults.ask(member.name, request.model, rng)
                if not self._note(answer, candidates, request):
                    return await self._end(answer, candidates, request, rng)
            if answer.cause == "first_byte_timeout":
                return answer.cause
            if not await going.go_on_in_turn(candidates, answer.status, QUEUE_SECONDS):
                break
            attempts += 1
        is_over = attempts >= self.failover.attempts or self.loop.time() - began >= 60
        uncertain = candidates.is_pinned and answer.status in (500, 503, 529)
        # One that has waited in vain may see places that others have given up at the same time.
        if request.has_turn and not (is_over or uncertain):
            self.referee.check_end(request)
        return "failed"

    async def _end(
        self,
        answer: Answer,
        candidates: Candidates[Upstream],
        request: Request,
        rng: random.Random,
    ) -> str:
        """Let the answer come to its end, if it does."""
        self.referee.judged = request.model
        candidates.answer()
        if request.session:
            self.referee.moved[request.session] = request.places[0]
            if request.places[0] == request.first_choice:
                del self.referee.moved[request.session]
        await asyncio.sleep(rng.expovariate(1 / 2))
        self.referee.judged = request.model
        if answer.torn:
            candidates.fail("reset", torn=True)
            return "torn"
        candidates.succeed(100)
        self.referee.served_at[request.places[0]] = self.loop.time()
        return "served"

    def _note(self, answer: Answer, candidates: Candidates[Upstream], request: Request) -> bool:
        """Let the member's health note an answer; return whether it is a failure. Check that a
        limit is taken at its word."""
        referee, name, now = self.referee, request.places[0], self.loop.time()
        if answer.status in (200, 400):
            return False
        referee.judged = request.model
        seen = referee.seen[name]
        out = seen.out
        if answer.status is None:
            candidates.fail(answer.cause)
            self._check_old(request, out, seen)
            if seen.out and request.number in seen.out.trying:
                seen.out.is_reachable = answer.cause not in SLOW
            return True
        told = NO_MODEL_SECONDS if answer.code == NO_MODEL else answer.told
        is_limit = answer.status == 429 or answer.code == NO_MODEL
        of = ALL_MODELS if answer.code == QUOTA else request.model
        before = seen.rests.get(of)
        in_force = before and (before.needs_success or before.until > now)
        is_last = referee.is_last(name, request.model)
        judge(candidates, answer.status, answer.code, answer.told)
        self._check_old(request, out, seen)
        if is_limit and not in_force and not is_last:
            rest = seen.rests[of]
            assert rest.since == now
            if told and of != ALL_MODELS:
                assert rest.until == pytest.approx(now + min(told, 600), abs=EPSILON)
            else:
                assert 0.8 <= rest.until - now <= LONGEST_PAUSE
        return True

    def _check_old(self, request: Request, out: Pause | None, seen: Seen) -> None:
        """Check that no request changes an outage that has begun after it."""
        if out and request.number not in out.trying:
            assert seen.out is out, f"an old request lengthens an outage: {request}"

    def _check_recovered(self, end: float) -> None:
        referee = self.referee
        assert not any(referee.in_flight.values())
        for member in self.upstreams:
            health = member.health
            assert (member.in_flight, health.in_flight) == (0, 0)
            assert health.state == "up", f"{member.name} is {health.state}"
            assert not health.struggling
            assert referee.served_at.get(member.name, 0) > end, f"{member.name} serves nothing"
        assert referee.outcomes["served"] > 0.5 * referee.outcomes.total()
        assert not referee.waiting


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[Simulation]:
    """Let each place that is given be checked by the referee of the simulation in the list."""
    current: list[Simulation] = []
    take, leave, wait = Candidates._take_first, Candidates._leave, PlaceQueue.wait

    def take_first(self: Candidates[Upstream], usable: list[Upstream]) -> bool:
        is_taken = take(self, usable)
        if is_taken:
            try:
                current[0].referee.took(self)
            except AssertionError as error:  # it may be raised within another request
                current[0].broken.append(error)
        return is_taken

    def leave_place(self: Candidates[Upstream], member: Upstream, tried: Tried) -> None:
        current[0].referee.left(self, member)
        leave(self, member, tried)

    async def wait_in_turn(self: PlaceQueue[Upstream], found: Candidates[Upstream]) -> None:
        referee = current[0].referee
        request = referee.requests[found]
        request.has_turn, request.task = False, asyncio.current_task()
        referee.waiting.append(request)
        try:
            await wait(self, found)
        finally:
            referee.waiting.remove(request)

    async def can_connect(_: object, url: Any, timeout: float) -> bool:
        running = current[0]
        name = url.host.removesuffix(".invalid")
        if running.faults.of(name, running.loop.time()) in SLOW:
            await asyncio.sleep(timeout)
            return False
        if out := running.referee.seen[name].out:
            out.is_reachable = True
        return True

    def now() -> float:
        return current[0].loop.time() if current else 0.0

    monkeypatch.setattr(Candidates, "_take_first", take_first)
    monkeypatch.setattr(Candidates, "_leave", leave_place)
    monkeypatch.setattr(PlaceQueue, "wait", wait_in_turn)
    monkeypatch.setattr("redbtc.upstream.transport.Transport.can_connect", can_connect)
    monkeypatch.setattr(
        "redbtc.upstream.upstreams.MemberHealth", functools.partial(MemberHealth, clock=now)
    )
    monkeypatch.setattr(failover, "time", SimpleNamespace(monotonic=now))
    return current


@pytest.mark.parametrize("seed", range(30))
def test_what_must_hold_holds_whatever_happens(seed: int, watched: list[Simulation]) -> None:
    random.seed(seed)

    async def simulate() -> None:
        simulation = Simulation(seed)
        watched.append(simulation)
        await simulation.run()
        print(simulation.referee.outcomes)

    run_in_virtual_time(simulate())
