"""The form with which the data of an account is downloaded."""

from __future__ import annotations

from collections.abc import AsyncIterator

from starlette.responses import Response, StreamingResponse

from redbtc.admin.api import API
from redbtc.dashboard.page_request import PageRequest
from redbtc.dashboard.usage_pages import download
from redbtc.server.asgi import request_of


async def download_export(page: PageRequest) -> Response:
    """Return the archive of all that is stored of the account, while it is made."""
    account = await page.ask(API.show_account, account=page.path["account"])
    made = await page.ask(API.export_account, account=account.id)

    async def parts() -> AsyncIterator[bytes]:
        async for part in made:
            if not page.is_logged_in():  # a normal end would make the archive look complete
                request_of(page.request.scope).client.abort()
                return
            yield part

    headers = download(f"export-{account.id}.zip")
    return StreamingResponse(parts(), headers=headers, media_type="application/zip")
