"""A receiver of a webhook's messages."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any, NamedTuple

SECRET = "whsec_c2VjcmV0IG9mIHRoZSB0ZXN0IQ=="


class Post(NamedTuple):
    """A request to the webhook."""

    headers: dict[str, str]
    body: bytes
    status: int  # with which it was answered

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def content(self) -> Any:
        return json.loads(self.body)

    @property
    def told(self) -> tuple[str, str]:
        """The type, and the upstream that it is about."""
        return self.content["type"], self.content["data"].get("upstream", "")


class Hook:
    """What was posted. `answer` is called with each message's id, and returns the status."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/hook"
        self.posts: list[Post] = []
        self.answer: Callable[[str], int] = lambda _: 204

    @property
    def accepted(self) -> list[Post]:
        return [post for post in self.posts if post.status < 300]

    def fails_first(self, message_id: str) -> int:
        """Fail the first time for each message."""
        return 204 if message_id in {post.id for post in self.posts} else 500

    def settings(self) -> str:
        """The settings of a gateway, without the table's name, for the secret in HOOK_SECRET."""
        return f'webhook_url = "{self.url}"\nwebhook_secret_env = "HOOK_SECRET"\n'


@contextmanager
def receiving() -> Iterator[Hook]:
    """Listen on loopback until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            status = hook.answer(self.headers["webhook-id"])
            hook.posts.append(Post(dict(self.headers), body, status))
            self.send_response(status)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    hook = Hook(server.server_port)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hook
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
