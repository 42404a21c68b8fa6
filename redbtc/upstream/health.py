"""The health of one member of the upstreams: whether it may be sent a request, and how it has done
lately. There is no I/O here; time is read from a clock that is handed in.

    up ─┬─► resting ─┬─► up    after a 429, for one model or for all, until a time
        └─► out ─────┘         after failures, until a time and then until a request succeeds

Rule 1. A 429 rests the member for the model, for as long as the upstream says, at most
MAX_RETRY_AFTER_SECONDS; if it does not say, for 1, 2, 4 … 60 s. A 429 to a request that
names no model (a handshake, or one for what is stored) rests it for none: such requests have limits
of their own. A quota that is used up rests it for all models, with growing pauses, until a request
succeeds.

Rule 2. FAILURES_IN_ROW failures in a row, or half of the requests of SHARE_SECONDS, take it out for
30 s, then twice as long each time, up to 300 s. A rejected key takes it out at once.

Rule 3. The last member that can serve a model neither rests nor is taken out: its answer, whatever
it is, is better than none. It is `struggling` instead.

Rule 4. After the time of an outage, or of a rest for a used-up quota, one request at a time is let
through. If it is answered, the member is up; if it fails, the time begins anew. After an outage,
the first answer that breaks off before one was complete takes the member out again. A member that
is out is tried early if all others have failed, at most once a second; if that fails, nothing
changes.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from redbtc.upstream.absences import ALL_MODELS, NOT_TRIED, Absence, Absences, Pauses, Tried
from redbtc.upstream.change import UpstreamChange
from redbtc.upstream.past_requests import PastRequests

OUT_SECONDS, MAX_OUT_SECONDS = 30.0, 300.0
UP_SECONDS = 300.0  # a member that has been up for so long begins with OUT_SECONDS again
REST_SECONDS, MAX_REST_SECONDS = 1.0, 60.0  # if the upstream does not say for how long
MAX_RETRY_AFTER_SECONDS = 600.0
QUOTA_SECONDS, MAX_QUOTA_SECONDS = 60.0, 1800.0
SLOW = ("dns", "connect_timeout")  # causes that cost a request seconds
UNREADY_SECONDS = 5.0  # for which a last member that fails, though it answers, can't serve
QUOTA, CREDENTIALS, BY_HAND = "insufficient_quota", "credentials", "by hand"
RECOVERED, RESTED = "recovered", "rested"


def unready_seconds(reason: str) -> float:
    """Return for how many seconds monitors are told that a last member can't serve, which fails for
    this reason. That is short if it answers: it may be the requests of one account that it fails
    on, and these must not take the gateway from the others."""
    unreached = reason in (*SLOW, "refused", "unreachable", CREDENTIALS)
    return OUT_SECONDS if unreached or reason.startswith("tls: ") else UNREADY_SECONDS


class MemberHealth:
    """The health of one member."""

    def __init__(
        self,
        name: str,
        usable: bool,
        clock: Callable[[], float] = time.monotonic,
        on_change: Callable[[UpstreamChange], None] = lambda _: None,
    ) -> None:
        self.name = name
        self.usable = usable  # its key is set
        self.on_change = on_change
        # Return whether no other member can serve a model. The set of members sets it.
        self.is_last: Callable[[str], bool] = lambda _: True
        # Called when it can't be reached, which takes seconds to find out. It is not sent requests
        # until `note_reachable` is called.
        self.on_unreachable: Callable[[], None] = lambda: None
        self.absences = Absences(clock, self._note_rested)
        self.past = PastRequests(clock)
        self.in_flight = 0  # requests, also those that began before its settings were changed
        self.struggling = ""  # why it would be out if it were not the last one
        self.struggling_until = 0.0  # until when monitors are told that it can't serve
        self.since = clock()  # of its state
        self.clock = clock
        self._pauses = Pauses()  # those that are chosen here
        self._out_seconds = 0.0  # of the last outage
        self._back_at = clock()

    # What it is

    @property
    def state(self) -> str:
        """The member's state: "up", "resting" (for one model at least), "out" or "unusable"."""
        if not self.usable:
            return "unusable"
        if self.absences.outage:
            return "out"
        return "resting" if self.absences.all() else "up"

    @property
    def is_steady(self) -> bool:
        """Return whether it serves all models, without any rest or outage."""
        absences = self.absences
        return self.usable and not (absences.outage or absences.rests)

    def is_proven(self, model: str) -> bool:
        """Return whether nothing keeps it from serving the model."""
        return self.usable and not self.absences.of(model)

    def may_serve(self, model: str, urgent: bool = False) -> bool:
        """Return whether it may be sent a request for the model. `urgent`: all other members have
        failed."""
        return self.usable and self.absences.allow(model, urgent)

    def is_only_out(self, model: str) -> bool:
        """Return whether an outage alone keeps it from serving the model."""
        return self.usable and self.absences.are_outage(model)

    @property
    def known_failure(self) -> str:
        """As `slow_failure`, of one that stays up as the last one: requests fail at once."""
        return self.struggling if self.struggling in SLOW else ""

    @property
    def slow_failure(self) -> str:
        """The reason why it can't be reached, if finding that out takes seconds; else ""."""
        outage = self.absences.outage
        reason = outage.reason if outage else self.struggling
        return reason if reason in SLOW else ""

    def note_reachable(self) -> None:
        """Note that a connection to it could be opened: requests may be tried again."""
        if self.struggling in SLOW:
            self._struggle("", 0.0)
        elif self.absences.outage:
            self.absences.outage.is_reachable = True

    # What happens to requests. `tried` is what `begin` has returned for the request.

    def begin(self, model: str) -> Tried:
        """Note that a request for the model has a place at it. Return what is over if the request
        succeeds."""
        return NOT_TRIED if self.is_steady else self.absences.begin(model)

    def answer(self, model: str, tried: Tried) -> None:
        """Note that it has begun to answer a request, with anything but a failure."""
        self.past.failed_in_row = 0
        if self.struggling:
            self._struggle("", 0.0)
        if self._pauses.are_growing:
            self._pauses.forget(model)
        absences = self.absences
        for absence in tried:
            if absence is absences.outage:
                absences.outage, self._back_at = None, self.clock()
                self.past.forget_failures(on_trial=True)  # only the answer's head has come
                self._changed("out", *absences.rest_of_all(RECOVERED))
            elif absence is absences.rests.get(absence.model) and absence.is_limit:
                self._pauses.forget(absence.model)
                del absences.rests[absence.model]
                self._note_rest_over(absence, RECOVERED)

    def fail(self, model: str, code: str, tried: Tried, torn: bool = False) -> None:
        """Note that a request failed, and why. `torn`: its answer had begun."""
        self.past.fail(code, torn)
        if self.absences.outage:
            self._stay_out(code, tried)
        elif self.struggling or self.past.have_failed_enough():
            self._take_out(code, model)

    def reject(self, model: str, code: str, tried: Tried) -> None:
        """Note that it has rejected its key, and with which code."""
        self.past.fail(code)
        if self.absences.outage:
            self._stay_out(CREDENTIALS, tried)
        else:
            self._take_out(CREDENTIALS, model)

    def limit(self, model: str, code: str, retry_after: float | None, tried: Tried) -> None:
        """Note that a limit of the upstream is reached, and with which code. `retry_after`:
        for how many seconds, as the upstream says; None if it does not say."""
        self.past.limit(code)
        now, quota = self.clock(), code == QUOTA
        of = ALL_MODELS if quota else model
        if of == ALL_MODELS and not quota:
            return  # that of a handshake, or of what is stored: models have limits of their own
        before = self.absences.rests.get(of)
        if before and before not in tried and (before.needs_success or now < before.until):
            return  # the request began before the rest
        if before not in tried and self.is_last(model):
            return
        if quota:
            seconds = self._pauses.next(of, QUOTA_SECONDS, MAX_QUOTA_SECONDS)
        elif retry_after:
            seconds = min(retry_after, MAX_RETRY_AFTER_SECONDS)
        else:
            seconds = self._pauses.next(of, REST_SECONDS, MAX_REST_SECONDS)
            seconds *= random.uniform(0.8, 1.2)
        self._rest(Absence(code, of, now, now + seconds, seconds, quota, is_limit=True))

    # Changes

    def rest(self, seconds: float, by: str) -> None:
        """Rest for all models, because an operator says so."""
        now = self.clock()
        self._rest(Absence(BY_HAND, ALL_MODELS, now, now + seconds, seconds, False), by)

    def restore(self, model: str, seconds: float, reason: str) -> None:
        """Go on with a rest that an earlier process has begun, for `seconds` more. If a clock was
        set meanwhile, it is no longer than a new one could be."""
        now, quota, by_hand = self.clock(), reason == QUOTA, reason == BY_HAND
        if not by_hand:
            seconds = min(seconds, MAX_QUOTA_SECONDS if quota else MAX_RETRY_AFTER_SECONDS)
        if quota:
            self._pauses.note(ALL_MODELS, max(QUOTA_SECONDS, seconds))
        rest = Absence(reason, model, now, now + seconds, seconds, quota, is_limit=not by_hand)
        self.absences.add_rest(rest)

    def resume(self, by: str) -> None:
        """Be up, because an operator says so."""
        was = self.state
        self.absences.outage, self._out_seconds, self.struggling = None, 0.0, ""
        self.absences.rests.clear()
        self._pauses = Pauses()
        self.past.forget_failures()
        self._changed(was, "resumed by hand", by=by)

    def come_back_as_last(self) -> None:
        """Be up, since there is no other member left that could serve."""
        outage, self._back_at = self.absences.outage, self.clock()
        self.absences.outage = None
        self.past.forget_failures()
        self._changed("out", "last one")
        if outage and not outage.is_reachable:
            self._struggle(outage.reason, self._back_at)

    def _rest(self, rest: Absence, by: str = "") -> None:
        was = self.state
        if self.absences.add_rest(rest):
            self._changed(was, rest.reason, rest.model, rest.seconds, by)

    def _note_rested(self, rest: Absence) -> None:
        """Note that the time of a rest was found to be over, which can be long ago."""
        since = self.since
        self._note_rest_over(rest, RESTED)
        if self.state == "up":
            self.since = max(since, rest.until)

    def _note_rest_over(self, rest: Absence, reason: str) -> None:
        if not self.absences.outage:
            self._changed("resting", reason, rest.model)

    def _take_out(self, reason: str, model: str) -> None:
        """Take it out, or note that it would be if it were not the last one."""
        now, absences = self.clock(), self.absences
        if absences.outage is None and self.is_last(model):
            if reason == CREDENTIALS != self.struggling:
                self._changed(self.state, CREDENTIALS)
            self._struggle(reason, now)
            return
        if absences.outage or now - self._back_at < UP_SECONDS:
            self._out_seconds = min(MAX_OUT_SECONDS, max(OUT_SECONDS, 2 * self._out_seconds))
        else:
            self._out_seconds = OUT_SECONDS
        was, seconds, self.struggling = self.state, self._out_seconds, ""
        until = now + seconds
        absences.outage = Absence(reason, ALL_MODELS, now, until, seconds, True, tried_at=now)
        self._changed(was, reason, ALL_MODELS, seconds)
        self._watch_if_slow(absences.outage)

    def _stay_out(self, reason: str, tried: Tried) -> None:
        """Note that a request has failed while it is out. If the request tried it after its time,
        that begins anew, and is longer; if before its time, the time goes on."""
        outage = self.absences.outage
        if outage is None or outage not in tried:  # the request began before it was out
            return
        if outage.tried_at >= outage.until:
            self._take_out(reason, ALL_MODELS)
        elif reason == CREDENTIALS or reason in SLOW:  # others are no news
            if reason != outage.reason:
                outage.reason = reason
                self._changed("out", reason, ALL_MODELS, outage.until - self.clock())
            self._watch_if_slow(outage)

    def _watch_if_slow(self, outage: Absence) -> None:
        if outage.reason in SLOW:
            outage.is_reachable = False
            self.on_unreachable()

    def _struggle(self, reason: str, now: float) -> None:
        """Note why it would be out."""
        if reason and (not self.struggling or now >= self.struggling_until):
            self.struggling_until = now + unready_seconds(reason)
        self.struggling = reason
        if reason in SLOW:
            self.on_unreachable()

    def _changed(
        self,
        was: str,
        reason: str,
        model: str = ALL_MODELS,
        seconds: float | None = None,
        by: str = "",
    ) -> None:
        state = self.state
        if state != was:
            self.since = self.clock()
        self.on_change(UpstreamChange(self.name, state, was, reason, model, seconds, by))
