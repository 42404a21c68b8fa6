"""Memory for the bodies of requests."""

from __future__ import annotations

import functools
import random
import time

from redbtc.config import Settings
from redbtc.deadlines import Deadline
from redbtc.limits.admission import LimitCounters, NoCapacity
from redbtc.limits.limiter import Limiter
from redbtc.store.keys import Key

FREE_BYTES = 64 << 10  # as much as the buffers of a connection hold
MAX_FREE = 256  # requests of an account whose first FREE_BYTES are not counted
OWN_BYTES = 4 << 20  # of each account, which no other account can take


class Reservation:
    """Memory for a request that has no place yet: its body and the decoded copy, or a WebSocket's
    messages. Leaving `with` gives it back.

    An account may hold half of `server.max_reading_bytes`. All accounts together may hold all of
    it; the first OWN_BYTES of each account don't count for that. The first FREE_BYTES of each of an
    account's first MAX_FREE requests don't count at all."""

    def __init__(self, limiter: Limiter, key: Key, settings: Settings) -> None:
        self.account_id = key.account_id
        self._limiter = limiter
        self._account, self._gateway = limiter.memory(key)
        self.settings = settings
        self.body: bytes | bytearray = b""  # what has been read of it, while it is read
        self._free = 0  # bytes that are not counted
        self._size = 0  # bytes that the caller holds
        self._held = 0  # bytes of these that were taken from the limits: all but the free ones
        self._waits_for = 0  # bytes that `take` is waiting for

    def __enter__(self) -> Reservation:
        if self._account.free < MAX_FREE:
            self._account.free += 1
            self._free = FREE_BYTES
        return self

    def __exit__(self, *_: object) -> None:
        if self._free or self._held:
            self.release()

    def as_client_sent(self) -> tuple[bytes | bytearray]:
        """Return what has been read of the body so far."""
        return (self.body,)

    def release(self) -> None:
        """Give all of it back. It has no effect the second time."""
        if self._free:
            self._account.free -= 1
            self._free = 0
        if self._held:
            self.give_back(self._size)

    async def take(self, size: int, deadline: Deadline | None) -> None:
        """Hold `size` bytes more. Raises Refusal if they do not come free within
        `limits.queue_seconds`, and ClientLeft. Only one task at a time may wait. If `deadline` is
        None, the memory is in use already: don't wait, and go ahead of waiting requests."""
        self._size += size
        more = self._size - self._free - self._held - self._waits_for
        if more > 0:
            self._waits_for += more
            try:
                await self._take(more, deadline)
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
            self._gateway.reading.give_back(excess)

    def _beyond_own(self) -> int:
        """Return how many bytes of the account count for the whole gateway."""
        return max(0, self._account.reading.taken - OWN_BYTES)

    async def _take(self, more: int, deadline: Deadline | None) -> None:
        seconds = self.settings.limits.queue_seconds
        if self._held:  # growing bodies can wait for each other: let one of them time out first
            seconds *= random.uniform(0.5, 1)
        until, maximum = time.monotonic() + seconds, self.settings.server.reading_bytes
        taken = 0
        try:
            await self._take_share(self._account, maximum // 2, more, until, deadline)
            taken = more
            await self._take_shared(maximum, more, until, deadline)
        except BaseException:
            # Also for 0 bytes: some may have been taken for an instant, and counted as shared.
            self._release(taken)
            raise

    async def _take_shared(
        self, maximum: int, more: int, until: float, deadline: Deadline | None
    ) -> None:
        """Take the part of `more` bytes that counts for the whole gateway, without the part that
        other requests of the account are waiting for."""
        account = self._account
        beyond = min(more, self._beyond_own() - account.shared - account.shared_waits)
        if beyond > 0:
            account.shared_waits += beyond
            try:
                await self._take_share(self._gateway, maximum, beyond, until, deadline)
            finally:
                account.shared_waits -= beyond
            account.shared += beyond
            self._release(0)  # frees what other requests of the account gave back meanwhile

    async def _take_share(
        self,
        counters: LimitCounters,
        maximum: int,
        more: int,
        until: float,
        deadline: Deadline | None,
    ) -> None:
        if not counters.reading.take_now(maximum, more, ahead=deadline is None):
            try:
                if deadline is None:
                    raise TimeoutError
                take_in_turn = functools.partial(counters.reading.take_in_turn, more)
                await self._limiter.wait(self._account, take_in_turn, until, deadline)
            except TimeoutError:
                message = f"Too many large request bodies at once for {counters.name}."
                raise NoCapacity(message) from None
