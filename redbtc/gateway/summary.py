"""The state of the gateway in a line, for the supervisor of the process."""

from __future__ import annotations

from redbtc.gateway.gateway import Gateway


async def summary(gateway: Gateway) -> str:
    """Return whether the gateway serves, and how many requests are in flight."""
    in_flight = f"requests in flight: {gateway.in_flight.count}"
    if gateway.draining:
        return f"Draining; {in_flight}"
    if not gateway.store.healthy:
        return f"Not ready: the ledger can't be written: {gateway.store.failure}"
    if not gateway.upstreams.can_serve():
        return f"Not ready: no upstream can be used; {in_flight}"
    return f"Serving; {in_flight}"
