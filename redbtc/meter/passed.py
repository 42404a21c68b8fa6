"""Count what has passed of an answer, for the estimate of one that does not report its usage."""

from __future__ import annotations

from collections.abc import Generator
from itertools import islice
from typing import Any

from msgspec import Struct

from redbtc.meter.answers import (
    CHOICES_NODE,
    ITEM_NODE,
    ITEMS_NODE,
    MAX_ITEMS,
    MAX_NAMED,
    Answer,
    name_in,
    objects_in,
)
from redbtc.meter.pictures import picture_tokens
from redbtc.meter.usage_fields import size_of, words_in


class Made(Struct):
    """What an item of the output, or several, come to."""

    text_bytes: int = 0
    sealed_bytes: int = 0
    image_tokens: int = 0

    def grow(self, other: Made) -> None:
        """It is seen again, with more of it, or less."""
        self.text_bytes = max(self.text_bytes, other.text_bytes)
        self.sealed_bytes = max(self.sealed_bytes, other.sealed_bytes)
        self.image_tokens = max(self.image_tokens, other.image_tokens)

    def add(self, other: Made, sign: int = 1) -> None:
        """Add another's counts, or subtract them with a `sign` of -1."""
        self.text_bytes += sign * other.text_bytes
        self.sealed_bytes += sign * other.sealed_bytes
        self.image_tokens += sign * other.image_tokens


def measured(item: Any) -> Made:
    """Measure an item of the output."""
    if not isinstance(item, dict):
        return Made()
    made = Made(size_of(item), size_of(item.get("encrypted_content")))
    if item.get("type") == "image_generation_call" and item.get("result"):
        made.image_tokens = picture_tokens(item.get("quality"), item.get("size"), item["result"])
    return made


class Passed:
    """What has passed of an answer, for an estimate of what nobody reports. Text that is seen as
    deltas, in the event that ends its item, and in the whole response counts once."""

    def __init__(self) -> None:
        self.deltas = 0  # bytes
        self._delta_bytes_in_items = 0  # of the deltas, those before the last item's end
        self._items: dict[Any, Made] = {}  # by id or index, the newest MAX_ITEMS at most
        self._in_items = Made()  # the sum over all items, forgotten ones included
        self._whole = Made()  # of the whole response, or of all messages of a chat
        self._pictures = 0  # tokens of pictures that came as events of their own

    def made(self) -> Made:
        """Return the largest view of it."""
        items = Made()
        items.add(self._in_items)
        since = self.deltas - self._delta_bytes_in_items
        items.text_bytes = max(self.deltas, items.text_bytes + since)
        items.grow(self._whole)
        items.image_tokens += self._pictures
        return items

    def see(self, answer: Answer, said: Answer, images: bool) -> Generator[None, None, None]:
        """Measure an answer's or an event's JSON, in small steps."""
        kind = answer.type if isinstance(answer.type, str) else ""
        if kind.endswith("partial_image"):
            self._pictures += PARTIAL_TOKENS
        elif images:
            yield from self._see_pictures(answer)
        elif answer.item:
            self._see_item(answer, kind)
        elif said.output:
            yield from self._see_whole(words_in(said.output, ITEMS_NODE))
        elif said.choices and not kind:
            yield from self._see_whole(words_in(said.choices, CHOICES_NODE))

    def see_delta(self, answer: Answer, chat: bool) -> None:
        """Measure an event that is too large for a search."""
        self.deltas += size_of(words_in(answer.choices if chat else answer.delta))

    def _see_item(self, answer: Answer, kind: str) -> None:
        item = words_in(answer.item, ITEM_NODE)
        if isinstance(item, dict):
            known = name_in(item.get("id")) or name_in(item.get("call_id"))
            index = answer.output_index if isinstance(answer.output_index, int) else None
            made = self._items.setdefault(known or index, Made())
            self._in_items.add(made, -1)
            made.grow(measured(item))
            self._in_items.add(made)
            if len(self._items) > MAX_ITEMS:
                self._items = dict(islice(self._items.items(), MAX_ITEMS // 2, None))
        if kind.endswith("done"):
            self._delta_bytes_in_items = self.deltas

    def _see_whole(self, listed: Any) -> Generator[None, None, None]:
        whole = Made()
        for number, each in enumerate(objects_in(listed), 1):
            whole.add(measured(each))
            if number % MAX_NAMED == 0:
                yield
        self._whole.grow(whole)

    def _see_pictures(self, answer: Answer) -> Generator[None, None, None]:
        if answer.b64_json:
            head = words_in(answer.b64_json)
            self._pictures += picture_tokens(answer.quality, answer.size, head)
        for number, picture in enumerate(objects_in(words_in(answer.data, ITEMS_NODE)), 1):
            if picture.get("b64_json") or picture.get("url"):
                head = picture.get("b64_json")
                self._pictures += picture_tokens(answer.quality, answer.size, head)
            if number % MAX_NAMED == 0:
                yield


PARTIAL_TOKENS = 100  # of a partial picture
