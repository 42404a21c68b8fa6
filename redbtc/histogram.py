"""A histogram of durations, kept as plain numbers until somebody reads the metrics."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable

REQUEST_SECONDS = (0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Histogram:
    """How many durations are up to each of `limits`, in seconds, and their `total`."""

    def __init__(self, limits: tuple[float, ...] = REQUEST_SECONDS) -> None:
        self.total = 0.0
        self._limits = limits
        self._counts = [0] * (len(limits) + 1)

    def observe(self, seconds: float) -> None:
        """Count a duration."""
        self._counts[bisect.bisect_left(self._limits, seconds)] += 1
        self.total += seconds

    def observe_all(self, durations: Iterable[float]) -> None:
        """Count durations, in seconds."""
        counts, limits = self._counts, self._limits
        for seconds in durations:
            counts[bisect.bisect_left(limits, seconds)] += 1
            self.total += seconds

    def buckets(self) -> list[tuple[str, float]]:
        """Return the buckets in Prometheus' form: each one counts those below it, too."""
        limits = [*map(str, map(float, self._limits)), "+Inf"]
        return list(zip(limits, itertools.accumulate(self._counts), strict=True))
