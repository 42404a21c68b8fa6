"""The message to the webhook that the ledger can't be opened. There is no ledger to keep it."""

from __future__ import annotations

import asyncio
import contextlib

from redbtc.billing.webhook import log_answer, post, webhook_body, webhook_client
from redbtc.billing.webhook_messages import (
    UnstoredMessage,
    WebhookAnswer,
    WebhookMessages,
    webhook_of,
)
from redbtc.config import BillingSettings
from redbtc.errors import StorageUnavailable
from redbtc.gateway.operator_messages import unhealthy_finding
from redbtc.store.failures import LogFunction
from redbtc.store.json_values import new_id
from redbtc.times import now_ms

UNOPENED_SECONDS = 5.0  # for which it must have failed to open
MAX_UNOPENED_PAUSE_SECONDS = 60.0  # between two tries to send the message


class UnopenedLedger:
    """Sends one message, once opening has failed for UNOPENED_SECONDS, until the webhook accepts
    it or the ledger is open."""

    def __init__(self, settings: BillingSettings, log: LogFunction) -> None:
        self._settings = settings
        self._log = log
        self._sending: asyncio.Task[None] | None = None
        self._message: UnstoredMessage | None = None
        self._answer: WebhookAnswer | None = None  # the last one

    def note(self, reason: str) -> None:
        """Note that the ledger can't be opened now. It waits for nothing."""
        if self._sending is None:
            self._sending = asyncio.create_task(self._send(reason), name="unopened ledger")

    async def _send(self, reason: str) -> None:
        await asyncio.sleep(UNOPENED_SECONDS)
        kind, data = unhealthy_finding("closed", reason)
        message = self._message = UnstoredMessage(new_id("msg"), kind, data, now_ms())
        pause = 1.0
        async with webhook_client() as client:
            while webhook := webhook_of(self._settings):
                self._answer = await post(client, webhook, message.id, webhook_body(message))
                if self._answer.delivered:
                    return
                log_answer(message.id, self._answer, self._log)
                await asyncio.sleep(pause)
                pause = min(MAX_UNOPENED_PAUSE_SECONDS, 2 * pause)

    async def end(self, messages: WebhookMessages | None) -> None:
        """Stop sending. If the ledger is open, whose messages are `messages`, add the message to
        it, so that the webhook is told when all is well. If it fails again, it has a message of its
        own."""
        if self._sending:
            self._sending.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._sending
        if messages and self._message and webhook_of(self._settings):
            with contextlib.suppress(StorageUnavailable):
                await messages.store_sent(self._message, self._answer)
