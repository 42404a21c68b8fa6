"""A request whose answer may not report its usage, which is then counted or estimated."""

from __future__ import annotations

import math
import re
import time

from redbtc.gateway.admitted_request import AdmittedRequest
from redbtc.gateway.settlement import is_partly_known
from redbtc.meter.estimates import (
    Estimate,
    MaximumUsage,
    SeenOutput,
    estimate,
    is_complete,
    text_tokens,
)
from redbtc.meter.meters import PlainMeter
from redbtc.meter.usage_fields import milliseconds_in
from redbtc.rates import AUDIO_TOKENS_A_MINUTE, MINUTE_MS
from redbtc.usage import FAILED, Outcome, Usage, UsagePart, UsageSource

TEXT_BYTES_A_SECOND = 15  # of speech, in most languages
AUDIO_BYTES_A_SECOND = 16_000  # of a usual recording: 128 kbit/s
MAX_AUDIO_BYTES_A_SECOND = 176_400  # 44.1 kHz, two channels, not compressed
TIMESTAMP = re.compile(rb"(?:(\d+):)?([0-5]\d):([0-5]\d)[.,](\d{3})")  # of subtitles


class EstimatedRequest(AdmittedRequest):
    """A request whose usage is counted or estimated where the answer does not report it."""

    repeats = False  # whether the upstream answered with what another request has made

    @property
    def asks_for_events(self) -> bool:
        return self.facts.asks_for_events

    def max_usage(self) -> MaximumUsage:
        """Return the most that the request can use."""
        return self.maximum.usage(self.hold, self.further_input)

    async def estimate(self, outcome: Outcome) -> Estimate | None:
        """Return the usage that the answer did not report, None where it is known or nothing was
        used."""
        report, endpoint = self.meter.report, self.endpoint
        partly = is_partly_known(self.meter, self.maximum.answers, images=endpoint.images)
        is_known = is_complete(report, writes=endpoint.writes) and not partly
        if endpoint.counts and self._was_used(outcome):
            # Speech of which no output is reported is billed by its characters.
            is_counted = endpoint.counts == "characters" and not report.has_output
            return self._count(outcome) if is_counted or report.usage is None else None
        if is_known or not self._was_used(outcome):
            return None
        read = self.input_estimate
        if endpoint.audio and report.usage is None:
            if (length_ms := milliseconds_in(report.duration)) is not None:
                return whole(Usage(audio_ms=length_ms), "upstream")
            length_ms = min(self._likely_length_ms(), self.max_usage().audio_ms)
            if self.hold.model_prices and self.hold.model_prices.bills_minutes:
                return whole(Usage(audio_ms=length_ms), "estimated")
            read = math.ceil(length_ms * AUDIO_TOKENS_A_MINUTE / MINUTE_MS)
            if isinstance(self.meter, PlainMeter):
                into = min(read, self.max_usage().input_tokens)
                out = min(text_tokens(self.meter.size), self.max_usage().output_tokens)
                return whole(Usage(into, output_tokens=out), "estimated")
        worked = max(0.0, time.monotonic() - self.left_at)  # before the speed is read
        speed = await self.gateway.speeds.of(
            self.row.model or self.row.requested_model,
            self.row.account_id,
            limited=self.hold.held > 0,
        )
        return estimate(
            report,
            SeenOutput.of(report),
            written=math.ceil(worked * speed * self.maximum.answers),
            read=read,
            maximum=self.max_usage(),
            images=endpoint.images,
            partly=partly,
        )

    def _count(self, outcome: Outcome) -> Estimate | None:
        """Return what the endpoint counts of the request. A failed search counts nothing. If the
        client left before the upstream had answered, nobody knows what was done: an estimate."""
        if self.endpoint.counts == "characters":
            source: UsageSource = "counted" if outcome == "completed" else "estimated"
            return whole(Usage(characters=self.body.characters), source)
        if outcome in FAILED:
            return None
        return whole(Usage(web_searches=1), "counted" if self.status else "estimated")

    def _likely_length_ms(self) -> int:
        """Return about how long the recording is that was sent: until the last of the subtitles, or
        as long as it takes to speak the text that was seen; if none was, by its size."""
        meter, size = self.meter, self.body.size
        if isinstance(meter, PlainMeter) and (found := TIMESTAMP.findall(meter.tail)):
            hours, minutes, seconds, rest = (int(each or 0) for each in found[-1])
            return ((hours * 60 + minutes) * 60 + seconds) * 1000 + rest
        text = meter.report.text_bytes or meter.size
        if not text:
            return size * 1000 // AUDIO_BYTES_A_SECOND
        shortest = size * 1000 // MAX_AUDIO_BYTES_A_SECOND
        return max(shortest, text * 1000 // TEXT_BYTES_A_SECOND)

    def _was_used(self, outcome: Outcome) -> bool:
        """Return whether a model has worked for the request, as far as can be told: bytes of an
        answer passed, or the client left while the upstream was asked. An error before any output
        is no use, nor is an answer that another request has made."""
        if self.endpoint.free or self.repeats:
            return False
        if outcome == "upstream_error" or (self.status or 0) >= 400:
            return bool(SeenOutput.of(self.meter.report))
        if outcome == "completed" and self.is_unmetered and not self.hold.model_prices:
            return self.settings.metering.include_usage == "add"
        return self.first_byte_ms is not None or outcome in ("client_disconnected", "interrupted")


def whole(usage: Usage, source: UsageSource) -> Estimate:
    """Return usage of the requested model alone."""
    return Estimate(usage, [UsagePart(None, usage, False)], source)
