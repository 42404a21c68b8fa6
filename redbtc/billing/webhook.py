"""Deliver messages to the webhook in the settings.

Each message is posted until the webhook accepts it, with growing pauses, across restarts, for at
most WEBHOOK_FOR. Requests are signed according to Standard Webhooks (standardwebhooks.com), which
OpenAI's SDKs check with `client.webhooks.verify_signature`.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import logging
import sqlite3
import time
from collections.abc import Mapping
from typing import Any

import httpx2
import orjson

from redbtc.billing.billing import Billing
from redbtc.billing.webhook_messages import (
    UnstoredMessage,
    Webhook,
    WebhookAnswer,
    WebhookMessages,
    subject_of,
)
from redbtc.errors import Conflict, StorageUnavailable
from redbtc.store.failures import LogFunction
from redbtc.store.json_values import json_time, new_id

WEBHOOK_SECONDS = 10
MAX_RETRY_SECONDS = 3600.0  # seconds
MAX_UNSTORED_RETRY_SECONDS = 60.0  # of messages in memory, which end with the process


def signature(secret: str, message_id: str, timestamp: str, body: bytes) -> str:
    """Return the signature of a message as Standard Webhooks define it: v1, HMAC-SHA256 over id,
    time and body. A secret that begins with whsec_ is in base64."""
    key = secret.encode()
    if secret.startswith("whsec_"):
        with contextlib.suppress(ValueError):
            key = base64.b64decode(secret.removeprefix("whsec_"))
    signed = f"{message_id}.{timestamp}.".encode() + body
    return "v1," + base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()


def webhook_client() -> httpx2.AsyncClient:
    """Return a client for requests to the webhook."""
    return httpx2.AsyncClient(timeout=WEBHOOK_SECONDS, trust_env=False)


async def post(
    client: httpx2.AsyncClient, webhook: Webhook, message_id: str, body: Mapping[str, Any]
) -> WebhookAnswer:
    """Post a message to the webhook. Return what it answered."""
    content, timestamp = orjson.dumps(body), str(int(time.time()))
    try:
        headers = {
            "content-type": "application/json",
            "webhook-id": message_id,
            "webhook-timestamp": timestamp,
            "webhook-signature": signature(webhook.secret, message_id, timestamp, content),
        }
        async with (
            asyncio.timeout(WEBHOOK_SECONDS),
            client.stream("POST", webhook.url, content=content, headers=headers) as response,
        ):  # the status says it all: a body can be endless
            status, delivered = response.status_code, response.is_success
    except Exception as error:  # no error of one message may end the gateway
        return WebhookAnswer(delivered=False, status=None, error=type(error).__name__)
    return WebhookAnswer(delivered=delivered, status=status, error=None)


async def post_all(billing: Billing, log: LogFunction) -> bool:
    """Post all messages that have not been accepted. Return whether none is left. What follows a
    message about the same subject that is not accepted must not overtake it: it waits, too. While
    the ledger can't commit, only messages in memory are posted: of others, it could not be noted
    that they were delivered. Messages about the gateway wait for no others: there may be hundreds,
    and the webhook may be slow."""
    messages = billing.messages
    webhook = messages.webhook
    if webhook is None:
        return True
    failed: set[str] = set()  # subjects
    if messages.unstored:
        await post_unstored(webhook, messages, failed, log)
    if not billing.store.healthy:
        return not messages.unstored
    waiting = [each for each in await messages.waiting() if each.id not in messages.sent_unstored]
    if not waiting:
        return True
    waiting.sort(key=lambda each: subject_of(each.type, each.data) is None)
    async with webhook_client() as client:
        for message in waiting:
            subject = subject_of(message.type, message.data)
            if subject in failed:
                continue
            body = {"type": message.type, "timestamp": message.created_at, "data": message.data}
            answer = await post(client, webhook, message.id, body)
            log_answer(message.id, answer, log)
            await messages.note_answer(message.id, answer)
            if answer.delivered and messages.wakeup.is_set():
                return False  # what was added meanwhile may be about the gateway
            if subject and not answer.delivered:
                failed.add(subject)
    return not await messages.waiting()


async def post_unstored(
    webhook: Webhook, messages: WebhookMessages, failed: set[str], log: LogFunction
) -> None:
    """Post the messages in memory, in their order. Add the subjects of those that are not accepted
    to `failed`."""
    async with webhook_client() as client:
        for message in list(messages.unstored):
            subject = subject_of(message.kind, message.data)
            if subject in failed:
                continue
            answer = await post(client, webhook, message.id, webhook_body(message))
            log_answer(message.id, answer, log)
            messages.note_answer_to_unstored(message, answer)
            if subject and not answer.delivered:
                failed.add(subject)


def webhook_body(message: UnstoredMessage) -> Mapping[str, Any]:
    """Return the body with which a message in memory is posted."""
    timestamp = json_time(message.created_at)
    return {"type": message.kind, "timestamp": timestamp, "data": message.data}


def log_answer(message_id: str, answer: WebhookAnswer, log: LogFunction) -> None:
    """Log that a message was not accepted."""
    if answer.status is None:
        log(logging.WARNING, "webhook failed", webhook_id=message_id, error=answer.error)
    elif not answer.delivered:
        log(logging.WARNING, "webhook refused", webhook_id=message_id, status=answer.status)


async def post_test(billing: Billing) -> WebhookAnswer:
    """Post a message of the type webhook.test, once, and return what the webhook answered. Raises
    Conflict if there is no webhook."""
    webhook = billing.messages.webhook
    if webhook is None:
        raise Conflict(
            "there is no webhook: set billing.webhook_url, and billing.webhook_secret_env to the "
            "name of an environment variable that has the secret"
        )
    body = {
        "type": "webhook.test",
        "timestamp": json_time(billing.store.time()),
        "data": {"text": "This is a test of the webhook."},
    }
    async with webhook_client() as client:
        return await post(client, webhook, new_id("msg"), body)


async def post_for_ever(billing: Billing, log: LogFunction) -> None:
    """Post messages for as long as the gateway runs."""
    pause: float | None = 0.0
    wakeup = billing.messages.wakeup
    while True:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause):
                await wakeup.wait()
        wakeup.clear()
        done = False
        with contextlib.suppress(sqlite3.Error, StorageUnavailable):
            done = await post_all(billing, log)
        if wakeup.is_set():
            continue
        longest = MAX_UNSTORED_RETRY_SECONDS if billing.messages.unstored else MAX_RETRY_SECONDS
        pause = None if done else min(longest, max(1.0, 2 * (pause or 0.0)))
