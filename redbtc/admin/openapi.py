"""The description of the admin API: openapi.json."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct

from redbtc.admin.api import OPERATIONS
from redbtc.admin.operations import PREFIX, Operation
from redbtc.admin.outputs import Refused
from redbtc.times import MONTH

ERRORS = {
    "400": "The request is malformed. The message names the field.",
    "401": "Not logged in, or the API key is not active.",
    "403": "Your role does not allow this, or the request came from another site.",
    "404": "The object does not exist or belongs to another account.",
    "409": "The request conflicts with the current state. The message says how.",
    "413": "The body is too large.",
    "429": "Too many login attempts.",
    "503": "The database can't be written, or too many logins are being checked.",
}

ID = {"type": "string", "minLength": 1, "pattern": "^[^/]+$"}
IN_PATH = {"month": {"type": "string", "pattern": f"^({MONTH.pattern})$"}}


def openapi(*, secure: bool) -> dict[str, Any]:
    """/admin/v1/openapi.json, made from the operations and their types (OpenAPI 3.1). `secure`: as
    it is reached with TLS, where the session's cookie has another name."""
    answers = {each.answer for each in OPERATIONS if isinstance(each.answer, type)}
    types = [*answers, *{each.body for each in OPERATIONS}, *{each.query for each in OPERATIONS}]
    template = "#/components/schemas/{name}"
    _, schemas = msgspec.json.schema_components([*types, Refused], ref_template=template)
    paths: dict[str, dict[str, Any]] = {}
    for each in OPERATIONS:
        for number, path in enumerate(each.paths):
            described = _described(each, path, number, schemas)
            paths.setdefault(PREFIX + path, {})[each.method.lower()] = described
    cookie = "__Host-redbtc" if secure else "redbtc"
    return {
        "openapi": "3.1.0",
        "info": {"title": "RedBTC AI admin API", "version": "1"},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "session": {"type": "apiKey", "in": "cookie", "name": cookie},
                "key": {"type": "http", "scheme": "bearer"},
            },
        },
    }


def _described(
    operation: Operation, path: str, number: int, schemas: dict[str, Any]
) -> dict[str, Any]:
    in_path = [part[1:-1] for part in path.split("/") if part.startswith("{")]
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": IN_PATH.get(name, ID)}
        for name in in_path
    ]
    query = schemas[operation.query.__name__]
    needed = query.get("required", ())
    parameters += [
        {"name": name, "in": "query", "required": name in needed, "schema": schema}
        for name, schema in query.get("properties", {}).items()
    ]
    described: dict[str, Any] = {
        "operationId": operation.name + ("_of_key" if path.startswith("/me/") and number else ""),
        "summary": operation.summary,
        "security": [{"key": []}] if path.startswith("/me") else [{"session": []}],
        "parameters": parameters,
        "responses": {
            str(operation.status): _content("Done.", operation.answer),
            **{status: _content(text, Refused) for status, text in ERRORS.items()},
        },
    }
    if operation.method in ("POST", "PATCH"):
        reference = {"$ref": f"#/components/schemas/{operation.body.__name__}"}
        described["requestBody"] = {
            "required": bool(schemas[operation.body.__name__].get("required")),
            "content": {"application/json": {"schema": reference}},
        }
    return described


def _content(text: str, of: Any) -> dict[str, Any]:
    named = isinstance(of, type) and issubclass(of, Struct)
    schema = {"$ref": f"#/components/schemas/{of.__name__}"} if named else {"type": "object"}
    return {"description": text, "content": {"application/json": {"schema": schema}}}
