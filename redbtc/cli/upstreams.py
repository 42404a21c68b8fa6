"""The command upstream."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import click

from redbtc.cli.main import CommandContext, commands, json_option, plain, show, table
from redbtc.times import iso_time, now_ms

UPSTREAM_COLUMNS = [
    *("name", "state", "since", "until", "in_flight", "success", "first_byte", "reason")
]


@commands.group()
def upstream() -> None:
    """List upstreams, let them rest, and resume them."""


@upstream.command("list")
@json_option
@click.pass_obj
def upstream_list(context: CommandContext, as_json: bool) -> None:
    """List the upstreams of the running gateway and their states.

    Shows since when, until when and why each is in its state, its requests in flight, and the share
    of successful requests and the median time to the first byte in the last 5 minutes. Times are
    UTC."""
    found = context.call("GET", "/admin/v1/upstreams")
    show(found, as_json, lambda: upstreams_text(found))


def upstreams_text(found: dict[str, Any]) -> str:
    if not found["running"]:
        return "No gateway runs. While it runs, this lists its upstreams."
    today = str(iso_time(now_ms()))[:10]
    rows = []
    for each in found["upstreams"]:
        rate, median = each["success_rate"], each["median_first_byte_ms"]
        shown = {
            "since": short_time(each["since"], today),
            "until": short_time(each["until"], today),
            "success": None if rate is None else f"{rate * 100:.4g} %",
            "first_byte": None if median is None else f"{median} ms",
        }
        rows.append({**each, **shown})
    lines = [table(rows, UPSTREAM_COLUMNS)]
    lines += [
        rest_text(each["name"], rest, today)
        for each in found["upstreams"]
        for rest in each["rests"]
        if rest["model"] or each["state"] == "out"
    ]
    return "\n".join(lines)


def rest_text(name: str, rest: dict[str, Any], today: str) -> str:
    end = short_time(rest["until"], today) or "a request succeeds"
    model = f" for {rest['model']}" if rest["model"] else ""
    return plain(f"{name} rests{model} until {end}: {rest['reason']}")


def short_time(moment: str | None, today: str) -> str | None:
    """Return a time in few characters: without the date if that is today, else without the year
    and the seconds."""
    if moment is None:
        return None
    return moment[11:19] if moment[:10] == today else f"{moment[5:10]} {moment[11:16]}"


def path_of_upstream(name: str, action: str) -> str:
    """Return the path of an action on an upstream in the admin API."""
    return f"/admin/v1/upstreams/{quote(name, safe='')}/{action}"


@upstream.command("rest")
@click.argument("name")
@click.option(
    "--for",
    "duration",
    metavar="DURATION",
    default="10m",
    show_default=True,
    help="How long, such as 90s, 15m or 24h; at most 30d.",
)
@json_option
@click.pass_obj
def upstream_rest(context: CommandContext, name: str, duration: str, as_json: bool) -> None:
    """Send an upstream no requests for a time. Those in flight go on."""
    rested = context.call("POST", path_of_upstream(name, "rest"), {"for": duration})
    until = [rest["until"] for rest in rested["rests"] if rest["model"] is None]
    show(rested, as_json, lambda: f"Upstream {rested['name']} rests until {until[0]}.")
    if unserved := ", ".join(rested["unserved_models"]):
        click.echo(
            plain(f"Warning: no other upstream serves these models meanwhile: {unserved}"), err=True
        )


@upstream.command("resume")
@click.argument("name")
@json_option
@click.pass_obj
def upstream_resume(context: CommandContext, name: str, as_json: bool) -> None:
    """Send an upstream requests again: end its rests, or its outage."""
    resumed = context.call("POST", path_of_upstream(name, "resume"))
    show(resumed, as_json, lambda: f"Upstream {resumed['name']} is sent requests again.")
