"""Operations for users of Codex CLI, and models for code samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from redbtc.admin.access import Access
from redbtc.admin.actors import Actor
from redbtc.admin.inputs import CodexConfigQuery
from redbtc.admin.outputs import CodexConfig
from redbtc.billing.model_patterns import matches
from redbtc.codex.config_toml import CodexOffer, config_toml
from redbtc.slices import with_turns


class CodexOperations(Access):
    """Operations for users of Codex CLI."""

    async def codex_config(self, actor: Actor, query: CodexConfigQuery) -> CodexConfig:
        """Return what to put into Codex CLI's config.toml. The model is one that the key, given by
        id or label, may use."""
        key = await self.accounts.key_named(query.key) if query.key else None
        own_login = query.own_login == "true" if query.own_login else None
        patterns, base_url = key.models if key else None, f"{self.public_url}/v1"
        return await self.codex_config_for(patterns, base_url, own_login)

    async def codex_config_for(
        self, patterns: Sequence[str] | None, base_url: str, own_login: bool | None = None
    ) -> CodexConfig:
        """Return what to put into Codex CLI's config.toml for a key that is limited to these
        patterns. `own_login` is as for `offer_of`. Raises UserError."""
        offer = self.gateway.codex(own_login)
        model = await self.example_model(patterns, offer)
        is_usable = all(self._fits(model, patterns, offer.serves))
        return CodexConfig(
            config=config_toml(base_url, model, offer, is_usable),
            model=model,
            base_url=base_url,
            websocket=offer.websocket(model),
            catalog=offer.catalog,
        )

    async def example_model(
        self, patterns: Sequence[str] | None, offer: CodexOffer | None = None
    ) -> str:
        """Return a model to try a key with that is limited to these patterns: one that the key may
        use, that an upstream serves and that has a price, as far as there is one; for Codex, one of
        its `offer` if it can be."""
        priced = {price.model for price in self.billing.prices.prices if price.output}
        stems = *sorted(priced, key=lambda name: ("*" in name, name)), *(patterns or ())
        names = (
            *(offer.models if offer else ()),
            self.gateway.example_model,
            *(name.rstrip("*") for name in stems),
        )

        serves = offer.serves if offer else self.gateway.serves
        found = [
            (self._fits(name, patterns, serves), name)
            async for name in with_turns(names)
            if not {*"*?["} & {*name}
        ]
        return max(found, key=lambda each: each[0])[1]

    def _fits(
        self, model: str, patterns: Sequence[str] | None, serves: Callable[[str], bool]
    ) -> tuple[bool, bool, bool]:
        """Return whether a key that is limited to these patterns may use a model, whether an
        upstream serves it, and whether it has a price or needs none."""
        allowed = not patterns or matches(model, patterns)
        return allowed, serves(model), self.billing.may_serve(model)
