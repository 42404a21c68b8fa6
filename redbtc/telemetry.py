"""What an operator sees of the gateway at work: one JSON line a request on standard error, and
metrics. Neither ever holds a byte of a prompt, a completion or a key."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
import traceback
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import msgspec
import orjson
import prometheus_client
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric

from redbtc.histogram import Histogram
from redbtc.refusals import Refusal, refusal_of
from redbtc.server.asgi import Scope
from redbtc.times import iso_time, now_ms
from redbtc.usage import Outcome, RequestRow

LEVEL_NAMES = {level: logging.getLevelName(level).lower() for level in (10, 20, 30, 40, 50)}
LOG_LINES_A_SECOND = 2000
LOG_BACKLOG = 10_000
LOG_SECONDS = 0.02  # what comes within is one write


WATCH_SECONDS = 0.25  # between two looks at the log's thread


class Log:
    """JSON lines on standard error, written by a thread of their own: a reader that stops reading
    must not stop the gateway. Beyond a rate, and where the reader lags, lines are dropped and
    counted."""

    def __init__(self) -> None:
        self.level = logging.INFO
        self._lines: deque[bytes] = deque()
        self._pending = threading.Event()
        self._written = threading.Event()
        self._written.set()
        self._second, self._in_second, self._dropped = 0, 0, 0
        self.failure: Exception | None = None  # what has ended the thread
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to write lines, also those that came before."""
        self._thread = threading.Thread(target=self._work, name="log", daemon=True)
        self._thread.start()

    @property
    def works(self) -> bool:
        """Return whether its thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def write(self, level: int, event: str, fields: dict[str, Any]) -> None:
        """One line, at one of logging's levels."""
        now = now_ms()
        if now // 1000 != self._second:
            self._second, self._in_second = now // 1000, 0
        self._in_second += 1
        if self._in_second > LOG_LINES_A_SECOND or len(self._lines) >= LOG_BACKLOG:
            self._dropped += 1
            return
        name = LEVEL_NAMES[level]
        line = {"time": iso_time(now), "level": name, "event": event} | fields
        if self._dropped:
            line["lines_dropped_before"], self._dropped = self._dropped, 0
        self._lines.append(orjson.dumps(line, None, orjson.OPT_APPEND_NEWLINE))
        if not self._pending.is_set():
            self._written.clear()
            self._pending.set()

    def _work(self) -> None:
        try:
            while self._pending.wait():
                time.sleep(LOG_SECONDS)
                self._pending.clear()
                self._write_lines()
                if not self._pending.is_set():
                    self._written.set()
        except Exception as error:  # the process ends when this does, and says so
            self.failure = error

    def _write_lines(self) -> None:
        while self._lines:
            lines = [self._lines.popleft() for _ in range(min(100, len(self._lines)))]
            with contextlib.suppress(OSError):
                os.write(2, b"".join(lines))

    def flush(self) -> None:
        """Wait up to a second for what is not yet written; write it here if the thread has
        ended."""
        if self.works:
            self._written.wait(1)
        else:
            self._write_lines()


LOG = Log()


def log(level: int, event: str, **fields: Any) -> None:
    """One line of the log, where its level is wanted."""
    if level >= LOG.level:
        LOG.write(level, event, fields)


def shown_error(error: BaseException | None) -> dict[str, Any]:
    """Return the type and the places of an unexpected error for the log. Its message could hold
    content, so it is left out."""
    frames = traceback.extract_tb(error.__traceback__) if error else []
    places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames]
    return {"error": type(error).__name__ if error else None, "places": places}


class Telemetry:
    """Counts and logs. The metrics' names are something that users rely on. Counting is a matter of
    plain numbers; prometheus-client is asked only when somebody reads them."""

    def __init__(self) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        self.registry.register(self)
        prometheus_client.ProcessCollector(registry=self.registry)
        self._requests: Counter[tuple[str, str, str]] = Counter()
        self._refusals: Counter[tuple[str]] = Counter()
        self._tokens: Counter[tuple[str, str]] = Counter()
        self._first_byte: defaultdict[str, Histogram] = defaultdict(Histogram)
        self._duration: defaultdict[str, Histogram] = defaultdict(Histogram)

    def collect(self) -> Iterator[Metric]:
        """What prometheus-client asks for at each reading."""
        for name, what, labels, counts in (
            (
                "redbtc_requests",
                "Requests by route, status and outcome (refused means by the gateway itself)",
                ["route", "status", "outcome"],
                self._requests,
            ),
            (
                "redbtc_refusals",
                "Requests refused by the gateway, by error code",
                ["code"],
                self._refusals,
            ),
            (
                "redbtc_tokens",
                "Tokens by kind, including kinds that are parts of others",
                ["kind", "source"],
                self._tokens,
            ),
        ):
            counter = CounterMetricFamily(name, what, labels=labels)
            for values, count in cast(Counter[Any], counts).items():
                counter.add_metric(values, count)
            yield counter
        for name, what, histograms in (
            (
                "redbtc_first_byte_seconds",
                "Time from the request headers to the first byte of the upstream's body",
                self._first_byte,
            ),
            (
                "redbtc_request_seconds",
                "Time from the request headers to the end of the response",
                self._duration,
            ),
        ):
            family = HistogramMetricFamily(name, what, labels=["route"])
            for route, histogram in histograms.items():
                family.add_metric([route], histogram.buckets(), histogram.total)
            yield family

    def settled(self, scope: Scope, row: RequestRow) -> None:
        """A request that left for an upstream is over."""
        scope["settled"] = True
        self._requests[row.endpoint, str(row.status or 0), row.outcome] += 1
        self._duration[row.endpoint].observe((row.duration_ms or 0) / 1000)
        if row.first_byte_ms is not None:
            self._first_byte[row.endpoint].observe(row.first_byte_ms / 1000)
        if row.usage_source != "none":
            for kind, tokens in msgspec.structs.asdict(row.usage).items():
                if tokens:
                    self._tokens[kind.removesuffix("_tokens"), row.usage_source] += tokens
        self._line(
            logging.INFO,
            scope,
            row.status,
            {
                "account_id": row.account_id,
                "key_id": row.key_id,
                "upstream": row.upstream,
                "outcome": row.outcome,
                "first_byte_ms": row.first_byte_ms,
                "duration_ms": row.duration_ms,
                "usage_source": row.usage_source,
                "input_tokens": row.usage.input_tokens,
                "output_tokens": row.usage.output_tokens,
            },
        )

    def answered(self, scope: Scope, status: int, outcome: Outcome = "completed") -> None:
        """A request that is not metered was answered."""
        self._requests[scope["where"], str(status), outcome] += 1
        self._line(logging.INFO, scope, status, {"outcome": outcome})

    def refused(self, scope: Scope, refusal: Refusal) -> None:
        """The gateway itself said no."""
        self._refusals[(refusal.code,)] += 1
        if "settled" in scope:  # counted and logged with its row
            return
        self._requests[scope["where"], str(refusal.status), "refused"] += 1
        fields = {"outcome": "refused", "code": refusal.code}
        self._line(logging.INFO, scope, refusal.status, fields)

    def refusals(self) -> dict[str, int]:
        """How often each code was answered since the start."""
        return {code: count for (code,), count in self._refusals.items()}

    def left(self, scope: Scope) -> None:
        """The client went before its request had left for an upstream."""
        self._requests[scope["where"], "0", "client_disconnected"] += 1
        self._line(logging.INFO, scope, None, {"outcome": "client_disconnected"})

    def failed(self, scope: Scope, error: Exception) -> None:
        """The gateway failed on a request: it had no memory left, or something that should not
        happen has. The error's message could hold content, so it is not logged."""
        if isinstance(error, MemoryError):
            self.refused(scope, refusal_of(error))
            return
        self._requests[scope["where"], "500", "refused"] += 1
        self._line(logging.ERROR, scope, 500, shown_error(error))

    @staticmethod
    def _line(level: int, scope: Scope, status: int | None, fields: dict[str, Any]) -> None:
        if level >= LOG.level:
            request = {"request_id": scope["request_id"], "route": scope["where"], "status": status}
            LOG.write(level, "request", request | fields)


async def watch_log() -> None:
    """Raise what has ended the log's thread, which must not happen."""
    while LOG.works:
        await asyncio.sleep(WATCH_SECONDS)
    if LOG.failure:
        raise LOG.failure
