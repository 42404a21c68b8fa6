"""Operations for users of Codex CLI, and models for code samples."""

from __future__ import annotations

from collections.abc import Sequence

from redbtc.admin.access import Access
from redbtc.admin.actors import Actor
from redbtc.admin.inputs import CodexConfigQuery
from redbtc.admin.outputs import CodexConfig
from redbtc.billing.model_patterns import matches
from redbtc.codex.config_toml import config_toml
from redbtc.slices import with_turns


class CodexOperations(Access):
    """Operations for users of Codex CLI."""

    async def codex_config(self, actor: Actor, query: CodexConfigQuery) -> CodexConfig:
        """Return what to put into Codex CLI's config.toml. The model is one that the key, given by
        id or label, may use."""
        key = await self.accounts.key_named(query.key) if query.key else None
        return await self.codex_config_for(key.models if key else None, f"{self.public_url}/v1")

    async def codex_config_for(self, patterns: Sequence[str] | None, base_url: str) -> CodexConfig:
        """Return what to put into Codex CLI's config.toml for a key that is limited to these
        patterns."""
        offer = self.gateway.codex
        model = await self.example_model(patterns, offer.models)
        return CodexConfig(
            config=config_toml(base_url, model, offer),
            model=model,
            base_url=base_url,
            websocket=offer.websocket,
            catalog=offer.catalog,
        )

    async def example_model(
        self, patterns: Sequence[str] | None, preferred: Sequence[str] = ()
    ) -> str:
        """Return a model to try a key with that is limited to these patterns: one that the key may
        use, that an upstream serves and that has a price, as far as there is one; one of those that
        are preferred, if it can be."""
        priced = {price.model for price in self.billing.prices.prices if price.output}
        stems = *sorted(priced, key=lambda name: ("*" in name, name)), *(patterns or ())
        names = (
            *preferred,
            self.gateway.example_model,
            *(name.rstrip("*") for name in stems),
        )

        def fits(name: str) -> tuple[bool, bool, bool]:
            allowed = not patterns or matches(name, patterns)
            return allowed, self.gateway.serves(name), self.billing.may_serve(name)

        found = [(fits(name), name) async for name in with_turns(names) if not {*"*?["} & {*name}]
        return max(found, key=lambda each: each[0])[1]
