"""The thread that writes the log, and does all else that needs its database."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from redbtc.config import Settings
from redbtc.errors import StorageUnavailable, UserError
from redbtc.store.failures import LogFunction, is_corrupt, reason_of
from redbtc.store.files import FileChanged, Identity, identity_of
from redbtc.store.request_log.file import LogFile, LogStatement
from redbtc.store.request_log.jobs import Job
from redbtc.store.request_log.recording import Part, PartQueue, Recording
from redbtc.store.request_log.states import RequestState
from redbtc.store.request_log.withholding import Secrets
from redbtc.store.turns import WriteTurns

GROUP_SECONDS = 0.05  # parts that come within this time are taken out together
REOPEN_SECONDS = 1.0
BATCH_BYTES = 512 << 10  # of content in a transaction
ROW_BYTES = 1024  # for a request's row and its entries in indexes
WHAT_TO_DO = (
    "Requests are served, but their bodies are not stored. If the file is damaged or not ours, "
    "move it away."
)


class Worker:
    """The thread, from `start` until the queue is closed."""

    def __init__(self, path: Path, queue: PartQueue, settings: Settings, log: LogFunction) -> None:
        self.written = 0  # requests that ended and are stored
        self.withheld = 0  # requests of which a body was withheld
        self.dropped = 0  # requests of which parts could not be written
        self.file_bytes = 0
        self.turns: WriteTurns | None = None  # while another process writes the log as well
        self.thread = threading.Thread(target=self._run, name="request log", daemon=True)
        self._path = path
        self._queue = queue
        self._log = log
        self._file: LogFile | None = None
        self._failure = ""  # why the file can't be used; "": it can
        self._reopen_at = 0.0
        self._damaged: Identity | None = None
        self._states: dict[Recording, RequestState] = {}
        self._jobs: deque[Job[Any]] = deque()
        self._pause: float | None = None  # until something is to be done, None: until it comes
        self.apply(settings)

    def apply(self, settings: Settings) -> None:
        """Use other settings. Called on the event loop."""
        self._secrets, self._max_bytes = Secrets(settings), settings.request_log.max_bytes

    def _run(self) -> None:
        while not self._queue.is_closed:
            self._wait()
            with self._having_turn() as in_turn:
                self._turn()
                while in_turn and self._jobs and not self._queue.is_closed:
                    self._wait()  # the job goes on in the file that it has begun in
                    self._turn()
        self._take_out()
        for state in self._states.values():
            state.end()
        with self._having_turn():
            self._turn()
        for job in self._jobs:
            job.fail(StorageUnavailable("the request log was closed meanwhile; try again"))
        self._close_file()

    @contextlib.contextmanager
    def _having_turn(self) -> Iterator[bool]:
        """While another process writes the log as well, wait for a turn, and close the file at its
        end: only one process can have it open. Give whether that is so."""
        turns = self.turns
        if turns is None:
            yield False
            return
        turns.take()
        try:
            yield True
        finally:
            self._close_file()
            turns.give_back()

    @property
    def is_closed(self) -> bool:
        """Return whether the file is not open."""
        return self._file is None

    def _wait(self) -> None:
        queue = self._queue
        if self._pause is None or self._pause > 0:
            queue.filled.wait(self._pause)
            queue.urgent.wait(GROUP_SECONDS)
        queue.urgent.clear()
        queue.filled.clear()

    def _turn(self) -> None:
        """Take out what has come, write what is due, and go on with a job."""
        every = False
        try:
            every = self._take_out()
        except Exception as error:  # such as MemoryError
            self._drop(list(self._states.values()), error)
        now = time.monotonic()
        states = list(self._states.values())
        self._write([each for each in states if every or each.due_in(now) == 0.0])
        pauses = [each.due_in(now) for each in self._states.values()]
        pauses.append(self._step())
        self._pause = min((each for each in pauses if each is not None), default=None)

    def _take_out(self) -> bool:
        """Take out what has come. Return whether all of it must be written before a job begins."""
        entries, has_job = self._queue.entries, False
        while entries:
            entry = entries.popleft()
            if isinstance(entry, Job):
                has_job = True
                self._jobs.append(entry)
                continue
            state = self._states.get(entry.recording)
            if isinstance(entry, Part):
                self._add(entry, state)
            elif state:
                state.is_ended = True
        return has_job

    def _add(self, part: Part, state: RequestState | None) -> None:
        recording = part.recording
        if recording.is_failed:
            self._queue.released += part.size
            return
        if state is None:
            state = self._states[recording] = RequestState(recording)
        before = state.withheld
        state.add(part, self._secrets)
        self.withheld += bool(state.withheld) > bool(before)

    def _forget(self, state: RequestState) -> None:
        state.recording.is_failed = True
        self._release(state)
        del self._states[state.recording]

    def _release(self, state: RequestState) -> None:
        self._queue.released += state.waiting_bytes
        state.waiting_bytes = 0

    def _write(self, states: list[RequestState]) -> None:
        """Write what waits of these requests. If that fails, it is dropped."""
        if not states:
            return
        try:
            file = self._opened(create=True)
            assert file
            for batch in self._batches(states):
                file.write(batch, sum(added_bytes(each) for each in batch))
            self.file_bytes = file.size
        except Exception as error:  # whatever it is, requests are served
            self._drop(states, error)
            return
        for state in states:
            self._release(state)
            if state.is_ended:
                self.written += 1
                del self._states[state.recording]

    def _drop(self, states: list[RequestState], error: Exception) -> None:
        """Drop what waits of these requests and all that will come, because of an error."""
        self._note_failure(error)
        for state in states:
            if not state.recording.is_lost:
                state.recording.is_lost = True
                self.dropped += 1
            self._forget(state)

    def _batches(self, states: Iterable[RequestState]) -> Iterator[list[LogStatement]]:
        batch: list[LogStatement] = []
        size = 0
        for state in states:
            before = state.withheld
            for statement in state.statements(self._secrets):
                batch.append(statement)
                size += added_bytes(statement)
                if size >= BATCH_BYTES:
                    yield batch
                    batch, size = [], 0
            self.withheld += bool(state.withheld) > bool(before)
        if batch:
            yield batch

    def _step(self) -> float | None:
        """Do the next step of one job after the other. Return the seconds until the next step, None
        if there is no job."""
        if not self._jobs:
            return None
        job = self._jobs.popleft()
        try:
            file = self._opened(create=False)
            pause = job.step(file)
            self.file_bytes = file.size if file else 0
        except StorageUnavailable as error:
            job.fail(error)
            return 0.0
        except Exception as error:
            self._note_failure(error)
            job.fail(self._unavailable())
            return 0.0
        if pause is None:
            return 0.0
        self._jobs.append(job)
        return pause

    def _opened(self, *, create: bool) -> LogFile | None:
        """Return the open file. Return None if there is none and it is not to be made. Raises
        StorageUnavailable, UserError, sqlite3.Error, OSError."""
        if self._file:
            try:
                self._file.check_files()
            except FileChanged:
                self._close_file()
        if self._file is None:
            if self._failure and time.monotonic() < self._reopen_at:
                raise self._unavailable()
            if self._damaged and identity_of(self._path) == self._damaged:
                raise self._unavailable()
            self._file = LogFile.open(self._path, self._max_bytes, create=create)
            if self._failure:
                self._log(logging.INFO, "request log available", file=str(self._path))
                self._failure = ""
        elif self._file.max_bytes != self._max_bytes:
            self._file.limit(self._max_bytes)
        return self._file

    def _unavailable(self) -> StorageUnavailable:
        return StorageUnavailable(f"the request log is unavailable: {self._failure}")

    def _note_failure(self, error: Exception) -> None:
        """Close the file after an error, and log that once."""
        if isinstance(error, StorageUnavailable):  # it was noted before
            return
        if is_corrupt(error):
            self._damaged = identity_of(self._path)
        self._close_file()
        self._reopen_at = time.monotonic() + REOPEN_SECONDS
        known = isinstance(error, UserError)
        reason = str(error) if known else f"{self._path}: {reason_of(error)}"
        if reason != self._failure:
            self._failure = reason
            event = "request log unavailable"
            self._log(logging.ERROR, event, reason=reason, what_to_do=WHAT_TO_DO)

    def _close_file(self) -> None:
        file, self._file = self._file, None
        if file:
            try:
                file.close()
            except Exception as error:
                self._log(logging.ERROR, "request log not closed", reason=reason_of(error))


def added_bytes(statement: LogStatement) -> int:
    """Return about how many bytes a statement adds to the database."""
    values = [value for value in statement.values if isinstance(value, bytes)]
    return ROW_BYTES + sum(map(len, values))
