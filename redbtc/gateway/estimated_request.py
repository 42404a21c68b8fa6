"""A request whose answer may not report its usage, which is then counted or estimated."""

from __future__ import annotations

import math
import re
import time

import msgspec

from redbtc.gateway.admitted_request import AdmittedRequest
from redbtc.gateway.maximum import tokens_of_length
from redbtc.gateway.settlement import is_partly_known
from redbtc.meter.estimates import (
    BYTES_A_TOKEN,
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
# The end of a subtitle, in SRT or WebVTT.
CUE = re.compile(rb"-->[ \t]*(?:(\d+):)?([0-5]\d):([0-5]\d)[.,](\d{3})")


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
        """Return the usage that the answer did not report, or that its price has no rates for; None
        where what it reported is all, or nothing was used."""
        counts, audio = self.endpoint.counts, self.endpoint.audio
        if not (counts or audio) and self._is_reported():
            return None
        if not self._was_used(outcome):
            return None
        if counts:
            return self._count(outcome)
        return await (self._of_recording() if audio else self._guess(self.input_estimate))

    def _is_reported(self) -> bool:
        """Return whether the answer has reported all of its usage."""
        is_whole = is_complete(self.meter.report, writes=self.endpoint.writes)
        return is_whole and not self._is_partly()

    def _is_partly(self) -> bool:
        """Return whether the usage that the answer has reported is not all that was used."""
        return is_partly_known(self.meter, self.maximum.answers, images=self.endpoint.images)

    async def _guess(self, read: int, partly: bool = False) -> Estimate:
        """Return the usage with estimates in place of what is missing. `read` is about how many
        input tokens there were."""
        report = self.meter.report
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
            images=self.endpoint.images,
            partly=partly or self._is_partly(),
        )

    def _count(self, outcome: Outcome) -> Estimate | None:
        """Return what the endpoint counts of the request, None if the usage that was reported is
        billed. A failed search counts nothing. If the client left before the upstream had answered,
        nobody knows what was done: an estimate."""
        report, prices = self.meter.report, self.hold.model_prices
        if self.endpoint.counts == "characters":
            has_rate = prices is None or prices.has("output", "audio_output")
            if has_rate and report.has_output and not self._is_partly():
                return None
            source: UsageSource = "counted" if outcome == "completed" else "estimated"
            return whole(Usage(characters=self.body.characters), source)
        if report.usage is not None or outcome in FAILED:
            return None
        return whole(Usage(web_searches=1), "counted" if self.status else "estimated")

    async def _of_recording(self) -> Estimate | None:
        """Return the length of a recording if its price is by the minute, or if no tokens were
        reported; where the length is not known either, an estimate."""
        report, prices = self.meter.report, self.hold.model_prices
        usage = report.usage or Usage()
        heard = usage.audio_input_tokens or usage.input_tokens or 0
        has_tokens = self._is_reported() and (heard or usage.output_tokens)
        by_minute = prices is not None and prices.has("audio_minute")
        bills_tokens = prices is None or prices.has("input", "audio_input")
        if usage.audio_ms is not None or (has_tokens and (bills_tokens or not by_minute)):
            return None
        reported = usage if has_tokens else Usage()
        if (length_ms := milliseconds_in(report.duration)) is not None:
            return whole(msgspec.structs.replace(reported, audio_ms=length_ms), "upstream")
        length_ms = min(self._likely_length_ms(), self.max_usage().audio_ms)
        if has_tokens and heard:
            length_ms = heard * MINUTE_MS // AUDIO_TOKENS_A_MINUTE
        if by_minute:
            return whole(msgspec.structs.replace(reported, audio_ms=length_ms), "estimated")
        read = tokens_of_length(length_ms)
        if isinstance(self.meter, PlainMeter):
            written = min(text_tokens(self.meter.size), self.max_usage().output_tokens)
            return whole(Usage(read, output_tokens=written), "estimated")
        return await self._guess(read, partly=True)

    def _likely_length_ms(self) -> int:
        """Return about how long the recording is that was sent: until the last of the subtitles, or
        as long as it takes to speak the text that was seen; if none was, by its size."""
        meter, size = self.meter, self.body.size
        if isinstance(meter, PlainMeter) and (found := CUE.findall(meter.tail)):
            times = [[int(each or 0) for each in cue] for cue in found]
            return max(((h * 60 + m) * 60 + s) * 1000 + rest for h, m, s, rest in times)
        written = (meter.report.usage and meter.report.usage.output_tokens) or 0
        text = max(meter.report.text_bytes, written * BYTES_A_TOKEN) or meter.size
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
