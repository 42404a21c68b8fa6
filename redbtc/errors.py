"""Errors that are shown to whoever asked for the work by a command, on a page or over the API."""

from __future__ import annotations


class UserError(Exception):
    """What was asked for can't be done; the message says why in one line, fit for a user."""


class NotFound(UserError):
    """There is no such account or key."""


class Conflict(UserError):
    """It exists already, or it is in a state that doesn't allow this."""


class StorageUnavailable(UserError):
    """The database can't be read or written now; it will be tried again."""
