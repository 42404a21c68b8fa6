"""Measure the output that has passed, for the estimate of an answer that does not report its
usage."""

from __future__ import annotations

from itertools import islice
from typing import Any

from msgspec import Struct

from redbtc.meter.answer_nodes import CHOICES_NODE, ITEM_NODE, ITEMS_NODE
from redbtc.meter.answers import (
    MAX_NAMED,
    MAX_OUTPUT_ITEMS,
    Answer,
    name_in,
    objects_in,
)
from redbtc.meter.pictures import picture_tokens
from redbtc.meter.usage_fields import text_bytes_in, text_in
from redbtc.steps import Steps

PARTIAL_TOKENS = 100  # of a partial picture


class OutputSizes(Struct):
    """The sizes of an output item, or the sums of several."""

    text_bytes: int = 0
    sealed_bytes: int = 0
    image_tokens: int = 0

    def grow(self, other: OutputSizes) -> None:
        """Take the larger of both, field by field: two views of the same output."""
        self.text_bytes = max(self.text_bytes, other.text_bytes)
        self.sealed_bytes = max(self.sealed_bytes, other.sealed_bytes)
        self.image_tokens = max(self.image_tokens, other.image_tokens)

    def add(self, other: OutputSizes, sign: int = 1) -> None:
        """Add the sizes of other output, or subtract them if `sign` is -1."""
        self.text_bytes += sign * other.text_bytes
        self.sealed_bytes += sign * other.sealed_bytes
        self.image_tokens += sign * other.image_tokens


def sizes_of(item: Any) -> OutputSizes:
    """Measure an output item."""
    if not isinstance(item, dict):
        return OutputSizes()
    sizes = OutputSizes(text_bytes_in(item), text_bytes_in(item.get("encrypted_content")))
    if item.get("type") == "image_generation_call" and item.get("result"):
        sizes.image_tokens = picture_tokens(item.get("quality"), item.get("size"), item["result"])
    return sizes


class PassedOutput:
    """The output that has passed so far. Text counts once, although an answer has it three times:
    as deltas, in the event that ends its item, and in the whole response."""

    def __init__(self) -> None:
        self.deltas = 0  # bytes
        self._delta_bytes_in_items = 0  # of deltas before the end of the last item
        self._items: dict[Any, OutputSizes] = {}  # the newest MAX_OUTPUT_ITEMS, by id or index
        self._in_items = OutputSizes()  # the sum over all items, removed ones included
        self._whole = OutputSizes()  # of the whole response, or of all messages of a chat
        self._segments = 0  # bytes of a transcription's segments, which repeat the deltas
        self._pictures = 0  # tokens of pictures that came in their own events

    def sizes(self) -> OutputSizes:
        """Return the largest of the three views of the output."""
        items = OutputSizes()
        items.add(self._in_items)
        since = self.deltas - self._delta_bytes_in_items
        items.text_bytes = max(self.deltas, items.text_bytes + since, self._segments)
        items.grow(self._whole)
        items.image_tokens += self._pictures
        return items

    def see(self, answer: Answer, response: Answer, images: bool) -> Steps[None]:
        """Measure the JSON of an answer or an event, in small steps. `response` is the Response
        object within the event, or the answer itself."""
        kind = answer.type if isinstance(answer.type, str) else ""
        if kind.endswith("partial_image"):
            self._pictures += PARTIAL_TOKENS
        elif images:
            yield from self._see_pictures(answer)
        elif answer.item:
            self._see_item(answer, kind)
        elif response.output:
            yield from self._see_whole(text_in(response.output, ITEMS_NODE))
        elif response.choices and not kind:
            yield from self._see_whole(text_in(response.choices, CHOICES_NODE))
        elif answer.text:
            self._see_transcript(text_bytes_in(text_in(answer.text)), kind)

    def see_delta(self, answer: Answer, chat: bool) -> None:
        """Measure the deltas of an event that is too large to be searched for them."""
        self.deltas += text_bytes_in(
            text_in(answer.choices if chat else answer.delta or answer.audio or answer.choices)
        )

    def _see_item(self, answer: Answer, kind: str) -> None:
        item = text_in(answer.item, ITEM_NODE)
        if isinstance(item, dict):
            known = name_in(item.get("id")) or name_in(item.get("call_id"))
            index = answer.output_index if isinstance(answer.output_index, int) else None
            sizes = self._items.setdefault(known or index, OutputSizes())
            self._in_items.add(sizes, -1)
            sizes.grow(sizes_of(item))
            self._in_items.add(sizes)
            if len(self._items) > MAX_OUTPUT_ITEMS:
                self._items = dict(islice(self._items.items(), MAX_OUTPUT_ITEMS // 2, None))
        if kind.endswith("done"):
            self._delta_bytes_in_items = self.deltas

    def _see_transcript(self, size: int, kind: str) -> None:
        if kind.endswith("segment"):
            self._segments += size
        else:
            self._whole.grow(OutputSizes(size))

    def _see_whole(self, listed: Any) -> Steps[None]:
        whole = OutputSizes()
        for number, each in enumerate(objects_in(listed), 1):
            whole.add(sizes_of(each))
            if number % MAX_NAMED == 0:
                yield
        self._whole.grow(whole)

    def _see_pictures(self, answer: Answer) -> Steps[None]:
        if answer.b64_json:
            head = text_in(answer.b64_json)
            self._pictures += picture_tokens(answer.quality, answer.size, head)
        for number, picture in enumerate(objects_in(text_in(answer.data, ITEMS_NODE)), 1):
            if picture.get("b64_json") or picture.get("url"):
                head = picture.get("b64_json")
                self._pictures += picture_tokens(answer.quality, answer.size, head)
            if number % MAX_NAMED == 0:
                yield
