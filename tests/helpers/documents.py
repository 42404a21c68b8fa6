"""Gateways with terms and a privacy policy."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from tests.helpers.gateway import Gateway

PAST = "2020-01-01"


def days_ahead(days: float) -> str:
    """Return a time so many days from now, as the head of a document has it."""
    return f"{datetime.now(UTC) + timedelta(days=days):%Y-%m-%dT%H:%M:%SZ}"


def write_document(
    gateway: Gateway,
    version: str,
    effective: str = PAST,
    text: str = "Be kind.",
    name: str = "terms",
) -> None:
    """Write a document beside the settings file."""
    head = f"---\nversion: {version}\neffective: {effective}\n---\n"
    (gateway.folder / f"{name}.md").write_text(head + text)


def reload(gateway: Gateway, said: str = '"event":"published"') -> None:
    """Let the gateway read its settings again, and wait until it says so in its log."""
    times = gateway.log().count(said)
    gateway.signal(1)
    gateway.wait_for_log(said, times + 1)
