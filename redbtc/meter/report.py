"""What an answer has reported: its usage, its name, its model, its tier and the objects it made."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import msgspec

from redbtc.meter.answers import (
    ITEM,
    ITEM_NODE,
    MAX_ITEMS,
    MAX_NAMED,
    UNFINISHED,
    Answer,
    OutputItem,
    items_in,
    name_in,
    read,
)
from redbtc.meter.passed import Passed
from redbtc.meter.usage_fields import (
    added,
    has_choices,
    read_usage,
    usage_elsewhere,
    usage_in_choices,
    with_former,
    with_svg,
    with_tools,
)
from redbtc.usage import Usage, UsagePart

# Items that cost more than their tokens, or run in containers that do.
COUNTED = (
    *("web_search_call", "file_search_call", "code_interpreter_call", "shell_call"),
    *("local_shell_call", "shell_call_output"),
)
# Items that hold nothing but what the model has written.
WORDS_ALONE = ("message", "reasoning", "function_call", "custom_tool_call")


class Report:
    """What an answer has said so far."""

    def __init__(self, images: bool) -> None:
        self._images = images
        self.response_id: str | None = None
        self.model: str | None = None
        self.service_tier: str | None = None
        self.status: str | None = None  # of the Response object
        self.usage: Usage | None = None
        self.parts: list[UsagePart] = []  # of the usage, by model
        # Ids of objects that the upstream made, in order, and whether to learn them if it does not
        # store the response.
        self.made: dict[str, bool] = {}
        self.words: set[str] = set()  # of these, items that hold nothing but output
        self.listed: dict[str, bool] = {}  # ids of listed input, and whether the upstream made them
        self.failed = False  # it says itself that it failed
        self.in_events = False  # the Response object came within an event
        self.passed = Passed()
        self._reported_at = 0  # bytes of deltas that had passed when the usage was reported last
        # The last usage had no output and came before the end of the answer. Some upstreams report
        # 0 with each event until they know the true number.
        self.is_provisional = False
        # The last usage of a streamed chat came with choices, so it may cover only those choices.
        self.is_of_choices = False
        self.is_of_one_choice = False  # the last usage was a member of a choice
        self._searches: dict[Any, bool] = {}  # by id: web searches, and whether they cost
        self._file_searches: set[Any] = set()  # ids
        self._svgs: dict[Any, Any] = {}  # by item id: usage of the author of an SVG
        # No usage reports these; they are counted by the items of the output.
        self.containers: dict[str, None] = {}  # ids of those in which code ran

    @property
    def is_outdated(self) -> bool:
        """Whether more text has passed since the usage was reported."""
        return self.usage is not None and self.passed.deltas > self._reported_at

    @property
    def has_output(self) -> bool:
        """Whether output was reported. Usage without any can be that of the answer's beginning."""
        return self.usage is not None and bool(self.usage.output_tokens)

    @property
    def is_of_beginning(self) -> bool:
        """Whether usage was reported before any output passed: without output, or with the little
        that Anthropic's message_start has, in an answer that goes on."""
        if self.usage is None or self._reported_at:
            return False
        return not self.has_output or self.is_of_choices or self.status in UNFINISHED

    @property
    def text_bytes(self) -> int:
        """Bytes of text, tool calls and their arguments that have passed."""
        return self.passed.made().text_bytes

    @property
    def sealed_bytes(self) -> int:
        """Bytes of encrypted reasoning that have passed, as it is written."""
        return self.passed.made().sealed_bytes

    @property
    def image_tokens(self) -> int:
        """Output tokens of the pictures that have passed."""
        return self.passed.made().image_tokens

    @property
    def web_searches(self) -> int:
        """Calls in the output; the usage may report its own number."""
        return sum(self._searches.values())

    @property
    def file_searches(self) -> int:
        """Calls in the output."""
        return len(self._file_searches)

    @property
    def authors(self) -> list[UsagePart]:
        """The usage of the authors of SVGs, which the image tool's items report."""
        parts: list[UsagePart] = []
        for svg in self._svgs.values():
            with_svg(None, parts, svg)
        return parts

    def note(self, answer: Answer, torn: bool = False) -> Generator[None, None, None]:
        """Take in the JSON of an answer or an event, in small steps: later values replace earlier
        ones. The status of one that was cut off (`torn`) is not believed, since it could have
        changed."""
        inner = answer.inner if answer.response else None
        said = inner or answer
        self.in_events = self.in_events or inner is not None
        self.response_id = name_in(said.id) or self.response_id
        self.model = name_in(said.model) or self.model
        self.service_tier = name_in(said.service_tier) or self.service_tier
        yield from self._name(answer, said)
        self._use(answer, said, torn)
        if self._images or not self.has_output:
            yield from self.passed.see(answer, said, self._images)
        if not torn:
            self.status = name_in(said.status) or self.status
            self.failed = self.failed or bool(
                said.error
                or answer.error
                or said.status == "failed"
                or answer.type in ("error", "response.failed")
            )

    def _use(self, answer: Answer, said: Answer, torn: bool) -> None:
        reported, of_choice = said.usage, None
        if not isinstance(reported, dict) and (said.x_groq or answer.usage or said.choices):
            reported = usage_elsewhere(answer, said)
            if not isinstance(reported, dict):
                reported = of_choice = usage_in_choices(said.choices)
        used = read_usage(reported, self._images)
        written = used.output_tokens if used else None
        if used and self.parts and not self._images:
            used = with_former(used, self.parts[0].usage)
        parts = [UsagePart(None, used, self._images)] if used else []
        if self._images:
            used = with_svg(used, parts, said.svg_usage)
        elif used:
            if self._searches or self._file_searches:
                used = self._with_calls(used, parts)
            used = with_tools(used, parts, said.tool_usage)
            for svg in self._svgs.values():
                used = with_svg(used, parts, svg)
        if used and self.usage and self._images:
            used, parts = self._with_earlier(answer, used, parts)
        if used:
            if written or not used.output_tokens:  # else its output was reported before
                self._reported_at = self.passed.deltas
                self.is_of_one_choice = of_choice is not None
            self.usage, self.parts = used, parts
            self.is_provisional = not (torn or used.output_tokens) and (
                said.status in UNFINISHED or has_choices(said)
            )

    def _with_calls(self, used: Usage, parts: list[UsagePart]) -> Usage:
        """A response's usage with the calls in its output that no usage reports."""
        used = msgspec.structs.replace(
            used,
            web_searches=self.web_searches or None,
            file_searches=self.file_searches or None,
        )
        parts[0] = parts[0]._replace(usage=used)
        return used

    def _with_earlier(
        self, answer: Answer, used: Usage, parts: list[UsagePart]
    ) -> tuple[Usage, list[UsagePart]]:
        """In a stream of pictures each `completed` event reports the usage of its own picture."""
        if self.usage is None or not str(answer.type).endswith("completed"):
            return used, parts
        sums = {(part.model, part.images): part for part in self.parts}
        for part in parts:  # the model of a picture has no name, and an SVG's author may have none
            if earlier := sums.get((part.model, part.images)):
                part = part._replace(usage=added(earlier.usage, part.usage))
            sums[part.model, part.images] = part
        return added(self.usage, used), list(sums.values())

    def _name(self, answer: Answer, said: Answer) -> Generator[None, None, None]:
        if self._images or answer.type == "error":  # an error makes nothing
            return
        named: list[tuple[Any, bool]] = [(said.id, False)]
        items: list[OutputItem] = []
        if isinstance(said.conversation, dict):
            named.append((said.conversation.get("id"), False))
        if answer.item and (item := read(answer.item, ITEM, ITEM_NODE)):
            items.append(item)
        if said.output:
            items += yield from items_in(said.output)
        if said.data:
            yield from self._list(said.data)
        for item in items:
            named.append((item.id, item.type != "message" and item.by_tool))
            if item.type in WORDS_ALONE and name_in(item.id) and len(self.words) < MAX_ITEMS:
                self.words.add(item.id)
            named += [(each, True) for each in item.containers()]
            if item.type in COUNTED:
                self._count(item)
            if item.svg_usage is not None and len(self._svgs) < MAX_ITEMS:
                self._svgs[name_in(item.id) or len(self._svgs)] = item.svg_usage
            if len(named) >= MAX_NAMED:
                self._learn(named)
                named.clear()
                yield
        self._learn(named)

    def _list(self, data: msgspec.Raw) -> Generator[None, None, None]:
        """Note the ids of the input items that an answer lists."""
        items = yield from items_in(data)
        listed = [item for item in items if name_in(item.id)][:MAX_ITEMS]
        self.listed = {item.id: item.id != item.call_id for item in listed}

    def _learn(self, named: list[tuple[Any, bool]]) -> None:
        """Remember ids of what the answer made, MAX_ITEMS at most."""
        for each, always in named:
            if name_in(each) and (len(self.made) < MAX_ITEMS or each in self.made):
                self.made[each] = always

    def _count(self, item: OutputItem) -> None:
        """Note a tool call that costs money, MAX_ITEMS at most. Without an id it is a new one."""
        if len(self._searches) + len(self._file_searches) + len(self.containers) >= MAX_ITEMS:
            return
        if item.type == "web_search_call":
            self._searches[name_in(item.id) or len(self._searches)] = item.searches
        elif item.type == "file_search_call":
            self._file_searches.add(name_in(item.id) or len(self._file_searches))
        else:
            self.containers.update((each, None) for each in item.ran_in() if name_in(each))
