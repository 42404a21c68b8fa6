"""A response's body whose beginning is read before it is passed on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import httpx2

from redbtc.upstream.connection import ResponseBody


class BegunBody(httpx2.AsyncByteStream):
    """A body whose first bytes have been read: `begun`. Iterating yields these, then the rest.
    `whole`: nothing follows them. `torn`: why nothing can follow them though the body is not whole;
    iterating then raises it."""

    def __init__(self, body: httpx2.AsyncByteStream) -> None:
        self._body = body
        self._chunks = body.__aiter__()
        self.begun = b""
        self.whole = False
        self.torn: httpx2.HTTPError | None = None

    async def read(self, size: int, seconds: float) -> None:
        """Read until more than `size` bytes have come, or the end, or `seconds` are over. (Waiting
        for a part of one of httpx2's own bodies is not cut short: it could not be read on.)"""
        until = time.monotonic() + seconds
        limit = seconds if isinstance(self._body, ResponseBody) else None
        try:
            async with asyncio.timeout(limit):
                while len(self.begun) <= size and time.monotonic() < until:
                    self.begun += await anext(self._chunks)
        except StopAsyncIteration:
            self.whole = True
        except httpx2.HTTPError as error:
            self.torn = error
        except TimeoutError:
            pass

    async def __aiter__(self) -> AsyncIterator[bytes]:
        if self.begun:
            yield self.begun
        if self.torn:
            raise self.torn
        if not self.whole:
            async for chunk in self._chunks:
                yield chunk

    def stop(self) -> None:
        """Let nothing follow what has been read."""
        self.whole, self.torn = True, None

    async def aclose(self) -> None:
        """Close the body."""
        await self._body.aclose()
