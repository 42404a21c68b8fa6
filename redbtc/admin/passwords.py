"""Judge and hash passwords, and slow down guessing."""

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
from collections.abc import AsyncIterator
from ipaddress import IPv6Network

from redbtc.errors import UserError
from redbtc.limits.buckets import Bucket

# Characters of a password. NIST SP 800-63B-4 §3.1.1.2 asks for at least 15.
MIN_LENGTH, MAX_LENGTH = 15, 1000
# Parameters of scrypt, as OWASP recommends them: 32 MiB, and 0.2 s of a core.
COST, BLOCKS, PARALLEL = 1 << 15, 8, 3
# These bound what zxcvbn reads, so that judging a password takes no longer than its scrypt: the
# characters of each text, the parts of the email address, and the readings of letters that stand
# for others (zxcvbn judges each anew; where there are more, all look-alikes are made one letter).
MAX_JUDGED_LENGTH, MAX_EMAIL_PARTS, MIN_EMAIL_PART_LENGTH, MAX_READINGS = 40, 5, 3, 8
EXAMPLES = "redbtc", "correcthorsebatterystaple"
LOOK_ALIKES = "4@", "({[<", "69", "1!|", "5$", "7+"
AS_ONE = {ord(other): each[0] for each in LOOK_ALIKES for other in each[1:]}
MIN_SCORE = 3  # of zxcvbn's 0 to 4: more than 10^8 guesses
MIN_OWN_LENGTH = 8  # characters that are not part of the email address


def scrypt(password: str, salt: bytes) -> bytes:
    """Return the 32 bytes that are stored in place of a password."""
    shortened = unicodedata.normalize("NFC", password[:MAX_LENGTH])
    encoded = shortened.encode("utf-8", "surrogatepass")
    return hashlib.scrypt(
        encoded, salt=salt, n=COST, r=BLOCKS, p=PARALLEL, maxmem=64 << 20, dklen=32
    )


def check_password(password: str, email: str) -> None:
    """Raise UserError for a password that is too short, too long or too easy to guess."""
    from zxcvbn import zxcvbn  # here: it takes 14 MiB, and most gateways never need it

    if len(password) < MIN_LENGTH:
        raise UserError(f"the password is too short: use at least {MIN_LENGTH} characters")
    if len(password) > MAX_LENGTH:
        raise UserError(f"the password is too long: use at most {MAX_LENGTH} characters")
    parts = [part for part in re.split(r"\W+", email) if len(part) >= MIN_EMAIL_PART_LENGTH]
    parts = parts[:MAX_EMAIL_PARTS]
    own = functools.reduce(lambda rest, part: rest.replace(part, ""), parts, password.lower())
    judged = [each[:MAX_JUDGED_LENGTH] for each in (password, email, *parts, *EXAMPLES)]
    if math.prod(len({*each} & {*judged[0]}) or 1 for each in LOOK_ALIKES) > MAX_READINGS:
        judged = [each.translate(AS_ONE) for each in judged]
    found = zxcvbn(judged[0], user_inputs=judged[1:])
    if found["score"] < MIN_SCORE or len(own) < MIN_OWN_LENGTH:
        raise UserError(
            "this password is too easy to guess: it is common, or consists of common words, "
            "repeats, sequences or your email address. Four random words make a strong password"
        )


# ── Attempts ─────────────────────────────────────────────────────────────────────────────────────

MAX_PER_ADDRESS, MAX_PER_NETWORK = 10, 30  # attempts a minute from one network
# The last used buckets are remembered. An attempt uses two and takes a scrypt (except for a new
# password that is too short), so a bucket is full again long before it is forgotten.
MAX_BUCKETS = 10_000
# Attempts that wait or run. It takes 20 sites to fill the queue.
MAX_QUEUED, MAX_QUEUED_OF_SITE = 100, 5


class Later(UserError):
    """A refusal for now. The same attempt may be made again after `seconds`."""

    def __init__(self, message: str, seconds: int) -> None:
        super().__init__(message)
        self.seconds = seconds


class Busy(Later):
    """Too many attempts wait for the processor."""


class TooMany(Later):
    """Too many attempts were made from this network, or from it for this address."""


def site_of(network: str) -> str:
    """Return the /48 of an IPv6 network, which is the most that one customer usually has (RFC
    6177), or any other network itself."""
    try:
        return str(IPv6Network(network).supernet(new_prefix=48))
    except ValueError:
        return network


class Attempts:
    """The queue of everything that computes a scrypt: logins and new passwords. One attempt runs at
    a time, and how many are made a minute is limited."""

    def __init__(self) -> None:
        self._buckets: OrderedDict[tuple[str, ...], Bucket] = OrderedDict()
        self._queued: Counter[str] = Counter()  # attempts that wait or run, by site
        self._one_at_a_time = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def begin(self, email: str, network: str) -> AsyncIterator[None]:
        """Count an attempt and wait for its turn, which lasts while the block runs. Raises TooMany
        or Busy."""
        site = site_of(network)
        if self._queued.total() >= MAX_QUEUED or self._queued[site] >= MAX_QUEUED_OF_SITE:
            raise Busy("too many logins at once; try again in a few seconds", 5)
        self._count(email, network)
        self._queued[site] += 1
        try:
            async with self._one_at_a_time:
                yield
        finally:
            self._queued -= Counter([site])  # which removes a site that has none left

    def _count(self, email: str, network: str) -> None:
        """Count an attempt, or raise TooMany. The network comes first: a refused attempt must not
        add a bucket for its address, or it would push others out without the cost of a scrypt."""
        of_network = self._filled((network,), MAX_PER_NETWORK)
        of_address = self._filled((network, email), MAX_PER_ADDRESS)
        of_network.charge(1)
        of_address.charge(1)

    def _filled(self, key: tuple[str, ...], limit: int) -> Bucket:
        """Return a bucket from which an attempt can be taken. Raises TooMany."""
        bucket = self._buckets.setdefault(key, Bucket())
        self._buckets.move_to_end(key)
        if len(self._buckets) > MAX_BUCKETS:
            self._buckets.popitem(last=False)
        bucket.fill(limit, time.monotonic())
        if wait := bucket.seconds_until(1):
            seconds = int(wait) + 1
            raise TooMany(f"too many login attempts; try again in {seconds} seconds", seconds)
        return bucket
