"""The event loop's side of the log: the bodies of a request, and the queue to the thread that
writes them. Nothing here waits, whatever the disk does."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from redbtc.store.request_log.frames import Body
from redbtc.store.request_log.jobs import Job

REQUEST, RESPONSE = 0, 1  # the bodies of a request, in the database as well
ENTRY_BYTES = 256  # memory of an entry of the queue, besides its bytes


class Part(NamedTuple):
    """A part of a body on its way to the thread."""

    recording: Recording
    body: int  # REQUEST or RESPONSE
    content: Body

    @property
    def size(self) -> int:
        """Return the bytes of memory that the part takes."""
        return ENTRY_BYTES + len(self.content)


class Ended(NamedTuple):
    """The end of a request."""

    recording: Recording


class PartQueue:
    """A queue that holds a limited number of bytes. Only the event loop puts entries into it, and
    only the thread takes them out: each counter has one writer."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.entries: deque[Part | Ended | Job[Any]] = deque()
        self.filled = threading.Event()  # set while there may be entries
        self.urgent = threading.Event()  # set while there may be jobs
        self.is_closed = False
        self.dropped = 0  # requests of which a part found no room
        self.released = 0  # bytes that were taken out, and written or dropped
        self._added = 0

    @property
    def bytes(self) -> int:
        """Return the bytes of memory of the parts that are not written yet."""
        return self._added - self.released

    def add_part(self, part: Part) -> bool:
        """Add a part. Return False if there is no room for it."""
        size = part.size
        if self.is_closed or self.bytes + size > self.max_bytes:
            return False
        self._added += size
        self.add(part)
        return True

    def add(self, entry: Part | Ended | Job[Any]) -> None:
        """Add an entry that takes no memory to speak of."""
        self.entries.append(entry)
        if not self.filled.is_set():
            self.filled.set()

    def close(self) -> None:
        """Take no more parts, and wake the thread."""
        self.is_closed = True
        self.urgent.set()
        self.filled.set()


class Recording:
    """The bodies of one request on their way into the log. All methods are called on the event
    loop, and `end` in any case."""

    def __init__(
        self,
        queue: PartQueue,
        request_id: str,
        account_id: str,
        key_id: str,
        max_body_bytes: int,
        on_end: Callable[[Recording], None],
    ) -> None:
        self.request_id = request_id
        self.account_id = account_id
        self.key_id = key_id
        self.logged_at = self.expires_at = 0  # milliseconds
        self.sizes = [0, 0]  # bytes of each body so far, stored or not
        # The content encodings of each body, such as "gzip", with ", " between several. They are
        # set before its first part.
        self.encodings = ["", ""]
        self.is_short = False  # a part is missing
        self.is_lost = False  # because the log was too slow or failed
        self.is_failed = False  # the thread stores nothing more
        self.is_discarded = False  # nothing is stored: the request has no row
        self._is_cut = [False, False]  # whether the rest of each body is not stored
        self._is_begun = False
        self._is_ended = False
        self._max_body_bytes = max_body_bytes
        self._queue = queue
        self._on_end = on_end

    def request(self, body: Body) -> None:
        """Store a part of the request's body, which must not change afterwards."""
        self._add(REQUEST, body)

    def response(self, body: Body) -> None:
        """Store a part of the response's body; see `request`."""
        self._add(RESPONSE, body)

    def _add(self, body: int, part: Body) -> None:
        room = self._max_body_bytes - self.sizes[body]
        self.sizes[body] += len(part)
        if self._is_cut[body]:
            return
        if len(part) > room:
            part = part[:room]  # a copy, so that the rest does not stay in memory
            self._is_cut[body] = self.is_short = True
        if self._queue.add_part(Part(self, body, part)):
            self._is_begun = True
            return
        self._is_cut[body] = self.is_short = True
        if not self.is_lost:
            self.is_lost = True
            self._queue.dropped += 1

    def stop(self) -> None:
        """Store nothing more: what is stored of the request is erased."""
        self._is_cut = [True, True]
        self.is_short = True

    def discard(self) -> None:
        """End the recording, and store nothing of the request: it has no row in the ledger."""
        self.is_discarded = True
        self.end()

    def end(self) -> None:
        """Note that no further part will come. More calls have no effect."""
        if self._is_ended:
            return
        self._is_ended = True
        self._is_cut = [True, True]
        if self._is_begun:
            self._queue.add(Ended(self))
        self._on_end(self)
