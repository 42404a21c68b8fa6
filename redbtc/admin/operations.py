"""The declaration of an operation of the admin API."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Concatenate, NamedTuple, TypeVar, overload

from redbtc.admin.actors import Actor, Rank
from redbtc.admin.inputs import Input, Nothing
from redbtc.admin.outputs_log import BodyContent

PREFIX = "/admin/v1"
JSON_ANSWER = "application/json"
Given = TypeVar("Given", bound=Input)
Result = TypeVar("Result")


def variables_of(path: str) -> list[str]:
    """Return the names of the variables of a path, such as `account` in /accounts/{account}."""
    return [part[1:-1] for part in path.split("/") if part.startswith("{")]


class Operation(NamedTuple):
    """A row of the table of operations (admin/api.py): a handler, and how it is reached over HTTP.

    The handler is a method of API. It takes the actor; then the input, if `query` or `body` is
    declared; then the variables of the path, by their names.
    """

    method: str
    path: str
    min_rank: Rank  # the lowest role that may perform the operation
    handler: Callable[..., Awaitable[Any]]
    answer: Any  # the type that is described in openapi.json
    query: type[Input] = Nothing
    body: type[Input] = Nothing
    status: int = 200
    key_path: str | None = None  # the path for the holder of an API key, if there is another one
    stream: Callable[..., AsyncIterator[bytes]] | None = None  # yields the answer to a command
    before_acceptance: bool = False  # for owners who have not accepted the newest documents, too
    media_type: str = JSON_ANSWER  # of the answer; of another one, it is bytes

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of the operation below PREFIX."""
        return (self.path, self.key_path) if self.key_path else (self.path,)

    @property
    def name(self) -> str:
        """The name of the handler, which is the operationId in openapi.json."""
        return self.handler.__name__

    @property
    def summary(self) -> str:
        """The docstring of the handler, on one line."""
        return " ".join((self.handler.__doc__ or "").split())

    @property
    def input(self) -> type[Input]:
        """The type of the handler's input; no operation has both a query and a body."""
        return self.query if self.body is Nothing else self.body


@overload
def operation(
    method: str,
    path: str,
    min_rank: Rank,
    handler: Callable[Concatenate[Any, Actor, ...], Awaitable[Result]],
    answer: type[Result],
    *,
    status: int = 200,
    key_path: str | None = None,
    before_acceptance: bool = False,
) -> Operation: ...


@overload
def operation(
    method: str,
    path: str,
    min_rank: Rank,
    handler: Callable[Concatenate[Any, Actor, Given, ...], Awaitable[Result]],
    answer: type[Result],
    *,
    query: type[Given],
    status: int = 200,
    key_path: str | None = None,
    stream: Callable[[Any, Actor, Given], AsyncIterator[bytes]] | None = None,
) -> Operation: ...


@overload
def operation(
    method: str,
    path: str,
    min_rank: Rank,
    handler: Callable[Concatenate[Any, Actor, Given, ...], Awaitable[Result]],
    answer: type[Result],
    *,
    body: type[Given],
    status: int = 200,
    key_path: str | None = None,
    before_acceptance: bool = False,
    stream: Callable[Concatenate[Any, Actor, Given, ...], AsyncIterator[bytes]] | None = None,
) -> Operation: ...


@overload
def operation(
    method: str,
    path: str,
    min_rank: Rank,
    handler: Callable[..., Awaitable[AsyncIterator[bytes] | BodyContent]],
    answer: Any,
    *,
    query: type[Input] = Nothing,
    media_type: str,
) -> Operation: ...


def operation(
    method: str,
    path: str,
    min_rank: Rank,
    handler: Callable[..., Awaitable[Any]],
    answer: Any,
    **declared: Any,
) -> Operation:
    """Return a row of the table. A type checker compares the declared types with the handler's."""
    return Operation(method, path, min_rank, handler, answer, **declared)
