"""The description of the admin API: openapi.json."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct

from redbtc.admin.api import OPERATIONS
from redbtc.admin.api_export import EXPORT_PART
from redbtc.admin.operations import JSON_ANSWER, PREFIX, Operation, variables_of
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
IN_PATH = {
    "month": {"type": "string", "pattern": f"^({MONTH.pattern})$"},
    "part": {"type": "string", "pattern": f"^({EXPORT_PART.pattern})$"},
    "upstream": {"type": "string", "minLength": 1},
}


def openapi(*, secure: bool) -> dict[str, Any]:
    """Return the content of /admin/v1/openapi.json (OpenAPI 3.1), made from the table of operations
    and their types. `secure` says whether clients use TLS, which changes the session cookie's
    name."""
    answers = [each.answer for each in OPERATIONS if isinstance(each.answer, type)]
    inputs = [kind for each in OPERATIONS for kind in (each.body, each.query)]
    template = "#/components/schemas/{name}"
    _, schemas = msgspec.json.schema_components(
        dict.fromkeys([*answers, *inputs, Refused]), ref_template=template
    )
    paths: dict[str, dict[str, Any]] = {}
    for each in OPERATIONS:
        for path in each.paths:
            described = _described(each, path, schemas)
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


def _described(operation: Operation, path: str, schemas: dict[str, Any]) -> dict[str, Any]:
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": IN_PATH.get(name, ID)}
        for name in variables_of(path)
    ]
    query = schemas[operation.query.__name__]
    needed = query.get("required", ())
    parameters += [
        {"name": name, "in": "query", "required": name in needed, "schema": schema}
        for name, schema in query.get("properties", {}).items()
    ]
    described: dict[str, Any] = {
        "operationId": operation.name + ("_of_key" if path == operation.key_path else ""),
        "summary": operation.summary,
        "security": [{"key": []}] if path.startswith("/me") else [{"session": []}],
        "parameters": parameters,
        "responses": {
            str(operation.status): _content("Done.", operation.answer, operation.media_type),
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


def _content(text: str, of: Any, media_type: str = JSON_ANSWER) -> dict[str, Any]:
    named = isinstance(of, type) and issubclass(of, Struct)
    schema = {"$ref": f"#/components/schemas/{of.__name__}"} if named else {"type": "object"}
    described = {"schema": schema} if media_type == JSON_ANSWER else {}
    return {"description": text, "content": {media_type: described}}
