"""A histogram of durations, kept as plain numbers until the metrics are read."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Sequence

REQUEST_SECONDS = (0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Histogram:
    """The number of durations up to each limit, and the total of the durations in seconds."""

    def __init__(self, limits: tuple[float, ...] = REQUEST_SECONDS) -> None:
        """`limits` are the upper bounds of the buckets, in seconds; a last bucket has none."""
        self.total = 0.0
        self._limits = limits
        self._counts = [0] * (len(limits) + 1)

    def observe(self, seconds: float) -> None:
        """Count a duration, in seconds."""
        self._counts[bisect.bisect_left(self._limits, seconds)] += 1
        self.total += seconds

    def observe_all(self, durations: Iterable[float]) -> None:
        """Count durations, in seconds."""
        counts, limits = self._counts, self._limits
        for seconds in durations:
            counts[bisect.bisect_left(limits, seconds)] += 1
            self.total += seconds

    def buckets(self) -> list[tuple[str, float]]:
        """Return each bucket's limit and count as Prometheus wants them: a bucket also counts the
        durations of the buckets below it."""
        limits = [*map(str, map(float, self._limits)), "+Inf"]
        return list(zip(limits, itertools.accumulate(self._counts), strict=True))

    @property
    def numbers(self) -> list[float]:
        """The total, and the number of durations in each bucket."""
        return [self.total, *self._counts]

    def add(self, numbers: Sequence[float]) -> None:
        """Add the `numbers` of another histogram with the same limits. Those of other limits are
        ignored: they are of another version."""
        if len(numbers) != len(self._counts) + 1:
            return
        self.total += numbers[0]
        for place, number in enumerate(numbers[1:]):
            self._counts[place] += int(number)
