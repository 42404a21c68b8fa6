"""Limits: how much at once, how many a minute, and how long. All on the monotonic clock.

A request is charged on the rates of its key, its account and the gateway as a whole, needs memory
for its body, and needs a place in each of the three. What is cheapest to refuse comes first:

1. the request rates, when nothing but the head has been read;
2. memory, before each part of the body is read;
3. the token rates, and then places, which are waited for in turn.

Key, account and gateway always come in this order, so that no two requests wait for each other. A
request that waits for the gateway already holds its account's share, so that no account can fill
the queue. Memory is given back once the request has its places: from then on they limit it.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, NamedTuple

from redbtc.config import AccountLimitSettings, Settings
from redbtc.config import LimitSettings as LimitSettings
from redbtc.deadlines import Deadline
from redbtc.headers import Headers
from redbtc.refusals import ClientLeft, Refusal
from redbtc.store.keys import Key

OwnLimits = tuple[int | None, int | None, int | None]  # None: the settings'
FREE_BYTES = 64 << 10  # what a connection's own buffers hold as well
MAX_FREE = 256  # requests of an account whose first FREE_BYTES are not counted
OWN_BYTES = 4 << 20  # of an account that nobody else can take
MAX_WAITING = 1000  # of an account's requests, for places or for memory


class NoRoom(Refusal):
    """Refuse a request for which no place or no memory came free in time: the gateway's fault, so
    that it does not count as a request."""

    def __init__(self, message: str, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
        super().__init__("concurrency_limit_exceeded", message, headers=headers)


class Places:
    """A counter of places of which `limit` can be taken at once (0: no limit), first come, first
    served. A request takes one place; for memory, each byte is a place."""

    def __init__(self) -> None:
        self.limit = 0
        self.taken = 0
        self._queue: OrderedDict[asyncio.Future[None], int] = OrderedDict()

    def take_now(self, limit: int, amount: int = 1, ahead: bool = False) -> bool:
        """Take `amount` places if they are free and nobody waits for any, or if they are free and
        the caller goes `ahead` of who waits; return whether they were taken. Sets the limit."""
        self.limit = limit
        if self._queue:
            self._let_in()
        if (self._queue and not ahead) or 0 < limit < self.taken + amount:
            return False
        self.taken += amount
        return True

    async def take_in_turn(self, amount: int = 1) -> None:
        """Wait for `amount` places and take them. Cancelling the wait takes none."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue[turn] = amount
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give_back(amount)  # it came in the same instant
            self._queue.pop(turn, None)
            self._let_in()  # the next in line may want less
            raise

    def give_back(self, amount: int = 1) -> None:
        """Free `amount` places for the next in the queue."""
        self.taken -= amount
        self._let_in()

    def _let_in(self) -> None:
        while self._queue:
            turn, amount = next(iter(self._queue.items()))
            if 0 < self.limit < self.taken + amount:
                return
            del self._queue[turn]
            if not turn.done():  # else given up a moment ago
                self.taken += amount
                turn.set_result(None)


class Bucket:
    """A token bucket that holds one minute's `limit` (0: no limit) and fills evenly. What is
    charged beyond it (an answer longer than estimated) is owed by those who come after."""

    def __init__(self) -> None:
        self.limit = 0
        self._level = 0.0
        self._at = 0.0

    def fill(self, limit: int, now: float) -> None:
        """Bring it up to `now` (monotonic seconds)."""
        if limit != self.limit:
            self._level = limit if not self.limit else min(self._level, limit)
            self.limit = limit
        self._level = min(limit, self._level + (now - self._at) * limit / 60)
        self._at = now

    def seconds_until(self, amount: float) -> float:
        """How long until it has `amount`; 0 if it has. More than it can hold counts as all of
        it."""
        missing = min(amount, self.limit) - self._level
        return max(0.0, missing * 60 / self.limit) if self.limit else 0.0

    def charge(self, amount: float) -> None:
        """Take `amount` out, or with a negative one put back."""
        self._level = min(self.limit, self._level - amount)

    @property
    def remaining(self) -> int:
        return max(0, int(self._level))

    @property
    def reset_seconds(self) -> float:
        return (self.limit - self._level) * 60 / self.limit if self.limit else 0.0


class Limited:
    """A key, an account, or the gateway: what is in use of its three limits."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.waiting = 0  # requests that have to wait for anything
        self.free = 0  # requests whose first FREE_BYTES are not counted
        self.shared = 0  # bytes being read that count for the whole gateway
        self.shared_waits = 0  # bytes that will count in `shared` and are waited for
        self.places = Places()
        self.reading = Places()  # bytes of memory for bodies
        self.small_frames = Bucket()  # frames of WebSockets
        self.requests = Bucket()
        self.tokens = Bucket()


class Bound(NamedTuple):
    """What one request is held to by one of the three: limits of 0 are none."""

    limited: Limited
    concurrency: int
    requests_per_minute: int
    tokens_per_minute: int

    def report(self, now: float) -> dict[str, Any]:
        """As JSON shows it."""
        taken, most = self.limited.places.taken, self.concurrency
        found: dict[str, Any] = {"concurrency": {"limit": most or None, "in_flight": taken}}
        for name, bucket in (("requests", self.limited.requests), ("tokens", self.limited.tokens)):
            limit: int = getattr(self, f"{name}_per_minute")
            bucket.fill(limit, now)
            found[f"{name}_per_minute"] = {
                "limit": limit or None,
                "remaining": bucket.remaining if limit else None,
                "reset_seconds": round(bucket.reset_seconds, 3),
            }
        return found


def go_duration(seconds: float) -> str:
    """12ms, 1.5s, 6m0s, as OpenAI writes resets (Go's time.Duration)."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(math.ceil(seconds * 1000) / 1000, 60)
    return f"{int(minutes)}m{rest:g}s" if minutes else f"{rest:g}s"


def rate_limit_headers(kind: str, limit: int, remaining: int, reset: float) -> Headers:
    """x-ratelimit-limit-…, -remaining-… and -reset-…"""
    of = kind.encode()
    return [
        (b"x-ratelimit-limit-" + of, b"%d" % limit),
        (b"x-ratelimit-remaining-" + of, b"%d" % remaining),
        (b"x-ratelimit-reset-" + of, go_duration(reset).encode()),
    ]


def check_rate(kind: str, bucket: Bucket, limit: int, amount: float) -> None:
    """Raise Refusal if the bucket, of `limit` a minute, does not have `amount` now."""
    bucket.fill(limit, time.monotonic())
    wait = bucket.seconds_until(amount)
    if wait > 0:
        headers = rate_limit_headers(kind, limit, bucket.remaining, wait)
        message = f"Rate limit reached: {limit} {kind} per minute."
        raise Refusal("rate_limit_exceeded", message, retry_after=wait, headers=headers)


class Admission:
    """One request's charges on the rates of its key, its account and the gateway, and its places.
    Leaving `with` gives the places back. If the request was not admitted, it also undoes its
    charges (see `refused`)."""

    def __init__(self, bounds: tuple[Bound, ...], queue_seconds: float) -> None:
        """Charge all request rates, or raise Refusal and charge none."""
        self.bounds = bounds
        self.queue_seconds = queue_seconds
        self.places: list[Places] = []
        self.read = False  # the body, whole
        self.admitted = False
        self._charges: list[tuple[str, Bucket, float]] = []
        self.charge("requests", 1)

    def __enter__(self) -> Admission:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if self.places:
            self.give_back_places()
        if error and not self.admitted:
            self.refused(error)

    def give_back_places(self) -> None:
        """Give back the places, once the upstream is done with the request."""
        while self.places:
            self.places.pop().give_back()

    def charge(self, kind: str, amount: float) -> None:
        """Charge all rates of a kind ("requests" or "tokens"), or raise Refusal and charge none."""
        charges: list[tuple[str, Bucket, float]] = []
        requests = kind == "requests"
        for bound in self.bounds:
            limit = bound.requests_per_minute if requests else bound.tokens_per_minute
            if limit:
                bucket = bound.limited.requests if requests else bound.limited.tokens
                check_rate(kind, bucket, limit, amount)
                charges.append((kind, bucket, min(amount, limit)))
        for _, bucket, charged in charges:
            bucket.charge(charged)
        self._charges += charges

    def refused(self, error: BaseException) -> None:
        """Undo the charges of a request that was not forwarded: its tokens always, and the request
        itself unless the client is at fault, or left while the body was read: reading was work."""
        fault = isinstance(error, ClientLeft) and not self.read
        if isinstance(error, Refusal):
            fault = error.status < 500 and not isinstance(error, NoRoom)
        if fault:
            self.correct(0)
        else:
            self.put_back()

    def put_back(self) -> None:
        """The request was not served: it costs nothing."""
        for _, bucket, amount in self._charges:
            bucket.charge(-amount)
        self._charges.clear()

    def correct(self, tokens: int) -> None:
        """Put the estimate right: this many were used. What is used after that comes on top."""
        for number, (kind, bucket, amount) in enumerate(self._charges):
            if kind == "tokens":
                bucket.charge(tokens - amount)
                self._charges[number] = kind, bucket, 0

    def headers(self) -> Headers:
        """OpenAI's x-ratelimit-* headers; of several limits the one with the least left."""
        tightest: dict[str, Bucket] = {}
        for kind, bucket, _ in self._charges:
            if kind not in tightest or bucket.remaining < tightest[kind].remaining:
                tightest[kind] = bucket
        return [
            line
            for kind, bucket in tightest.items()
            for line in rate_limit_headers(
                kind, bucket.limit, bucket.remaining, bucket.reset_seconds
            )
        ]


class Limiter:
    """All that is in flight, by key, by account and over all."""

    def __init__(self) -> None:
        self._keys: dict[str, Limited] = {}
        self._accounts: dict[str, Limited] = {}
        self._all = Limited("this gateway")
        self.queued = 0

    def charge(self, key: Key, limits: LimitSettings) -> Admission:
        """Charge one request, before its body is read. Raises Refusal if a rate is used up."""
        return Admission(self._bounds(key, limits), limits.queue_seconds)

    async def admit(self, admission: Admission, estimate: int, clock: Deadline) -> None:
        """Charge the tokens and take the places, which leaving the admission's `with` gives back.
        Raises Refusal if a rate is used up, or no place comes free within `limits.queue_seconds`;
        ClientLeft."""
        admission.read = not clock.client_left
        if clock.client_left:
            raise ClientLeft
        admission.charge("tokens", estimate)
        deadline = time.monotonic() + admission.queue_seconds
        account = admission.bounds[1].limited
        for bound in admission.bounds:
            places = bound.limited.places
            if not places.take_now(bound.concurrency):
                await self._wait_for_place(bound, account, deadline, clock)
            admission.places.append(places)
        admission.admitted = True

    def small_frames(self, key: Key) -> Bucket:
        """Return the rate of small WebSocket frames of the key's account."""
        return self._account(key.account_id).small_frames

    def memory(self, key: Key) -> tuple[Limited, Limited]:
        """Return the two that a body takes memory from: the key's account, and the gateway."""
        return self._account(key.account_id), self._all

    def _bounds(self, key: Key, limits: LimitSettings) -> tuple[Bound, Bound, Bound]:
        of_key = self._keys.get(key.id)
        if of_key is None:
            of_key = self._keys[key.id] = Limited("this key")
        own = (
            key.account_concurrency,
            key.account_requests_per_minute,
            key.account_tokens_per_minute,
        )
        return (
            Bound(
                of_key,
                key.concurrency or 0,
                key.requests_per_minute or 0,
                key.tokens_per_minute or 0,
            ),
            self._bound(key.account_id, own, key.throttle_factor, limits.account),
            Bound(
                self._all, limits.concurrency, limits.requests_per_minute, limits.tokens_per_minute
            ),
        )

    def _bound(
        self, account_id: str, own: OwnLimits, factor: int | None, usual: AccountLimitSettings
    ) -> Bound:
        """That of an account. `factor`: thousandths of its limits that it is held to; of a limit
        something is always left."""
        concurrency, requests, tokens = own
        limits = [
            usual.concurrency if concurrency is None else concurrency,
            usual.requests_per_minute if requests is None else requests,
            usual.tokens_per_minute if tokens is None else tokens,
        ]
        if factor is not None:
            limits = [limit and max(1, limit * factor // 1000) for limit in limits]
        return Bound(self._account(account_id), *limits)

    def _account(self, account_id: str) -> Limited:
        limited = self._accounts.get(account_id)
        if limited is None:
            limited = self._accounts[account_id] = Limited("this account")
        return limited

    def report_account(
        self, account_id: str, own: OwnLimits, factor: int | None, limits: LimitSettings
    ) -> dict[str, Any]:
        """As `report`, of an account."""
        return self._bound(account_id, own, factor, limits.account).report(time.monotonic())

    def report(self, key: Key, limits: LimitSettings) -> dict[str, Any]:
        """The limits in force for a key and its account, and what is left of them; a limit of null
        is none."""
        now = time.monotonic()
        of_key, of_account, _ = self._bounds(key, limits)
        return {"key": of_key.report(now), "account": of_account.report(now)}

    async def _wait_for_place(
        self, bound: Bound, account: Limited, deadline: float, clock: Deadline
    ) -> None:
        try:
            await self.wait(account, bound.limited.places, 1, deadline, clock)
        except TimeoutError:
            headers = rate_limit_headers("concurrency", bound.concurrency, 0, 1)
            what = f"{bound.limited.what} may have {bound.concurrency} requests in flight"
            message = f"Too many requests at once: {what}."
            raise NoRoom(message, headers) from None

    async def wait(
        self, account: Limited, places: Places, amount: int, deadline: float, clock: Deadline
    ) -> None:
        """Take `amount` places in turn. Raises TimeoutError at `patience`, a time of the monotonic
        clock, or at once if MAX_WAITING requests of the account wait already; ClientLeft."""
        if account.waiting >= MAX_WAITING:
            raise TimeoutError
        account.waiting += 1
        self.queued += 1
        try:
            with clock.running(deadline - time.monotonic(), grace=0):
                await places.take_in_turn(amount)
        except TimeoutError:
            if clock.client_left:
                raise ClientLeft from None
            raise
        finally:
            self.queued -= 1
            account.waiting -= 1


class Reservation:
    """Memory for requests that have no place yet: a body and its decoded copy, or a WebSocket's
    messages. Leaving `with` gives it back. An account may hold half of `server.max_reading_bytes`,
    and all accounts together all of it, without the first OWN_BYTES of each account. The first
    FREE_BYTES of each of an account's first MAX_FREE requests are not counted."""

    def __init__(self, limits: Limiter, key: Key, settings: Settings) -> None:
        self.account_id = key.account_id
        self._limits = limits
        self._account, self._everybody = limits.memory(key)
        self.settings = settings
        self._free = 0  # bytes that are not counted
        self._size = 0  # bytes that were asked for
        self._held = 0  # bytes that were taken: all but the free ones
        self._waits_for = 0  # bytes that `take` is waiting for

    def __enter__(self) -> Reservation:
        if self._account.free < MAX_FREE:
            self._account.free += 1
            self._free = FREE_BYTES
        return self

    def __exit__(self, *_: object) -> None:
        if self._free or self._held:
            self.release()

    def release(self) -> None:
        """Give all of it back. It has no effect the second time."""
        if self._free:
            self._account.free -= 1
            self._free = 0
        if self._held:
            self.give_back(self._size)

    async def take(self, size: int, clock: Deadline | None) -> None:
        """Hold `size` bytes more. Raises Refusal if they do not come free within
        `limits.queue_seconds`; ClientLeft. Only one task at a time may wait. If `clock` is None, go
        ahead of those who wait, and do not wait: the memory is in use already."""
        self._size += size
        more = self._size - self._free - self._held - self._waits_for
        if more > 0:
            self._waits_for += more
            try:
                await self._take(more, clock)
                self._held += more
            except BaseException:
                self._size -= size
                raise
            finally:
                self._waits_for -= more
                self.give_back(0)  # frees what `give_back` kept while this waited

    def give_back(self, size: int) -> None:
        """Hold `size` bytes less."""
        self._size -= size
        if self._held:
            needed = max(0, self._size - self._free) - self._waits_for
            spare = min(self._held - needed, self._held)
            if spare > 0:
                self._held -= spare
                self._release(spare)

    def _release(self, size: int) -> None:
        self._account.reading.give_back(size)
        excess = self._account.shared - self._beyond_own()
        if excess > 0:
            self._account.shared -= excess
            self._everybody.reading.give_back(excess)

    def _beyond_own(self) -> int:
        """Bytes of the account that count for the whole gateway."""
        return max(0, self._account.reading.taken - OWN_BYTES)

    async def _take(self, more: int, clock: Deadline | None) -> None:
        seconds = self.settings.limits.queue_seconds
        if self._held:  # growing bodies can wait for each other: let one of them give up first
            seconds *= random.uniform(0.5, 1)
        deadline, most = time.monotonic() + seconds, self.settings.server.reading_bytes
        taken = 0
        try:
            await self._take_share(self._account, most // 2, more, deadline, clock)
            taken = more
            await self._take_shared(most, more, deadline, clock)
        except BaseException:
            self._release(taken)  # none may have been taken for an instant, and counted as shared
            raise

    async def _take_shared(
        self, most: int, more: int, deadline: float, clock: Deadline | None
    ) -> None:
        """Take the part of `more` bytes that counts for the whole gateway. What other requests of
        the account are waiting for is left to them."""
        account = self._account
        beyond = min(more, self._beyond_own() - account.shared - account.shared_waits)
        if beyond > 0:
            account.shared_waits += beyond
            try:
                await self._take_share(self._everybody, most, beyond, deadline, clock)
            finally:
                account.shared_waits -= beyond
            account.shared += beyond
            self._release(0)  # what others of the account gave back meanwhile

    async def _take_share(
        self, limited: Limited, most: int, more: int, deadline: float, clock: Deadline | None
    ) -> None:
        if not limited.reading.take_now(most, more, ahead=clock is None):
            try:
                if clock is None:
                    raise TimeoutError
                await self._limits.wait(self._account, limited.reading, more, deadline, clock)
            except TimeoutError:
                message = f"Too many large request bodies at once for {limited.what}."
                raise NoRoom(message) from None
