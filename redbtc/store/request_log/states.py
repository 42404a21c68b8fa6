"""The thread's side of a recording: what was taken out of the queue and is not written yet."""

from __future__ import annotations

import time
from collections.abc import Iterator

from redbtc.meter.decoding import Decoding, NotDecoded
from redbtc.store.request_log.file import LogStatement
from redbtc.store.request_log.frames import FRAME_BYTES, Body, framed, pieces_of
from redbtc.store.request_log.recording import Part, Recording
from redbtc.store.request_log.withholding import Secrets

GATHER_SECONDS = 2.0  # for which small parts are gathered, so that they compress well

BEGIN_REQUEST = """
    INSERT INTO logged (request_id, account_id, key_id, logged_at, expires_at)
    VALUES (?, ?, ?, ?, ?) ON CONFLICT (request_id) DO NOTHING"""
# Without effect if the request's row was erased meanwhile.
ADD_PART = """
    INSERT INTO parts (logged_id, body, content)
    SELECT id, ?2, ?3 FROM logged WHERE request_id = ?1 AND expires_at > 0"""
# It is shown no more, and the next purge erases it.
DISCARD = "UPDATE logged SET expires_at = 0 WHERE request_id = ?"
NOTE_BODIES = """
    UPDATE logged SET request_bytes = ?2, response_bytes = ?3, request_encoding = ?4,
                      response_encoding = ?5, withheld = ?6, is_complete = ?7
     WHERE request_id = ?1"""
WITHHOLD_BODY = """
    DELETE FROM parts
     WHERE logged_id = (SELECT id FROM logged WHERE request_id = ?) AND body = ?"""


class BodyState:
    """A body of which parts wait. The last bytes of those that were looked at stay in `parts`,
    since a secret could begin in them and end in the next part."""

    def __init__(self) -> None:
        self.is_withheld = False
        self.is_removed = False  # what was written before a secret was found
        self._parts: list[Body] = []
        self._is_begun = False
        # Secrets are searched for in the decoded text of a compressed body as well.
        self._decoding: Decoding | None = None
        self._text_end = b""  # in which a secret could begin, too

    def add(self, part: Part, secrets: Secrets) -> None:
        """Add a part."""
        if self.is_withheld:
            return
        if not self._is_begun:
            self._is_begun = True
            encoding = part.recording.encodings[part.body]
            self._decoding = Decoding(encoding.encode("latin-1").split(b", ")) if encoding else None
        self._parts.append(part.content)
        if self._decoding is None:
            return
        try:
            for piece in pieces_of(self._decoding.decoded(bytes(part.content))):
                text = self._text_end + piece
                self._look_at(text, secrets)
                self._text_end = text[-secrets.overlap :]
        except NotDecoded:  # it is not what its header says, and can only be searched as it is
            self._decoding = None

    def _look_at(self, text: bytes, secrets: Secrets) -> None:
        if secrets.are_in(text):
            self.is_withheld = True
            self._parts.clear()
        time.sleep(0)  # let the event loop go on; this took about 0.1 ms

    def pieces(self, secrets: Secrets, *, is_last: bool, is_short: bool) -> Iterator[bytes]:
        """Take out what can be stored, in pieces. If a secret is found, end, and withhold the body.
        With `is_last`, nothing more will come; with `is_short`, some of that is missing."""
        parts, self._parts = self._parts, []
        rest = b""
        for piece in pieces_of(parts):
            text = rest + piece
            self._look_at(text, secrets)
            if self.is_withheld:
                return
            yield text[: -secrets.overlap]
            rest = text[-secrets.overlap :]
        if is_last:
            yield secrets.without_beginning(rest) if is_short else rest
        else:
            self._parts = [rest]


class RequestState:
    """The waiting parts of a request's bodies."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.waiting_bytes = 0  # of the queue's limit
        self.is_ended = False
        self._bodies = BodyState(), BodyState()
        self._is_begun = False
        self._gathered = 0  # bytes since the last write
        self._first_at: float | None = None  # when the first of them came

    def add(self, part: Part, secrets: Secrets) -> None:
        """Add a part of a body."""
        if self._first_at is None:
            self._first_at = time.monotonic()
        self._gathered += len(part.content)
        self.waiting_bytes += part.size
        self._bodies[part.body].add(part, secrets)

    def end(self) -> None:
        """End the request early: the log is closed."""
        if not self.is_ended:
            self.is_ended = self.recording.is_short = True

    def due_in(self, now: float) -> float | None:
        """Return the seconds after which the parts should be written, None if there are none."""
        if self.is_ended or self._gathered >= FRAME_BYTES:
            return 0.0
        return None if self._first_at is None else max(0.0, self._first_at + GATHER_SECONDS - now)

    def statements(self, secrets: Secrets) -> Iterator[LogStatement]:
        """Take out what can be written, as statements to be executed in this order."""
        recording = self.recording
        request_id = recording.request_id
        if recording.is_discarded:
            yield LogStatement(DISCARD, (request_id,))
            return
        if not self._is_begun:
            self._is_begun = True
            ids = request_id, recording.account_id, recording.key_id
            values = *ids, recording.logged_at, recording.expires_at
            yield LogStatement(BEGIN_REQUEST, values)
        for number, body in enumerate(self._bodies):
            is_last, is_short = self.is_ended, recording.is_short
            for piece in body.pieces(secrets, is_last=is_last, is_short=is_short):
                if piece:
                    yield LogStatement(ADD_PART, (request_id, number, framed(piece)))
            if body.is_withheld and not body.is_removed:
                body.is_removed = True
                yield LogStatement(WITHHOLD_BODY, (request_id, number), erases=True)
        self._gathered, self._first_at = 0, None
        is_complete = self.is_ended and not recording.is_short and not self.withheld
        facts = (*recording.sizes, *recording.encodings, self.withheld, is_complete)
        yield LogStatement(NOTE_BODIES, (request_id, *facts))

    @property
    def withheld(self) -> int:
        """Return which bodies are withheld, a bit for each."""
        return sum(body.is_withheld << number for number, body in enumerate(self._bodies))
