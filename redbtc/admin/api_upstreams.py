"""Operations on upstreams."""

from __future__ import annotations

from redbtc.admin.access import Access
from redbtc.admin.actors import Actor
from redbtc.admin.inputs import NewestQuery, NewRest
from redbtc.admin.outputs import (
    UpstreamAtWork,
    UpstreamChangeList,
    UpstreamList,
    UpstreamRested,
)
from redbtc.errors import UserError
from redbtc.store.upstream_changes import newest_upstream_changes
from redbtc.times import DAY, parse_duration

MAX_REST_DAYS = 30


class UpstreamOperations(Access):
    """Operations on upstreams."""

    async def list_upstreams(self, actor: Actor) -> UpstreamList:
        """List the upstreams: the state of each, and how it did in the last 5 minutes."""
        found = self.gateway.at_work()
        return UpstreamList(running=found.running, upstreams=found.upstreams)

    async def rest_upstream(self, actor: Actor, body: NewRest, upstream: str) -> UpstreamRested:
        """Let an upstream rest: send it no more requests for a time. Those in flight go on."""
        duration = 0 if body.duration == "0" else parse_duration(body.duration)
        if not 0 < duration <= MAX_REST_DAYS * DAY:
            raise UserError(f"for must be from 1s to {MAX_REST_DAYS}d, not {body.duration!r}")
        return self.gateway.rest_upstream(upstream, duration / 1000, actor.name)

    async def resume_upstream(self, actor: Actor, upstream: str) -> UpstreamAtWork:
        """End an upstream's rests and outage: send it requests again."""
        return self.gateway.resume_upstream(upstream, actor.name)

    async def list_upstream_changes(self, actor: Actor, query: NewestQuery) -> UpstreamChangeList:
        """List what happened to upstreams: which were taken out, rested or came back, and why."""
        return UpstreamChangeList(await newest_upstream_changes(self.billing.store, query.limit))
