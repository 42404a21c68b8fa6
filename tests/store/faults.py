"""A disk that is made full, and a request that is then refused."""

from __future__ import annotations

import contextlib
from pathlib import Path

from tests.helpers.gateway import Gateway

RESPONSE = {"model": "gpt-up", "input": "Hi"}


def post(gateway: Gateway, key: str) -> tuple[int, str]:
    """Return the status of a request and its error's code, "" where it has none."""
    with gateway.client(key) as client:
        answer = client.post("/responses", json=RESPONSE)
    error = answer.json().get("error") or {}
    if answer.status_code == 503:
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert int(answer.headers["retry-after-ms"]) >= 1
    return answer.status_code, error.get("code", "")


def fill(file: Path) -> None:
    """Write to a file until its disk is full."""
    with file.open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(b"x" * 4096)
