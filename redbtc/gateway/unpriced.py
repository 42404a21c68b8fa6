"""Decide which of the models that were refused for want of a price are really models.

A client can name anything. A name is kept only if an upstream has it in its list of models or,
where an upstream gives no list, if its `models` name it or have a pattern for it that begins with
at least MIN_START characters, such as gpt-5*.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Iterable

from redbtc.billing.model_patterns import is_pattern
from redbtc.gateway.gateway import Gateway
from redbtc.telemetry import log, shown_error
from redbtc.upstream.upstreams import PATTERN, Upstream

FLUSH_SECONDS = 10.0
PRUNE_SECONDS = 3600.0  # between two looks for models that have a price now
LIST_SECONDS = 600.0  # between two times at which the upstreams are asked for their lists
LISTING_SECONDS = 30.0  # for them to answer
MIN_START = 3


async def write_unpriced_for_ever(gateway: Gateway) -> None:
    """Write which models were refused, every few seconds if there are any."""
    listed_at = looked_at = -math.inf
    while True:
        await asyncio.sleep(FLUSH_SECONDS)
        now, unpriced = time.monotonic(), gateway.billing.unpriced
        if not gateway.store.healthy or not (unpriced.asked or now - looked_at > PRUNE_SECONDS):
            continue
        try:
            if now - listed_at > LIST_SECONDS and unpriced.asked - offered(
                gateway.upstreams, unpriced.asked
            ):
                listed_at = now
                await ask_for_lists(gateway)
            looked_at = now
            await unpriced.write(offered(gateway.upstreams, unpriced.asked).__contains__)
        except Exception as error:  # whatever it is, it must not end the gateway
            log(logging.WARNING, "refused models not written", **shown_error(error))


async def ask_for_lists(gateway: Gateway) -> None:
    """Ask the upstreams for their lists of models, which they then have."""
    usable = [each for each in gateway.upstreams if each.usable and not each.is_client]
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LISTING_SECONDS):
            await asyncio.gather(*(each.models() for each in usable), return_exceptions=True)


def offered(upstreams: Iterable[Upstream], models: set[str]) -> set[str]:
    """Return the models that an upstream offers. There may be a thousand, and lists as long: each
    list is read once."""
    found: set[str] = set()
    for upstream in upstreams:
        if listed := upstream.listed:
            found |= models.intersection(listed)
        else:
            found |= {each for each in models - found if offers(upstream, each)}
    return found


def offers(upstream: Upstream, model: str) -> bool:
    """Return whether an upstream offers a model, as far as it says so."""
    if listed := upstream.listed:
        return model in listed
    if model in upstream.settings.models and not is_pattern(model):
        return True
    starts = [PATTERN.split(each, maxsplit=1)[0] for each in upstream.settings.models]
    if not any(len(each) >= MIN_START and model.startswith(each) for each in starts):
        return False
    return upstream.serves(model)
