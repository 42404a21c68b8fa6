"""The times in which a member of the upstreams is not sent requests. Times are by a clock that is
handed in."""

from __future__ import annotations

import math
from collections.abc import Callable

from msgspec import Struct

URGENT_SECONDS = 1.0  # between two requests to a member that is out, if no other one succeeds
MAX_RESTS = 1000  # models that a member rests for: clients choose their names
ALL_MODELS = ""  # in place of a model: for all models


class Absence(Struct, eq=False):
    """A time in which a member is not sent requests."""

    reason: str
    model: str
    since: float
    until: float
    seconds: float  # its length
    needs_success: bool  # after its time, one request at a time is let through
    is_limit: bool = False  # the upstream has said that a limit is reached
    is_reachable: bool = True  # a connection can be opened, as far as is known
    tries: int = 0  # such requests that are under way
    tried_at: float = 0.0  # when the last one began

    def allows(self, now: float, urgent: bool = False) -> bool:
        """Return whether a request may be sent. `urgent`: all other members have failed."""
        if self.tries or not self.is_reachable:
            return False
        if now >= self.until:
            return True
        early = urgent and self.needs_success and not self.is_limit
        return early and now >= max(self.since, self.tried_at) + URGENT_SECONDS


Tried = tuple[Absence, ...]
NOT_TRIED: Tried = ()


class Absences:
    """The outage of a member, and its rests."""

    def __init__(self, clock: Callable[[], float], on_rest_over: Callable[[Absence], None]) -> None:
        """`on_rest_over` is called with each rest whose time is found to be over."""
        self.outage: Absence | None = None
        self.rests: dict[str, Absence] = {}  # by model
        self._clock = clock
        self._on_rest_over = on_rest_over

    def of(self, model: str) -> list[Absence]:
        """Return what keeps the member from serving a model. Rests that are over are forgotten."""
        now = self._clock()
        found = [self.outage] if self.outage else []
        for each in (ALL_MODELS, model) if model != ALL_MODELS else (ALL_MODELS,):
            rest = self.rests.get(each)
            if rest is None:
                continue
            if now < rest.until or rest.needs_success:
                found.append(rest)
            else:
                del self.rests[each]
                self._on_rest_over(rest)
        return found

    def all(self) -> list[Absence]:
        """Return the outage, and the rests that are not over, the longest first."""
        now = self._clock()
        rests = [each for each in self.rests.values() if each.needs_success or now < each.until]
        rests.sort(key=lambda each: (each.model != ALL_MODELS, -each.until))
        return [self.outage, *rests] if self.outage else rests

    def end_rests(self) -> None:
        """Forget the rests that are over. Without this, each is forgotten at the next request."""
        for model in list(self.rests):
            self.of(model)

    def rest_of_all(self, reason: str) -> tuple[str, str, float | None]:
        """Return the reason of the rest for all models, ALL_MODELS, and in how many seconds it is
        over; `reason` and None if there is no such rest."""
        rest = self.rests.get(ALL_MODELS)
        left = rest.until - self._clock() if rest else 0.0
        return (rest.reason, ALL_MODELS, left) if rest and left > 0 else (reason, ALL_MODELS, None)

    def end(self, rest: Absence) -> None:
        """End a rest before its time."""
        rest.until = self._clock()
        del self.rests[rest.model]
        self._on_rest_over(rest)

    def allow(self, model: str, urgent: bool = False) -> bool:
        """Return whether a request for the model may be sent: nothing keeps the member from serving
        it, or the time of that is over and no other request tries it. `urgent`: all other members
        have failed."""
        if not (self.outage or self.rests):
            return True
        absent, now = self.of(model), self._clock()
        return all(each.allows(now, urgent) for each in absent)

    def seconds_left(self, model: str) -> float:
        """Return in how many seconds the member may serve the model; 0 if it may now."""
        absent, now = self.of(model), self._clock()
        return max([0.0, *(each.until - now for each in absent)])

    @property
    def outage_left(self) -> float:
        """The seconds until a member that is out may be tried: infinity if it can't be reached, 0
        if it is not out."""
        if self.outage is None:
            return 0.0
        return self.outage.until - self._clock() if self.outage.is_reachable else math.inf

    def are_limits(self, model: str) -> bool:
        """Return whether only limits of the upstream keep the member from serving the model."""
        absent = self.of(model)
        return bool(absent) and all(each.is_limit for each in absent)

    def are_outage(self, model: str) -> bool:
        """Return whether an outage alone keeps the member from serving the model."""
        if self.outage is None:
            return False
        absent, now = self.of(model), self._clock()
        return all(each is self.outage or each.allows(now) for each in absent)

    def begin(self, model: str) -> Tried:
        """Note that a request for the model is sent. Return what is over if that succeeds."""
        tried, now = tuple(self.of(model)), self._clock()
        for absence in tried:
            absence.tries += 1
            absence.tried_at = now
        return tried

    def add_rest(self, rest: Absence) -> bool:
        """Add a rest, in place of an earlier one for the same model. Return False, and add none, if
        there are MAX_RESTS of them."""
        model = rest.model
        if model != ALL_MODELS and model not in self.rests and len(self.rests) >= MAX_RESTS:
            self.rests = {each.model: each for each in self.all() if each is not self.outage}
            if len(self.rests) >= MAX_RESTS:
                return False
        self.rests[model] = rest
        return True


class Pauses:
    """Pauses by model, each of which is twice as long as the one before."""

    def __init__(self) -> None:
        self._last: dict[str, float] = {}
        self.are_growing = False  # there was one

    def next(self, model: str, first: float, longest: float) -> float:
        """Return the length of the next pause, in seconds."""
        before = self._last.pop(model, None)
        seconds = first if before is None else min(longest, 2 * before)
        self.note(model, seconds)
        return seconds

    def note(self, model: str, seconds: float) -> None:
        """Note the length of the last pause."""
        self._last[model], self.are_growing = seconds, True
        if len(self._last) > MAX_RESTS:  # the oldest one is in front
            del self._last[next(iter(self._last))]

    def forget(self, model: str) -> None:
        """Begin with the first one again."""
        self._last.pop(model, None)
        self.are_growing = bool(self._last)


def end_tries(tried: Tried) -> None:
    """Note that a request has ended, whatever was found: another one may be tried."""
    for absence in tried:
        absence.tries -= 1
