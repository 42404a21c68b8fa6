"""Users: links, logins and sessions, also where something else happens meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import pytest

from redbtc.admin.passwords import (
    MAX_PER_ADDRESS,
    MAX_PER_NETWORK,
    MAX_QUEUED_OF_SITE,
    Later,
    TooMany,
    scrypt,
)
from redbtc.admin.users import LINK_LASTS, MAX_USER_SESSIONS, Users, hash_of
from redbtc.errors import Conflict, NotFound
from redbtc.store.accounts import Accounts
from redbtc.store.database import Store
from redbtc.store.schema import APPLICATION_ID, migrations, schema
from redbtc.times import now_ms
from tests.helpers.logins import OTHER_PASSWORD, PASSWORD

pytestmark = [pytest.mark.promise_5, pytest.mark.promise_7]


class Changing:
    """A store in which something happens before the next transaction."""

    def __init__(self, store: Store, before: Callable[[], Awaitable[object]]) -> None:
        self._store, self._before = store, before

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def transact(self, *changes: Any, by: str | None = None) -> int:
        await self._before()
        return await self._store.transact(*changes, by=by)


@pytest.mark.slow
@pytest.mark.parametrize("event", ["reset", "remove", "suspend"])
def test_what_ends_a_login_while_it_is_checked_ends_it(tmp_path: Path, event: str) -> None:
    asyncio.run(end_while_it_is_checked(tmp_path, event))


async def end_while_it_is_checked(tmp_path: Path, event: str) -> None:
    async with Store.open(tmp_path / "redbtc.db", "normal") as store:
        users, accounts = Users(store), Accounts(store)
        account = (await accounts.add("a", None, {}, "test")).id
        user = await users.add("ada@example.com", "owner", account, "test")
        link = users.link(user.link)
        assert link is not None
        await users.set_password(link, PASSWORD, "here")
        (login,) = await users.verify("ada@example.com", PASSWORD, "here")
        first = await users.log_in(login.user_id, login.hashed, "")
        assert first is not None
        assert await users.log_in(login.user_id, b"not any more", "", first) is None
        session = users.session(first)
        assert session is not None
        ends: dict[str, Callable[[], Awaitable[object]]] = {
            "reset": lambda: users.reset(login.user_id, "test"),
            "remove": lambda: users.remove(login.user_id, "test"),
            "suspend": lambda: accounts.suspend(account, None, "test"),
        }
        with pytest.raises(NotFound):  # another client has used the link meanwhile
            await users.set_password(link, OTHER_PASSWORD, "here")
        assert users.session(first) is not None
        again = await users.log_in(login.user_id, login.hashed, "")
        ended = users.session(again) if again else None
        assert ended is not None
        await users.end_session(ended.id, ended.user_id)
        another = await users.log_in(login.user_id, login.hashed, "")
        ending = users.session(another) if another else None
        assert ending is not None
        at_last = Users(cast(Store, Changing(store, lambda: users.end_session(*ending[:3:2]))))
        for which, late in ((users, ended), (at_last, ending)):
            with pytest.raises(Conflict, match="session has ended"):
                await which.change_password(late, PASSWORD, OTHER_PASSWORD, "here")
        overtaken = Users(cast(Store, Changing(store, ends[event])))
        assert await overtaken.log_in(login.user_id, login.hashed, "") is None
        assert users.session(first) is None
        if event == "reset":
            link = users.link((await users.reset(login.user_id, "test")).link)
            assert link is not None
            await users.set_password(link, PASSWORD, "here")
            with pytest.raises(Conflict):
                await overtaken.change_password(session, PASSWORD, OTHER_PASSWORD, "here")
            assert not await users.verify("ada@example.com", OTHER_PASSWORD, "here")


async def password_is(users: Users, link: str, password: str, network: str = "here") -> bytes:
    found = users.link(link)
    assert found is not None
    return await users.set_password(found, password, network)


async def is_told(users: Users, password: str, network: str) -> str:
    """Try to log in as op@example.com. Return "in", "no", or why the attempt has to wait."""
    try:
        return "in" if await users.verify("op@example.com", password, network) else "no"
    except Later as error:
        return str(error)


@pytest.fixture
def quick_scrypt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "redbtc.admin.users.scrypt", lambda password, salt: hash_of(f"{password}{salt}")
    )
    monkeypatch.setattr("redbtc.admin.users.check_password", lambda *_: None)


@pytest.mark.usefixtures("quick_scrypt")
def test_who_guesses_from_a_line_with_both_protocols_keeps_no_stranger_out(tmp_path: Path) -> None:
    async def main() -> None:
        async with Store.open(tmp_path / "redbtc.db", "normal") as store:
            users = Users(store)
            user = await users.add("op@example.com", "operator", None, "test")
            await password_is(users, user.link, "right")
            for _ in range(50):
                for network in ("10.0.0.1", "2001:db8::/64"):
                    await is_told(users, "wrong", network)
            assert await is_told(users, "right", "10.0.0.2") == "in"

    asyncio.run(main())


@pytest.mark.usefixtures("quick_scrypt")
def test_a_flood_from_several_networks_leaves_room_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with Store.open(tmp_path / "redbtc.db", "normal") as store:
            users = Users(store)
            user = await users.add("op@example.com", "operator", None, "test")
            hashed = await password_is(users, user.link, "right")
            go = threading.Event()
            monkeypatch.setattr("redbtc.admin.users.scrypt", lambda *_: go.wait() and hashed)
            flood = [
                asyncio.create_task(is_told(users, "wrong", f"network {number % 19}"))
                for number in range(19 * MAX_PER_NETWORK)
            ]
            await asyncio.sleep(0.2)
            asked = asyncio.create_task(is_told(users, "right", "elsewhere"))
            await asyncio.sleep(0.2)
            waits = not asked.done()
            go.set()
            assert (waits, await asked) == (True, "in")
            told = await asyncio.gather(*flood)
            assert len([each for each in told if "logins at once" in each]) == 19 * (
                MAX_PER_NETWORK - MAX_QUEUED_OF_SITE
            )

    asyncio.run(main())


@pytest.mark.usefixtures("quick_scrypt")
def test_a_password_is_set_by_nothing_that_has_expired_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with Store.open(tmp_path / "redbtc.db", "normal") as store:
            users = Users(store)
            ada = await users.add("ada@example.com", "operator", None, "test")
            bob = await users.add("bob@example.com", "operator", None, "test")
            link = users.link(bob.link)
            assert link is not None
            logged_in = await users.log_in(ada.id, await password_is(users, ada.link, "right"), "")
            session = users.session(logged_in) if logged_in else None
            assert session is not None
            later = store.time() + LINK_LASTS
            monkeypatch.setattr(store, "time", lambda: later)
            with pytest.raises(NotFound):
                await users.set_password(link, "new", "here")
            with pytest.raises(Conflict, match="ended"):
                await users.change_password(session, "right", "new", "here")

    asyncio.run(main())


@pytest.mark.usefixtures("quick_scrypt")
def test_a_login_of_one_s_own_is_of_no_use_to_guess_another(tmp_path: Path) -> None:
    """Whoever has a login of the victim's address could set its password to each guess. Then right
    passwords must count, and setting one must count as well."""

    async def main() -> None:
        async with Store.open(tmp_path / "redbtc.db", "normal") as store:
            users, accounts = Users(store), Accounts(store)
            account = (await accounts.add("a", None, {}, "test")).id
            victim = await users.add("op@example.com", "operator", None, "test")
            await password_is(users, victim.link, "right")
            own = await users.add("op@example.com", "owner", account, "test")
            found = []
            for number in range(20):
                reset = await users.reset(own.id, "test")
                try:
                    await password_is(users, reset.link, f"{number}", "his")
                    found.append(len(await users.verify("op@example.com", f"{number}", "his")))
                except TooMany:
                    found.append(0)
            assert found == [1] * (MAX_PER_ADDRESS // 2) + [0] * (20 - MAX_PER_ADDRESS // 2)

    asyncio.run(main())


@pytest.mark.usefixtures("quick_scrypt")
def test_of_too_many_sessions_the_oldest_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oldest sessions end, even if all of them began in the same millisecond."""

    async def main() -> None:
        async with Store.open(tmp_path / "redbtc.db", "normal") as store:
            users = Users(store)
            user = await users.add("ada@example.com", "operator", None, "test")
            hashed = await password_is(users, user.link, "right")
            instant = store.time()
            monkeypatch.setattr(store, "time", lambda: instant)
            begun = []
            for _ in range(MAX_USER_SESSIONS + 5):
                logged_in = await users.log_in(user.id, hashed, "")
                session = users.session(logged_in) if logged_in else None
                assert logged_in is not None
                assert session is not None
                begun.append((logged_in, session.id))
            in_force = [ses for cookie, ses in begun if users.session(cookie)]
            assert in_force == [ses for _, ses in begun[5:]]
            shown = [each.id for each in await users.sessions(user.id, "")]
            assert shown == in_force[::-1]

    asyncio.run(main())


@pytest.mark.slow
@pytest.mark.parametrize("version", [6, 11])
def test_who_was_logged_in_is_logged_in_after_an_upgrade(tmp_path: Path, version: int) -> None:
    """A new password ends the session, although the browsers that a user was known in are gone."""
    path = tmp_path / "redbtc.db"
    sections = migrations(schema())
    cookie, now = "secret", now_ms()
    with contextlib.closing(sqlite3.connect(path)) as database:
        for number in range(1, version + 1):
            database.executescript(sections[number])
        database.executescript(
            f"""
            PRAGMA journal_mode = WAL;
            PRAGMA application_id = {APPLICATION_ID};
            PRAGMA user_version = {version};
            INSERT INTO acting VALUES (1, 'test', 1);
            INSERT INTO users (id, email, role, salt, password, created_at)
            VALUES ('usr_1', 'op@example.com', 'operator', zeroblob(16),
                    x'{scrypt(PASSWORD, bytes(16)).hex()}', 1);
            INSERT INTO sessions
            VALUES ('ses_1', x'{hash_of(cookie).hex()}', 'usr_1', '', {now}, {now});
            INSERT INTO known_browsers VALUES (zeroblob(32), 'usr_1', 1);
            DELETE FROM acting;"""
        )

    async def main() -> None:
        async with Store.open(path, "normal") as store:
            users = Users(store)
            session = users.session(cookie)
            assert session is not None
            assert await is_told(users, PASSWORD, "here") == "in"
            await users.change_password(session, PASSWORD, OTHER_PASSWORD, "here")
            assert users.session(cookie) is None
            tables = [row["name"] async for row in store.rows("SELECT name FROM sqlite_schema")]
            assert not [name for name in tables if "known" in name]

    asyncio.run(main())
