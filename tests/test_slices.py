"""Long work on the event loop is done in slices, in turn."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Generator

import pytest

from redbtc.slices import MAX_STARTED, SLICE_SECONDS, answer_queue, in_slices

pytestmark = pytest.mark.promise_9


def busy(name: str, log: list[str], slices: int) -> Generator[None, None, str]:
    """Return work that takes this many slices."""
    for _ in range(slices):
        until = time.perf_counter() + SLICE_SECONDS
        while time.perf_counter() < until:
            pass
        log.append(name)
        yield
    return name


def test_short_work_is_done_without_a_turn_of_the_loop() -> None:
    async def main() -> None:
        turned = False

        def turn() -> None:
            nonlocal turned
            turned = True

        asyncio.get_running_loop().call_soon(turn)
        assert await in_slices(busy("a", [], 0), "") == "a"
        assert not turned

    asyncio.run(main())


def test_long_works_take_turns_and_together_one_slice_a_turn() -> None:
    log: list[str] = []

    async def main() -> None:
        loop, done = asyncio.get_running_loop(), False

        def turn() -> None:
            log.append("|")
            if not done:
                loop.call_soon(turn)

        turn()
        works = [in_slices(busy(name, log, 20), "") for name in "abcd"]
        assert await asyncio.gather(*works) == list("abcd")
        done = True

    asyncio.run(main())
    turns = "".join(log).strip("|").split("|")
    assert max(map(len, turns)) <= 2, "the first slice, and that of a turn"
    order = "".join(turns)
    assert all(abs(order[:40].count(name) - 10) <= 2 for name in "abcd"), order


def test_an_account_has_few_works_begun_and_no_more_slices_for_many() -> None:
    """What was built of five hundred short bodies, of which each waited for its next slice, took
    1.4 GB, and everybody else waited for as many slices."""
    log: list[str] = []

    async def first_then_again(name: str, account_id: str) -> None:
        await in_slices(busy(name, log, 3), account_id)
        await in_slices(busy(name, log, 3), account_id, started=True)

    async def main() -> None:
        many = [first_then_again(f"a{number}", "a") for number in range(30)]
        await asyncio.gather(*many, first_then_again("b", "b"))

    asyncio.run(main())
    begun: set[str] = set()
    most = 0
    for at, name in enumerate(log):
        begun = {each for each in {*begun, name} if each in log[at:]} - {"b"}
        most = max(most, len(begun))
    assert most <= MAX_STARTED + 1, "and the one that nobody was before"
    assert log.index("b") < 5
    assert len(log) - log[::-1].index("b") < 20


def test_bodies_are_begun_beside_many_answers() -> None:
    """A short request waited until of its account's large answers only a few went on."""
    log: list[str] = []

    async def main() -> None:
        many = range(2 * MAX_STARTED)
        answers = [in_slices(busy("a", log, 40), answer_queue("x"), started=True) for _ in many]
        await asyncio.gather(*answers, in_slices(busy("b", log, 3), "x"))

    asyncio.run(main())
    assert len(log) - log[::-1].index("b") < 40


def test_work_that_is_cancelled_ends_and_others_go_on() -> None:
    log: list[str] = []

    async def main() -> None:
        steps = busy("a", log, 1000)
        cancelled = asyncio.create_task(in_slices(steps, ""))
        other = asyncio.create_task(in_slices(busy("b", log, 20), ""))
        await asyncio.sleep(SLICE_SECONDS * 5)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        assert inspect.getgeneratorstate(steps) == inspect.GEN_CLOSED
        assert await other == "b"
        assert await in_slices(busy("c", log, 0), "") == "c"

    asyncio.run(main())
    asyncio.run(main())  # another loop waits for nothing of the first one


def test_work_that_fails_raises() -> None:
    def failing() -> Generator[None, None, None]:
        yield
        raise KeyError("x")

    with pytest.raises(KeyError, match="x"):
        asyncio.run(in_slices(failing(), ""))


def test_work_that_goes_on_waits_for_no_other_to_be_done() -> None:
    """The MAX_STARTED works that were begun took all turns among themselves."""

    async def main() -> None:
        log: list[str] = []
        works = [
            asyncio.create_task(in_slices(busy(f"{number}", log, 50), "a"))
            for number in range(MAX_STARTED + 5)
        ]
        while len(set(log)) < MAX_STARTED:
            await asyncio.sleep(0)
        await in_slices(busy("more", log, 1), "a", started=True)
        assert not any(work.done() for work in works)
        await asyncio.gather(*works)

    asyncio.run(main())
