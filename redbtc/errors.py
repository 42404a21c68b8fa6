"""Errors whose message is shown to the user, by a command, on a page or over the API."""

from __future__ import annotations


class UserError(Exception):
    """An operation that can't be done. The message says why, in one line for the user."""


class NotFound(UserError):
    """The account, key or other object does not exist."""


class Conflict(UserError):
    """The object exists already, or its state does not allow the operation."""


class StorageUnavailable(UserError):
    """The database can't be read or written now, but may be later."""
