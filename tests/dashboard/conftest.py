"""A fixture: logins whose clients are closed at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.helpers.logins import Login


@pytest.fixture
def closing() -> Iterator[Callable[[Login], Login]]:
    logins: list[Login] = []

    def keep(login: Login) -> Login:
        logins.append(login)
        return login

    yield keep
    for login in logins:
        login.client.close()
