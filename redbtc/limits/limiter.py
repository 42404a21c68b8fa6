"""The usage of all keys and accounts that counts for their limits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Protocol

from redbtc.config import AccountLimitSettings, LimitSettings
from redbtc.deadlines import Deadline
from redbtc.limits.admission import Admission, AppliedLimits, LimitCounters, NoCapacity
from redbtc.limits.buckets import Bucket, rate_limit_headers
from redbtc.refusals import ClientLeft, Refusal
from redbtc.store.keys import Key

# An account's own limits of concurrency, requests and tokens; None: the default from config.toml.
OwnLimits = tuple[int | None, int | None, int | None]
OF_ACCOUNT, OF_KEY = "account", "key"  # in the names of counters
MAX_WAITING_REQUESTS = 1000  # of an account's requests, for places or for memory


class UpstreamQueue(Protocol):
    """Places at upstreams."""

    def take_now(self) -> bool:
        """Take a place if one is free, and return whether there was one. Raises Refusal if no
        upstream may be asked now."""

    async def take_in_turn(self) -> None:
        """Wait for a place, and take it."""


class Limiter:
    """The requests in flight, by key, by account and for the whole gateway."""

    def __init__(self) -> None:
        self._keys: dict[str, LimitCounters] = {}
        self._accounts: dict[str, LimitCounters] = {}
        self._all = LimitCounters("this gateway")
        self.queued = 0

    @property
    def of_gateway(self) -> LimitCounters:
        """Return the counters of all accounts together."""
        return self._all

    def charge(self, key: Key, limits: LimitSettings) -> Admission:
        """Charge one request, before its body is read. Raises Refusal if a rate is used up."""
        return Admission(self._applied_limits(key, limits), limits.queue_seconds)

    async def take_places(self, admission: Admission, estimate: int, deadline: Deadline) -> None:
        """Charge the tokens and take the places, which leaving the admission's `with` gives back.
        Raises Refusal if a rate is used up, or no place comes free within `limits.queue_seconds`,
        and ClientLeft."""
        admission.is_body_read = not deadline.client_left
        if deadline.client_left:
            raise ClientLeft
        admission.charge("tokens", estimate)
        until = time.monotonic() + admission.queue_seconds
        account = admission.applied_limits[1].counters
        for applied in admission.applied_limits:
            places = applied.counters.places
            if not places.take_now(applied.concurrency):
                await self._wait_for_place(applied, account, until, deadline)
            admission.places.append(places)
        admission.took_places = True

    async def take_place_at_upstream(
        self, admission: Admission, queue: UpstreamQueue, deadline: Deadline
    ) -> None:
        """Take a place at an upstream, and wait in turn for it for at most `limits.queue_seconds`.
        Raises Refusal and ClientLeft, and undoes what was charged."""
        try:
            if not queue.take_now():
                account = admission.applied_limits[1].counters
                until = time.monotonic() + admission.queue_seconds
                await self.wait(account, queue.take_in_turn, until, deadline)
        except TimeoutError:
            message = "All upstreams have as many requests in flight as they may have."
            refusal = Refusal("overloaded", message)
            admission.undo(refusal)
            raise refusal from None
        except (Refusal, ClientLeft, asyncio.CancelledError) as error:
            admission.undo(error)
            raise

    def counters(self) -> Iterator[tuple[str, LimitCounters]]:
        """Return all counters, with the names by which `counters_named` finds them."""
        yield "", self._all
        for account_id, counters in self._accounts.items():
            yield f"{OF_ACCOUNT} {account_id}", counters
        for key_id, counters in self._keys.items():
            yield f"{OF_KEY} {key_id}", counters

    def counters_named(self, name: str) -> LimitCounters:
        """Return the counters of a name. They are made if there are none."""
        kind, _, owner = name.partition(" ")
        if kind == OF_ACCOUNT:
            return self._account(owner)
        return self._key(owner) if kind == OF_KEY else self._all

    def small_frames(self, key: Key) -> Bucket:
        """Return the rate of small WebSocket frames of the key's account."""
        return self._account(key.account_id).small_frames

    def memory(self, key: Key) -> tuple[LimitCounters, LimitCounters]:
        """Return the account and the gateway, from both of which a body takes memory."""
        return self._account(key.account_id), self._all

    def _applied_limits(
        self, key: Key, limits: LimitSettings
    ) -> tuple[AppliedLimits, AppliedLimits, AppliedLimits]:
        of_key = self._keys.get(key.id) or self._key(key.id)
        own = (
            key.account_concurrency,
            key.account_requests_per_minute,
            key.account_tokens_per_minute,
        )
        return (
            AppliedLimits(
                of_key,
                key.concurrency or 0,
                key.requests_per_minute or 0,
                key.tokens_per_minute or 0,
            ),
            self._bound(key.account_id, own, key.throttle_factor, limits.account),
            AppliedLimits(
                self._all, limits.concurrency, limits.requests_per_minute, limits.tokens_per_minute
            ),
        )

    def _bound(
        self, account_id: str, own: OwnLimits, factor: int | None, default: AccountLimitSettings
    ) -> AppliedLimits:
        """Return the limits of an account: its own, or the `default` ones. `factor` is the share of
        them that it is throttled to, in thousandths; at least 1 of each limit is left."""
        concurrency, requests, tokens = own
        limits = [
            default.concurrency if concurrency is None else concurrency,
            default.requests_per_minute if requests is None else requests,
            default.tokens_per_minute if tokens is None else tokens,
        ]
        if factor is not None:
            limits = [limit and max(1, limit * factor // 1000) for limit in limits]
        return AppliedLimits(self._account(account_id), *limits)

    def _key(self, key_id: str) -> LimitCounters:
        return self._keys.setdefault(key_id, LimitCounters("this key"))

    def _account(self, account_id: str) -> LimitCounters:
        counters = self._accounts.get(account_id)
        if counters is None:
            counters = self._accounts[account_id] = LimitCounters("this account")
        return counters

    def report_account(
        self, account_id: str, own: OwnLimits, factor: int | None, limits: LimitSettings
    ) -> dict[str, Any]:
        """Return the limits of an account, and what is left of them, as `report` does."""
        return self._bound(account_id, own, factor, limits.account).report(time.monotonic())

    def report(self, key: Key, limits: LimitSettings) -> dict[str, Any]:
        """Return the current limits of a key and its account, and what is left of them, for JSON. A
        limit of null is none."""
        now = time.monotonic()
        of_key, of_account, _ = self._applied_limits(key, limits)
        return {"key": of_key.report(now), "account": of_account.report(now)}

    async def _wait_for_place(
        self, applied: AppliedLimits, account: LimitCounters, until: float, deadline: Deadline
    ) -> None:
        try:
            await self.wait(account, applied.counters.places.take_in_turn, until, deadline)
        except TimeoutError:
            headers = rate_limit_headers("concurrency", applied.concurrency, 0, 1)
            what = f"{applied.counters.name} may have {applied.concurrency} requests in flight"
            message = f"Too many requests at once: {what}."
            raise NoCapacity(message, headers) from None

    async def wait(
        self,
        account: LimitCounters,
        take_in_turn: Callable[[], Awaitable[None]],
        until: float,
        deadline: Deadline,
    ) -> None:
        """Take places in turn. Raises TimeoutError at `until` (monotonic seconds), or
        immediately if MAX_WAITING_REQUESTS requests of the account wait already; ClientLeft if the
        client disconnects."""
        if account.waiting >= MAX_WAITING_REQUESTS:
            raise TimeoutError
        account.waiting += 1
        self.queued += 1
        try:
            with deadline.running(until - time.monotonic(), grace=0):
                await take_in_turn()
        except TimeoutError:
            if deadline.client_left:
                raise ClientLeft from None
            raise
        finally:
            self.queued -= 1
            account.waiting -= 1
