"""Users of the dashboard, who log in with clients that run no scripts."""

from __future__ import annotations

from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx2

from tests.helpers.gateway import USUAL, Gateway

PASSWORD = "correct horse battery staple 7"
OTHER_PASSWORD = "tangerine lighthouse umbrella 42"


class Login(NamedTuple):
    """A logged-in user with an HTTP client that runs no scripts."""

    client: httpx2.Client
    user: dict[str, Any]

    def get(self, path: str, status: int = 200) -> httpx2.Response:
        answer = self.client.get(path)
        assert answer.status_code == status, (path, answer.status_code, answer.text)
        return answer

    def post(self, path: str, **form: str) -> httpx2.Response:
        return self.client.post(path, data=form)


def anonymous(gateway: Gateway, **headers: str) -> httpx2.Client:
    headers = {"origin": gateway.url, **headers}
    return httpx2.Client(base_url=gateway.url, headers=headers, **USUAL)


def new_user(gateway: Gateway, email: str, role: str = "operator", account: str = "") -> Login:
    """Return the login of a new user, whose password is PASSWORD."""
    body = {"email": email, "role": role, **({"account": account} if account else {})}
    user = gateway.api("POST", "/users", body)
    client = anonymous(gateway)
    answer = client.post(
        urlsplit(user["link"]).path, data={"password": PASSWORD, "again": PASSWORD}
    )
    assert (answer.status_code, answer.headers["location"]) == (303, "/dashboard/"), answer.text
    return Login(client, user)


def log_in(client: httpx2.Client, email: str, password: str, **headers: str) -> httpx2.Response:
    form = {"email": email, "password": password}
    return client.post("/dashboard/login", data=form, headers=headers)
