"""A background response that has not ended yet."""

from __future__ import annotations

import asyncio
import enum
import math
import time

import msgspec

from redbtc.billing.billing import Billing
from redbtc.billing.spending import Hold
from redbtc.gateway.progress import SAVE_GROWTH
from redbtc.gateway.settlement import account_for, bill
from redbtc.meter.error_codes import kept_code
from redbtc.meter.estimates import (
    MaximumUsage,
    Progress,
    SeenOutput,
    estimate,
    is_cancelled_without_output,
    is_complete,
)
from redbtc.meter.report import Report
from redbtc.store.background import UnfinishedRow
from redbtc.store.requests import CorrectionFacts
from redbtc.usage import Outcome, RequestRow, UsagePart

# Then a response is given up. OpenAI's longest completion window is 8 hours.
MAX_AGE_SECONDS = 48 * 3600


class Stage(enum.Enum):
    """The stages of a background response, in their order. It has ended with SETTLING, whatever
    comes after that."""

    FOLLOWED = 1  # the request that created it is still being answered
    ALONE = 2  # that request is over: the gateway asks the upstream how the response is
    SETTLING = 3  # it has ended, and its row is being written


class BackgroundResponse:
    """One background response that has not been seen to end."""

    def __init__(
        self,
        row: RequestRow,
        hold: Hold,
        unfinished: UnfinishedRow,
        chosen: set[str] | None,
        now: int,
    ) -> None:
        """`chosen` are the ids that the client gave to items of its input; None if only an earlier
        process knew them. Their hashes are kept: thousands of ids would take much memory for as
        long as the response runs. `now` is the ledger's time."""
        created = row.started_at + (row.duration_ms or 0)
        self._progress = (
            msgspec.json.decode(unfinished.seen, type=Progress)
            if unfinished.seen
            else Progress(SeenOutput(unfinished.text_bytes), created, created)
        )
        self._saved = self._progress.seen, self._progress.works  # what the ledger has
        self.row = row
        self.unfinished = unfinished
        self.chosen = None if chosen is None else {hash(each) for each in chosen}
        self.stage = Stage.FOLLOWED
        self.settling: asyncio.Task[None] | None = None  # in the stage SETTLING
        self.is_left = False  # another process asks for it
        self.to_be_cancelled = False  # its key was reported as compromised
        self.hold = hold
        self._readers: set[Report] = set()
        self._followed_at = time.monotonic()  # when this object was made
        self._age_before = max(0, now - row.started_at)  # milliseconds
        self._updated_after = 0.0  # seconds from then to the last update that was due

    def enter(self, stage: Stage) -> None:
        """Go on to a later stage; a stage that has passed is not entered again."""
        if stage.value > self.stage.value:
            self.stage = stage

    @property
    def has_ended(self) -> bool:
        """Return whether the response has ended, and is settled or about to be."""
        return self.stage is Stage.SETTLING

    def add_reader(self, report: Report) -> None:
        """Count what this report meters as sent to a reader."""
        self._readers.add(report)

    def remove_reader(self, report: Report) -> None:
        """Keep what this reader was sent, as a lower bound for the estimate."""
        self._readers.discard(report)
        self._progress.seen = self._progress.seen.or_more(SeenOutput.of(report))

    def update_if_due(self, now: float) -> bool:
        """Note what its readers have been sent so far, if that is due. Return whether it was. `now`
        is by the monotonic clock."""
        seconds = now - self._followed_at
        if seconds < SAVE_GROWTH * self._updated_after or not self._readers:
            return False
        self._updated_after = seconds
        for report in self._readers:
            self._progress.seen = self._progress.seen.or_more(SeenOutput.of(report))
            if report.status == "in_progress":
                self.note_status(report.status)
        return True

    def ignore_reader(self, report: Report) -> None:
        """Ignore what a reader was sent: it was another response."""
        self._readers.discard(report)

    @property
    def _age(self) -> int:
        """The time since its request began, in milliseconds: in this process by the monotonic
        clock."""
        return self._age_before + round((time.monotonic() - self._followed_at) * 1000)

    @property
    def _now(self) -> int:
        return self.row.started_at + self._age

    def set_back(self, at: int) -> None:
        """Let it have begun at `at` if it began later, and move what is known of its progress with
        it."""
        distance = max(0, self.row.started_at - at)
        self.row.started_at -= distance
        self._progress.since -= distance
        self._progress.until -= distance

    def note_status(self, status: str | None) -> None:
        """Note that it was looked at and has not ended. A status of None could not be read."""
        self._progress.note(status, self._now)

    def unsaved_progress(self) -> str | None:
        """Return what is known of it as JSON, None if the ledger has as much."""
        known = self._progress.seen, self._progress.works
        if known == self._saved:
            return None
        self._saved = known
        return msgspec.json.encode(self._progress).decode()

    def finish(
        self, report: Report, outcome: Outcome, speed: float, maximum: MaximumUsage
    ) -> list[UsagePart]:
        """Fill in the row, except its cost: it has ended. Return the parts to bill. `speed` is in
        output tokens a second."""
        row, progress = self.row, self._progress
        row.duration_ms = self._age
        row.model, row.service_tier = report.model or row.model, report.service_tier
        row.upstream_error_code = kept_code(row.status or 0, report.error_code)
        for each in (report, *self._readers):
            progress.seen = progress.seen.or_more(SeenOutput.of(each))
        guess = None
        partly = is_cancelled_without_output(report) and (progress.works or bool(progress.seen))
        unknown = partly or not is_complete(report)
        if unknown and (outcome != "upstream_error" or progress.seen):
            if report.status is not None:  # it worked until it ended
                progress.until = self._now
            guess = estimate(
                report,
                progress.seen,
                written=math.ceil(progress.worked_seconds * speed),
                read=self.unfinished.input_estimate,
                maximum=maximum,
                images=False,
                partly=partly,
            )
        return account_for(row, report, outcome, guess)

    def bill(self, parts: list[UsagePart], billing: Billing) -> None:
        """Fill in the row's cost and month, and replace the hold by the cost."""
        bill(self.row, parts, billing, self.hold, self.unfinished.image_model)

    @property
    def maximum(self) -> MaximumUsage | None:
        """The most that it was held to use; None where an earlier version did not keep it."""
        known = self.unfinished.most
        return msgspec.json.decode(known, type=MaximumUsage) if known else None

    @property
    def correction_facts(self) -> CorrectionFacts:
        """The facts that a later correction needs."""
        unfinished = self.unfinished
        return CorrectionFacts(unfinished.admitted_at, unfinished.image_model, unfinished.held)

    @property
    def seconds_left(self) -> float:
        """The seconds until the response is given up, if it does not end."""
        return MAX_AGE_SECONDS - self._age / 1000
