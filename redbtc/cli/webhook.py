"""The command webhook."""

from __future__ import annotations

from typing import Any

import click

from redbtc.cli.main import CommandContext, commands, given, json_option, show, table

MESSAGE_COLUMNS = ["created_at", "type", "state", "tries", "tried_at", "answer", "text"]


@commands.group()
def webhook() -> None:
    """List the messages to billing.webhook_url, and test it."""


@webhook.command("list")
@click.option(
    "--limit",
    type=click.IntRange(1, 1000),
    metavar="N",
    help="Show the newest N messages.  [default: 100]",
)
@json_option
@click.pass_obj
def webhook_list(context: CommandContext, limit: int | None, as_json: bool) -> None:
    """List messages to the webhook, newest first.

    Shows whether each has arrived. A message is tried again until the webhook accepts it, and given
    up after three days."""
    found = context.call("GET", "/admin/v1/webhook", query=given({"limit": limit}))
    show(found, as_json, lambda: messages_text(found))


def messages_text(found: dict[str, Any]) -> str:
    rows = []
    for each in found["messages"]:
        data = each["data"]
        text = f"{data['account']}: {data['text']}" if "account" in data else data["text"]
        rows.append({**each, "answer": each["status"] or each["error"], "text": text})
    lines = [table(rows, MESSAGE_COLUMNS)]
    if not found["configured"]:
        lines.append("No webhook is set (billing.webhook_url and its secret): nothing is sent.")
    return "\n\n".join(lines)


@webhook.command("test")
@json_option
@click.pass_obj
def webhook_test(context: CommandContext, as_json: bool) -> None:
    """Send a test message to the webhook and print its answer.

    Exits with 1 if it did not accept the message."""
    found = context.call("POST", "/admin/v1/webhook/test")
    answer = f"status {found['status']}" if found["status"] else f"no answer ({found['error']})"
    arrived = "arrived" if found["delivered"] else "was not accepted"
    show(found, as_json, lambda: f"The message {arrived}: {answer}.")
    if not found["delivered"]:
        raise SystemExit(1)
