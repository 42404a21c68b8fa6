"""Errors as clients see them."""

from __future__ import annotations

import httpx2


def error(answer: httpx2.Response) -> tuple[int, str, str | None]:
    """Return an answer's status, and its error's code and parameter."""
    said = answer.json()["error"]
    return answer.status_code, said["code"], said["param"]
