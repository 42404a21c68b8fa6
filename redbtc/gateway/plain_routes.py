"""Functions as routes, and the answers to what is not served."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from starlette.routing import Match, Route

from redbtc.gateway.endpoints import RESPONSES
from redbtc.gateway.health import HealthRoutes
from redbtc.headers import header
from redbtc.refusals import Refusal
from redbtc.server.asgi import App, Receive, Scope, Send
from redbtc.server.cors import PATHS
from redbtc.server.websocket_protocol import UPGRADE

PATH_PARAMETER = re.compile(r"\{(\w+)(?::\w+)?\}")


class AsApp:
    """A function as an ASGI app. (Starlette's Route takes a function for a handler of requests.)"""

    def __init__(self, function: App) -> None:
        self._function = function

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._function(scope, receive, send)


class ExactRoute(Route):
    """A route that leaves requests with other methods to the router's default, which knows all
    routes of a path."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, child = super().matches(scope)
        return (match, child) if match is Match.FULL else (Match.NONE, {})


def get_route(path: str, function: App) -> Route:
    """Return the route of GET requests for a path to an app that is a function."""
    return ExactRoute(path, AsApp(function), methods=["GET"])


class NotServed:
    """The app of requests that no route serves: 405 with the methods of the path, if it has others,
    else 404 with a list of what is served. Neither reads the body or asks for a key."""

    def __init__(
        self, metered: Sequence[str], routes: Sequence[Route], health: HealthRoutes
    ) -> None:
        """`metered` are the paths of POST requests that are not in `routes`. `health` answers CORS
        preflights."""
        self._metered = frozenset(metered)
        self._routes = routes
        self._health = health
        self._listed = listed([*((path, "POST") for path in metered), *paths_under_v1(routes)])

    async def __call__(self, scope: Scope, _: Receive, send: Send) -> None:
        method, path = scope.get("method", "GET"), scope["path"]
        is_under_v1 = path.startswith(PATHS)
        if method == "OPTIONS" and is_under_v1 and await self._health.preflight(scope, send):
            return
        if scope["type"] == "http":
            check_upgrade(scope)
        is_plain = b"%2f" not in scope["raw_path"].lower()  # else it climbs to another path
        methods = self._methods(path) if is_plain else set()
        if methods and method not in methods:  # a WebSocket may ask by GET for a path that has it
            raise self._other_method(method, path, methods)
        raise Refusal("unknown_url", f"Unknown request URL. {self._listed}")

    def _methods(self, path: str) -> set[str]:
        """Return the methods that are served at a path."""
        found = {"POST"} if path in self._metered else set()
        for route in self._routes:
            if route.methods and route.path_regex.match(path):
                found |= route.methods
        return found

    def _other_method(self, method: str, path: str, methods: set[str]) -> Refusal:
        if path.startswith(PATHS) and method != "OPTIONS" and self._health.has_preflights():
            methods = {*methods, "OPTIONS"}
        allowed = ", ".join(sorted(methods))
        message = f"The method {method} is not allowed here. Allowed: {allowed}."
        return Refusal("method_not_allowed", message, headers=[(b"allow", allowed.encode())])


def paths_under_v1(routes: Iterable[Route]) -> list[tuple[str, str]]:
    """Return the paths of routes under /v1, each with its methods, except HEAD."""
    found = [(route.path, method) for route in routes for method in route.methods or ()]
    return [(path, method) for path, method in found if path.startswith(PATHS) and method != "HEAD"]


def listed(served: list[tuple[str, str]]) -> str:
    """Return a sentence that lists these paths under /v1 by their methods."""
    by_method: dict[str, list[str]] = {}
    for path, method in served:
        shown = PATH_PARAMETER.sub(r"{\1}", path.removeprefix(PATHS))
        by_method.setdefault(method, []).append(shown)
    parts = [f"{method} {', '.join(paths)}" for method, paths in by_method.items()]
    return f"Served under {PATHS.rstrip('/')}: {'; '.join(parts)}."


def check_upgrade(scope: Scope) -> None:
    """Raise Refusal for a WebSocket that no upstream offers: Codex asks for one by GET
    /v1/responses, and 426 makes it use POST at once."""
    upgrade = (header(scope["headers"], b"upgrade") or b"").lower()
    if (scope["method"], scope["path"], upgrade) == ("GET", RESPONSES.path, b"websocket"):
        raise Refusal("upgrade_required", headers=UPGRADE)


async def unknown_url(scope: Scope, _: Receive, send: Send) -> None:
    """Refuse a request for anything that is not served."""
    raise Refusal("unknown_url")
