"""The report of an answer: its usage, id, model and tier, and the objects that it made."""

from __future__ import annotations

from typing import Any

import msgspec

from redbtc.meter.answer_nodes import ITEM_NODE
from redbtc.meter.answers import (
    ITEM_DECODER,
    MAX_NAMED,
    MAX_OUTPUT_ITEMS,
    UNFINISHED,
    Answer,
    OutputItem,
    decode_leniently,
    items_in,
    name_in,
)
from redbtc.meter.error_codes import error_code_of
from redbtc.meter.paid_items import PAID_TYPES, PaidItems
from redbtc.meter.passed_output import PassedOutput
from redbtc.meter.usage_fields import (
    added,
    has_choices,
    read_usage,
    usage_elsewhere,
    usage_in_choices,
    with_earlier,
    with_svg,
    with_tools,
)
from redbtc.steps import Steps
from redbtc.usage import Usage, UsagePart

# Items that contain nothing but text of the model.
TEXT_ITEMS = ("message", "reasoning", "function_call", "custom_tool_call")


class Report:
    """Collects what an answer has reported so far."""

    def __init__(self, images: bool) -> None:
        self._images = images
        self.response_id: str | None = None
        self.model: str | None = None
        self.service_tier: str | None = None
        self.status: str | None = None  # of the Response object
        self.duration: Any = None  # of a recording, in seconds
        self.usage: Usage | None = None
        self.parts: list[UsagePart] = []  # of the usage, by model
        # The ids of objects that the upstream made, in order, and whether they belong to the
        # account even if the upstream does not store the response.
        self.made: dict[str, bool] = {}
        self.text_items: set[str] = set()  # of these, the items that contain only text
        self.listed: dict[str, bool] = {}  # ids of listed input; whether the upstream made them
        self.failed = False  # the answer reports a failure
        self.error_code: str | None = None  # of the failure
        self.in_events = False  # the Response object came within an event
        self.passed = PassedOutput()
        self._reported_at = 0  # bytes of deltas that had passed at the last report of usage
        # The last usage had no output and came before the end of the answer. Some upstreams report
        # 0 with each event until they know the number.
        self.is_provisional = False
        # The last usage of a streamed chat came with choices, so it may cover only those choices.
        self.is_of_choices = False
        self.is_of_one_choice = False  # the last usage was a member of a choice
        self._paid = PaidItems()
        self.containers = self._paid.containers  # the ids of containers in which code ran

    @property
    def is_outdated(self) -> bool:
        """Return whether text has passed since the usage was reported."""
        return self.usage is not None and self.passed.deltas > self._reported_at

    @property
    def has_output(self) -> bool:
        """Return whether output tokens were reported. Usage without any can be that of the answer's
        beginning."""
        return self.usage is not None and bool(self.usage.output_tokens)

    @property
    def is_of_beginning(self) -> bool:
        """Return whether the usage was reported before any output passed: without output tokens, or
        with the few that Anthropic's message_start reports, in an answer that goes on."""
        if self.usage is None or self._reported_at:
            return False
        return not self.has_output or self.is_of_choices or self.status in UNFINISHED

    @property
    def text_bytes(self) -> int:
        """Bytes of text, tool calls and their arguments that have passed."""
        return self.passed.sizes().text_bytes

    @property
    def sealed_bytes(self) -> int:
        """Bytes of encrypted reasoning that have passed, in base64."""
        return self.passed.sizes().sealed_bytes

    @property
    def image_tokens(self) -> int:
        """Output tokens of the pictures that have passed."""
        return self.passed.sizes().image_tokens

    @property
    def web_searches(self) -> int:
        """The number of paid web searches in the output; the usage may report another number."""
        return self._paid.web_searches

    @property
    def file_searches(self) -> int:
        """The number of file searches in the output."""
        return len(self._paid.file_searches)

    @property
    def authors(self) -> list[UsagePart]:
        """The usage of the authors of SVGs, which the image tool's items report."""
        parts: list[UsagePart] = []
        self._paid.add_authors(None, parts)
        return parts

    def note(self, answer: Answer, cut_off: bool = False) -> Steps[None]:
        """Take in the JSON of an answer or an event, in small steps: later values replace earlier
        ones. If it was cut off, its status is not believed, since that could have changed."""
        inner = answer.inner if answer.response else None
        response = inner or answer
        self.in_events = self.in_events or inner is not None
        self.response_id = name_in(response.id) or self.response_id
        self.model = name_in(response.model) or self.model
        self.service_tier = name_in(response.service_tier) or self.service_tier
        yield from self._note_objects(answer, response)
        self._note_usage(answer, response, cut_off)
        if self._images or not self.has_output:
            yield from self.passed.see(answer, response, self._images)
        if not cut_off:
            self.status = name_in(response.status) or self.status
            if (
                response.error
                or answer.error
                or response.status == "failed"
                or answer.type in ("error", "response.failed")
            ):
                self.failed = True
                self.error_code = error_code_of(answer) or self.error_code

    def _note_usage(self, answer: Answer, response: Answer, cut_off: bool) -> None:
        reported, of_choice = response.usage, None
        if not isinstance(reported, dict) and (response.x_groq or answer.usage or response.choices):
            reported = usage_elsewhere(answer, response)
            if not isinstance(reported, dict):
                reported = of_choice = usage_in_choices(response.choices)
        self.duration = response.duration
        if isinstance(reported, dict) and reported.get("seconds") is not None:
            self.duration = reported["seconds"]
        used = read_usage(reported, self._images)
        written = used.output_tokens if used else None
        if used and self.parts and not self._images:
            used = with_earlier(used, self.parts[0].usage)
        parts = [UsagePart(None, used, self._images)] if used else []
        if self._images:
            used = with_svg(used, parts, response.svg_usage)
        elif used:
            if self._paid.searches or self._paid.file_searches:
                used = self._paid.add_calls(used, parts)
            used = with_tools(used, parts, response.tool_usage)
            if self._paid.svgs:
                used = self._paid.add_authors(used, parts)
        if used and self.usage and self._images:
            used, parts = self._with_earlier_pictures(answer, used, parts)
        if used:
            if written or not used.output_tokens:  # else its output was reported earlier
                self._reported_at = self.passed.deltas
                self.is_of_one_choice = of_choice is not None
            self.usage, self.parts = used, parts
            self.is_provisional = not (cut_off or used.output_tokens) and (
                response.status in UNFINISHED or has_choices(response)
            )

    def _with_earlier_pictures(
        self, answer: Answer, used: Usage, parts: list[UsagePart]
    ) -> tuple[Usage, list[UsagePart]]:
        """Return the usage with that of earlier pictures added: in a stream of pictures, each
        `completed` event reports the usage of its own picture."""
        if self.usage is None or not str(answer.type).endswith("completed"):
            return used, parts
        sums = {(part.model, part.images): part for part in self.parts}
        for part in parts:  # the model of a picture is not named, nor always an SVG's author
            if earlier := sums.get((part.model, part.images)):
                part = part._replace(usage=added(earlier.usage, part.usage))
            sums[part.model, part.images] = part
        return added(self.usage, used), list(sums.values())

    def _note_objects(self, answer: Answer, response: Answer) -> Steps[None]:
        if self._images or answer.type == "error":  # an error makes no objects
            return
        ids: list[tuple[Any, bool]] = [(response.id, False)]
        items: list[OutputItem] = []
        if isinstance(response.conversation, dict):
            ids.append((response.conversation.get("id"), False))
        if answer.item and (item := decode_leniently(answer.item, ITEM_DECODER, ITEM_NODE)):
            items.append(item)
        if response.output:
            items += yield from items_in(response.output)
        if response.data:
            yield from self._note_listed(response.data)
        for item in items:
            ids.append((item.id, item.type != "message" and item.is_made_by_tool))
            has_room = len(self.text_items) < MAX_OUTPUT_ITEMS
            if item.type in TEXT_ITEMS and name_in(item.id) and has_room:
                self.text_items.add(item.id)
            ids += [(each, True) for each in item.container_objects()]
            if item.type in PAID_TYPES or item.svg_usage is not None:
                self._paid.note(item)
            if len(ids) >= MAX_NAMED:
                self._remember(ids)
                ids.clear()
                yield
        self._remember(ids)

    def _note_listed(self, data: msgspec.Raw) -> Steps[None]:
        """Note the ids of the input items that an answer lists."""
        items = yield from items_in(data)
        listed = [item for item in items if name_in(item.id)][:MAX_OUTPUT_ITEMS]
        self.listed = {item.id: item.id != item.call_id for item in listed}

    def _remember(self, ids: list[tuple[Any, bool]]) -> None:
        """Remember the ids of objects that the answer made, at most MAX_OUTPUT_ITEMS."""
        for each, always in ids:
            if name_in(each) and (len(self.made) < MAX_OUTPUT_ITEMS or each in self.made):
                self.made[each] = always
