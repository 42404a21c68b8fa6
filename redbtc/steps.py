"""Work that is done in small steps, each of which takes under a millisecond.

The work is a generator that yields after each step and uses no asyncio. `in_slices` in
redbtc/slices.py runs it on the event loop, together with other work.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")

Steps = Generator[None, None, T]  # T is what the work returns


def result_of(steps: Steps[T]) -> T:
    """Do all steps at once, and return the result."""
    while True:
        try:
            next(steps)
        except StopIteration as done:
            result: T = done.value
            return result
