"""The report on a member's health for people: its state, and how its latest requests went. Times
are in seconds before or after now, since the member's clock is monotonic."""

from __future__ import annotations

from typing import NamedTuple

from redbtc.upstream.absences import ALL_MODELS, Absence
from redbtc.upstream.health import CREDENTIALS, MemberHealth
from redbtc.upstream.past_requests import RecentRequests


class RestReport(NamedTuple):
    """A rest of a member: `model` is None for all models, `seconds_left` None if it lasts until a
    request succeeds."""

    model: str | None
    reason: str
    seconds_left: float | None


class HealthReport(NamedTuple):
    """The health of a member. `reason` says why it is not up or, if it is up, why it would be out
    if it were not the last one; None if it has no fault. `seconds_left` is None if the end of its
    state is not known: it is out until a request succeeds."""

    state: str
    state_seconds: float  # for which it has had this state
    reason: str | None
    seconds_left: float | None
    rests: list[RestReport]  # the longest first
    lately: RecentRequests
    last_error: str | None
    last_error_seconds: float | None  # ago


def report(health: MemberHealth) -> HealthReport:
    """Return how a member is."""
    health.absences.end_rests()
    now, absences = health.clock(), health.absences.all()
    first = absences[0] if absences else None
    error_at = health.past.last_error_at
    return HealthReport(
        state=health.state,
        state_seconds=now - health.since,
        reason=(first.reason if first else health.struggling) or None,
        seconds_left=seconds_left(first, now) if first else None,
        rests=[
            RestReport(each.model or None, each.reason, seconds_left(each, now))
            for each in (absences[1:] if health.state == "out" else absences)
        ],
        lately=health.past.lately(),
        last_error=health.past.last_error or None,
        last_error_seconds=None if error_at is None else now - error_at,
    )


def rejects_key(health: MemberHealth) -> bool:
    """Return whether a member has rejected its key, and no request has succeeded since."""
    outage = health.absences.outage
    return (outage.reason if outage else health.struggling) == CREDENTIALS


def can_serve(health: MemberHealth) -> bool:
    """Return whether a member would probably serve a request, for some model."""
    now, outage = health.clock(), health.absences.outage
    if not health.usable or health.known_failure:
        return False
    # One client whose requests fail, however many, shows nothing while those of others succeed.
    serves_nobody = health.struggling == CREDENTIALS or health.past.have_failed_in_row
    if health.struggling and serves_nobody and now < health.struggling_until:
        return False
    if outage and (now < outage.until or not outage.is_reachable):
        return False
    rest = health.absences.rests.get(ALL_MODELS)
    return rest is None or now >= rest.until


def seconds_left(absence: Absence, now: float) -> float | None:
    """Return in how many seconds an absence ends; None if that depends on the upstream."""
    if absence.until <= now or not absence.is_reachable:
        return None
    return absence.until - now
