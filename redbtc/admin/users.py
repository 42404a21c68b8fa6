"""Users: who may log in to the dashboard, how they prove it, and their sessions.

Rule 1. What could let somebody in is never stored: of a password its scrypt, of a one-time link, a
session's cookie and a known browser's the SHA-256 (each is 256 bits of chance).

Rule 2. Nobody learns whether an address has a login. An unknown one costs the same work and gets
the same answer; all logins of one address have the same salt, so that those whose password is right
are found with one scrypt, however many there are.

Rule 3. A session ends for good: with logout, a new password, a new link, the user's removal, the
account's suspension, after IDLE without a sign of it and after LIFETIME in all. Whatever begins or
ends one asks, in the transaction that does so, whether what it was granted for still holds.

Rule 4. Who guesses is slowed down, and nobody else is: not in another network, whoever guesses in
one; not in a browser in which a login was used before (the last MAX_BROWSERS of it), whoever
guesses wherever: it has tries of its own, for the logins that were used there. Right passwords
count as wrong ones do. If they didn't, a login of one's own, whose password is the guess, would
make guesses at another login of its address free, and a try that counts would tell that there is
another one.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import sqlite3
from typing import Literal, NamedTuple

from msgspec import Struct
from msgspec.structs import asdict

from redbtc.admin.passwords import (
    HashingPool,
    HashingSlot,
    Throttle,
    check_password,
    scrypt,
    too_many,
)
from redbtc.errors import Conflict, NotFound, UserError
from redbtc.store.database import Store
from redbtc.store.records import Moment, by_name, new_id, shown_time
from redbtc.times import iso_time


class UserShown(Struct):
    """A login. If `account` is null, it is an operator's."""

    id: str
    email: str
    role: Literal["operator", "owner", "viewer"]
    account: str | None
    account_id: str | None
    password_set_at: Moment | None
    link_expires_at: Moment | None
    created_at: Moment

    @classmethod
    def of(cls, row: sqlite3.Row) -> UserShown:
        """Return the user of a row."""
        columns = {
            **by_name(row),
            "password_set_at": iso_time(row["password_set_at"]),
            "link_expires_at": iso_time(row["link_expires_at"]),
            "created_at": shown_time(row["created_at"]),
        }
        return cls(**columns)


class UserAdded(UserShown):
    """A login and its one-time link to set a password."""

    link: str


class SessionShown(Struct):
    """A session of a browser that is logged in. `this` marks the session that asks."""

    id: str
    browser: str
    created_at: Moment
    seen_at: Moment
    this: bool

    @classmethod
    def of(cls, row: sqlite3.Row, this: str) -> SessionShown:
        """Return the session of a row; `this` is the id of the one that asks."""
        times = {name: shown_time(row[name]) for name in ("created_at", "seen_at")}
        return cls(**{**by_name(row), **times}, this=row["id"] == this)


Role = Literal["operator", "owner", "viewer"]
SALT_BYTES = 16

LINK_LASTS = 7 * 86_400_000  # milliseconds
IDLE = 30 * 60_000
LIFETIME = 12 * 3_600_000
SEEN_EVERY = 60_000  # how exactly it is known when a session was last used
MAX_SESSIONS = 20  # of a user; the oldest ends
MAX_BROWSERS = 20
EMAIL = re.compile(r"[^@\s\x00-\x1f\x7f]{1,64}@[^@\s\x00-\x1f\x7f]{1,189}")
USER = """
    SELECT users.id, users.email, role, accounts.name AS account, account_id, password_set_at,
           link_expires_at, users.created_at
      FROM users LEFT JOIN accounts ON accounts.id = account_id"""
USERS = (
    USER
    + """
     WHERE (?1 IS NULL OR account_id = ?1) AND (?2 IS NULL OR role = ?2)
     ORDER BY account_id IS NOT NULL, account, users.email"""
)
USER_BY_ID = USER + " WHERE users.id = ?"
USERS_BY_EMAIL = USER + " WHERE users.email = ? ORDER BY users.created_at, users.rowid"
ADD_USER = """
    INSERT INTO users (id, email, role, account_id, salt, link, link_expires_at, created_at)
    VALUES (?1, ?2, ?3, ?4, ifnull((SELECT salt FROM users WHERE email = ?2), ?5), ?6, ?7, ?8)"""
REMOVE_USER = "DELETE FROM users WHERE id = ?"
IN_FORCE = f"sessions.created_at > ?2 - {LIFETIME} AND seen_at > ?2 - {IDLE}"  # at ?2
RESET = """
    UPDATE users SET password = NULL, password_set_at = NULL, link = ?, link_expires_at = ?
     WHERE id = ?"""
CANDIDATES = """
    SELECT users.id, users.role, accounts.name, salt, password,
           ifnull(accounts.status, 'active') = 'active'
      FROM users LEFT JOIN accounts ON accounts.id = account_id
     WHERE users.email = ? ORDER BY users.created_at, users.rowid"""
BY_LINK = """
    SELECT users.id, users.email, accounts.name, salt
      FROM users LEFT JOIN accounts ON accounts.id = account_id
     WHERE link = ? AND link_expires_at > ?"""
# A password is set by a link, or by the old one in a session, and only where that is still so.
SET_PASSWORD = """
    UPDATE users SET password = ?1, password_set_at = ?2, link = NULL, link_expires_at = NULL
     WHERE id = ?3 AND """
SET_BY_LINK = SET_PASSWORD + "link = ?4 AND link_expires_at > ?2"
SET_IN_SESSION = f"""{SET_PASSWORD} password = ?4 AND EXISTS (
    SELECT 1 FROM sessions WHERE id = ?5 AND {IN_FORCE})"""
# Somebody logs in with what was checked a moment ago, and only where it is still right.
IF_RIGHT = """
      FROM users LEFT JOIN accounts ON accounts.id = account_id
     WHERE users.id = ?1 AND password = ?2 AND ifnull(accounts.status, 'active') = 'active'"""
ADD_SESSION = f"""
    INSERT INTO sessions (id, hash, user_id, browser, created_at, seen_at)
    SELECT ?3, ?4, users.id, ?5, ?6, ?6 {IF_RIGHT}"""
END_FORMER = f"DELETE FROM sessions WHERE hash = ?3 AND EXISTS (SELECT 1 {IF_RIGHT})"
PRUNE_SESSIONS = f"""
    DELETE FROM sessions WHERE NOT ({IN_FORCE})
        OR (user_id = ?1 AND id NOT IN (SELECT id FROM sessions WHERE user_id = ?1
             ORDER BY created_at DESC, rowid DESC LIMIT {MAX_SESSIONS - 1}))"""
KNOW_BROWSER = f"""
    INSERT INTO known_browsers (hash, user_id, created_at)
    SELECT ?3, users.id, max(?4, ifnull((SELECT max(created_at) + 1 FROM known_browsers
                                          WHERE user_id = ?1), 0)) {IF_RIGHT}
    ON CONFLICT DO UPDATE SET created_at = excluded.created_at"""
PRUNE_BROWSERS = f"""
    DELETE FROM known_browsers WHERE user_id = ?1 AND hash NOT IN (
        SELECT hash FROM known_browsers WHERE user_id = ?1
         ORDER BY created_at DESC LIMIT {MAX_BROWSERS})"""
KNOWN_STILL = """
    UPDATE OR IGNORE known_browsers SET hash = ?2
     WHERE hash = ?1 AND EXISTS (SELECT 1 FROM known_browsers WHERE hash = ?2)"""
IS_KNOWN = "SELECT 1 FROM known_browsers WHERE hash = ? AND user_id = ?"
LOGINS_KNOWN = """
    SELECT users.id, accounts.name AS account, known_browsers.created_at
      FROM known_browsers JOIN users ON users.id = user_id
      LEFT JOIN accounts ON accounts.id = account_id WHERE hash = ? AND users.email = ?"""
SESSION = f"""
    SELECT sessions.id, seen_at, users.id, users.email, role, account_id, accounts.name
      FROM sessions JOIN users ON users.id = user_id
      LEFT JOIN accounts ON accounts.id = account_id
     WHERE hash = ?1 AND {IN_FORCE}"""
SEE = "UPDATE sessions SET seen_at = max(seen_at, ?) WHERE id = ?"
SESSIONS = f"""
    SELECT id, browser, created_at, seen_at FROM sessions
     WHERE user_id = ?1 AND {IN_FORCE}
     ORDER BY seen_at DESC, rowid DESC"""
END_SESSION = "DELETE FROM sessions WHERE id = ? AND user_id = ?"


def no_link() -> NotFound:
    """It never was one, or isn't any more."""
    return NotFound("this link has expired or was already used; ask for a new one")


def signature(email: str, account: str | None) -> str:
    """Who somebody is in the log of changes: the same address in an account is somebody else."""
    return f"{email} of {account}" if account else email


class LoginSession(NamedTuple):
    """Somebody who is logged in. Of an operator both `account_id` and `account` are None."""

    id: str
    seen_at: int
    user_id: str
    email: str
    role: Role
    account_id: str | None
    account: str | None


class Login(NamedTuple):
    """One whose password is right; `account` is a name, None for an operator."""

    user_id: str
    role: Role
    account: str | None
    salt: bytes
    hashed: bytes
    active: bool


class Link(NamedTuple):
    """A one-time link, and whom it is for."""

    hashed: bytes
    user_id: str
    email: str
    account: str | None
    salt: bytes


class LoggedIn(NamedTuple):
    """What a browser gets at login: its cookie, and the one by which it is known from then on."""

    cookie: str
    browser: str


def new_secret() -> str:
    """256 bits."""
    return secrets.token_urlsafe(32)


def hash_of(secret: str) -> bytes:
    """Under which it is stored."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def parse_email(text: str) -> str:
    """An address in the form in which it is compared. Raises UserError."""
    email = text.strip().lower()
    if not EMAIL.fullmatch(email):
        raise UserError(f"{text!r} is not an email address; write it like ada@example.com")
    return email


class Users:
    """All users of one gateway, and their sessions. `by`: who makes the change."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._hashing = HashingPool()
        self._throttle = Throttle()
        self._nobodys_salt = secrets.token_bytes(SALT_BYTES)

    async def all(self, account_id: str | None, role: Role | None) -> list[UserShown]:
        """Those of an account, or of all and the operators; of one role, or of any."""
        return [UserShown.of(row) async for row in self._store.rows(USERS, (account_id, role))]

    async def show(self, user_id: str) -> UserShown:
        """Raises NotFound."""
        user = await self._store.one(USER_BY_ID, (user_id,))
        if user is None:
            raise NotFound(f"user {user_id!r} does not exist")
        return UserShown.of(user)

    async def named(self, name: str, account: str | None, operator: bool) -> UserShown:
        """A user by id or address; where an address has several logins, `account` or `operator`
        tells which. Raises NotFound, Conflict."""
        found = self._store.rows(USERS_BY_EMAIL, (name.lower(),))
        rows = [UserShown.of(row) async for row in found]
        if operator or account:
            rows = [row for row in rows if row.account == account]
        if not rows:
            return await self.show(name)
        if len(rows) > 1:
            raise Conflict(
                f"{name} has {len(rows)} logins; choose one by its account, or the operator login"
            )
        return rows[0]

    async def add(self, email: str, role: Role, account_id: str | None, by: str) -> UserAdded:
        """A new user; `link` in the answer is the secret with which, once, to set a password.
        Raises Conflict where there is one already."""
        email, user_id, link = parse_email(email), new_id("usr"), new_secret()
        now, salt = self._store.time(), secrets.token_bytes(SALT_BYTES)
        values = (user_id, email, role, account_id, salt, hash_of(link), now + LINK_LASTS, now)
        try:
            await self._store.transact((ADD_USER, values), by=by)
        except sqlite3.IntegrityError:
            raise Conflict(f"user {email} already exists") from None
        return UserAdded(**asdict(await self.show(user_id)), link=link)

    async def remove(self, user_id: str, by: str) -> UserShown:
        """And log them out."""
        user = await self.show(user_id)
        await self._store.transact((REMOVE_USER, (user_id,)), by=by)
        return user

    async def reset(self, user_id: str, by: str) -> UserAdded:
        """The password and all sessions end; `link` is a new secret as from `add`."""
        link, expires = new_secret(), self._store.time() + LINK_LASTS
        await self._store.transact((RESET, (hash_of(link), expires, user_id)), by=by)
        return UserAdded(**asdict(await self.show(user_id)), link=link)

    # Passwords

    async def verify(self, email: str, password: str, network: str, browser: str) -> list[Login]:
        """The logins whose address and password these are: none, which takes as long, one, or
        several. `network` is where that is tried, `browser` the cookie by which it is known. Raises
        TooMany, Busy."""
        email = email.strip().lower()
        rows = self._store.rows(LOGINS_KNOWN, (hash_of(browser), email))
        known = {row["id"]: row async for row in rows}
        here = [("login", f"{row['id']} {row['created_at']}") for row in known.values()]
        anywhere = ("network", network), ("address here", f"{network} {email}"), ("address", email)
        accounts = {row["account"] for row in known.values()}
        with self._hashing.room("known" if known else "anybody", network, accounts) as room:
            wait = self._throttle.seconds_to_wait(*anywhere)
            if not known or not wait:
                self._throttle.count(*anywhere)
                return await self._right(room, email, password)
            if not self._throttle.seconds_to_wait(*here):
                self._throttle.count(*here)
                found = await self._right(room, email, password)
                if found := [each for each in found if each.user_id in known]:
                    return found
        raise too_many(self._throttle.seconds_to_wait(*anywhere))  # as in any other browser

    async def _right(self, room: HashingSlot, email: str, password: str) -> list[Login]:
        """The logins whose password it is."""
        rows = [tuple(row) async for row in self._store.rows(CANDIDATES, (email,))]
        salt = rows[0][3] if rows else self._nobodys_salt
        hashed = await room.run(scrypt, password, salt)
        return [
            Login(user_id, role, account, salt, hashed, bool(active))
            for user_id, role, account, _, taken, active in rows
            if taken and hmac.compare_digest(taken, hashed)
        ]

    def link(self, secret: str) -> Link | None:
        """That of a secret, if it is in force. Raises StorageUnavailable."""
        hashed = hash_of(secret)
        found = self._store.look_up(BY_LINK, (hashed, self._store.time()))
        return Link(hashed, *found) if found else None

    async def set_password(self, link: Link, password: str, network: str) -> bytes:
        """Its scrypt; the link is used up. Raises NotFound where it is meanwhile, UserError for a
        password that won't do."""
        with self._hashing.room("known", network, [link.account]) as room:
            self._throttle.count(("link", link.hashed.hex()))
            await room.run(check_password, password, link.email)
            hashed = await room.run(scrypt, password, link.salt)
        values = hashed, self._store.time(), link.user_id, link.hashed
        by = signature(link.email, link.account)
        if not await self._store.transact((SET_BY_LINK, values), by=by):
            raise no_link()
        return hashed

    async def change_password(
        self, session: LoginSession, old_password: str, new_password: str, network: str
    ) -> bytes:
        """The new one's scrypt. All sessions end with it, also this one: a new one is to be begun.
        Raises UserError."""
        user_id, email = session.user_id, session.email
        with self._hashing.room("known", network, [session.account]) as room:
            self._throttle.count(("login", f"{user_id}, logged in"))
            logins = await self._right(room, email, old_password)
            found = [each for each in logins if each.user_id == user_id]
            if not found:
                raise UserError("the current password is wrong")
            await room.run(check_password, new_password, email)
            hashed = await room.run(scrypt, new_password, found[0].salt)
        values = hashed, self._store.time(), user_id, found[0].hashed, session.id
        by = signature(email, session.account)
        if not await self._store.transact((SET_IN_SESSION, values), by=by):
            raise Conflict("this session has ended")
        return hashed

    # Sessions

    async def log_in(
        self, user_id: str, hashed: bytes, browser: str, known_by: str = "", former: str = ""
    ) -> LoggedIn | None:
        """A new session for whose password has this scrypt; None where it has not any more, or its
        account is suspended. `known_by`: the cookie by which the browser was known so far;
        `former`: that of its session, which ends, since nobody could end it there any more."""
        cookie, known, now = new_secret(), new_secret(), self._store.time()
        if self._store.look_up(IS_KNOWN, (hash_of(known_by), user_id)):
            known = known_by
        added = await self._store.transact(
            (END_FORMER, (user_id, hashed, hash_of(former))),
            (PRUNE_SESSIONS, (user_id, now)),
            (KNOW_BROWSER, (user_id, hashed, hash_of(known), now)),
            (PRUNE_BROWSERS, (user_id,)),
            (KNOWN_STILL, (hash_of(known_by), hash_of(known))),
            (ADD_SESSION, (user_id, hashed, new_id("ses"), hash_of(cookie), browser[:200], now)),
        )
        return LoggedIn(cookie, known) if added else None

    def session(self, cookie: str) -> LoginSession | None:
        """That of a cookie, if it is in force; that it was used is noted. Raises
        StorageUnavailable."""
        now = self._store.time()
        found = self._store.look_up(SESSION, (hash_of(cookie), now))
        if found is None:
            return None
        session = LoginSession(*found)
        if now - session.seen_at >= SEEN_EVERY:
            self._store.record(SEE, (now, session.id), retry_until_written=True, durable=False)
        return session

    async def sessions(self, user_id: str, this: str) -> list[SessionShown]:
        """The user's, the last used first; `this` is the id of the session that asks."""
        rows = self._store.rows(SESSIONS, (user_id, self._store.time()))
        return [SessionShown.of(row, this) async for row in rows]

    async def end_session(self, session_id: str, user_id: str) -> bool:
        """It is over at once; False: there is none."""
        return bool(await self._store.transact((END_SESSION, (session_id, user_id))))
