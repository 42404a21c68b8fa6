"""The log, with one JSON line for each request on standard error, and the metrics of requests.
Neither ever holds a byte of a prompt, a completion or a key."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
import traceback
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import orjson
import prometheus_client
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric

from redbtc.histogram import Histogram
from redbtc.refusals import Refusal, refusal_of
from redbtc.times import iso_time, now_ms
from redbtc.usage import Outcome, RequestRow, Usage

# ── Log ──────────────────────────────────────────────────────────────────────────────────────────

LEVEL_NAMES = {level: logging.getLevelName(level).lower() for level in (10, 20, 30, 40, 50)}
LOG_LINES_A_SECOND = 2000
LOG_BACKLOG = 10_000
LOG_SECONDS = 0.02  # lines that are logged within this time are written together
LOG_WATCH_SECONDS = 0.25  # between two looks at the log's thread
UNEXPECTED = "unexpected error"  # the event of an error that no code handles
MAX_PLACES = 50  # of an error in a log line: endless recursion passes through a thousand


class Log:
    """A log of JSON lines on standard error. A thread of its own writes them, so that a reader that
    stops reading does not stop the gateway. Lines are dropped and counted above LOG_LINES_A_SECOND,
    and while LOG_BACKLOG lines wait for the reader."""

    def __init__(self) -> None:
        self.level = logging.INFO
        self._lines: deque[bytes] = deque()
        self._pending = threading.Event()
        self._written = threading.Event()
        self._written.set()
        self._second, self._in_second, self._dropped = 0, 0, 0
        self.dropped = 0  # lines since the start
        self.failure: Exception | None = None  # the error that ended the thread
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to write lines, those that were logged before included."""
        self._thread = threading.Thread(target=self._work, name="log", daemon=True)
        self._thread.start()

    @property
    def works(self) -> bool:
        """Return whether the thread that writes the lines runs."""
        return self._thread is not None and self._thread.is_alive()

    def write(self, level: int, event: str, fields: dict[str, Any]) -> None:
        """Queue a line, at one of the levels of `logging`."""
        now = now_ms()
        if now // 1000 != self._second:
            self._second, self._in_second = now // 1000, 0
        self._in_second += 1
        if self._in_second > LOG_LINES_A_SECOND or len(self._lines) >= LOG_BACKLOG:
            self._dropped += 1
            self.dropped += 1
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
        """Wait up to a second until all lines are written. If the thread has ended, write them."""
        if self.works:
            self._written.wait(1)
        else:
            self._write_lines()


LOG = Log()
# Events since the start, by level, of those that an operator should look at; logged or not.
NOTED = dict.fromkeys((logging.WARNING, logging.ERROR, logging.CRITICAL), 0)
LOG_EVENTS = "log events"  # their name where another process goes on with the numbers


def log(level: int, event: str, **fields: Any) -> None:
    """Log an event, unless the log's level is higher."""
    if level in NOTED:
        NOTED[level] += 1
    if level >= LOG.level:
        LOG.write(level, event, fields)


def shown_error(error: BaseException | None) -> dict[str, Any]:
    """Return the type of an unexpected error and the last lines of code it passed through, for the
    log. Its message could hold content, so it is left out. Files are named with their folder, since
    files of several folders have the same name."""
    frames = traceback.extract_tb(error.__traceback__, -MAX_PLACES) if error else []
    places = [f"{'/'.join(Path(each.filename).parts[-2:])}:{each.lineno}" for each in frames]
    return {"error": type(error).__name__ if error else None, "places": places}


async def watch_log() -> None:
    """Wait for the end of the log's thread, which must not happen, and raise the error that ended
    it."""
    while LOG.works:
        await asyncio.sleep(LOG_WATCH_SECONDS)
    if LOG.failure:
        raise LOG.failure


# ── Metrics ──────────────────────────────────────────────────────────────────────────────────────
# prometheus-client's own counters and histograms take a lock each time, and cost a JSON request 6 %
# more function calls. So counts are plain numbers here, and become metrics when they are read.

Counts = Counter[tuple[str, ...]]  # by the values of the metric's labels
Histograms = Mapping[tuple[str, ...], Histogram]
# What is counted by a process, by the name of a metric and the values of its labels.
MetricNumbers = dict[tuple[str, ...], list[float]]


def counter_of(name: str, what: str, labels: Sequence[str], counts: Counts) -> Metric:
    """Return counts as a Prometheus counter."""
    metric = CounterMetricFamily(name, what, labels=labels)
    for values, count in counts.items():
        metric.add_metric(values, count)
    return metric


def histogram_of(name: str, what: str, labels: Sequence[str], histograms: Histograms) -> Metric:
    """Return histograms as one of Prometheus."""
    metric = HistogramMetricFamily(name, what, labels=labels)
    for values, histogram in histograms.items():
        metric.add_metric(values, histogram.buckets(), histogram.total)
    return metric


TOKENS_OF = attrgetter(*Usage.__struct_fields__)
TOKEN_KINDS = [name.removesuffix("_tokens") for name in Usage.__struct_fields__]


class Telemetry:
    """Counts requests and logs each of them. Users rely on the metrics' names."""

    def __init__(self) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        self.registry.register(self)
        prometheus_client.ProcessCollector(registry=self.registry)
        self._requests: Counts = Counter()
        self._refusals: Counts = Counter()
        self._tokens: Counts = Counter()
        self._first_byte: defaultdict[tuple[str, ...], Histogram] = defaultdict(Histogram)
        self._duration: defaultdict[tuple[str, ...], Histogram] = defaultdict(Histogram)
        self._counters = {
            "requests": self._requests,
            "refusals": self._refusals,
            "tokens": self._tokens,
        }
        self._histograms = {"first byte": self._first_byte, "duration": self._duration}

    def show_gauge(self, name: str, what: str, read: Callable[[], float]) -> None:
        """Add a gauge, whose value is read whenever the metrics are."""
        prometheus_client.Gauge(name, what, registry=self.registry).set_function(read)

    def collect(self) -> Iterator[Metric]:
        """Return what prometheus-client asks for whenever the metrics are read."""
        yield counter_of(
            "redbtc_requests",
            "Requests by route, status and outcome (refused means by the gateway itself)",
            ["route", "status", "outcome"],
            self._requests,
        )
        yield CounterMetricFamily(  # without labels, so that it is there before the first one
            "redbtc_internal_errors",
            "Requests on which the gateway failed",
            sum(
                count
                for (_, status, outcome), count in self._requests.items()
                if (status, outcome) == ("500", "refused")
            ),
        )
        yield counter_of(
            "redbtc_refusals",
            "Requests refused by the gateway, by error code",
            ["code"],
            self._refusals,
        )
        yield counter_of(
            "redbtc_tokens",
            "Tokens by kind, including kinds that are parts of others",
            ["kind", "source"],
            self._tokens,
        )
        yield histogram_of(
            "redbtc_first_byte_seconds",
            "Time from the request headers to the first byte of the upstream's body",
            ["route"],
            self._first_byte,
        )
        yield histogram_of(
            "redbtc_request_seconds",
            "Time from the request headers to the end of the response",
            ["route"],
            self._duration,
        )

    @property
    def numbers(self) -> MetricNumbers:
        """All that was counted, for another process that goes on with it."""
        counts = {
            (name, *labels): [float(count)]
            for name, counter in self._counters.items()
            for labels, count in counter.items()
        }
        noted = {(LOG_EVENTS, str(level)): [float(count)] for level, count in NOTED.items()}
        return (
            counts
            | noted
            | {
                (name, *labels): histogram.numbers
                for name, histograms in self._histograms.items()
                for labels, histogram in histograms.items()
            }
        )

    def add(self, numbers: MetricNumbers) -> None:
        """Add what another process has counted. Metrics of another version are left out."""
        for (name, *labels), values in numbers.items():
            if name == LOG_EVENTS:
                NOTED[int(labels[0])] += int(values[0])
            elif name in self._counters:
                self._counters[name][tuple(labels)] += int(values[0])
            elif name in self._histograms:
                self._histograms[name][tuple(labels)].add(values)

    def settled(self, row: RequestRow) -> None:
        """Count and log a request that has a row in the ledger."""
        self._requests[row.endpoint, str(row.status or 0), row.outcome] += 1
        self._duration[(row.endpoint,)].observe((row.duration_ms or 0) / 1000)
        if row.first_byte_ms is not None:
            self._first_byte[(row.endpoint,)].observe(row.first_byte_ms / 1000)
        if row.usage_source != "none":
            for kind, tokens in zip(TOKEN_KINDS, TOKENS_OF(row.usage), strict=True):
                if tokens:
                    self._tokens[kind, row.usage_source] += tokens
        fields = {
            "account_id": row.account_id,
            "key_id": row.key_id,
            "upstream": row.upstream,
            "attempts": row.attempts,
            "upstream_status": row.upstream_status,
            "outcome": row.outcome,
            "first_byte_ms": row.first_byte_ms,
            "duration_ms": row.duration_ms,
            "usage_source": row.usage_source,
            "input_tokens": row.usage.input_tokens,
            "output_tokens": row.usage.output_tokens,
        }
        if row.upstream_error_code:
            fields["upstream_error_code"] = row.upstream_error_code
        if row.upstream_request_id:
            fields["upstream_request_id"] = row.upstream_request_id
        self._line(logging.INFO, row.request_id, row.endpoint, row.status, fields)

    def answered(
        self, request_id: str, route: str, status: int, outcome: Outcome = "completed"
    ) -> None:
        """Count and log a request that was answered and is not metered."""
        self._requests[route, str(status), outcome] += 1
        self._line(logging.INFO, request_id, route, status, {"outcome": outcome})

    def refused(self, request_id: str, route: str, refusal: Refusal, counted: bool) -> None:
        """Count a refusal. Count and log the request as well, unless that was done with its row,
        which `counted` says."""
        self._refusals[(refusal.code,)] += 1
        if counted:
            return
        self._requests[route, str(refusal.status), "refused"] += 1
        fields = {"outcome": "refused", "code": refusal.code}
        self._line(logging.INFO, request_id, route, refusal.status, fields)

    def refusals(self) -> dict[str, int]:
        """Return how often each code was answered since the start."""
        return {code: count for (code,), count in self._refusals.items()}

    def left(self, request_id: str, route: str) -> None:
        """Count and log a request whose client disconnected before it was sent to an upstream."""
        self._requests[route, "0", "client_disconnected"] += 1
        self._line(logging.INFO, request_id, route, None, {"outcome": "client_disconnected"})

    def failed(self, request_id: str, route: str, error: Exception, counted: bool) -> None:
        """Count and log a request on which the gateway failed: it had no memory left, or something
        happened that should not. The error's message could hold content, so it is not logged."""
        if isinstance(error, MemoryError):
            self.refused(request_id, route, refusal_of(error), counted)
            return
        self._requests[route, "500", "refused"] += 1
        NOTED[logging.ERROR] += 1
        self._line(logging.ERROR, request_id, route, 500, shown_error(error))

    @staticmethod
    def _line(
        level: int, request_id: str, route: str, status: int | None, fields: dict[str, Any]
    ) -> None:
        if level >= LOG.level:
            request = {"request_id": request_id, "route": route, "status": status}
            LOG.write(level, "request", request | fields)
