"""A disk that is made full, a request that is then refused, and libraries that make calls to the
system fail."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path

from tests.helpers.gateway import Gateway, MakeGateway
from tests.helpers.tools import needs

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


def build_shim(folder: Path, code: str) -> Path:
    """Return a library for LD_PRELOAD, compiled from C."""
    source, shim = folder / "hang.c", folder / "hang.so"
    source.write_text(code)
    subprocess.run([needs("cc"), "-shared", "-fPIC", "-o", shim, source, "-ldl"], check=True)
    return shim


def on_disk(make_gateway: MakeGateway, disk: Path) -> Gateway:
    gateway = make_gateway(f'[database]\npath = "{disk}/redbtc.db"')
    gateway.database = disk / "redbtc.db"
    return gateway
