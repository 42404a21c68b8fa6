"""Deliver notices of budgets to the webhook in the settings.

Each notice is posted until the webhook accepts it, with growing pauses, across restarts, for at
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
import os
import sqlite3
import time

import httpx2
import orjson

from redbtc.billing.billing import Billing
from redbtc.billing.records import Notice
from redbtc.errors import StorageUnavailable
from redbtc.store.failures import LogFunction
from redbtc.times import DAY

WEBHOOK_SECONDS = 10
WEBHOOK_FOR = 3 * DAY  # milliseconds
MAX_RETRY_SECONDS = 3600.0  # seconds


def signature(secret: str, message_id: str, timestamp: str, body: bytes) -> str:
    """Return the signature of a message as Standard Webhooks define it: v1, HMAC-SHA256 over id,
    time and body. A secret that begins with whsec_ is in base64."""
    key = secret.encode()
    if secret.startswith("whsec_"):
        with contextlib.suppress(ValueError):
            key = base64.b64decode(secret.removeprefix("whsec_"))
    signed = f"{message_id}.{timestamp}.".encode() + body
    return "v1," + base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()


async def post(
    client: httpx2.AsyncClient, url: str, secret: str, notice: Notice, log: LogFunction
) -> bool:
    """Post a notice to the webhook. Return whether the webhook accepted it."""
    fields = ("account", "key_id", "month", "percent", "text")
    body = {
        "type": "budget.reached",
        "timestamp": notice.created_at,
        "data": {name: getattr(notice, name) for name in fields},
    }
    content, timestamp = orjson.dumps(body), str(int(time.time()))
    try:
        headers = {
            "content-type": "application/json",
            "webhook-id": notice.id,
            "webhook-timestamp": timestamp,
            "webhook-signature": signature(secret, notice.id, timestamp, content),
        }
        response = await client.post(url, content=content, headers=headers)
    except Exception as error:  # no error of one notice may end the gateway
        log(logging.WARNING, "webhook failed", notice=notice.id, error=type(error).__name__)
        return False
    if not response.is_success:
        log(logging.WARNING, "webhook refused", notice=notice.id, status=response.status_code)
    return response.is_success


async def post_all(billing: Billing, log: LogFunction) -> bool:
    """Post all notices that have not been accepted. Return whether none is left."""
    url = billing.settings.webhook_url
    secret = os.environ.get(billing.settings.webhook_secret_env, "")
    if not (url and secret):
        return True
    waiting = await billing.notices.undelivered(billing.store.time() - WEBHOOK_FOR)
    if not waiting:
        return True
    async with httpx2.AsyncClient(timeout=WEBHOOK_SECONDS, trust_env=False) as client:
        for notice in waiting:
            if await post(client, url, secret, notice, log):
                await billing.notices.mark_delivered(notice.id)
    return not await billing.notices.undelivered(billing.store.time() - WEBHOOK_FOR)


async def post_for_ever(billing: Billing, log: LogFunction) -> None:
    """Post notices for as long as the gateway runs."""
    pause: float | None = 0.0
    while True:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause):
                await billing.notices.webhook_wakeup.wait()
        billing.notices.webhook_wakeup.clear()
        done = False
        with contextlib.suppress(sqlite3.Error, StorageUnavailable):
            done = await post_all(billing, log)
        pause = None if done else min(MAX_RETRY_SECONDS, max(1.0, 2 * (pause or 0.0)))
