"""The whole command line: to import this module adds all commands."""

from __future__ import annotations

from redbtc.cli import (
    accounts,
    check,
    closing,
    codex,
    database,
    export,
    init,
    money,
    price_diff,
    reload,
    request_log,
    serve,
    upstreams,
    usage,
    users,
    webhook,
)
from redbtc.cli.main import main

__all__ = [
    "accounts",
    "check",
    "closing",
    "codex",
    "database",
    "export",
    "init",
    "main",
    "money",
    "price_diff",
    "reload",
    "request_log",
    "serve",
    "upstreams",
    "usage",
    "users",
    "webhook",
]
