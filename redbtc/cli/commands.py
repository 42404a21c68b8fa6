"""The whole command line: to import this module adds all commands."""

from __future__ import annotations

from redbtc.cli import (
    accounts,
    check,
    codex,
    database,
    export,
    money,
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
    "codex",
    "database",
    "export",
    "main",
    "money",
    "serve",
    "upstreams",
    "usage",
    "users",
    "webhook",
]
