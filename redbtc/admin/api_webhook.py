"""Operations on the webhook."""

from __future__ import annotations

from redbtc.admin.access import Access
from redbtc.admin.actors import Actor
from redbtc.admin.inputs import NewestQuery
from redbtc.admin.outputs import WebhookMessageList
from redbtc.billing.webhook import post_test
from redbtc.billing.webhook_messages import WebhookAnswer


class WebhookOperations(Access):
    """Operations on the webhook."""

    async def list_webhook_messages(self, actor: Actor, query: NewestQuery) -> WebhookMessageList:
        """List messages to the webhook, and whether they arrived."""
        messages = self.billing.messages
        return WebhookMessageList(
            configured=messages.webhook is not None, messages=await messages.newest(query.limit)
        )

    async def test_webhook(self, actor: Actor) -> WebhookAnswer:
        """Send a test message to the webhook, once, and show what it answered."""
        return await post_test(self.billing)
