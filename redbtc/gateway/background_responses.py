"""The background responses that have not ended yet, and the tasks that ask for them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import Counter
from collections.abc import Callable, Collection, Coroutine
from typing import Any, Protocol

from redbtc.billing.billing import Billing
from redbtc.billing.spending import Hold
from redbtc.errors import StorageUnavailable
from redbtc.gateway.asking import ask
from redbtc.gateway.background_response import BackgroundResponse, Stage
from redbtc.gateway.corrections import Corrections
from redbtc.gateway.maximum import maximum_of_unknown
from redbtc.gateway.settlement import count_containers, inheritable_usage, locations_of
from redbtc.limits.buckets import rate_limit_headers
from redbtc.locations import ObjectLocation
from redbtc.meter.answers import UNFINISHED
from redbtc.meter.estimates import MaximumUsage
from redbtc.meter.report import Report
from redbtc.refusals import Refusal
from redbtc.slices import with_turns
from redbtc.store.background import (
    UnfinishedRow,
    end_background,
    keep_pending,
    must_stop,
    note_progress,
    unfinished_rows,
)
from redbtc.store.containers import Containers
from redbtc.store.keys import Key
from redbtc.store.objects import Objects
from redbtc.store.speeds import Speeds
from redbtc.telemetry import Telemetry, log, shown_error
from redbtc.upstream.configured import Upstreams
from redbtc.usage import MAX_TOKENS, Outcome, RequestRow

# A background response goes on when its request is over. Its row stays pending and what it can cost
# stays held, until somebody sees that it has ended: its client, who fetches it, or the gateway,
# which asks the upstream with growing pauses, after a restart as well. Whoever is first settles it;
# whoever comes while that is being written waits until it is.
FIRST_PAUSE, MAX_PAUSE, PAUSE_GROWTH = 1.0, 60.0, 1.5  # seconds; the pause grows by half
MAX_ASKING = 16
ROOM_SECONDS = 5  # retry-after for a client that has too many unfinished responses
UNKNOWN = (400, 404, 410)  # how an upstream says that there is no such response
MAX_UNKNOWN = 3  # in a row: it may not know at once what it has just made


class UnfinishedCount:
    """The number of unfinished background responses, by account. Requests that may create one are
    counted as well."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def add(self, account_id: str, limit: int) -> None:
        """Count one more unfinished background response of the account, before the upstream is
        asked for it. `limit` is the maximum (0: none). Raises Refusal."""
        if 0 < limit <= self._counts[account_id]:
            headers = rate_limit_headers("background", limit, 0, ROOM_SECONDS)
            message = f"This account has {limit} unfinished background responses, the maximum."
            raise Refusal(
                "concurrency_limit_exceeded", message, retry_after=ROOM_SECONDS, headers=headers
            )
        self._counts[account_id] += 1

    def of(self, account_id: str) -> int:
        """Return the number of the account's unfinished background responses."""
        return self._counts[account_id]

    def total(self) -> int:
        """Return the number of all accounts' unfinished background responses."""
        return self._counts.total()

    def by_account(self) -> dict[str, int]:
        """Return the number of each account that has any."""
        return dict(self._counts)

    def change(self, account_id: str, by: int) -> None:
        """Count more or fewer of an account, whatever the maximum is."""
        self._counts[account_id] += by
        if not self._counts[account_id]:
            del self._counts[account_id]

    def remove(self, account_id: str) -> None:
        """Stop counting a background response that has ended or was not created."""
        self.change(account_id, -1)


class Left(Protocol):
    """The responses that are left to another process."""

    def add(self, response: BackgroundResponse) -> None:
        """Leave a response, whose request is over."""


class BackgroundResponses:
    """The background responses that have not been seen to end."""

    def __init__(
        self,
        billing: Billing,
        objects: Objects,
        containers: Containers,
        corrections: Corrections,
        speeds: Speeds,
        upstreams: Upstreams,
        telemetry: Telemetry,
        on_task_end: Callable[[asyncio.Task[Any]], None],
    ) -> None:
        """`on_task_end` is called with each task that has ended."""
        self._store = billing.store
        self._billing = billing
        self._objects = objects
        self._containers = containers
        self._corrections = corrections
        self._upstreams = upstreams
        self._telemetry = telemetry
        self._speeds = speeds
        self.responses: dict[str, BackgroundResponse] = {}
        self.unfinished = UnfinishedCount()
        self._asking = asyncio.Semaphore(MAX_ASKING)
        self.tasks: set[asyncio.Task[Any]] = set()
        self._on_task_end = on_task_end
        self.left: Left | None = None  # None: this process asks for what outlives its request

    async def resume(self, except_for: Collection[str] = ()) -> None:
        """Take up what an earlier process left, but not the responses with these ids. Raises
        StorageUnavailable, sqlite3.Error."""
        rows = await unfinished_rows(self._store)
        await self._take_up([each for each in rows if each[0].response_id not in except_for])

    async def take_up(self, response_ids: Collection[str]) -> None:
        """Take up those of these responses, which another process leaves to this one, that are not
        here yet. Raises StorageUnavailable, sqlite3.Error."""
        if missing := set(response_ids).difference(self.responses):
            rows = await unfinished_rows(self._store)
            await self._take_up([each for each in rows if each[0].response_id in missing])

    async def _take_up(self, rows: list[tuple[RequestRow, Key, UnfinishedRow]]) -> None:
        for row, key, unfinished in rows:
            hold = await self._billing.hold_at(
                key, row.requested_model, unfinished.admitted_at, unfinished.held
            )
            response = BackgroundResponse(row, hold, unfinished, None, self._store.time())
            if maximum := response.maximum:
                hold.grow(self._objects, [row.response_id or ""], maximum.all_tokens)
            self.unfinished.change(row.account_id, 1)
            self._add(response)
            response.enter(Stage.ALONE)
            response.to_be_cancelled = must_stop(self._store, key.id)
            self.start(self._ask_until_ended(response))

    def keep(
        self, row: RequestRow, hold: Hold, unfinished: UnfinishedRow, chosen: set[str]
    ) -> tuple[BackgroundResponse, asyncio.Future[None]]:
        """Keep track of a response that goes on after its request has ended, with its hold. Return
        it, and a future that is done when it is on disk."""
        now = self._store.time()
        response = BackgroundResponse(row, hold.transfer(), unfinished, chosen, now)
        self._add(response)
        return response, keep_pending(self._store, row, unfinished)

    async def leave(self, response: BackgroundResponse, report: Report) -> bool:
        """Note that the request that created the response is over. Settle the response and return
        True if it has ended; otherwise begin to ask the upstream for it, and return False."""
        response.remove_reader(report)
        response.enter(Stage.ALONE)
        await self._settle_if_ended(response, report)
        if response.has_ended:
            return True
        response.note_status(report.status)
        if written := self._save_if_changed(response):
            await written
        if self.left:
            self.left.add(response)
        elif not response.is_left:
            self.start(self._ask_until_ended(response))
        return False

    def add_reader(self, response_id: str, report: Report) -> None:
        """Count what this report meters as sent to a reader."""
        if response := self.responses.get(response_id):
            response.add_reader(report)

    def ignore_reader(self, response_id: str, report: Report) -> None:
        """Ignore what a reader was sent: it was another response."""
        if response := self.responses.get(response_id):
            response.ignore_reader(report)

    async def finish_reader(self, response_id: str, report: Report, shown: bool) -> None:
        """Note that a reader has been sent all that it will get. If `shown` and the report tells of
        the end, return once the row is settled. Events can tell of an old status: they begin with
        the response."""
        if response := self.responses.get(response_id):
            response.remove_reader(report)
            if shown:
                await self._settle_if_ended(response, report)
            if report.status == "in_progress" or (
                report.status == "queued" and not report.in_events
            ):
                response.note_status(report.status)
            if written := self._save_if_changed(response):
                await written

    async def save_progress(self, now: float) -> None:
        """Keep what readers of unfinished responses have been sent so far, in case the process is
        killed. `now` is by the monotonic clock."""
        async for response in with_turns(list(self.responses.values())):
            if response.update_if_due(now):
                self._save_if_changed(response)

    def _save_if_changed(self, response: BackgroundResponse) -> asyncio.Future[None] | None:
        """Write what was seen of it, if that is more than the ledger has. Return a future that is
        done when it is on disk."""
        if response.has_ended or not (progress := response.unsaved_progress()):
            return None
        return note_progress(self._store, response.row, progress)

    def _add(self, response: BackgroundResponse) -> None:
        """Register the response, unless an upstream has given its id to an earlier one."""
        self.responses.setdefault(response.row.response_id or "", response)

    def remove(self, response: BackgroundResponse) -> None:
        """Forget a response: its row is settled, or another process asks for it."""
        response_id = response.row.response_id or ""
        if self.responses.get(response_id) is response:
            del self.responses[response_id]
        self.unfinished.remove(response.row.account_id)

    def set_back(self, at: int) -> None:
        """Let each have begun at `at` if it began later: the ledger's time is set back."""
        for response in self.responses.values():
            response.set_back(at)

    def __contains__(self, response_id: str) -> bool:
        """Return whether the response has not ended, or its settled row is not committed yet."""
        return response_id in self.responses

    def cancel(self, owner_id: str) -> int:
        """Begin to cancel the unfinished responses of a key or an account at the upstreams. Return
        how many of them outlive their request."""
        running = [
            each
            for each in self.responses.values()
            if owner_id in (each.row.key_id, each.row.account_id) and not each.has_ended
        ]
        for each in running:
            each.to_be_cancelled = True
            self.start(self._look_after(each))
        return sum(each.stage is Stage.ALONE for each in running)

    async def _settle_if_ended(self, response: BackgroundResponse, report: Report) -> None:
        if report.status and report.status not in UNFINISHED:
            outcome: Outcome = "completed"
            if report.status == "cancelled":
                outcome = "client_disconnected"
            elif report.failed:
                outcome = "upstream_error"
            self._settle(response, report, outcome)
        if response.settling:
            await asyncio.shield(response.settling)

    def _settle(self, response: BackgroundResponse, report: Report, outcome: Outcome) -> None:
        """Begin to settle a response, unless that has begun."""
        if not response.has_ended:
            response.settling = self.start(self._write(response, report, outcome))
            response.enter(Stage.SETTLING)

    def start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Start a task, which must not fail."""
        task = asyncio.create_task(work, name="background responses")
        self.tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self.tasks.discard(task)
        self._on_task_end(task)

    async def _write(self, response: BackgroundResponse, report: Report, outcome: Outcome) -> None:
        row = response.row
        speed = await self._speeds.of(
            report.model or row.model or row.requested_model,
            row.account_id,
            limited=response.hold.held > 0,
        )
        maximum = response.maximum or maximum_of_unknown(self._billing.settings, MAX_TOKENS)
        parts = response.finish(report, outcome, speed, maximum)
        parts = await count_containers(self._containers, row, report, parts)
        response.bill(parts, self._billing)
        own_ended(self._objects, response, report, maximum)
        correction_facts = response.correction_facts
        # As in MeteredRequest: nothing else is awaited between `bill` and this.
        with self._corrections.keep_held(row, response.hold, correction_facts):
            await end_background(self._store, row, correction_facts)
        self.remove(response)
        self._telemetry.settled(row)

    async def _ask_until_ended(self, response: BackgroundResponse) -> None:
        pause, unknown = FIRST_PAUSE, 0
        while not response.has_ended:
            wait = min(pause * random.uniform(0.8, 1.2), max(0.0, response.seconds_left))
            await asyncio.sleep(wait)
            pause = min(MAX_PAUSE, pause * PAUSE_GROWTH)
            status = await self._try_to_look(response)
            unknown = unknown + 1 if status in UNKNOWN else 0
            if unknown >= MAX_UNKNOWN or response.seconds_left <= 0:
                self._settle(response, Report(images=False), "upstream_failed")

    async def _try_to_look(self, response: BackgroundResponse) -> int:
        """Ask for the response. On an unexpected error, log it and return 0."""
        try:
            return await self._look_after(response)
        except Exception as error:
            fields = {"request_id": response.row.request_id, **shown_error(error)}
            log(logging.ERROR, "background response not asked for", **fields)
            return 0

    async def _look_after(self, response: BackgroundResponse) -> int:
        """Cancel the response if that is due, then ask for it. Return the status of the upstream's
        answer, 0 where there is none."""
        async with self._asking:
            if response.to_be_cancelled and not response.has_ended:
                await self._ask(response, "/cancel", "POST")
            return 200 if response.has_ended else await self._ask(response)

    async def _ask(
        self, response: BackgroundResponse, suffix: str = "", method: str = "GET"
    ) -> int:
        """Ask the upstream about the response. Return the status of its answer, 0 without one."""
        row = response.row
        upstream = self._upstreams.named(row.upstream)
        if upstream is None:
            return 0
        path = f"/responses/{row.response_id}{suffix}"
        status, report = await ask(upstream, path, row.account_id, method)
        if not status or report.response_id not in (None, row.response_id):
            return 0  # no answer, or the upstream has answered with another response
        response.remove_reader(report)
        if status == 200:
            await self._settle_if_ended(response, report)
            response.note_status(report.status)
            if written := self._save_if_changed(response):
                await written
        return status


def own_ended(
    objects: Objects, response: BackgroundResponse, report: Report, maximum: MaximumUsage
) -> None:
    """Record the objects that the finished response names as the account's, with their tokens,
    except for ids that the client may have chosen."""
    row, chosen = response.row, response.chosen
    response_id = row.response_id or ""
    made = list(dict.fromkeys((response_id, *report.made)))
    if chosen is None:
        location = None
        with contextlib.suppress(StorageUnavailable):
            location = objects.location_of(response_id, row.account_id)
        if not (location and location.minted_input):
            made = [response_id] if location else []
    made = [each for each in made if hash(each) not in (chosen or ())]
    location, usage = ObjectLocation(row.upstream), inheritable_usage(row, maximum)
    objects.own_each(locations_of(made, report, location, usage, row.usage), row.account_id)
