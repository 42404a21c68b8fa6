"""Fill in the row of a request that has ended: usage, cost, containers, owners of objects."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from redbtc.billing.billing import Billing
from redbtc.billing.spending import Hold
from redbtc.locations import ObjectLocation
from redbtc.meter.answers import IMAGE_TOOL
from redbtc.meter.estimates import Estimate, MaximumUsage
from redbtc.meter.meters import Meter
from redbtc.meter.report import Report
from redbtc.store.containers import Containers
from redbtc.usage import Outcome, RequestRow, Usage, UsagePart


def locations_of(
    ids: Iterable[str],
    report: Report,
    location: ObjectLocation,
    usage: Usage | None,
    likely: Usage | None = None,
) -> dict[str, ObjectLocation]:
    """Return the location of each object that a response made, with the maximum number of tokens
    that a request which builds on it reads: the response's input and output, or only its output for
    an item that contains nothing else. `usage` is None if it is not known yet. If it is only the
    maximum that can have been used, `likely` is the estimate."""
    if usage is None:
        return dict.fromkeys(ids, location)
    whole = location.with_tokens(all_of(usage), all_of(likely) if likely else None)
    words = location.with_tokens(usage.output_tokens or 0, likely.output_tokens if likely else None)
    return {each: words if each in report.text_items else whole for each in ids}


def all_of(usage: Usage) -> int:
    """Return the tokens of an answer and of all that it was made from."""
    pictures = usage.image_output_tokens or 0
    return (usage.input_tokens or 0) + (usage.output_tokens or 0) + pictures


def inheritable_usage(row: RequestRow, maximum: MaximumUsage) -> Usage:
    """Return the usage of a request that has ended, as requests that build on it inherit it. Where
    the row can say too little, since it is an estimate, or since a failed answer reported no input,
    this is the maximum: what those requests read must be held."""
    if row.usage_source != "estimated":
        into = row.usage.input_tokens or maximum.input_tokens
        return msgspec.structs.replace(row.usage, input_tokens=into)
    drawn = maximum.drawn_tokens * maximum.pictures
    return Usage(
        maximum.input_tokens, output_tokens=maximum.output_tokens, image_output_tokens=drawn
    )


def account_for(
    row: RequestRow, report: Report, outcome: Outcome, guess: Estimate | None = None
) -> list[UsagePart]:
    """Fill in how the request ended and what it used: what the upstream says, else the estimate.
    Return the parts to bill."""
    row.outcome = outcome
    if guess:
        row.usage, row.usage_source = guess.usage, guess.source
        return guess.parts
    if report.usage:
        row.usage, row.usage_source = report.usage, "upstream"
    return report.parts


async def count_containers(
    containers: Containers, row: RequestRow, report: Report, parts: list[UsagePart]
) -> list[UsagePart]:
    """Count the containers in an answer that nobody was billed for, which no usage reports. An
    estimate bounds their number. Return the parts to bill. The row must be settled before anything
    else is waited for, so that parallel requests are not billed for the same container."""
    if row.usage_source == "none":
        return parts
    new = await containers.unbilled(report.containers)
    if row.usage_source == "estimated":
        new = new[: row.usage.containers or 0]
    containers.mark_billed(new)
    return add_usage(row, parts, containers=len(new) or None)


def add_usage(row: RequestRow, parts: list[UsagePart], **added: int | None) -> list[UsagePart]:
    """Add what the answer does not report to a row's usage, if that is known. Return the parts to
    bill."""
    if row.usage_source == "none":
        return parts
    row.usage = msgspec.structs.replace(row.usage, **added)
    first = parts[0]._replace(usage=msgspec.structs.replace(parts[0].usage, **added))
    return [first, *parts[1:]]


def add_audio(row: RequestRow, parts: list[UsagePart], *, spoken: bool) -> list[UsagePart]:
    """Say which tokens are audio if the answer does not: all output of speech (`spoken`), and all
    input of a request that sends a recording. Return the parts to bill."""
    usage = row.usage
    if spoken and not usage.audio_output_tokens:
        return add_usage(row, parts, audio_output_tokens=usage.output_tokens)
    if not spoken and not usage.audio_input_tokens:
        return add_usage(row, parts, audio_input_tokens=usage.input_tokens)
    return parts


def fill_in_cost(row: RequestRow, parts: list[UsagePart], hold: Hold, image_model: str) -> None:
    """Fill in the row's cost, by the prices of the request's admission and the tier that the
    response reports. Leave it unknown where no usage is known."""
    if row.usage_source != "none":
        row.price_id, row.cost = hold.cost(of_models(parts, image_model), row.service_tier)


def bill(
    row: RequestRow, parts: list[UsagePart], billing: Billing, hold: Hold, image_model: str
) -> None:
    """Fill in the row's cost and month, and replace the hold by the cost."""
    fill_in_cost(row, parts, hold, image_model)
    row.month = billing.replace_hold(hold, row.cost or 0)


def is_partly_known(meter: Meter, answers: int, *, images: bool) -> bool:
    """Return whether the usage that an answer reported is not all that was used. `answers` is how
    many were asked for."""
    report, has_ended = meter.report, meter.state == "ended"
    if images:
        return report.usage is not None and not has_ended
    outdated, begun = report.is_outdated, report.is_of_beginning
    if has_ended and not report.failed:
        partly = outdated and begun
    else:
        partly = outdated or begun or report.is_provisional
        partly = partly or (report.is_of_choices and answers > 1)
    return partly or (report.is_of_one_choice and answers > 1)


def of_models(parts: list[UsagePart], image_model: str) -> list[UsagePart]:
    """Return the parts with the name of the image tool's model, which no answer tells."""
    return [
        part._replace(model=image_model) if part.model == IMAGE_TOOL else part for part in parts
    ]
