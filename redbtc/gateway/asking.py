"""Requests of the gateway's own about responses that an upstream stores."""

from __future__ import annotations

import httpx2

from redbtc.meter.meters import JSONMeter
from redbtc.meter.report import Report
from redbtc.slices import in_slices
from redbtc.upstream.upstreams import Upstream


async def ask(
    upstream: Upstream, path: str, account_id: str, method: str = "GET"
) -> tuple[int, Report]:
    """Send a request about a response of the account. Return the status of the upstream's answer, 0
    where there is none, and what the answer reports. A member that needs a client's credential is
    not asked: the gateway has none."""
    meter = JSONMeter(images=False)
    if upstream.is_client:
        return 0, meter.report
    try:
        status = await upstream.fetch(path, meter.steps, method)
    except (httpx2.HTTPError, TimeoutError):
        return 0, meter.report
    await in_slices(meter.finish_steps(), account_id)
    return status, meter.report
