"""A terminated account is erased from every file, whatever interrupts that, and its statements stay."""

from __future__ import annotations

import contextlib
import json
import random
import re
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.helpers.gateway import NO_TLS, PATIENCE_SECONDS, ROOT, Gateway, MakeGateway
from tests.helpers.leaving import fill_account, marks_in, text_columns, texts_of

pytestmark = pytest.mark.promise_6

MARK = "canary"
STAYS = "remains"
# Columns of an account that can identify it, and are filled by `fill_account`.
IDENTIFYING = {
    "accounts.email",
    "accounts.name",
    "accounts.status_reason",
    "background.most",
    "background.seen",
    "billed_containers.id",
    "changes.after",
    "changes.before",
    "changes.changed_by",
    "estimates.response_id",
    "keys.label",
    "keys.models",
    "notices.text",
    "payments.reason",
    "payments.reference",
    "requests.response_id",
    "requests.upstream_request_id",
    "sessions.browser",
    "stored_objects.id",
    "users.email",
    "webhook_messages.data",
}


def filled(gateway: Gateway, rows: int) -> dict[str, Any]:
    """Make an account that is to leave and one that stays, with `rows` requests each, in the
    database of a stopped gateway, and return the first one."""
    for mark in (MARK, STAYS):
        account = gateway.cli("account", "add", f"The {mark.title()} Company")
        now = round(time.time() * 1000)
        fill_account(gateway.database, account["id"], mark, rows, now)
        if mark == MARK:
            leaves = account
    found: dict[str, Any] = leaves
    return found


def statement(gateway: Gateway, account_id: str) -> dict[str, Any]:
    """Return a statement without the texts that are erased."""
    found: dict[str, Any] = gateway.api("GET", f"/accounts/{account_id}/statements/2026-11")
    for each in found["payments"]:
        assert each.pop("account")
        del each["reference"], each["reason"]
    del found["account"]
    return found


def test_nothing_that_identifies_an_account_is_left(make_gateway: MakeGateway) -> None:
    gateway = make_gateway()
    account = filled(gateway, 400)
    gateway.start()
    assert texts_of(gateway.database, MARK) == IDENTIFYING, "the test fills all of them"
    stays = texts_of(gateway.database, STAYS)
    before = statement(gateway, account["id"])
    assert before["totals"]["requests"] == 400
    done = gateway.run("account", "terminate", account["name"], "--now", "--yes")
    assert done.returncode == 0, done.stderr
    assert "Erasing stored objects" in done.stderr
    assert "was erased" in done.stdout
    assert not marks_in(gateway.folder, MARK)
    assert statement(gateway, account["id"]) == before
    assert texts_of(gateway.database, STAYS) == stays
    changes = gateway.api("GET", "/changes", account=account["id"], limit=1000)["changes"]
    assert {each["kind"] for each in changes} == {"account", "key", "payment", "user"}
    assert gateway.cli("db", "check")["ok"]
    shown = gateway.api("GET", f"/accounts/{account['id']}")
    assert (shown["name"], shown["status"], shown["email"]) == (account["id"], "terminated", None)
    assert shown["erased_at"]
    assert gateway.terminate() == 0
    assert not marks_in(gateway.folder, MARK)
