"""The dashboard's users: their passwords, one-time links and sessions.

Rule 1. No secret is stored: of a password only its scrypt is kept, of a one-time link and a
session's cookie (256 random bits each) only the SHA-256.

Rule 2. A login does not reveal whether an email address has a user. An unknown address costs the
same work and gets the same answer. All users of one address, who belong to different accounts,
share a salt, so one scrypt finds those whose password is right.

Rule 3. A session ends for good: at logout, with a new password, a new link, the user's removal or
the account's suspension, after IDLE without use, and LIFETIME after it began. Whatever begins or
ends a session checks, in the same transaction, that the reason for it still holds.

Rule 4. Attempts are limited for each network, and in each network for each address. Nothing is
counted across networks, so guessing in one network locks no user out in another. Attempts wait in
one queue, in which each site has few places, so a flood from one site leaves places for others.
Right passwords count like wrong ones. Otherwise guesses would be free for an attacker with a user
of the same address in another account: they would set its password to each guess and log in."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import secrets
import sqlite3
from typing import Literal, NamedTuple

from msgspec import Struct
from msgspec.structs import asdict

from redbtc.admin.passwords import Attempts, check_password, scrypt
from redbtc.errors import Conflict, NotFound, UserError
from redbtc.store.database import Store
from redbtc.store.json_values import Moment, by_name, json_time, new_id
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
            "created_at": json_time(row["created_at"]),
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
        times = {name: json_time(row[name]) for name in ("created_at", "seen_at")}
        return cls(**{**by_name(row), **times}, this=row["id"] == this)


Role = Literal["operator", "owner", "viewer"]
SALT_BYTES = 16

LINK_LASTS = 7 * 86_400_000  # milliseconds
IDLE = 30 * 60_000
LIFETIME = 12 * 3_600_000
SEEN_EVERY = 60_000  # how precisely a session's last use is stored
MAX_USER_SESSIONS = 20  # one more ends the oldest
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
IN_FORCE = f"sessions.created_at > ?2 - {LIFETIME} AND seen_at > ?2 - {IDLE}"  # at the time ?2
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
# A password is set by a link, or by the old password in a session, if that is still valid.
SET_PASSWORD = """
    UPDATE users SET password = ?1, password_set_at = ?2, link = NULL, link_expires_at = NULL
     WHERE id = ?3 AND """
SET_BY_LINK = SET_PASSWORD + "link = ?4 AND link_expires_at > ?2"
SET_IN_SESSION = f"""{SET_PASSWORD} password = ?4 AND EXISTS (
    SELECT 1 FROM sessions WHERE id = ?5 AND {IN_FORCE})"""
# A session begins with a password that was checked a moment ago, if it is still right.
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
             ORDER BY created_at DESC, rowid DESC LIMIT {MAX_USER_SESSIONS - 1}))"""
SESSION_COLUMNS = {  # by field of LoginSession
    "id": "sessions.id",
    "seen_at": "seen_at",
    "user_id": "users.id",
    "email": "users.email",
    "role": "role",
    "account_id": "account_id",
    "account": "accounts.name",
}
SESSION = f"""
    SELECT {", ".join(SESSION_COLUMNS.values())}
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
    """Return the refusal of a link that is not, or no longer, valid."""
    return NotFound("this link has expired or was already used; ask for a new one")


def name_in_log(email: str, account: str | None) -> str:
    """Return the name of a user in the log of changes. It tells apart users of one address in
    different accounts."""
    return f"{email} of {account}" if account else email


def is_members_name(name: str, account: str) -> bool:
    """Return whether a name in the log of changes is that of a member of this account."""
    return name.endswith(f" of {account}")


class LoginSession(NamedTuple):
    """A session of a logged-in user. An operator's `account_id` and `account` are None."""

    id: str
    seen_at: int
    user_id: str
    email: str
    role: Role
    account_id: str | None
    account: str | None


class Login(NamedTuple):
    """A user whose password was right. `account` is a name, None for an operator."""

    user_id: str
    role: Role
    account: str | None
    salt: bytes
    hashed: bytes
    active: bool


class Link(NamedTuple):
    """A valid one-time link and the user whom it is for."""

    hashed: bytes
    user_id: str
    email: str
    account: str | None
    salt: bytes


def new_secret() -> str:
    """Return 256 random bits as text."""
    return secrets.token_urlsafe(32)


def hash_of(secret: str) -> bytes:
    """Return the SHA-256 that is stored in place of a secret."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def parse_email(text: str) -> str:
    """Return an email address in the form in which addresses are compared. Raises UserError."""
    email = text.strip().lower()
    if not EMAIL.fullmatch(email):
        raise UserError(f"{text!r} is not an email address; write it like ada@example.com")
    return email


class Users:
    """The users of one gateway and their sessions. The argument `by` of a method is the name
    under which the change is logged."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._attempts = Attempts()
        self._salt_of_unknown = secrets.token_bytes(SALT_BYTES)

    async def all(self, account_id: str | None, role: Role | None) -> list[UserShown]:
        """Return the users of an account (None: all users, operators too) who have this role (None:
        any)."""
        return [UserShown.of(row) async for row in self._store.rows(USERS, (account_id, role))]

    async def get(self, user_id: str) -> UserShown:
        """Return a user by their id. Raises NotFound."""
        user = await self._store.one(USER_BY_ID, (user_id,))
        if user is None:
            raise NotFound(f"user {user_id!r} does not exist")
        return UserShown.of(user)

    async def named(self, name: str, account: str | None, operator: bool) -> UserShown:
        """Return a user by id or email address. `account` or `operator` chooses between several
        users of one address. Raises NotFound, or Conflict for more than one."""
        found = self._store.rows(USERS_BY_EMAIL, (name.lower(),))
        rows = [UserShown.of(row) async for row in found]
        if operator or account:
            rows = [row for row in rows if row.account == account]
        if not rows:
            return await self.get(name)
        if len(rows) > 1:
            raise Conflict(
                f"{name} has {len(rows)} logins; choose one by its account, or the operator login"
            )
        return rows[0]

    async def add(self, email: str, role: Role, account_id: str | None, by: str) -> UserAdded:
        """Add a user and return them. `link` in the answer is the secret with which their password
        is set, once. Raises Conflict if there is such a user already."""
        email, user_id, link = parse_email(email), new_id("usr"), new_secret()
        now, salt = self._store.time(), secrets.token_bytes(SALT_BYTES)
        values = (user_id, email, role, account_id, salt, hash_of(link), now + LINK_LASTS, now)
        try:
            await self._store.transact((ADD_USER, values), by=by)
        except sqlite3.IntegrityError:
            raise Conflict(f"user {email} already exists") from None
        return UserAdded(**asdict(await self.get(user_id)), link=link)

    async def remove(self, user_id: str, by: str) -> UserShown:
        """Remove a user with all their sessions, and return that user. Raises NotFound."""
        user = await self.get(user_id)
        await self._store.transact((REMOVE_USER, (user_id,)), by=by)
        return user

    async def reset(self, user_id: str, by: str) -> UserAdded:
        """End a user's password and sessions. `link` in the answer is a new secret, as in that of
        `add`."""
        link, expires = new_secret(), self._store.time() + LINK_LASTS
        await self._store.transact((RESET, (hash_of(link), expires, user_id)), by=by)
        return UserAdded(**asdict(await self.get(user_id)), link=link)

    # Passwords

    async def verify(self, email: str, password: str, network: str) -> list[Login]:
        """Return the users with this email address and password. That takes as long if there are
        none. Raises TooMany or Busy."""
        email = email.strip().lower()
        async with self._attempts.begin(email, network):
            return await self._right(email, password)

    async def _right(self, email: str, password: str) -> list[Login]:
        """Return the users of an address whose password this is."""
        rows = [tuple(row) async for row in self._store.rows(CANDIDATES, (email,))]
        salt = rows[0][3] if rows else self._salt_of_unknown
        hashed = await asyncio.to_thread(scrypt, password, salt)
        return [
            Login(user_id, role, account, salt, hashed, bool(active))
            for user_id, role, account, _, stored, active in rows
            if stored and hmac.compare_digest(stored, hashed)
        ]

    def link(self, secret: str) -> Link | None:
        """Return the link with this secret if it is valid. Raises StorageUnavailable."""
        hashed = hash_of(secret)
        found = self._store.look_up(BY_LINK, (hashed, self._store.time()))
        return Link(hashed, *found) if found else None

    async def set_password(self, link: Link, password: str, network: str) -> bytes:
        """Set a password, which uses the link up, and return its scrypt. Raises NotFound if the
        link is not valid any more, UserError for a password that is too weak, TooMany or Busy."""
        async with self._attempts.begin(link.email, network):
            await asyncio.to_thread(check_password, password, link.email)
            hashed = await asyncio.to_thread(scrypt, password, link.salt)
        values = hashed, self._store.time(), link.user_id, link.hashed
        by = name_in_log(link.email, link.account)
        if not await self._store.transact((SET_BY_LINK, values), by=by):
            raise no_link()
        return hashed

    async def change_password(
        self, session: LoginSession, old_password: str, new_password: str, network: str
    ) -> bytes:
        """Set a new password and return its scrypt. All the user's sessions end, this one too; log
        in to begin a new one. Raises UserError."""
        user_id, email = session.user_id, session.email
        async with self._attempts.begin(email, network):
            logins = await self._right(email, old_password)
            found = [each for each in logins if each.user_id == user_id]
            if not found:
                raise UserError("the current password is wrong")
            await asyncio.to_thread(check_password, new_password, email)
            hashed = await asyncio.to_thread(scrypt, new_password, found[0].salt)
        values = hashed, self._store.time(), user_id, found[0].hashed, session.id
        by = name_in_log(email, session.account)
        if not await self._store.transact((SET_IN_SESSION, values), by=by):
            raise Conflict("this session has ended")
        return hashed

    # Sessions

    async def log_in(
        self, user_id: str, hashed: bytes, browser: str, former: str = ""
    ) -> str | None:
        """Begin a session of the user whose password has this scrypt, and return its cookie. Return
        None if the password has changed meanwhile or the account is suspended. `former` is the
        cookie that the new one replaces in the browser; its session could not be ended there any
        more, so it ends now."""
        cookie, now = new_secret(), self._store.time()
        added = await self._store.transact(
            (END_FORMER, (user_id, hashed, hash_of(former))),
            (PRUNE_SESSIONS, (user_id, now)),
            (ADD_SESSION, (user_id, hashed, new_id("ses"), hash_of(cookie), browser[:200], now)),
        )
        return cookie if added else None

    def session(self, cookie: str) -> LoginSession | None:
        """Return the session of a cookie if it is valid, and note that it was used. Raises
        StorageUnavailable."""
        now = self._store.time()
        found = self._store.look_up(SESSION, (hash_of(cookie), now))
        if found is None:
            return None
        session = LoginSession(**dict(zip(SESSION_COLUMNS, found, strict=True)))
        if now - session.seen_at >= SEEN_EVERY:
            self._store.record(SEE, (now, session.id), retry_until_written=True, durable=False)
        return session

    async def sessions(self, user_id: str, this: str) -> list[SessionShown]:
        """Return a user's sessions, the last used one first. `this` is the id of the session that
        asks."""
        rows = self._store.rows(SESSIONS, (user_id, self._store.time()))
        return [SessionShown.of(row, this) async for row in rows]

    async def end_session(self, session_id: str, user_id: str) -> bool:
        """End a user's session at once. Return whether there was one."""
        return bool(await self._store.transact((END_SESSION, (session_id, user_id))))
