"""Passwords: how they are hashed, and how guessing is slowed down."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import math
import re
import time
import unicodedata
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from redbtc.errors import UserError
from redbtc.limits.rates import Bucket

Given = TypeVar("Given")
Made = TypeVar("Made")
Counted = tuple[str, str]  # what of, and which one

MIN_LENGTH, MAX_LENGTH = 15, 1000  # characters; NIST SP 800-63B-4 §3.1.1.2 asks for 15
COST, BLOCKS, PARALLEL = 1 << 15, 8, 3  # of scrypt, as OWASP has it: 32 MiB; a core for 0.2 s
MAX_WAITING = 100  # of anybody, and as many who are known
MAX_OF_ONE = 10  # network, or account of those who are known
# What of a password is judged is bounded, so that none takes longer than its scrypt: so many
# characters and parts of the address. zxcvbn reads it anew for each way to say which of the
# characters that may stand for a letter does; of too many ways one is left.
LOOKED_AT, MAX_PARTS, MIN_PART, MAX_WAYS = 40, 5, 3, 8
EXAMPLES = "redbtc", "correcthorsebatterystaple"
ALIKE = "4@", "({[<", "69", "1!|", "5$", "7+"
AS_ONE = {ord(other): each[0] for each in ALIKE for other in each[1:]}
STRONG_ENOUGH = 3  # of zxcvbn's 4: more than 10^8 guesses
MIN_OWN = 8  # characters that are not the address's


class Later(UserError):
    """Not now, but in so many seconds."""

    def __init__(self, message: str, seconds: int) -> None:
        super().__init__(message)
        self.seconds = seconds


class Busy(Later):
    """Too many passwords are being checked."""


class TooMany(Later):
    """Too many passwords were tried."""


def too_many(wait: float) -> TooMany:
    """Until so many seconds have gone by."""
    seconds = int(wait) + 1
    return TooMany(f"too many attempts; try again in {seconds} seconds", seconds)


class HashingSlot:
    """For somebody's password, until it is checked."""

    def __init__(self, place: asyncio.Semaphore) -> None:
        self._place = place

    async def run(self, work: Callable[[str, Given], Made], password: str, given: Given) -> Made:
        """In a thread, when it is one's turn."""
        async with self._place:
            return await asyncio.to_thread(work, password, given)


class HashingPool:
    """What takes long with passwords, off the event loop: one thread for those who may be anybody,
    one for who has a session, a link, or a browser that is known, so that they never wait for the
    others."""

    def __init__(self) -> None:
        self._places = {who: asyncio.Semaphore(1) for who in ("anybody", "known")}
        self._waiting: Counter[Counted] = Counter()

    @contextlib.contextmanager
    def room(
        self, who: str, network: str, accounts: Iterable[str | None] = ()
    ) -> Iterator[HashingSlot]:
        """For "anybody" or somebody "known", from a network and of one of these accounts that has
        place left; operators (None) need none of an account. Raises Busy."""
        ways = [[(who, f"of {each}")] if each else [] for each in accounts] or [[]]
        fewest = min(ways, key=lambda way: sum(self._waiting[each] for each in way))
        parties = [(who, f"from {network}"), *fewest]
        full = any(self._waiting[each] >= MAX_OF_ONE for each in parties)
        if full or self._waiting[who, "all"] >= MAX_WAITING:
            raise Busy("too many people log in at once; try again in a few seconds", 5)
        taken = Counter([(who, "all"), *parties])
        self._waiting += taken
        try:
            yield HashingSlot(self._places[who])
        finally:
            self._waiting -= taken  # and forgets who has none


def scrypt(password: str, salt: bytes) -> bytes:
    """32 bytes."""
    typed = unicodedata.normalize("NFC", password[:MAX_LENGTH]).encode("utf-8", "surrogatepass")
    return hashlib.scrypt(typed, salt=salt, n=COST, r=BLOCKS, p=PARALLEL, maxmem=64 << 20, dklen=32)


def check_password(password: str, email: str) -> None:
    """Raises UserError for one that is too short or too common."""
    from zxcvbn import zxcvbn  # here: it takes 14 MiB, and most gateways never need it

    if len(password) < MIN_LENGTH:
        raise UserError(f"a password has at least {MIN_LENGTH} characters")
    if len(password) > MAX_LENGTH:
        raise UserError(f"a password has at most {MAX_LENGTH} characters")
    parts = [part for part in re.split(r"\W+", email) if len(part) >= MIN_PART][:MAX_PARTS]
    own = functools.reduce(lambda rest, part: rest.replace(part, ""), parts, password.lower())
    judged = [each[:LOOKED_AT] for each in (password, email, *parts, *EXAMPLES)]
    if math.prod(len({*each} & {*judged[0]}) or 1 for each in ALIKE) > MAX_WAYS:
        judged = [each.translate(AS_ONE) for each in judged]
    found = zxcvbn(judged[0], user_inputs=judged[1:])
    if found["score"] < STRONG_ENOUGH or len(own) < MIN_OWN:
        raise UserError(
            "this password is too easy to guess: it is common, or made of common words, repeats, "
            "sequences or the address; four words by chance are a good one"
        )


class Throttle:
    """How often passwords may be tried, a minute, by what is counted: what comes from a network,
    from it for one address, for the address from anywhere, and for a login in a browser that knows
    it (since it was last used there) or in its sessions, and by a link. Of each kind the MOST that
    were counted last are remembered: each but the links', of which anybody may have thousands,
    costs a scrypt, and there is no time for so many before the first is forgiven."""

    TRIES = {"network": 30, "address here": 10, "address": 40, "login": 10, "link": 10}  # noqa: RUF012
    MOST = 10_000

    def __init__(self) -> None:
        self._kinds: dict[str, OrderedDict[str, Bucket]] = {
            kind: OrderedDict() for kind in self.TRIES
        }

    def seconds_to_wait(self, *counted: Counted) -> float:
        """Until the next try; 0: now."""
        known = (each for each in counted if each[1] in self._kinds[each[0]])
        return max((self._filled(each).seconds_until(1) for each in known), default=0.0)

    def count(self, *counted: Counted) -> None:
        """A try. Raises TooMany."""
        if wait := self.seconds_to_wait(*counted):
            raise too_many(wait)
        for each in counted:
            self._filled(each).charge(1)

    def _filled(self, counted: Counted) -> Bucket:
        kind, which = counted
        buckets = self._kinds[kind]
        bucket = buckets.setdefault(which, Bucket())
        buckets.move_to_end(which)
        if len(buckets) > self.MOST:
            buckets.popitem(last=False)
        bucket.fill(self.TRIES[kind], time.monotonic())
        return bucket
