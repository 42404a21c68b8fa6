"""The rules of a member's health, one by one, with a clock that only the test moves."""

from __future__ import annotations

import pytest

from redbtc.upstream.absences import ALL_MODELS, MAX_RESTS, NOT_TRIED, Tried, end_tries
from redbtc.upstream.change import UpstreamChange
from redbtc.upstream.health import (
    BY_HAND,
    CREDENTIALS,
    MAX_RETRY_AFTER_SECONDS,
    QUOTA,
    MemberHealth,
)
from redbtc.upstream.health_report import can_serve

pytestmark = pytest.mark.promise_9

MODEL, OTHER = "gpt-a", "gpt-b"
RATE = "rate_limit_exceeded"


class Member:
    """A health, with a clock, whether it is the last one, and what it has reported."""

    def __init__(self, last: bool = False) -> None:
        self.now = 1000.0
        self.last = last
        self.changes: list[UpstreamChange] = []
        self.unreachable = 0  # how often it was reported
        self.health = MemberHealth("up", True, lambda: self.now, self.changes.append)
        self.health.is_last = lambda _: self.last
        self.health.on_unreachable = self._count

    def _count(self) -> None:
        self.unreachable += 1

    def may(self, model: str = MODEL, urgent: bool = False) -> bool:
        return self.health.may_serve(model, urgent)

    def fail(self, code: str = "500", times: int = 1, torn: bool = False) -> None:
        """Let requests begin and fail."""
        for _ in range(times):
            tried = self.health.begin(MODEL)
            self.health.fail(MODEL, code, tried, torn)
            end_tries(tried)

    def serve(self, model: str = MODEL) -> None:
        """Let a request begin and end well."""
        tried = self.health.begin(model)
        self.health.answer(model, tried)
        self.health.past.succeed(10)
        end_tries(tried)

    def limit(self, told: float | None = None, code: str = RATE, model: str = MODEL) -> None:
        """Let a request begin and be answered 429."""
        tried = self.health.begin(model)
        self.health.limit(model, code, told, tried)
        end_tries(tried)

    def pause(self, model: str = MODEL) -> float:
        """Wait until the model may be served again; return how long that was. An instant before it
        may not."""
        seconds = self.health.absences.seconds_left(model)
        if seconds:
            start = self.now
            self.now = start + seconds - 0.001
            assert not self.may(model)
            self.now = start + seconds + 0.0005
            assert self.may(model)
        return seconds


# ── Outages ──────────────────────────────────────────────────────────────────────────────────────


def test_five_failures_in_a_row_take_a_member_out() -> None:
    member = Member()
    for _ in range(3):
        member.fail(times=4)
        member.serve()
    assert member.health.state == "up"
    member.fail(times=4)
    assert member.may()
    member.fail()
    assert member.health.state == "out"
    assert not member.may()
    assert not member.may(OTHER)
    assert [(each.state, each.reason, each.seconds) for each in member.changes] == [
        ("out", "500", 30)
    ]


def test_limits_are_no_failures() -> None:
    member = Member(last=True)
    for _ in range(100):
        member.limit()
    member.last = False
    member.fail(times=4)
    assert member.health.state == "up"


def test_five_torn_answers_in_a_row_take_a_member_out() -> None:
    """Each of them has begun, which does not count as a success."""
    member = Member()
    for _ in range(5):
        assert member.health.state == "up"
        tried = member.health.begin(MODEL)
        member.health.answer(MODEL, tried)
        member.health.fail(MODEL, "reset", tried, torn=True)
    assert member.health.state == "out"


def test_an_answer_to_its_end_ends_a_row_of_torn_ones() -> None:
    member = Member()
    for _ in range(3):
        member.fail(torn=True, times=4)
        member.serve()
    assert member.health.state == "up"


def test_a_trial_that_breaks_off_takes_a_member_out_again() -> None:
    member = Member()
    member.fail(times=5)
    member.pause()
    tried = member.health.begin(MODEL)
    member.health.answer(MODEL, tried)
    assert member.health.state == "up"
    member.health.fail(MODEL, "reset", tried, torn=True)
    end_tries(tried)
    assert member.health.state == "out"
    assert member.pause() == pytest.approx(60)
    member.serve()
    member.fail(torn=True, times=4)
    assert member.health.state == "up"


@pytest.mark.parametrize(("requests", "is_out"), [(19, False), (20, True)])
def test_half_of_twenty_requests_take_a_member_out(requests: int, is_out: bool) -> None:
    member = Member()
    for number in range(requests):
        assert member.health.state == "up"
        member.serve() if number % 2 == 0 else member.fail()
        member.now += 1
    assert (member.health.state == "out") == is_out


def test_less_than_half_of_many_requests_take_no_member_out() -> None:
    member = Member()
    for _ in range(300):
        member.serve()
        member.fail()
        member.serve()
        member.now += 0.1
    assert member.health.state == "up"


def test_requests_of_more_than_half_a_minute_ago_do_not_count() -> None:
    member = Member()
    for _ in range(100):  # 18 within 30 s
        member.serve()
        member.fail()
        member.now += 3.4
    assert member.health.state == "up"


def test_outages_become_longer_up_to_five_minutes() -> None:
    member = Member()
    member.fail(times=5)
    pauses = []
    for _ in range(6):
        pauses.append(round(member.pause()))
        member.fail()
    assert pauses == [30, 60, 120, 240, 300, 300]


@pytest.mark.parametrize(("up_seconds", "seconds"), [(299, 60), (301, 30)])
def test_an_outage_soon_after_another_one_is_longer(up_seconds: float, seconds: float) -> None:
    member = Member()
    member.now += 1000
    member.fail(times=5)
    assert round(member.pause()) == 30
    member.serve()
    assert member.health.state == "up"
    member.now += up_seconds
    member.fail(times=4)
    assert member.health.state == "up", "what was before the outage is forgotten"
    member.fail()
    assert round(member.health.absences.seconds_left(MODEL)) == seconds


def test_one_request_at_a_time_tries_a_member_that_is_out() -> None:
    member = Member()
    member.fail(times=5)
    member.pause()
    tried = member.health.begin(MODEL)
    assert not member.may()
    assert not member.may(OTHER)
    assert not member.may(urgent=True)
    end_tries(tried)  # its client has left
    assert member.health.state == "out"
    assert member.may()
    member.serve()
    assert member.health.state == "up"
    assert member.changes[-1].reason == "recovered"


def test_a_member_is_tried_until_all_that_try_it_have_ended() -> None:
    """Requests for what is stored at a member are sent to it even if it is out."""
    member = Member()
    member.fail(times=5)
    member.pause()
    first, second = member.health.begin(MODEL), member.health.begin(MODEL)
    end_tries(first)
    assert not member.may()
    end_tries(second)
    assert member.may()


def test_old_requests_neither_lengthen_nor_end_an_outage() -> None:
    member = Member()
    old = [member.health.begin(MODEL) for _ in range(4)]
    member.fail(times=5)
    member.now += 10
    member.health.fail(MODEL, "500", old[0], False)
    member.health.fail(MODEL, "reset", old[1], True)
    member.health.reject(MODEL, "invalid_api_key", old[2])
    member.health.answer(MODEL, old[3])
    member.health.past.succeed(10)
    assert member.health.state == "out"
    assert round(member.pause()) == 20
    assert len(member.changes) == 1


def test_a_rejected_key_takes_a_member_out_at_once() -> None:
    member = Member()
    member.health.reject(MODEL, "invalid_api_key", member.health.begin(MODEL))
    assert member.health.state == "out"
    assert member.health.past.last_error == "invalid_api_key"
    assert [(each.reason, each.is_outage) for each in member.changes] == [(CREDENTIALS, True)]
    pauses = []
    for _ in range(3):
        pauses.append(round(member.pause()))
        tried = member.health.begin(MODEL)
        member.health.reject(MODEL, "invalid_api_key", tried)
        end_tries(tried)
    assert pauses == [30, 60, 120]
    member.pause()
    member.serve()
    assert member.health.state == "up"


# ── Urgency ──────────────────────────────────────────────────────────────────────────────────────


def test_an_outage_is_tried_early_once_a_second_if_all_others_have_failed() -> None:
    member = Member()
    member.fail(times=5)
    tries = 0
    for _ in range(100):
        member.now += 0.1
        if member.may(urgent=True):
            assert not member.may()
            tries += 1
            end_tries(member.health.begin(MODEL))
    assert 9 <= tries <= 10


def test_an_early_try_that_fails_does_not_lengthen_the_outage() -> None:
    """Otherwise a few seconds in which all members fail would cost one of them five minutes."""
    member = Member()
    member.fail(times=5)
    for _ in range(20):
        member.now += 1.01
        assert member.may(urgent=True)
        member.fail()
    assert len(member.changes) == 1, "nothing has changed"
    assert 9 < member.pause() < 10
    member.fail()
    assert round(member.pause()) == 60


def test_an_early_try_that_succeeds_ends_the_outage() -> None:
    member = Member()
    member.fail(times=5)
    member.now += 2
    member.serve()
    assert member.health.state == "up"
    assert member.may()


def test_an_early_try_tells_of_another_cause() -> None:
    member = Member()
    member.fail(times=5)
    member.now += 2
    tried = member.health.begin(MODEL)
    member.health.reject(MODEL, "invalid_api_key", tried)
    end_tries(tried)
    assert [each.reason for each in member.changes] == ["500", CREDENTIALS]
    assert round(member.pause()) == 28
    member.now -= 15
    for number in (1, 2):
        member.now += 2
        member.fail("connect_timeout")
        assert member.unreachable == number
        assert not member.may(urgent=True)
        assert member.health.slow_failure == "connect_timeout"
        member.health.note_reachable()
    member.now += 2
    member.fail("502")
    assert [each.reason for each in member.changes] == ["500", CREDENTIALS, "connect_timeout"]


def test_limits_are_not_tried_early() -> None:
    member = Member()
    member.limit(told=20)
    member.limit(code=QUOTA, model=OTHER)
    member.now += 10
    assert not member.may(urgent=True)
    assert not member.may(OTHER, urgent=True)


def test_a_limit_without_a_model_rests_none() -> None:
    member = Member()
    member.limit(told=100, model=ALL_MODELS)
    member.limit(model=ALL_MODELS)
    assert (member.health.state, member.health.past.last_error) == ("up", RATE)
    member.limit(code=QUOTA, model=ALL_MODELS)
    assert member.health.state == "resting"


# ── The last member ──────────────────────────────────────────────────────────────────────────────


def test_monitors_are_not_told_of_requests_that_fail_while_others_succeed() -> None:
    member = Member(last=True)
    for _ in range(30):
        member.serve()
        member.fail()
    assert member.health.struggling
    assert can_serve(member.health)
    member.fail(times=4)
    assert not can_serve(member.health)


def test_the_last_member_is_never_out() -> None:
    member = Member(last=True)
    member.fail(times=100)
    member.limit(told=100)
    member.limit(code=QUOTA)
    tried = member.health.begin(MODEL)
    for _ in range(3):
        member.health.reject(MODEL, "invalid_api_key", tried)
    assert tried is NOT_TRIED
    assert member.may()
    assert member.health.state == "up"
    assert member.health.struggling == CREDENTIALS
    assert [(each.state, each.reason) for each in member.changes] == [("up", CREDENTIALS)]
    assert not can_serve(member.health)
    member.serve()
    assert member.health.struggling == ""
    assert can_serve(member.health)


def test_a_struggling_member_is_out_at_the_next_failure_once_it_is_not_the_last() -> None:
    member = Member(last=True)
    member.fail(times=5)
    member.last = False
    assert member.may()
    member.fail()
    assert member.health.state == "out"
    assert member.health.struggling == ""


def test_a_member_that_comes_back_as_the_last_one_begins_anew() -> None:
    member = Member()
    member.now += 1000
    member.fail(times=5)
    member.limit(told=100, model=OTHER)
    assert member.health.is_only_out(MODEL)
    assert not member.health.is_only_out(OTHER)
    member.health.come_back_as_last()
    assert member.may()
    assert not member.may(OTHER), "its rest goes on"
    assert (member.changes[-1].was, member.changes[-1].state) == ("out", "resting")
    member.fail(times=4)
    assert member.may()
    member.fail()
    assert round(member.pause()) == 60, "it has not been up for long"


def test_a_quota_whose_time_has_passed_keeps_no_member_from_coming_back() -> None:
    member = Member()
    member.limit(code=QUOTA)
    member.fail(times=5)
    assert not member.health.is_only_out(MODEL)
    member.now += 61
    member.fail()
    assert member.health.state == "out"
    assert not member.may()
    assert member.health.is_only_out(MODEL)
    member.health.come_back_as_last()
    assert member.may()
    tried = member.health.begin(MODEL)
    assert not member.may(), "one request at a time tries whether there is quota again"
    member.health.answer(MODEL, tried)
    assert member.health.state == "up"


def test_a_member_that_comes_back_unreachable_is_still_known_to_be() -> None:
    """Each request would have to find it out otherwise, which takes seconds."""
    member = Member()
    member.fail("dns", times=5)
    member.last = True
    member.health.come_back_as_last()
    assert member.may()
    assert member.health.known_failure == "dns"
    assert member.unreachable == 2
    member.health.note_reachable()
    assert member.health.known_failure == ""


# ── Members that can't be reached ────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("cause", ["dns", "connect_timeout"])
def test_no_request_waits_for_a_member_that_fails_slowly(cause: str) -> None:
    member = Member()
    member.fail(cause, times=5)
    assert member.unreachable == 1
    assert member.health.slow_failure == cause
    member.now += 1000
    assert not member.may()
    assert not member.may(urgent=True)
    member.health.note_reachable()
    assert member.may()
    member.fail(cause)
    assert member.unreachable == 2
    assert not member.may()
    member.health.note_reachable()
    member.now += 61
    member.serve()
    assert member.health.slow_failure == ""


def test_requests_fail_at_once_at_the_last_member_while_it_can_not_be_reached() -> None:
    member = Member(last=True)
    member.fail("connect_timeout", times=4)
    assert member.health.known_failure == ""
    member.fail("connect_timeout")
    assert member.health.known_failure == "connect_timeout"
    assert member.unreachable == 1
    member.health.note_reachable()
    assert member.health.known_failure == ""
    member.fail("refused", times=5)
    assert member.health.known_failure == "", "this takes no time to find out"


# ── Rests ────────────────────────────────────────────────────────────────────────────────────────


def test_a_limit_rests_the_member_for_the_model_and_time_that_the_upstream_says() -> None:
    member = Member()
    member.limit(told=7.25)
    assert member.may(OTHER)
    assert member.health.state == "resting"
    assert member.health.absences.are_limits(MODEL)
    assert not member.health.absences.are_limits(OTHER)
    assert member.pause() == pytest.approx(7.25)
    assert member.health.state == "up"
    assert [(each.reason, each.model, each.seconds) for each in member.changes] == [
        (RATE, MODEL, 7.25),
        ("rested", MODEL, None),
    ]


@pytest.mark.parametrize("told", [601.0, 86400.0, 1e18, 1e308])
def test_no_told_rest_is_longer_than_ten_minutes(told: float) -> None:
    member = Member()
    member.limit(told=told)
    assert round(member.pause()) == MAX_RETRY_AFTER_SECONDS == 600


def test_rests_without_a_time_become_longer_up_to_a_minute() -> None:
    member = Member()
    found = []
    for _ in range(8):
        member.limit()
        found.append(member.pause())
    for seconds, whole in zip(found, [1, 2, 4, 8, 16, 32, 60, 60], strict=True):
        assert whole * 0.8 <= seconds <= whole * 1.2
    assert (
        len({round(seconds / whole, 3) for seconds, whole in zip(found, [1, 2, 4], strict=False)})
        > 1
    )
    member.serve()
    member.limit()
    assert member.pause() <= 1.2, "an answer ends the row"


def test_rests_of_two_models_do_not_touch_each_other() -> None:
    member = Member()
    member.limit(told=10)
    member.limit(told=20, model=OTHER)
    assert [each.model for each in member.health.absences.all()] == [OTHER, MODEL]
    assert member.pause() == pytest.approx(10)
    member.serve()
    assert not member.may(OTHER)


def test_a_rest_is_not_lengthened_by_requests_that_began_before_it() -> None:
    member = Member()
    old: list[Tried] = [member.health.begin(MODEL) for _ in range(3)]
    member.limit(told=10)
    member.now += 5
    member.health.limit(MODEL, RATE, 100, old[0])
    member.health.limit(MODEL, RATE, None, old[1])
    assert member.pause() == pytest.approx(5)


def test_a_used_up_quota_rests_all_models_until_a_request_succeeds() -> None:
    member = Member()
    pauses = []
    member.limit(code=QUOTA)
    for _ in range(7):
        assert not member.may(OTHER)
        assert not can_serve(member.health)
        pauses.append(round(member.pause(OTHER)))
        tried = member.health.begin(OTHER)
        assert not member.may(), "one at a time"
        member.health.limit(OTHER, QUOTA, 5, tried)
        end_tries(tried)
    assert pauses == [60, 120, 240, 480, 960, 1800, 1800]
    member.pause()
    assert member.health.state == "resting"
    member.serve()
    assert member.health.state == "up"
    assert member.changes[-1].reason == "recovered"
    member.limit(code=QUOTA)
    assert round(member.pause()) == 60


def test_old_requests_neither_lengthen_nor_end_the_rest_for_a_quota() -> None:
    member = Member()
    old = [member.health.begin(MODEL) for _ in range(3)]
    member.limit(code=QUOTA)
    member.now += 61
    member.health.limit(MODEL, QUOTA, None, old[0])
    member.health.answer(MODEL, old[1])
    assert member.may()
    trial = member.health.begin(MODEL)
    member.health.answer(MODEL, old[2])
    assert member.health.state == "resting"
    member.health.answer(MODEL, trial)
    assert member.health.state == "up"


def test_an_operator_rests_and_resumes_a_member() -> None:
    member = Member(last=True)
    member.health.rest(600, by="operator")
    assert member.health.state == "resting"
    assert not member.may()
    assert not member.may(urgent=True)
    assert not member.health.absences.are_limits(MODEL)
    member.fail(times=5)
    member.health.resume(by="operator")
    assert member.may()
    assert member.health.state == "up"
    assert [(each.reason, each.by) for each in member.changes] == [
        (BY_HAND, "operator"),
        ("resumed by hand", "operator"),
    ]
    member.health.rest(600, by="operator")
    assert round(member.pause()) == 600


def test_resuming_ends_everything() -> None:
    member = Member()
    for _ in range(3):  # the outages would become longer
        member.now += 1
        member.fail(times=5)
        member.limit(code=QUOTA)
        member.limit(told=100, model=OTHER)
        member.health.resume(by="operator")
        assert member.may()
        assert member.may(OTHER)
        assert member.health.state == "up"
    member.fail(times=5)
    assert round(member.pause()) == 30
    member.health.resume(by="operator")
    member.limit(code=QUOTA)
    assert round(member.pause()) == 60


def test_a_rest_by_hand_outlasts_a_request_that_succeeds() -> None:
    member = Member()
    member.limit(code=QUOTA)
    member.pause()
    trial = member.health.begin(MODEL)
    member.health.rest(600, by="operator")
    member.health.answer(MODEL, trial)
    end_tries(trial)
    assert not member.may()
    assert member.health.state == "resting"


def test_an_outage_and_a_rest_both_keep_a_member_away() -> None:
    member = Member()
    member.limit(told=100)
    member.fail(times=5)
    assert member.health.state == "out"
    member.now += 31
    assert not member.may()
    assert member.may(OTHER)
    member.serve(OTHER)
    assert member.health.state == "resting"
    member.now += 70
    assert member.may()


# ── After a restart ──────────────────────────────────────────────────────────────────────────────


def test_rests_go_on_after_a_restart() -> None:
    member = Member()
    member.health.restore(MODEL, 7.5, RATE)
    assert member.may(OTHER)
    assert member.health.absences.are_limits(MODEL)
    assert member.pause() == pytest.approx(7.5)
    member.health.restore(ALL_MODELS, 30, BY_HAND)
    assert not member.health.absences.are_limits(MODEL)
    assert member.pause() == pytest.approx(30)
    assert member.health.state == "up"


def test_the_rest_for_a_quota_goes_on_after_a_restart_until_a_request_succeeds() -> None:
    member = Member()
    member.health.restore(ALL_MODELS, 400, QUOTA)
    assert member.pause() == pytest.approx(400)
    assert member.health.state == "resting"
    member.limit(code=QUOTA)
    assert round(member.pause()) == 800, "the pauses go on to grow"
    member.serve()
    assert member.health.state == "up"


@pytest.mark.parametrize(("reason", "longest"), [(RATE, 600), (QUOTA, 1800)])
def test_no_limit_lasts_longer_because_a_clock_was_wrong(reason: str, longest: float) -> None:
    member = Member()
    member.health.restore(ALL_MODELS, 1e9, reason)
    assert round(member.pause()) == longest


# ── What clients can make it remember ────────────────────────────────────────────────────────────


def test_many_models_take_a_bounded_amount_of_memory() -> None:
    member = Member()
    member.limit(code=QUOTA)
    member.now += 61
    for number in range(100_000):
        member.health.limit(f"model-{number}", RATE, None, NOT_TRIED)
        member.now += 0.0001
    assert len(member.health.absences.all()) <= MAX_RESTS + 1
    assert member.health.absences.all()[0].reason == QUOTA, "this one is not given up for others"
    assert member.health.past.lately().requests <= 2000
    member.health.rest(600, by="operator")
    assert not member.may("model"), "an operator's word takes effect all the same"
    member.health.resume(by="operator")
    pauses = []
    for number in range(3):
        for filler in range(2 * MAX_RESTS):
            member.health.limit(f"filler-{number}-{filler}", RATE, None, NOT_TRIED)
            member.now += 0.01
        member.now += 10
        member.limit()
        pauses.append(member.pause())
        member.limit()
        pauses.append(member.pause())
    assert max(pauses) > 1.5, "pauses become longer even after many models that are limited"


def test_lately_says_how_the_requests_of_five_minutes_went() -> None:
    member = Member()
    assert member.health.past.lately() == (0, None, None)
    member.fail()
    member.now += 200
    for milliseconds in (10.4, 300, 20, None):
        member.health.past.succeed(milliseconds)
    assert member.health.past.lately() == (5, 0.8, 20)
    member.now += 150
    assert member.health.past.lately() == (4, 1.0, 20)


def test_an_unusable_member_serves_nothing() -> None:
    health = MemberHealth("up", False)
    assert health.state == "unusable"
    assert not health.may_serve(MODEL)
    assert not health.may_serve(MODEL, urgent=True)
    assert not health.is_proven(MODEL)
    assert not health.is_only_out(MODEL)
    assert not can_serve(health)
