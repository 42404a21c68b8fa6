"""The webhook: notices of budgets go to the address in the settings, each until it is taken, with
growing pauses, across restarts. They are signed as Standard Webhooks are (standardwebhooks.com),
which OpenAI's SDKs check with `client.webhooks.verify_signature`.
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
from collections.abc import Callable

import httpx2
import orjson

from redbtc.billing.books import Billing
from redbtc.billing.records import Notice
from redbtc.errors import StorageUnavailable
from redbtc.times import DAY

LogFunction = Callable[..., None]  # the gateway's log: level, event, fields

WEBHOOK_SECONDS = 10
WEBHOOK_FOR = 3 * DAY
MAX_PAUSE = 3600.0


def signature(secret: str, message_id: str, timestamp: str, body: bytes) -> str:
    """Standard Webhooks: v1, HMAC-SHA256 over id, time and body, with a secret that is in base64
    after whsec_, or else as it is."""
    key = secret.encode()
    if secret.startswith("whsec_"):
        with contextlib.suppress(ValueError):
            key = base64.b64decode(secret.removeprefix("whsec_"))
    signed = f"{message_id}.{timestamp}.".encode() + body
    return "v1," + base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()


async def post(
    client: httpx2.AsyncClient, url: str, secret: str, notice: Notice, log: LogFunction
) -> bool:
    """Whether the webhook took it."""
    facts = ("account", "key_id", "month", "percent", "text")
    body = {
        "type": "budget.reached",
        "timestamp": notice.created_at,
        "data": {name: getattr(notice, name) for name in facts},
    }
    content, timestamp = orjson.dumps(body), str(int(time.time()))
    try:
        headers = {
            "content-type": "application/json",
            "webhook-id": notice.id,
            "webhook-timestamp": timestamp,
            "webhook-signature": signature(secret, notice.id, timestamp, content),
        }
        answer = await client.post(url, content=content, headers=headers)
    except Exception as error:  # whatever it is, one notice must not end the gateway
        log(logging.WARNING, "webhook failed", notice=notice.id, error=type(error).__name__)
        return False
    if not answer.is_success:
        log(logging.WARNING, "webhook refused", notice=notice.id, status=answer.status_code)
    return answer.is_success


async def post_all(books: Billing, log: LogFunction) -> bool:
    """Post what has not been taken yet; whether all of it was taken now."""
    url = books.settings.webhook_url
    secret = os.environ.get(books.settings.webhook_secret_env, "")
    if not (url and secret):
        return True
    waiting = await books.undelivered(books.store.time() - WEBHOOK_FOR)
    if not waiting:
        return True
    async with httpx2.AsyncClient(timeout=WEBHOOK_SECONDS, trust_env=False) as client:
        for notice in waiting:
            if await post(client, url, secret, notice, log):
                await books.delivered(notice.id)
    return not await books.undelivered(books.store.time() - WEBHOOK_FOR)


async def post_for_ever(books: Billing, log: LogFunction) -> None:
    """Post notices for as long as the gateway runs."""
    pause: float | None = 0.0
    while True:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause):
                await books.noticed.wait()
        books.noticed.clear()
        done = False
        with contextlib.suppress(sqlite3.Error, StorageUnavailable):
            done = await post_all(books, log)
        pause = None if done else min(MAX_PAUSE, max(1.0, 2 * (pause or 0.0)))
