"""The choice among members: affinity, priorities, places, and requests that replay encrypted
content. Nothing is sent."""

from __future__ import annotations

import asyncio
import hashlib
import math
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from redbtc.refusals import Refusal
from redbtc.upstream import candidates as candidates_module
from redbtc.upstream.absences import NOT_TRIED
from redbtc.upstream.candidates import Candidates, MovedSessions, PlaceQueue, ranked, session_hash
from redbtc.upstream.configured import Upstreams
from redbtc.upstream.health import QUOTA, MemberHealth
from redbtc.upstream_settings import UpstreamSettings

pytestmark = [pytest.mark.promise_4, pytest.mark.promise_9]

ROOT = Path(__file__).parents[2]
MODEL = "gpt-a"
SESSIONS = [session_hash("acct", f"session-{number}") for number in range(20_000)]


@dataclass(eq=False)
class Named:
    """A member of which only the choice knows."""

    name: str
    priority: int = 1
    weight: int = 1
    max_concurrency: int = 0
    organization: str = ""
    in_flight: int = 0
    health: MemberHealth = field(init=False)

    def __post_init__(self) -> None:
        self.health = MemberHealth(self.name, True)
        self.health.is_last = lambda _: False
        self.organization = self.organization or self.name

    def rest(self) -> None:
        self.health.rest(600, by="operator")

    def resume(self) -> None:
        self.health.resume(by="operator")

    def go_out(self) -> None:
        self.health.reject(MODEL, "401", NOT_TRIED)


def firsts(members: list[Named], sessions: list[bytes] = SESSIONS) -> list[str]:
    return [ranked(members, session)[0].name for session in sessions]


def names(members: list[Named]) -> list[str]:
    return [each.name for each in members]


def candidates(members: list[Named], queue: PlaceQueue[Named], **more: Any) -> Candidates[Named]:
    return Candidates(members, MODEL, queue, **more)


def taken(found: Candidates[Named]) -> str | None:
    """Take a place; return the member's name, or None if the request has to wait."""
    if not found.take_now():
        return None
    assert found.member is not None
    return found.member.name


@pytest.fixture
def queue() -> PlaceQueue[Named]:
    return PlaceQueue()


# ── Affinity ─────────────────────────────────────────────────────────────────────────────────────


def test_sessions_are_shared_by_weight() -> None:
    members = [Named("a", weight=1), Named("b", weight=2), Named("c", weight=5)]
    count = Counter(firsts(members))
    for member in members:
        assert count[member.name] / len(SESSIONS) == pytest.approx(member.weight / 8, rel=0.05)


def test_requests_without_a_session_are_shared_by_weight() -> None:
    members = [Named("a", weight=1), Named("b", weight=3)]
    count = Counter(ranked(members, None)[0].name for _ in range(20_000))
    assert count["b"] / 20_000 == pytest.approx(0.75, rel=0.05)


def test_the_second_choices_are_shared_by_weight_as_well() -> None:
    """What a member that is out leaves behind is spread over all others."""
    members = [Named("a"), Named("b", weight=1), Named("c", weight=3)]
    seconds = Counter(
        order[1].name for session in SESSIONS if (order := ranked(members, session))[0].name == "a"
    )
    assert seconds["c"] / seconds.total() == pytest.approx(0.75, rel=0.05)


def test_removing_a_member_moves_exactly_its_sessions() -> None:
    members = [
        Named(name, weight=weight) for name, weight in zip("abcde", range(1, 6), strict=True)
    ]
    before = firsts(members)
    for removed in members:
        after = firsts([each for each in members if each is not removed])
        for old, new in zip(before, after, strict=True):
            assert (old == new) == (old != removed.name)


def test_adding_a_member_moves_only_the_sessions_that_it_gets() -> None:
    members = [Named(name) for name in "abcd"]
    before, after = firsts(members), firsts([*members, Named("e", weight=2)])
    moved = [new for old, new in zip(before, after, strict=True) if old != new]
    assert set(moved) == {"e"}
    assert len(moved) / len(SESSIONS) == pytest.approx(2 / 6, rel=0.05)


def test_another_weight_moves_only_what_the_member_gets_or_gives() -> None:
    members = [Named(name, weight=4) for name in "abc"]
    heavier = [*members[:2], Named("c", weight=6)]
    for old, new in zip(firsts(members), firsts(heavier), strict=True):
        assert old == new or new == "c"


@given(st.permutations("abcdef"), st.binary(min_size=16, max_size=16))
def test_the_order_of_the_settings_does_not_matter(order: list[str], session: bytes) -> None:
    members = [Named(name, weight=1 + ord(name) % 3, priority=ord(name) % 2) for name in order]
    expected = names(ranked(sorted(members, key=lambda each: each.name), session))
    assert names(ranked(members, session)) == expected


def test_the_choice_is_the_one_that_is_documented() -> None:
    """The chance of a member is its hash, keyed with the session's, as a fraction of 2^64."""

    def cost(member: Named, session: bytes) -> float:
        digest = hashlib.blake2b(member.name.encode(), digest_size=8, key=session).digest()
        return -math.log((int.from_bytes(digest, "big") + 1) / 2**64) / member.weight

    members = [Named("openai/A"), Named("openai/B", weight=3), Named("azure", weight=2)]
    for session in SESSIONS[:500]:
        expected = sorted(members, key=lambda each: cost(each, session))
        assert ranked(members, session) == expected
    assert (
        session_hash("acct", "s").hex() == hashlib.blake2b(b"acct\0s", digest_size=16).hexdigest()
    )


@pytest.mark.parametrize("seed", ["0", "1"])
def test_the_choice_is_the_same_in_every_process(seed: str) -> None:
    program = (
        "from tests.upstream.test_candidates import *;"
        "print(''.join(firsts([Named(n) for n in 'dcba'], SESSIONS[:200])))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.strip() == "".join(firsts([Named(n) for n in "abcd"], SESSIONS[:200]))


def test_accounts_with_the_same_session_name_are_spread() -> None:
    members = [Named(name) for name in "abcd"]
    sessions = [session_hash(f"acct-{number}", "main") for number in range(20_000)]
    for count in Counter(firsts(members, sessions)).values():
        assert count / 20_000 == pytest.approx(0.25, rel=0.05)


def test_lower_priorities_come_first() -> None:
    members = [Named("c", priority=3), Named("a", priority=1), Named("b", priority=2, weight=1000)]
    for session in (*SESSIONS[:100], None):
        assert names(ranked(members, session)) == ["a", "b", "c"]


# ── Health and places ───────────────────────────────────────────────────────────────────────────


def test_a_session_returns_when_its_member_is_back(queue: PlaceQueue[Named]) -> None:
    members, moved = [Named("a"), Named("b"), Named("c")], MovedSessions()

    def ask() -> str | None:
        found = candidates(members, queue, session=SESSIONS[0], moved=moved)
        with found:
            name = taken(found)
            found.answer()
        return name

    assert [ask(), ask()] == ["a", "a"]
    members[0].rest()
    assert [ask(), ask()] == ["b", "b"]
    members[1].rest()
    assert ask() == "c"
    members[0].resume()
    assert ask() == "a"


def test_a_full_member_is_passed_over(queue: PlaceQueue[Named]) -> None:
    members = [Named("a", max_concurrency=1), Named("b", priority=2, max_concurrency=2)]
    held = [candidates(members, queue) for _ in range(3)]
    assert [taken(each) for each in held] == ["a", "b", "b"]
    assert taken(candidates(members, queue)) is None
    held[0].give_back()
    held[0].give_back()
    assert taken(candidates(members, queue)) == "a"


def test_a_request_without_a_place_does_not_count(queue: PlaceQueue[Named]) -> None:
    member = Named("a", max_concurrency=1)
    for _ in range(3):
        assert taken(candidates([member], queue, takes_place=False)) == "a"
    assert member.health.in_flight == member.in_flight == 0


def test_the_member_whose_outage_ends_first_serves_if_there_is_no_other(
    queue: PlaceQueue[Named],
) -> None:
    members = [Named("a"), Named("b"), Named("c")]
    members[1].go_out()
    time.sleep(0.01)
    members[0].go_out()
    members[2].rest()
    assert taken(candidates(members, queue)) == "b"
    assert members[1].health.state == "up"
    assert members[0].health.state == "out"


def test_a_member_that_can_be_reached_comes_back_rather_than_another_one(
    queue: PlaceQueue[Named],
) -> None:
    members = [Named("a"), Named("b")]
    for _ in range(5):
        members[0].health.fail(MODEL, "dns", NOT_TRIED)
    time.sleep(0.01)
    members[1].go_out()
    assert taken(candidates(members, queue)) == "b"


def test_the_refusal_says_whether_limits_alone_are_the_reason(queue: PlaceQueue[Named]) -> None:
    members = [Named("a"), Named("b")]
    members[0].health.limit(MODEL, "rate_limit_exceeded", 30, NOT_TRIED)
    members[1].health.limit(MODEL, QUOTA, None, NOT_TRIED)
    with pytest.raises(Refusal) as caught:
        candidates(members, queue).take_now()
    assert caught.value.code == "rate_limit_exceeded"
    assert (b"retry-after", b"30") in caught.value.headers
    members[1].rest()
    with pytest.raises(Refusal) as caught:
        candidates(members, queue).take_now()
    assert caught.value.code == "no_upstream"


def test_members_that_were_tried_are_not_tried_again(queue: PlaceQueue[Named]) -> None:
    members = [Named("a"), Named("b", max_concurrency=1), Named("c")]
    blocker = candidates([members[1]], queue)
    assert taken(blocker) == "b"
    found = candidates(members, queue)
    assert taken(found) == "a"
    assert found.go_on()
    assert found.member is members[2]
    assert not found.go_on()
    assert found.member is members[2], "it keeps its place"
    assert [each.in_flight for each in members] == [0, 1, 1]


def test_a_member_that_is_out_is_tried_after_all_others(queue: PlaceQueue[Named]) -> None:
    members = [Named("a"), Named("b")]
    now = 1000.0
    members[0].health = MemberHealth("a", True, lambda: now)
    members[0].health.is_last = lambda _: False
    members[0].go_out()
    now += 2
    found = candidates(members, queue)
    assert taken(found) == "b"
    assert found.go_on()
    assert found.member is members[0]
    assert not found.go_on()
    again = candidates(members, queue)
    assert taken(again) == "b"
    assert not again.go_on(), "not twice within a second"


# ── Waiting ──────────────────────────────────────────────────────────────────────────────────────


def run(scene: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(60):
            await scene()

    asyncio.run(limited())


async def waiting(found: Candidates[Named]) -> asyncio.Task[None]:
    """Return the task of a request that waits for a place."""
    assert not found.take_now()
    task = asyncio.create_task(found.take_in_turn())
    await asyncio.sleep(0)
    return task


def test_places_are_given_in_turn_to_those_who_can_use_them(queue: PlaceQueue[Named]) -> None:
    async def scene() -> None:
        a, b = Named("a", max_concurrency=1), Named("b", max_concurrency=1)
        at_a, at_b = candidates([a], queue), candidates([b], queue)
        assert (taken(at_a), taken(at_b)) == ("a", "b")
        found = [candidates([a], queue), candidates([a, b], queue), candidates([b], queue)]
        tasks = [await waiting(each) for each in found]
        at_b.give_back()
        await tasks[1]
        assert found[1].member is b
        assert [each.done() for each in tasks] == [False, True, False]
        late = candidates([a, b], queue)
        late_task = await waiting(late)
        at_a.give_back()
        await tasks[0]
        found[0].give_back()
        await late_task
        assert late.member is a
        found[1].give_back()
        await tasks[2]
        found[2].give_back()
        late.give_back()
        assert (a.in_flight, b.in_flight, len(queue.waiting)) == (0, 0, 0)

    run(scene)


def test_those_who_wait_come_before_a_new_request(queue: PlaceQueue[Named]) -> None:
    async def scene() -> None:
        a, b = Named("a", max_concurrency=1), Named("b", max_concurrency=1)
        b.rest()
        assert taken(candidates([a, b], queue)) == "a"
        first = candidates([a, b], queue)
        task = await waiting(first)
        b.resume()
        assert taken(candidates([b, a], queue)) is None
        await task
        assert first.member is b

    run(scene)


def test_a_member_that_returns_lets_in_those_who_wait(queue: PlaceQueue[Named]) -> None:
    async def scene() -> None:
        a, b = Named("a", max_concurrency=1), Named("b")
        b.rest()
        assert taken(candidates([a, b], queue)) == "a"
        found = candidates([a, b], queue)
        task = await waiting(found)
        b.resume()
        await task
        assert found.member is b

    run(scene)


def test_those_who_wait_bring_a_member_back_if_no_other_one_can_serve(
    queue: PlaceQueue[Named],
) -> None:
    """Otherwise they would wait in vain, and a later request would be served before them."""

    async def scene() -> None:
        a = Named("a", max_concurrency=1)
        holder = candidates([a], queue)
        assert taken(holder) == "a"
        first = candidates([a], queue)
        task = await waiting(first)
        a.go_out()
        holder.give_back()
        assert taken(candidates([a], queue)) is None
        await task
        assert first.member is a

    run(scene)


@pytest.mark.parametrize("at", ["before its turn", "in its turn"])
def test_a_request_that_leaves_the_queue_takes_no_place(queue: PlaceQueue[Named], at: str) -> None:
    async def scene() -> None:
        a = Named("a", max_concurrency=1)
        holder, found, last = (candidates([a], queue) for _ in range(3))
        assert taken(holder) == "a"
        tasks = [await waiting(found), await waiting(last)]
        if at == "before its turn":
            tasks[0].cancel()
            await asyncio.sleep(0)
            holder.give_back()
        else:
            holder.give_back()
            assert found.member is a
            tasks[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]
        await tasks[1]
        assert (found.member, last.member) == (None, a)
        last.give_back()
        assert (a.in_flight, a.health.in_flight, len(queue.waiting)) == (0, 0, 0)

    run(scene)


def test_many_who_wait_do_not_make_a_request_dearer(queue: PlaceQueue[Named]) -> None:
    """A request that finds all members full looks at none of those who wait."""

    async def scene() -> None:
        members = [Named(name, max_concurrency=1) for name in "abcd"]
        held = [candidates(ranked(members, None), queue) for _ in members]
        assert None not in [taken(each) for each in held]
        tasks = [await waiting(candidates(ranked(members, None), queue)) for _ in range(1000)]
        asked = 0

        def count(*_: object) -> None:
            nonlocal asked
            asked += 1

        late = candidates(ranked(members, None), queue)
        sys.setprofile(count)
        try:
            late.take_now()
            held[0].give_back()
        finally:
            sys.setprofile(None)
        assert asked < 300
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    run(scene)


# ── Encrypted content ────────────────────────────────────────────────────────────────────────────


def test_a_session_that_replays_stays_where_it_was_moved_to(queue: PlaceQueue[Named]) -> None:
    members, moved = [Named("a"), Named("b"), Named("c")], MovedSessions()

    def ask(replays: bool) -> str | None:
        found = candidates(members, queue, session=SESSIONS[0], moved=moved, replays=replays)
        with found:
            name = taken(found)
            found.answer()
        return name

    assert ask(replays=True) == "a"
    members[0].rest()
    assert ask(replays=True) == "b"
    members[0].resume()
    assert [ask(replays=True), ask(replays=True)] == ["b", "b"]
    members[1].rest()
    assert ask(replays=True) == "a", "the alternative is an error anyway"
    members[1].resume()
    assert ask(replays=True) == "a"
    assert len(moved) == 0


def test_a_session_that_replays_returns_within_an_organization(queue: PlaceQueue[Named]) -> None:
    members, moved = [Named("a", organization="o"), Named("b", organization="o")], MovedSessions()
    moved.note(SESSIONS[0], "a", "b")
    found = candidates(members, queue, session=SESSIONS[0], moved=moved, replays=True)
    assert taken(found) == "a"


def test_a_removed_member_is_not_missed(queue: PlaceQueue[Named]) -> None:
    moved = MovedSessions()
    moved.note(SESSIONS[0], "a", "removed")
    members = [Named("a"), Named("b")]
    found = candidates(members, queue, session=SESSIONS[0], moved=moved, replays=True)
    assert taken(found) == "a"


def test_replaying_waits_for_its_own_organization_and_fails_over_within_it(
    queue: PlaceQueue[Named],
) -> None:
    home = [Named(name, organization="o", max_concurrency=1) for name in "ab"]
    members = [home[0], Named("x"), home[1]]

    def replaying() -> Candidates[Named]:
        return candidates(members, queue, replays=True)

    held = [replaying(), replaying()]
    assert [taken(each) for each in held] == ["a", "b"]
    assert taken(replaying()) is None, "x could not read it"
    held[1].give_back()
    assert held[0].go_on()
    assert held[0].member is home[1]
    home[0].rest()
    home[1].rest()
    assert taken(replaying()) == "x"


def test_requests_with_objects_of_a_member_are_sent_to_it_even_if_it_is_out(
    queue: PlaceQueue[Named],
) -> None:
    members = [Named("a", organization="o"), Named("b", organization="o")]
    members[0].go_out()
    assert taken(candidates(members, queue, is_pinned=True)) == "b"
    members[1].rest()
    found = candidates(members, queue, is_pinned=True)
    assert taken(found) == "a"
    assert members[0].health.state == "out"
    found.answer()
    assert members[0].health.state == "up"


def test_the_memory_of_moved_sessions_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates_module, "MAX_MOVED", 100)
    moved = MovedSessions()
    for session in SESSIONS[:500]:
        moved.note(SESSIONS[0], "a", "b")  # it is in use
        moved.note(session, "a", "b")
    assert len(moved) == 100
    assert moved.member_of(SESSIONS[0]) == "b"
    assert moved.member_of(SESSIONS[1]) is None
    moved.note(SESSIONS[0], "a", "a")
    assert moved.member_of(SESSIONS[0]) is None


def test_the_members_that_a_session_is_connected_to_come_first(queue: PlaceQueue[Named]) -> None:
    members = [Named("a"), Named("b"), Named("c"), Named("d", priority=2)]

    def first(connected: list[Named], **more: Any) -> str | None:
        found = candidates(members, queue, **more)
        found.prefer(connected)
        return taken(found)

    assert first([]) == "a"
    assert first([members[2], members[3]]) == "c"
    assert first([members[0], members[2]]) == "a"
    assert first([members[3]]) == "a", "a lower priority is no home"
    assert first([members[2]], is_pinned=True) == "a"
    members[2].rest()
    assert first([members[2]]) == "a"
    replaying = candidates(members, queue, replays=True)
    members[2].resume()
    replaying.prefer([members[2]])
    assert taken(replaying) == "c"


# ── A reload of the settings ─────────────────────────────────────────────────────────────────────


def table(name: str, **more: Any) -> UpstreamSettings:
    return UpstreamSettings(name=name, base_url=f"http://{name}.invalid", api_key_env="", **more)


def test_a_reload_does_not_give_places_twice() -> None:
    async def scene() -> None:
        settings = table("a", max_concurrency=2)
        upstreams = Upstreams((settings,))
        held = [upstreams.candidates(MODEL) for _ in range(2)]
        assert [each.take_now() for each in held] == [True, True]
        upstreams.apply((msgspec.structs.replace(settings, weight=2),))
        assert not upstreams.candidates(MODEL).take_now()
        held[0].give_back()
        assert upstreams.candidates(MODEL).take_now()

    run(scene)


def test_a_member_that_can_not_be_reached_is_watched_after_a_reload(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody would find out otherwise that it can be reached again."""
    monkeypatch.setattr("redbtc.upstream.upstreams.REACH_SECONDS", 0.01)

    async def scene() -> None:
        reachable = False

        async def can_connect(*_: object) -> bool:
            return reachable

        monkeypatch.setattr("redbtc.upstream.transport.Transport.can_connect", can_connect)
        settings = table("a")
        upstreams = Upstreams((settings, table("b")))
        member = next(iter(upstreams))
        for _ in range(5):
            member.health.fail(MODEL, "dns", NOT_TRIED)
        assert member.health.state == "out"
        upstreams.apply((msgspec.structs.replace(settings, idle_timeout_seconds=2), table("b")))
        after = next(iter(upstreams))
        assert after is not member
        assert after.health is member.health
        await asyncio.sleep(1.1)  # the member before is closed
        assert after.health.absences.outage_left == math.inf
        reachable = True
        while after.health.absences.outage_left == math.inf:
            await asyncio.sleep(0.01)
        await after.close()

    run(scene)
