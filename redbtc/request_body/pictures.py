"""Count the pictures that a body contains: their tokens don't depend on their bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import msgspec
from msgspec import Struct

from redbtc.meter.scanner import NOT_JSON
from redbtc.request_body.pieces import Pieces
from redbtc.request_body.references import ESCAPED
from redbtc.request_body.strict_json import NO_VALUE, Members, is_list, is_text
from redbtc.steps import Steps

PICTURE_MARK = b"image_url"


class ContentPart(Struct):
    """A part of a message or of a tool's output. It is a picture if it has an `image_url` or, in
    the output of a code interpreter, a `url`."""

    image_url: msgspec.Raw = NO_VALUE
    url: msgspec.Raw = NO_VALUE


PART_DECODER = msgspec.json.Decoder(ContentPart)
PARTS_DECODER = msgspec.json.Decoder(list[ContentPart])


class PictureCounter(Struct):
    """Counts pictures by their places in the items of a body, and their bytes."""

    pieces: Pieces
    count: int = 0
    bytes: int = 0
    is_countable: bool = True  # False once a list that can have pictures could not be read

    def add(self, pictures: list[msgspec.Raw]) -> None:
        """Count pictures by their values."""
        self.count += len(pictures)
        self.bytes += sum(map(self.pieces.size, pictures))

    def count_in(self, item: Members, names: Iterable[str]) -> Steps[None]:
        """Count the pictures in these members of an object: lists of parts, or one part."""
        for name in names:
            given = item.get(name, NO_VALUE)
            single = bytes(memoryview(given)[:1]) == b"{"
            for text in self.pieces.parts(given) if single or is_list(given) else ():
                try:
                    parts = [PART_DECODER.decode(text)] if single else PARTS_DECODER.decode(text)
                except NOT_JSON:
                    self.is_countable = False
                    return
                self.add([each.image_url for each in parts if each.image_url])
                yield

    def count_in_outputs(self, outputs: msgspec.Raw) -> Steps[None]:
        """Count the pictures in the output of a code interpreter."""
        for text in self.pieces.parts(outputs):
            with contextlib.suppress(*NOT_JSON):
                self.add([each.url for each in PARTS_DECODER.decode(text) if is_text(each.url)])
            yield

    def count_names(self) -> Steps[None]:
        """Count every `image_url` in the body, and every escape, as a picture, and all bytes as
        text. For bodies with malformed lists, which some upstreams ignore."""
        self.count = self.bytes = 0
        for piece in self.pieces.all():
            self.count += piece.count(PICTURE_MARK)
            for number, _ in enumerate(ESCAPED.finditer(piece)):
                self.count += 1
                if number % 256 == 0:
                    yield
            yield
