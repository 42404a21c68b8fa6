"""Read a list of prices from a file, standard input or an https URL, within bounds."""

from __future__ import annotations

import stat
import sys
import time
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

import httpx2

from redbtc.errors import UserError
from redbtc.upstream.certificates import system_context

LITELLM_URL = (
    "https://raw.githubusercontent.com/BerriAI/litellm/main/model_prices_and_context_window.json"
)
MAX_LIST_BYTES = 32 << 20  # LiteLLM's has 3 MB
MAX_FETCH_SECONDS = 60  # all redirects together
SILENCE_SECONDS = 20
MAX_REDIRECTS = 5
REDIRECTS = (301, 302, 303, 307, 308)


def read_price_list(source: str) -> str:
    """Return the text of a list: of a file, of standard input ("-"), or of an https URL. Raises
    UserError."""
    if source == "-":
        data = bounded(sys.stdin.buffer, "standard input")
    elif "://" in source:
        data = fetch_list(source)
    else:
        data = read_file(Path(source))
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: not valid UTF-8: {error.reason}") from None


def read_file(path: Path) -> bytes:
    """Return the content of a file. Raises UserError."""
    try:
        with path.open("rb") as file:
            if stat.S_ISREG(path.stat().st_mode) and path.stat().st_size > MAX_LIST_BYTES:
                raise too_large(str(path))
            return bounded(file, str(path))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def bounded(file: BinaryIO, name: str) -> bytes:
    """Return all that a file has. Raises UserError if that is too much for a list of prices."""
    data = file.read(MAX_LIST_BYTES + 1)
    if len(data) > MAX_LIST_BYTES:
        raise too_large(name)
    return data


def too_large(name: str) -> UserError:
    """Return the error for a list that is too large."""
    return UserError(f"{name} has more than {MAX_LIST_BYTES >> 20} MiB: this is no list of prices")


def fetch_list(url: str) -> bytes:
    """Return what an https URL has. Redirects to other https URLs are followed. No credentials are
    sent, and no proxy of the environment is used. Raises UserError."""
    deadline = time.monotonic() + MAX_FETCH_SECONDS
    with httpx2.Client(
        verify=system_context(),
        trust_env=False,
        timeout=SILENCE_SECONDS,
        headers={"accept-encoding": "identity"},
    ) as client:
        for _ in range(MAX_REDIRECTS + 1):
            check_url(url)
            try:
                with client.stream("GET", url) as response:
                    if response.status_code not in REDIRECTS:
                        return content_of_list(response, url, deadline)
                    url = str(response.url.join(response.headers.get("location", "")))
            except (httpx2.HTTPError, httpx2.InvalidURL) as error:
                raise UserError(f"{url}: {error or type(error).__name__}") from None
    raise UserError(f"{url}: more than {MAX_REDIRECTS} redirects")


def check_url(url: str) -> None:
    """Raise UserError if a list must not be fetched from a URL."""
    parts = urlsplit(url)
    if parts.scheme != "https" or not parts.hostname:
        raise UserError(f"{url}: lists are fetched from https URLs only")
    if "@" in parts.netloc:
        raise UserError("a URL with a user name or password can't be used; download the list first")


def content_of_list(response: httpx2.Response, url: str, deadline: float) -> bytes:
    """Return the body of an answer. Raises UserError, httpx2.HTTPError."""
    if response.status_code != 200:
        raise UserError(f"{url}: the server answered with status {response.status_code}, not 200")
    if response.headers.get("content-encoding", "identity") != "identity":
        raise UserError(f"{url}: the answer is compressed, although that was not asked for")
    data = bytearray()
    for chunk in response.iter_raw():
        data += chunk
        if len(data) > MAX_LIST_BYTES:
            raise too_large(url)
        if time.monotonic() > deadline:
            raise UserError(f"{url}: not complete after {MAX_FETCH_SECONDS} seconds")
    return bytes(data)
