"""Pictures of every page of the dashboard, light and dark, wide and narrow, with a month of made-up
usage: `make screenshots` writes them to build/screenshots, and the README's two to docs/."""

from __future__ import annotations

import random
import sqlite3
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import Browser, Page, sync_playwright

from redbtc.times import day_of, now_ms
from tests.dashboard.pages import OPERATORS_PAGES, PAGES, fill_in
from tests.helpers.gateway import ROOT, Gateway
from tests.helpers.logins import new_user
from tests.helpers.tools import needs
from tests.helpers.upstream import Upstream, json_answer
from tests.helpers.uptimes import fill_unpriced, fill_uptime

MODELS = (("gpt-5.5", 5_000_000), ("gpt-5.4-mini", 400_000), ("gpt-image-2", 9_000_000))
OUTCOMES = [  # with the attempts, and the upstream's status and error code
    *[("completed", 1, 200, None)] * 29,
    ("completed", 2, 200, None),
    ("client_disconnected", 1, 200, None),
    ("upstream_error", 3, 429, "rate_limit_exceeded"),
    ("upstream_failed", 1, None, "tls: certificate has expired"),
]
REQUEST = """
    INSERT INTO requests (request_id, account_id, key_id, endpoint, model, requested_model,
                          upstream, started_at, first_byte_ms, duration_ms, status, outcome,
                          usage_source, input_tokens, cached_input_tokens, output_tokens, cost,
                          month, attempts, upstream_status, upstream_error_code)
    SELECT ?, account_id, id, '/v1/responses', ?2, ?2, ?3, ?4, ?5, ?6, ifnull(?9, 502), ?7,
           'upstream', ?11, ?12, ?13, ?14, strftime('%Y-%m', ?4 / 1000, 'unixepoch'), ?8, ?9, ?10
      FROM keys WHERE id = ?15"""
UPSTREAM_CHANGE = """
    INSERT INTO upstream_changes (id, changed_at, upstream, was, state, reason, model, until,
                                  changed_by)
    VALUES (?1, ?2, 'openai/KEY_A', ?3, ?4, ?5, ?6, ?7, ?8)"""
MESSAGE = """
    INSERT INTO webhook_messages (id, type, data, created_at, tries, tried_at, status, error,
                                  delivered_at)
    VALUES (?, ?, json_object('upstream', 'openai/KEY_A', 'text', ?), ?, ?, ?, ?, ?, ?)"""
DAY = 86_400_000


def fill(gateway: Gateway) -> str:
    """Accounts with keys, payments, notices and a month of usage; the first account's id."""
    chance = random.Random(1)
    gateway.cli("price", "import", str(ROOT / "prices.toml"))
    keys, ids = [], []
    for name in ("ada", "grace", "research", "support bot"):
        options = [
            "--monthly-budget",
            "500",
            "--credit-limit",
            "50",
            "--requests-per-minute",
            "600",
        ]
        ids.append(gateway.cli("account", "add", name, *options)["id"])
        gateway.cli("payment", "add", name, "250.00", "--reference", f"inv-{len(ids)}")
        for label in ("laptop", "production"):
            keys.append(gateway.cli("key", "add", name, "--label", label)["id"])
    gateway.cli(
        "notice",
        "add",
        "--kind",
        "maintenance",
        "--effective",
        "3d",
        "--until",
        "4d",
        "An hour of maintenance.",
    )
    gateway.cli("account", "throttle", "support bot", "--factor", "0.5", "--until", "2d")
    with closing(sqlite3.connect(gateway.database)) as database, database:
        for number in range(3000):
            model, cost = chance.choice(MODELS)
            at = now_ms() - round(chance.random() ** 1.3 * 30 * DAY)
            values = (
                f"req_{number:032x}",
                model,
                chance.choice(("openai", "azure")),
                at,
                chance.randrange(150, 900),
                chance.randrange(900, 9000),
                *chance.choice(OUTCOMES),
                chance.randrange(200, 9000),
                chance.randrange(0, 200),
                chance.randrange(20, 3000),
                round(cost * chance.random() * 20),
                chance.choice(keys),
            )
            database.execute(REQUEST, values)
        fill_upstreams(database)
    fill_uptime(gateway.database)
    fill_unpriced(gateway.database, 2)
    return str(ids[0])


def fill_upstreams(database: sqlite3.Connection) -> None:
    """Changes of an upstream, and messages to the webhook about it."""
    at, minute = now_ms() - DAY // 4, 60_000
    for number, (was, state, reason, model, seconds, by) in enumerate(
        [
            ("up", "resting", "rate_limit_exceeded", "gpt-5.5", 20, None),
            ("up", "out", "tls: certificate has expired", None, 30, None),
            ("out", "up", "recovered", None, None, None),
            ("up", "resting", "by hand", None, 600, "ada@example.com"),
            ("resting", "up", "resumed by hand", None, None, "ada@example.com"),
            ("up", "out", "credentials", None, None, None),
        ]
    ):
        changed_at = at + number * 7 * minute
        until = changed_at + seconds * 1000 if seconds else None
        values = (f"upc_{number}", changed_at, was, state, reason, model, until, by)
        database.execute(UPSTREAM_CHANGE, values)
    late, failed = at + 9 * minute, at + 120 * minute
    for number, (kind, text, *answer) in enumerate(
        [
            ("out", "was taken out: tls: certificate has expired.", 1, at, 204, None, at),
            ("back", "serves again: recovered.", 3, late, 200, None, late),
            ("credentials", "rejected the API key.", 5, failed, None, "ConnectTimeout", None),
            ("out", "was taken out: credentials.", 0, None, None, None, None),
        ]
    ):
        told = f"openai/KEY_A {text}"
        database.execute(MESSAGE, (f"msg_{number}", f"upstream.{kind}", told, at, *answer))


def pages(account: str, link: str) -> list[tuple[str, str, Callable[[Page], None] | None]]:
    """Return each page's name and path, and what is done there before the picture is taken."""
    of_account = f"dashboard/accounts/{account}"
    month = day_of(now_ms() // DAY)[:7]
    keys, manage, members = (f"{of_account}/{name}" for name in ("keys", "manage", "members"))
    used = "dashboard/link/used-up"
    return [
        ("login", "dashboard/login", None),
        ("login-refused", "dashboard/login", fill_in("Log in", email="a@b.c", password="x")),
        ("link", link, None),
        ("link-used", used, None),
        ("status", "status", None),
        ("status-day", f"status?day={day_of(now_ms() // DAY - 9)}", None),
        ("not-found", "dashboard/nowhere", None),
        *((name, f"dashboard/{name}", None) for name in (*OPERATORS_PAGES, "you")),
        (
            "user-added",
            "dashboard/users",
            fill_in("Invite operator", add__email="grace@example.com"),
        ),
        *(
            (
                f"account{page.replace('/', '-')}",
                f"{of_account}{page.replace('2026-11', month)}",
                None,
            )
            for page in PAGES
        ),
        ("account-failures", f"{of_account}/usage?failed=true", None),
        ("account-key-added", keys, fill_in("Create key", add__label="ci")),
        ("account-key-refused", keys, fill_in("Create key", add__expires="tomorrow")),
        ("account-member-added", members, fill_in("Invite member", add__email="bob@example.com")),
        ("account-suspended", manage, fill_in("Suspend account", suspend__reason="unpaid")),
        ("account-resumed", manage, fill_in("Resume account")),
    ]


def shoot(browser: Browser, gateway: Gateway, account: str, cookie: str, link: str) -> None:
    """Take pictures of every page, light and dark, wide and narrow."""
    folder, docs = ROOT / "build" / "screenshots", ROOT / "docs"
    cookies: Any = [{"name": "redbtc", "value": cookie, "url": gateway.url}]

    def opened(scheme: Any, width: int, height: int) -> Page:
        size: Any = {"width": width, "height": height}
        context = browser.new_context(color_scheme=scheme, viewport=size)
        context.add_cookies(cookies)
        return context.new_page()

    for scheme in ("light", "dark"):
        for width in (1280, 360):
            page = opened(scheme, width, 900)
            for name, path, then in pages(account, link):
                page.goto(f"{gateway.url}/{path}")
                if then:
                    then(page)
                page.screenshot(path=folder / f"{name}-{scheme}-{width}.png", full_page=True)
            for user in gateway.api("GET", "/users")["users"]:  # those that this round has added
                if not user["password_set_at"] and user["email"] != "new@example.com":
                    gateway.api("DELETE", f"/users/{user['id']}")
            page.context.close()
        page = opened(scheme, 1100, 1020)
        page.goto(f"{gateway.url}/dashboard/accounts/{account}")
        page.screenshot(path=docs / f"dashboard-{scheme}.png")
        page.context.close()


UPSTREAMS = """
[[upstreams]]
name = "openai"
base_url = "{url}"
api_key_envs = ["KEY_A", "KEY_B", "KEY_C"]

[[upstreams]]
name = "azure"
base_url = "{url}"
api_key_env = "TEST_UPSTREAM_KEY"
models = ["gpt-5.4*"]
"""


def use_upstreams(gateway: Gateway, upstream: Upstream) -> None:
    """Let members of the upstreams serve requests, be limited, and rest."""
    gateway.api("POST", "/upstreams/openai/KEY_A/rest", {"for": "12h"})
    body = {"model": "gpt-5.5", "input": "Hi"}
    with gateway.client(gateway.new_key("ada")) as client:
        for _ in range(40):
            client.post("/responses", json=body)
        limited = {"error": {"code": "rate_limit_exceeded", "message": "Slow down."}}
        upstream.script = json_answer(limited, 429, [("retry-after", "600")])
        client.post("/responses", json={**body, "model": "gpt-5.4-mini"})


def main() -> None:
    """Start a gateway with a month of usage and take the pictures."""
    with tempfile.TemporaryDirectory() as folder, Upstream() as upstream:
        settings = UPSTREAMS.format(url=upstream.url)
        keys: dict[str, Any] = {"KEY_A": "a", "KEY_B": "b"}
        gateway = Gateway(Path(folder) / "gateway", upstream.url, settings, **keys)
        account = fill(gateway)
        new = gateway.cli("user", "add", "new@example.com", "--operator")["link"]
        gateway.start()
        use_upstreams(gateway, upstream)
        operator = new_user(gateway, "ada@example.com")
        with closing(operator.client) as client, sync_playwright() as playwright:
            path = needs("chromium")
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
            link = urlsplit(new).path.lstrip("/")
            shoot(browser, gateway, account, client.cookies["redbtc"], link)
            browser.close()
        gateway.close()


if __name__ == "__main__":
    main()
