"""Names and patterns of models. A pattern is a name with wildcards (`*`, `?`, `[...]`); it matches
itself, too.
"""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Callable, Iterable

from redbtc.slices import with_turns

LITERAL_START = re.compile(r"[^*?\[]*+")  # the characters that every match of a pattern begins with
LAST_CHARACTER = "\U0010ffff"
ONE_CHARACTER = re.compile(r"\[[^\]]+\]|\?")  # a part of a pattern that matches one character
MAX_MATCHERS = 10_000


@functools.lru_cache(MAX_MATCHERS)
def matcher(pattern: str) -> Callable[[str], object]:
    """Return a function that tells if a pattern matches a model. (The cache of fnmatch itself is
    too small.)"""
    return re.compile(fnmatch.translate(pattern)).match


def matches(model: str, patterns: Iterable[str]) -> bool:
    """Return whether one of the patterns matches the model or is the model itself."""
    return any(model == pattern or matcher(pattern)(model) for pattern in patterns)


def is_pattern(model: str) -> bool:
    """Return whether a name has wildcards, so that it can match other names."""
    return not set(model).isdisjoint("*?[")


def specificity(pattern: str) -> tuple[bool, int, int, str]:
    """Return a sort key that puts the most specific first: names, then the patterns with the most
    literal characters."""
    literal, ones = ONE_CHARACTER.subn("", pattern.replace("*", ""))
    return literal != pattern, -len(literal), -ones, pattern


async def models_matched(models: Iterable[str], patterns: set[str]) -> set[str]:
    """Return those of many models that one of the patterns matches."""
    wild = [pattern for pattern in patterns if is_pattern(pattern)]
    return {
        model async for model in with_turns(models) if model in patterns or matches(model, wild)
    }


async def patterns_matching(patterns: Iterable[str], models: Iterable[str]) -> set[str]:
    """Return those of many patterns that match one of the models."""
    return {
        pattern
        async for pattern in with_turns(filter(is_pattern, patterns))
        if any(matches(model, {pattern}) for model in models)
    }
