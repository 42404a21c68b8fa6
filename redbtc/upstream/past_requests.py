"""How the requests that a member of the upstreams was sent went."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from typing import NamedTuple

FAILURES_IN_ROW = 5
SHARE_SECONDS, SHARE_MINIMUM = 30.0, 20  # of the latest requests, and how many these must be
KEPT_SECONDS, MAX_KEPT = 300.0, 2000  # the latest requests
MAX_REASONS, OTHER = 100, "other"  # that failures are counted by: upstreams choose their codes

# How a request went, and when: whether it was answered, or has failed (reached its limit: neither),
# and in how many milliseconds its first byte came.
Sample = tuple[float, bool, bool, float | None]


class RecentRequests(NamedTuple):
    """How the requests of the last KEPT_SECONDS went; None where there were none."""

    requests: int
    success_rate: float | None
    median_first_byte_ms: int | None


class PastRequests:
    """The requests that a member was sent. Set `failed_in_row` to 0 when an answer has begun."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.attempts = 0
        self.failures: Counter[str] = Counter()  # by code or cause, reached limits as well
        self.last_error = ""  # the code or cause of the last failure
        self.last_error_at: float | None = None
        self._clock = clock
        self.failed_in_row = 0  # before an answer had begun
        self._torn_in_row = 0  # after that
        self._recent: deque[Sample] = deque(maxlen=MAX_KEPT)

    def succeed(self, first_byte_ms: float | None) -> None:
        """Note that a request was answered to the end."""
        self._torn_in_row = 0
        self._recent.append((self._clock(), True, False, first_byte_ms))

    def fail(self, code: str, torn: bool = False) -> None:
        """Note that a request failed, and why. `torn`: its answer had begun."""
        self._note(code, failed=True)
        self.failed_in_row += not torn
        self._torn_in_row += torn

    def limit(self, code: str) -> None:
        """Note that a request has met a limit, and which."""
        self._note(code, failed=False)

    def _note(self, code: str, failed: bool) -> None:
        now = self._clock()
        self.last_error, self.last_error_at = code, now
        self._recent.append((now, False, failed, None))
        is_counted = code in self.failures or len(self.failures) < MAX_REASONS
        self.failures[code if is_counted else OTHER] += 1

    @property
    def have_failed_in_row(self) -> bool:
        """Return whether FAILURES_IN_ROW have failed in a row."""
        return max(self.failed_in_row, self._torn_in_row) >= FAILURES_IN_ROW

    def have_failed_enough(self) -> bool:
        """Return whether so many have failed that the member is to be taken out."""
        if self.have_failed_in_row:
            return True
        since = self._clock() - SHARE_SECONDS
        recent = [each for each in self._recent if each[0] > since]
        failed = sum(has_failed for _, _, has_failed, _ in recent)
        counted = failed + sum(is_good for _, is_good, *_ in recent)
        return counted >= SHARE_MINIMUM and failed * 2 >= counted

    def forget_failures(self, on_trial: bool = False) -> None:
        """Count failures anew, and keep what is shown of the latest requests. `on_trial`: one more
        answer that breaks off is as many in a row as take a member out, until one is complete."""
        self.failed_in_row = 0
        self._torn_in_row = FAILURES_IN_ROW - 1 if on_trial else 0
        self._recent = deque(((at, good, False, ms) for at, good, _, ms in self._recent), MAX_KEPT)

    def lately(self) -> RecentRequests:
        """Return how the latest requests went."""
        since = self._clock() - KEPT_SECONDS
        recent = [each for each in self._recent if each[0] >= since]
        times = sorted(first_byte_ms for *_, first_byte_ms in recent if first_byte_ms is not None)
        good = sum(is_good for _, is_good, *_ in recent)
        return RecentRequests(
            len(recent),
            good / len(recent) if recent else None,
            round(times[len(times) // 2]) if times else None,
        )
