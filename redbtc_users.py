"""Users: who may log in to the dashboard, how they prove it, and their sessions.

Rule 1. What could let somebody in is never stored: of a password its scrypt, of a one-time link, a
session's cookie and a known browser's the SHA-256 (each is 256 bits of chance).

Rule 2. Nobody learns whether an address has a login. An unknown one costs the same work and gets
the same answer; all users of one address have the same salt, so that its one password that is right
is found with one scrypt, however many there are.

Rule 3. A session ends for good: with logout, a new password, a new link, the user's removal, the
account's suspension, after IDLE without a sign of it and after LIFETIME in all.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import secrets
import sqlite3
import unicodedata
from typing import Literal, NamedTuple

from zxcvbn import zxcvbn

from redbtc_ledger import Record, Store, new_id, shown
from redbtc_settings import Conflict, LedgerError, NotFound

Role = Literal["operator", "owner", "viewer"]

# ── Passwords ────────────────────────────────────────────────────────────────────────────────────

SHORTEST, LONGEST = 15, 1000  # characters; NIST SP 800-63B-4 §3.1.1.2 asks for 15
COST, BLOCKS, PARALLEL = 1 << 15, 8, 3  # of scrypt, as OWASP has it: 32 MiB; 0.2 s here
SALT_BYTES = 16
MOST_HASHING = 2  # at a time: each takes a core and 32 MiB
MOST_WAITING = 20
LOOKED_AT = 72  # characters of a password whose strength is judged: what is longer is no weaker
STRONG_ENOUGH = 3  # of zxcvbn's 4: more than 10^8 guesses


class Busy(LedgerError):
    """Too many passwords are being checked."""


class Hashing:
    """scrypt, off the event loop."""

    def __init__(self) -> None:
        self._places = asyncio.Semaphore(MOST_HASHING)
        self._waiting = 0

    async def scrypt(self, password: str, salt: bytes) -> bytes:
        """32 bytes. Raises Busy."""
        if self._waiting >= MOST_WAITING:
            raise Busy("too many people log in at once; try again in a few seconds")
        self._waiting += 1
        try:
            async with self._places:
                return await asyncio.to_thread(_scrypt, password, salt)
        finally:
            self._waiting -= 1


def _scrypt(password: str, salt: bytes) -> bytes:
    typed = unicodedata.normalize("NFC", password[:LONGEST]).encode("utf-8", "surrogatepass")
    return hashlib.scrypt(typed, salt=salt, n=COST, r=BLOCKS, p=PARALLEL, maxmem=64 << 20, dklen=32)


def check_password(password: str, email: str) -> None:
    """Raises LedgerError for one that is too short or too common."""
    if len(password) < SHORTEST:
        raise LedgerError(f"a password has at least {SHORTEST} characters")
    if len(password) > LONGEST:
        raise LedgerError(f"a password has at most {LONGEST} characters")
    found = zxcvbn(password[:LOOKED_AT], user_inputs=[email, *re.split(r"\W+", email), "redbtc"])
    if found["score"] < STRONG_ENOUGH:
        raise LedgerError(
            "this password is too easy to guess: it is common, or made of common words, repeats or "
            "sequences; four words by chance are a good one"
        )


# ── Users ────────────────────────────────────────────────────────────────────────────────────────

LINK_LASTS = 7 * 86_400_000  # milliseconds
IDLE = 30 * 60_000
LIFETIME = 12 * 3_600_000
SEEN_EVERY = 60_000  # how exactly it is known when a session was last used
MOST_SESSIONS = 20  # of a user; the oldest ends
MOST_BROWSERS = 20
EMAIL = re.compile(r"[^@\s\x00-\x1f\x7f]{1,64}@[^@\s\x00-\x1f\x7f]{1,189}")
USER = """
    SELECT users.id, users.email, role, accounts.name AS account, account_id, password_set_at,
           link_expires_at, users.created_at
      FROM users LEFT JOIN accounts ON accounts.id = account_id"""
USERS = (
    USER
    + """
     WHERE ?1 IS NULL OR account_id = ?1 ORDER BY account_id IS NOT NULL, account, users.email"""
)
USER_BY_ID = USER + " WHERE users.id = ?"
USERS_BY_EMAIL = USER + " WHERE users.email = ? ORDER BY users.created_at, users.id"
ADD_USER = """
    INSERT INTO users (id, email, role, account_id, salt, link, link_expires_at, created_at)
    VALUES (?1, ?2, ?3, ?4, ifnull((SELECT salt FROM users WHERE email = ?2), ?5), ?6, ?7, ?8)"""
REMOVE_USER = "DELETE FROM users WHERE id = ?"
RESET = """
    UPDATE users SET password = NULL, password_set_at = NULL, link = ?, link_expires_at = ?
     WHERE id = ?"""
END_SESSIONS_OF = "DELETE FROM sessions WHERE user_id = ?"
FORGET_BROWSERS = "DELETE FROM known_browsers WHERE user_id = ?"
CANDIDATES = """
    SELECT users.id, salt, password, ifnull(accounts.status, 'active') FROM users
      LEFT JOIN accounts ON accounts.id = account_id WHERE users.email = ?"""
BY_LINK = """
    SELECT users.id, email, salt FROM users WHERE link = ? AND link_expires_at > ?"""
SET_PASSWORD = """
    UPDATE users SET password = ?, password_set_at = ?, link = NULL, link_expires_at = NULL
     WHERE id = ? AND (?4 IS NULL OR link = ?4)"""
ADD_SESSION = """
    INSERT INTO sessions (id, hash, user_id, browser, created_at, seen_at)
    VALUES (?1, ?2, ?3, ?4, ?5, ?5)"""
PRUNE_SESSIONS = f"""
    DELETE FROM sessions WHERE created_at < ?2 - {LIFETIME} OR seen_at < ?2 - {IDLE}
        OR (user_id = ?1 AND id NOT IN (SELECT id FROM sessions WHERE user_id = ?1
             ORDER BY created_at DESC, id LIMIT {MOST_SESSIONS - 1}))"""
KNOW_BROWSER = "INSERT OR IGNORE INTO known_browsers (hash, user_id, created_at) VALUES (?, ?, ?)"
PRUNE_BROWSERS = f"""
    DELETE FROM known_browsers WHERE user_id = ?1 AND hash NOT IN (
        SELECT hash FROM known_browsers WHERE user_id = ?1
         ORDER BY created_at DESC LIMIT {MOST_BROWSERS - 1})"""
KNOWN_BROWSER = """
    SELECT 1 FROM known_browsers JOIN users ON users.id = user_id WHERE hash = ? AND email = ?"""
SESSION = f"""
    SELECT sessions.id, seen_at, users.id, users.email, role, account_id FROM sessions
      JOIN users ON users.id = user_id LEFT JOIN accounts ON accounts.id = account_id
     WHERE hash = ?1 AND sessions.created_at > ?2 - {LIFETIME} AND seen_at > ?2 - {IDLE}
       AND ifnull(accounts.status, 'active') = 'active'"""
SEE = "UPDATE sessions SET seen_at = max(seen_at, ?) WHERE id = ?"
SESSIONS = f"""
    SELECT id, browser, created_at, seen_at FROM sessions
     WHERE user_id = ?1 AND created_at > ?2 - {LIFETIME} AND seen_at > ?2 - {IDLE}
     ORDER BY seen_at DESC, id"""
END_SESSION = "DELETE FROM sessions WHERE id = ? AND user_id = ?"


def no_link() -> NotFound:
    """It never was one, or isn't any more."""
    return NotFound("this link has been used, or it is too old; ask for another")


class Session(NamedTuple):
    """Somebody who is logged in. `account_id` is None for an operator."""

    id: str
    seen_at: int
    user_id: str
    email: str
    role: Role
    account_id: str | None


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
    """An address in the form in which it is compared. Raises LedgerError."""
    email = text.strip().lower()
    if not EMAIL.fullmatch(email):
        raise LedgerError(f"{text!r} is not an address; write it like ada@example.com")
    return email


class Users:
    """All users of one gateway, and their sessions. `by`: who makes the change."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._hashing = Hashing()
        self._nobodys_salt = secrets.token_bytes(SALT_BYTES)

    async def all(self, account_id: str | None) -> list[Record]:
        """Those of an account, or of all and the operators."""
        return [shown(row) async for row in self._store.rows(USERS, (account_id,))]

    async def show(self, user_id: str) -> Record:
        """Raises NotFound."""
        user = await self._store.one(USER_BY_ID, (user_id,))
        if user is None:
            raise NotFound(f"there is no user {user_id!r}")
        return shown(user)

    async def any_operator(self) -> bool:
        """Whether there is one."""
        return await self._store.one("SELECT 1 FROM users WHERE role = 'operator'") is not None

    async def named(self, name: str, account: str | None, operator: bool) -> Record:
        """A user by id or address; where an address has several logins, `account` or `operator`
        tells which. Raises NotFound, Conflict."""
        rows = [shown(row) async for row in self._store.rows(USERS_BY_EMAIL, (name.lower(),))]
        if operator or account:
            rows = [row for row in rows if row["account"] == account]
        if not rows:
            return await self.show(name)
        if len(rows) > 1:
            raise Conflict(f"{name} has {len(rows)} logins; say of which account, or operator")
        return rows[0]

    async def add(self, email: str, role: Role, account_id: str | None, by: str) -> Record:
        """A new user; `link` in the answer is the secret with which, once, to set a password.
        Raises Conflict where there is one already."""
        email, user_id, link = parse_email(email), new_id("usr"), new_secret()
        now, salt = self._store.time(), secrets.token_bytes(SALT_BYTES)
        values = (user_id, email, role, account_id, salt, hash_of(link), now + LINK_LASTS, now)
        try:
            await self._store.transact((ADD_USER, values), by=by)
        except sqlite3.IntegrityError:
            raise Conflict(f"there is a user {email} already") from None
        return {**await self.show(user_id), "link": link}

    async def remove(self, user_id: str, by: str) -> Record:
        """And log them out."""
        user = await self.show(user_id)
        await self._store.transact((REMOVE_USER, (user_id,)), by=by)
        return user

    async def reset(self, user_id: str, by: str) -> Record:
        """The password and all sessions end; `link` is a new secret as from `add`."""
        link, expires = new_secret(), self._store.time() + LINK_LASTS
        await self._store.transact(
            (RESET, (hash_of(link), expires, user_id)),
            (END_SESSIONS_OF, (user_id,)),
            (FORGET_BROWSERS, (user_id,)),
            by=by,
        )
        return {**await self.show(user_id), "link": link}

    # Passwords

    async def verify(self, email: str, password: str) -> tuple[str, bool] | None:
        """The id of the user whose these are, and whether he may log in now; None where they are
        nobody's, which takes as long. Raises Busy."""
        rows = [tuple(row) async for row in self._store.rows(CANDIDATES, (email.strip().lower(),))]
        salt = rows[0][1] if rows else self._nobodys_salt
        hashed = await self._hashing.scrypt(password, salt)
        right = [row for row in rows if row[2] and hmac.compare_digest(row[2], hashed)]
        return (right[0][0], right[0][3] == "active") if right else None

    def user_of_link(self, link: str) -> tuple[str, str, bytes] | None:
        """Id, address and salt of the user whom a one-time link is for."""
        values = (hash_of(link), self._store.time())
        return self._store.look_up(BY_LINK, values)

    async def set_password_by_link(self, link: str, password: str) -> str:
        """The user's id; the link is used up. Raises NotFound where it is no link, or none any
        more, LedgerError for a password that won't do."""
        found = self.user_of_link(link)
        if found is None:
            raise no_link()
        user_id, email, salt = found
        await self._set_password(user_id, email, salt, password, hash_of(link))
        return user_id

    async def change_password(self, session: Session, old: str, new: str) -> None:
        """All other sessions end with it, and this one: a new one is to be begun. Raises
        LedgerError."""
        found = await self.verify(session.email, old)
        if found is None or found[0] != session.user_id:
            raise LedgerError("the old password is not right")
        rows = [row async for row in self._store.rows(CANDIDATES, (session.email,))]
        salt = next(row[1] for row in rows if row[0] == session.user_id)
        await self._set_password(session.user_id, session.email, salt, new, None)

    async def _set_password(
        self, user_id: str, email: str, salt: bytes, password: str, link: bytes | None
    ) -> None:
        check_password(password, email)
        hashed = await self._hashing.scrypt(password, salt)
        async for other, _, taken, _ in self._store.rows(CANDIDATES, (email,)):
            if taken and other != user_id and hmac.compare_digest(taken, hashed):
                raise LedgerError("this is the password of another login of yours; take another")
        now = self._store.time()
        changed = await self._store.transact(
            (END_SESSIONS_OF, (user_id,)),
            (FORGET_BROWSERS, (user_id,)),
            (SET_PASSWORD, (hashed, now, user_id, link)),
            by=email,
        )
        if not changed:
            raise no_link()

    # Sessions

    async def log_in(self, user_id: str, browser: str) -> LoggedIn:
        """A new session."""
        cookie, known, now = new_secret(), new_secret(), self._store.time()
        session = (new_id("ses"), hash_of(cookie), user_id, browser[:200], now)
        await self._store.transact(
            (PRUNE_SESSIONS, (user_id, now)),
            (ADD_SESSION, session),
            (PRUNE_BROWSERS, (user_id,)),
            (KNOW_BROWSER, (hash_of(known), user_id, now)),
        )
        return LoggedIn(cookie, known)

    def session(self, cookie: str) -> Session | None:
        """That of a cookie, if it is in force; that it was used is noted. Raises
        LedgerUnavailable."""
        now = self._store.time()
        found = self._store.look_up(SESSION, (hash_of(cookie), now))
        if found is None:
            return None
        session = Session(*found)
        if now - session.seen_at >= SEEN_EVERY:
            self._store.record(SEE, (now, session.id), insist=True, lasting=False)
        return session

    def knows_browser(self, cookie: str, email: str) -> bool:
        """Whether somebody of this address has logged in there. Raises LedgerUnavailable."""
        values = (hash_of(cookie), email.strip().lower())
        return bool(cookie) and self._store.look_up(KNOWN_BROWSER, values) is not None

    async def sessions(self, user_id: str) -> list[Record]:
        """The user's, the last used first."""
        rows = self._store.rows(SESSIONS, (user_id, self._store.time()))
        return [shown(row) async for row in rows]

    async def end_session(self, session_id: str, user_id: str) -> None:
        """It is over at once."""
        await self._store.transact((END_SESSION, (session_id, user_id)))
