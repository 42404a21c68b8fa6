"""The upstreams of the settings, and which of them may take a request."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from redbtc.config import UpstreamSettings
from redbtc.upstream.upstreams import Upstream, choose


class Upstreams:
    """The upstreams of the settings that are in force, in their order."""

    def __init__(self, settings: tuple[UpstreamSettings, ...]) -> None:
        self._upstreams = [Upstream(each) for each in settings]
        self._closing: set[asyncio.Task[None]] = set()

    def __iter__(self) -> Iterator[Upstream]:
        return iter(self._upstreams)

    def apply(self, settings: tuple[UpstreamSettings, ...]) -> None:
        """Use other settings from the next request on. Upstreams that are unchanged keep their
        connections; the connections of the others end with their requests."""
        before = self._upstreams
        kept = {upstream.settings: upstream for upstream in before}
        self._upstreams = [kept.get(each) or Upstream(each) for each in settings]
        for upstream in before:
            if upstream not in self._upstreams:
                task = asyncio.create_task(upstream.close())
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)

    def named(self, name: str) -> Upstream | None:
        """Return the upstream of that name, None if the settings have none."""
        return next((upstream for upstream in self._upstreams if upstream.name == name), None)

    def choose(self, model: str, only: str | None = None) -> list[Upstream]:
        """Return the upstreams that may take a request for a model, the first to try in front.
        `only` is the name of the one that stores what the request builds on. Raises Refusal."""
        return choose(self._upstreams, model, only)

    def serve(self, model: str) -> bool:
        """Return whether an upstream serves the model."""
        return any(upstream.serves(model) for upstream in self._upstreams)

    def listed_models(self) -> set[str]:
        """Return the models that upstreams have listed so far."""
        return {name for upstream in self._upstreams for name in upstream.listed}

    def offer_websocket(self) -> bool:
        """Return whether an upstream speaks WebSocket. If none does, an upgrade is answered 426."""
        return any(upstream.speaks_websocket for upstream in self._upstreams)
