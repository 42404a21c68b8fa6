#!/usr/bin/env python3
"""RedBTC AI: an OpenAI-compatible API gateway that is small enough to read.

    authenticate ─► read ─► admit ─► choose ─► open ─► relay ─► settle ─► last byte

Clients point their base URL here. Each request is checked, held to its account's limits, forwarded
byte for byte to an upstream, and written down: what the upstream says was used, committed before
the client sees the end of the answer. The code is in the package beside this file, by subject:

    redbtc/server/        the client's side of HTTP: connections, heads, bodies, WebSocket frames
    redbtc/gateway/       the way of a request, and the routes
    redbtc/request_body/  what must be known of a request's body
    redbtc/limits.py      how much at once and how many a minute
    redbtc/upstream/      the way to the upstreams
    redbtc/meter/         find the usage in an answer
    redbtc/billing/       prices, spending, statements
    redbtc/store/         the ledger's database
    redbtc/admin/         the admin API, which commands and pages use
    redbtc/dashboard/     the pages
    redbtc/cli/           the commands
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take 0.2 s
    from redbtc import start

    start.prepare()

from redbtc.cli import main as command_line
from redbtc.cli import serve  # noqa: F401 (adds its commands)


def main() -> None:
    """Run the command line: redbtc-proxy, or python redbtc_proxy.py."""
    command_line.main()


if __name__ == "__main__":
    main()
