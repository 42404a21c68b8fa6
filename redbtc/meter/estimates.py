"""Estimates of the usage that the upstream did not report.

The output is the larger of two numbers: what was seen of it, and what the model writes in the time
that it worked. The input is estimated from the size of the body. Neither is more than the maximum
for which the request was held. This file does no I/O and reads no clock.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec
from msgspec import Struct

from redbtc.meter.answers import IMAGE_TOOL, UNFINISHED
from redbtc.meter.report import Report
from redbtc.meter.usage_fields import plus
from redbtc.usage import Usage, UsagePart, UsageSource

BYTES_A_TOKEN = 4  # of English text, OpenAI's rule of thumb


def text_tokens(size: int) -> int:
    """Return about how many tokens a text of `size` bytes has."""
    return -(-size // BYTES_A_TOKEN)


class MaximumUsage(Struct, frozen=True):
    """The maximum usage for which a request was held; an estimate is never more. `drawn_tokens` is
    the output of the image tool's model in one call, `pictures` the number of such calls among all
    `tool_calls`."""

    input_tokens: int
    output_tokens: int
    drawn_tokens: int
    tool_calls: int
    pictures: int
    audio_ms: int = 0

    @property
    def all_tokens(self) -> int:
        """The maximum number of tokens that a request which builds on this one reads."""
        return self.input_tokens + self.output_tokens + self.drawn_tokens * self.pictures


class SeenOutput(Struct, frozen=True):
    """The output that was seen of an answer; Report explains each field. `containers` is a
    number."""

    text_bytes: int = 0
    sealed_bytes: int = 0
    image_tokens: int = 0
    web_searches: int = 0
    file_searches: int = 0
    containers: int = 0

    @classmethod
    def of(cls, report: Report) -> SeenOutput:
        """Return the output that a meter has seen so far."""
        return cls(
            report.text_bytes,
            report.sealed_bytes,
            report.image_tokens,
            report.web_searches,
            report.file_searches,
            len(report.containers),
        )

    def or_more(self, other: SeenOutput) -> SeenOutput:
        """Return the larger of both, field by field, since two readers may have seen the same
        output."""
        pairs = zip(msgspec.structs.astuple(self), msgspec.structs.astuple(other), strict=True)
        return SeenOutput(*map(max, pairs))

    def __bool__(self) -> bool:
        return any(msgspec.structs.astuple(self))

    @property
    def output_tokens(self) -> int:
        """The tokens of text and of encrypted reasoning (base64: 4 characters for 3 bytes)."""
        return text_tokens(self.text_bytes) + text_tokens(self.sealed_bytes * 3 // 4)


class Estimate(NamedTuple):
    """The usage for the ledger's row, its parts by model for the cost, and its source."""

    usage: Usage
    parts: list[UsagePart]
    source: UsageSource = "estimated"


def known_usage(report: Report) -> Usage | None:
    """Return the reported usage of the model that was asked for, or None."""
    for part in report.parts:
        if part.model is None:
            return part.usage
    return None


def is_complete(report: Report, *, writes: bool = True) -> bool:
    """Return whether the answer has reported all of its usage: its input and its output, if a model
    `writes` it, or the length of the audio."""
    known = known_usage(report)
    if known is None:
        return False
    reported = known.input_tokens, known.output_tokens if writes else 0
    return None not in reported or known.audio_ms is not None


def is_final(report: Report) -> bool:
    """Return whether the answer reports that the response has ended, and its whole usage."""
    return report.status not in (None, *UNFINISHED) and is_complete(report)


def is_cancelled_without_output(report: Report) -> bool:
    """Return whether a cancelled response reports no output tokens. That can be the usage of its
    beginning: the upstream may not have counted what the model wrote before it was cancelled."""
    return report.status == "cancelled" and report.is_of_beginning


def estimate(
    report: Report,
    seen: SeenOutput,
    written: int,
    read: int,
    maximum: MaximumUsage,
    *,
    images: bool,
    partly: bool,
) -> Estimate:
    """Return the usage of a request, with estimates in place of what the answer did not report.

    `written` is the number of output tokens for the time that the model worked, `read` the number
    of input tokens in the body. `images`: the request was to an image endpoint. `partly`: the
    reported output is only a part, and a reported input of 0 means that it was not known yet.
    """
    known = known_usage(report) or Usage()
    into, out = known.input_tokens, known.output_tokens
    if into is None or (partly and into == 0):
        into = min(read, maximum.input_tokens)
    if out is None or partly:
        shown = seen.image_tokens if images else seen.output_tokens
        out = max(out or 0, min(max(shown, written), maximum.output_tokens))
    drawn, left = 0, maximum.tool_calls
    if maximum.drawn_tokens and not images:
        drawn = min(seen.image_tokens, maximum.drawn_tokens * maximum.pictures)
        left -= -(-drawn // maximum.drawn_tokens)
    used = with_calls(known, seen, left)
    used = msgspec.structs.replace(used, input_tokens=into, output_tokens=out)
    if images:  # the estimated part of the output is image tokens
        of_pictures = (known.image_output_tokens or 0) + out - (known.output_tokens or 0)
        used = msgspec.structs.replace(used, image_output_tokens=of_pictures)
    parts = [UsagePart(None, used, images)]
    parts += [part for part in report.parts if part.usage is not known] or report.authors
    if drawn and all(part.model != IMAGE_TOOL for part in parts):
        by_tool = Usage(output_tokens=drawn, image_output_tokens=drawn)
        parts.append(UsagePart(IMAGE_TOOL, by_tool, True))
    return Estimate(joined_usage(parts, report.usage), parts)


def with_calls(known: Usage, seen: SeenOutput, left: int) -> Usage:
    """Return the usage with the tool calls that were seen but not reported, at most `left`."""
    counts: dict[str, int] = {}
    for name in ("web_searches", "file_searches", "containers"):
        calls = min(getattr(seen, name), left)
        if getattr(known, name) is None and calls:
            counts[name] = calls
            left -= calls
    return msgspec.structs.replace(known, **counts)


def joined_usage(parts: list[UsagePart], reported: Usage | None) -> Usage:
    """Return the usage for the row: an image tool's tokens are in separate fields, those of an
    SVG's author are added to the model's own."""
    used = parts[0].usage
    for part in parts[1:]:
        if part.model == IMAGE_TOOL:
            used = msgspec.structs.replace(
                used,
                image_input_tokens=part.usage.image_input_tokens,
                image_output_tokens=part.usage.image_output_tokens,
                tool_input_tokens=reported.tool_input_tokens if reported else None,
            )
        else:
            used = msgspec.structs.replace(
                used,
                input_tokens=plus(used.input_tokens, part.usage.input_tokens),
                output_tokens=plus(used.output_tokens, part.usage.output_tokens),
            )
    return used


class Progress(Struct):
    """The progress of a background response while it runs: the output that was seen of it, and from
    when until when its model is known to have worked (the ledger's time, in milliseconds). While
    the response is queued, `since` moves along and the model has not worked."""

    seen: SeenOutput
    since: int
    until: int
    works: bool = False

    def note(self, status: str | None, now: int) -> None:
        """Note that the response was looked up at `now` and has not ended. If its status could not
        be read (None), its model is taken to work."""
        self.until = now
        self.works = self.works or status != "queued" or bool(self.seen)
        if not self.works:
            self.since = now

    @property
    def worked_seconds(self) -> float:
        """The number of seconds for which its model is known to have worked."""
        return max(0, self.until - self.since) / 1000 if self.works else 0.0
