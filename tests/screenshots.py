"""Pictures of every page of the dashboard, light and dark, wide and narrow, with a month of made-up
usage: `make screenshots` writes them to build/screenshots, and the README's two to docs/."""

from __future__ import annotations

import random
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from conftest import needs
from gateway import ROOT, Gateway
from playwright.sync_api import Browser, sync_playwright
from test_dashboard import OPERATORS_PAGES, PAGES, PASSWORD
from upstream import Upstream

from redbtc_settings import now_ms

MODELS = (("gpt-5.5", 5_000_000), ("gpt-5.4-mini", 400_000), ("gpt-image-2", 9_000_000))
OUTCOMES = ("completed",) * 30 + ("client_disconnected", "upstream_error", "upstream_failed")
REQUEST = """
    INSERT INTO requests (request_id, account_id, key_id, endpoint, model, requested_model,
                          upstream, started_at, first_byte_ms, duration_ms, status, outcome,
                          usage_source, input_tokens, cached_input_tokens, output_tokens, cost,
                          month)
    SELECT ?, account_id, id, '/v1/responses', ?2, ?2, ?3, ?4, ?5, ?6, 200, ?7, 'upstream', ?8, ?9,
           ?10, ?11, strftime('%Y-%m', ?4 / 1000, 'unixepoch') FROM keys WHERE id = ?12"""
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
                chance.choice(OUTCOMES),
                chance.randrange(200, 9000),
                chance.randrange(0, 200),
                chance.randrange(20, 3000),
                round(cost * chance.random() * 20),
                chance.choice(keys),
            )
            database.execute(REQUEST, values)
    return str(ids[0])


def shoot(browser: Browser, gateway: Gateway, account: str, cookie: str) -> None:
    """Every page."""
    folder, docs = ROOT / "build" / "screenshots", ROOT / "docs"
    docs.mkdir(exist_ok=True)
    paths = [f"accounts/{account}{page}" for page in PAGES if page[:9] != "/billing/"]
    schemes: tuple[Literal["light", "dark"], ...] = ("light", "dark")
    for scheme in schemes:
        for width in (1280, 360):
            size = {"width": width, "height": 900}
            context = browser.new_context(color_scheme=scheme, viewport=size)  # type: ignore[arg-type]
            context.add_cookies([{"name": "redbtc", "value": cookie, "url": gateway.url}])
            page = context.new_page()
            for path in ["login", *OPERATORS_PAGES, *paths, "you"]:
                page.goto(f"{gateway.url}/dashboard/{path}")
                name = path.replace(account, "").replace("/", "-").strip("-")
                file = folder / f"{name}-{scheme}-{width}.png"
                page.screenshot(path=file, full_page=True)
            context.close()
        small = {"width": 1100, "height": 1020}
        context = browser.new_context(color_scheme=scheme, viewport=small)  # type: ignore[arg-type]
        context.add_cookies([{"name": "redbtc", "value": cookie, "url": gateway.url}])
        page = context.new_page()
        page.goto(f"{gateway.url}/dashboard/accounts/{account}")
        page.screenshot(path=docs / f"dashboard-{scheme}.png")
        context.close()


def main() -> None:
    """Take them."""
    with tempfile.TemporaryDirectory() as folder, Upstream() as upstream:
        gateway = Gateway(Path(folder) / "gateway", upstream.url)
        account = fill(gateway)
        link = gateway.cli("user", "add", "ada@example.com", "--operator")["link"]
        gateway.start()
        with sync_playwright() as playwright:
            path = needs("chromium")
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
            page = browser.new_page()
            page.goto(gateway.url + urlsplit(link).path)
            page.get_by_label("Password", exact=True).fill(PASSWORD)
            page.get_by_label("Password again").fill(PASSWORD)
            page.get_by_role("button").click()
            page.wait_for_url("**/overview")
            (cookie,) = [each for each in page.context.cookies() if each["name"] == "redbtc"]
            shoot(browser, gateway, account, cookie["value"])
            browser.close()
        gateway.close()


if __name__ == "__main__":
    main()
