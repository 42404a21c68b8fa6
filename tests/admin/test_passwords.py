"""Passwords: which are too easy, and how many are tried."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from types import SimpleNamespace

import pytest

from redbtc.admin.passwords import (
    MAX_BUCKETS,
    MAX_PER_ADDRESS,
    MAX_PER_NETWORK,
    MAX_QUEUED,
    MAX_QUEUED_OF_SITE,
    Attempts,
    Busy,
    TooMany,
    check_password,
    scrypt,
)
from redbtc.errors import UserError
from tests.helpers.logins import PASSWORD
from tests.helpers.speed import cost

pytestmark = [pytest.mark.promise_5, pytest.mark.promise_7]


def test_passwords_that_are_too_easy() -> None:
    for password in (
        "passwordpassword",
        "123456789012345",
        "aaaaaaaaaaaaaaaa",
        "qwertyuiopasdfg",
        "correctHorseBatteryStaple",
        "P@ssw0rd!@#$%^&*",
        "!@#$%^&*()qwertyuiop",
        "QWERTYUIOP{}|qwe",
        "Ada.example-com2026",
        "x" * 14,
        "x" * 1001,
        "ada@example.com ada",
    ):
        with pytest.raises(UserError, match="password"):
            check_password(password, "ada@example.com")
    check_password(PASSWORD, "ada@example.com")


@pytest.mark.slow
def test_none_takes_longer_to_judge_than_to_hash() -> None:
    """Passwords are judged quickly, even if each character stands for many letters or the whole
    password matches the email address."""
    check_password(PASSWORD, "")  # what is loaded the first time
    hashing = cost(lambda: scrypt(PASSWORD, bytes(16)))

    def judge(password: str, email: str) -> None:
        with contextlib.suppress(UserError):
            check_password(password, email)

    dots = [".".join("o" * length for length in range(*ends)) for ends in ((1, 10), (10, 21))]
    for end in ("0oO" * 8, "0O" * 12, "0" * 24, "4(69175@{[<!|$+8" * 2):
        check = functools.partial(judge, f"4@({{[<691!|7$5+0{end}", "@".join(dots))
        assert cost(check) < hashing, end


async def attempt(attempts: Attempts, email: str, network: str) -> bool:
    """Make an attempt to log in. Return False if it has to wait."""
    try:
        async with attempts.begin(email, network):
            return True
    except TooMany:
        return False


def test_attempts_are_limited_by_network_and_in_it_by_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = time.monotonic()
    monkeypatch.setattr("redbtc.admin.passwords.time", SimpleNamespace(monotonic=lambda: now))

    async def main() -> None:
        nonlocal now
        attempts = Attempts()
        tried = [await attempt(attempts, "a", "here") for _ in range(MAX_PER_ADDRESS + 1)]
        assert tried == [True] * MAX_PER_ADDRESS + [False]
        assert await attempt(attempts, "a", "elsewhere")
        tried = [await attempt(attempts, f"{i}", "here") for i in range(MAX_PER_NETWORK)]
        assert tried == [True] * (MAX_PER_NETWORK - MAX_PER_ADDRESS) + [False] * MAX_PER_ADDRESS
        assert await attempt(attempts, "here", "elsewhere")
        now += 60 / MAX_PER_ADDRESS - 1
        assert not await attempt(attempts, "a", "here")
        now += 1
        assert await attempt(attempts, "a", "here")
        assert not await attempt(attempts, "a", "here")

    asyncio.run(main())


def test_the_table_of_buckets_is_bounded() -> None:
    """The last used are kept; an attempt that is refused makes no other forgotten."""

    async def main() -> None:
        attempts = Attempts()
        while await attempt(attempts, "a", "here"):
            pass
        while await attempt(attempts, "b", "there"):
            pass
        for number in range(MAX_BUCKETS):
            await attempt(attempts, f"{number}", "there")
        assert not await attempt(attempts, "a", "here")
        for number in range(MAX_BUCKETS // 2):
            assert await attempt(attempts, "a", f"{number}")
        assert len(attempts._buckets) == MAX_BUCKETS
        assert await attempt(attempts, "a", "here")

    asyncio.run(main())


def test_one_attempt_runs_at_a_time_and_few_wait_for_one_site() -> None:
    async def main() -> None:
        attempts, go = Attempts(), asyncio.Event()
        running, most = 0, 0

        async def wait(network: str) -> None:
            nonlocal running, most
            async with attempts.begin(f"{len(asyncio.all_tasks())}", network):
                running += 1
                most = max(most, running)
                await go.wait()
                running -= 1

        async def flood(network: str) -> list[asyncio.Task[None]]:
            tasks = [asyncio.create_task(wait(network)) for _ in range(MAX_QUEUED_OF_SITE + 2)]
            await asyncio.sleep(0)
            refused = [task for task in tasks if task.done()]
            for task in refused:
                with pytest.raises(Busy, match="try again in a few"):
                    task.result()
            return [task for task in tasks if task not in refused]

        waiting: list[asyncio.Task[None]] = []
        for number in range(MAX_QUEUED // MAX_QUEUED_OF_SITE):
            tasks = await flood(f"2001:db8:{number:x}::/64")
            assert len(tasks) == MAX_QUEUED_OF_SITE
            assert await flood(f"2001:db8:{number:x}:ffff::/64") == []
            waiting += tasks
        assert await flood("one more") == []
        waiting.pop().cancel()
        await asyncio.sleep(0)
        waiting += await flood("one more")
        assert len(waiting) == MAX_QUEUED
        go.set()
        await asyncio.gather(*waiting)
        assert most == 1
        assert not attempts._queued

    asyncio.run(main())
