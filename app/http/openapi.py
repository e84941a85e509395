"""The OpenAPI document: what the routes declare, and what any of them may answer besides.

A route declares the answers that belong to what it does. What the server answers before or after
that, whatever the route, stands here once: add a line to one of the tables.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute

from app.http.base_body import error_response

Answers = dict[int, dict[str, Any]]
Operation = dict[str, Any]  # of an OpenAPI document

ANY: Answers = {
    400: error_response(
        "Asked under an unknown name, or not in HTTP/1.1.",
        unknown_host="This server is not called 'bracket.example': ask it by its address or ...",
        bad_http="This is not HTTP/1.1: send an ordinary request.",
    ),
    408: error_response(
        "It did not arrive in time.", too_slow="The request did not arrive in time: look at ..."
    ),
    431: error_response(
        "Its head is too large.",
        head_too_large="The head of the request has more than the 65,536 bytes allowed.",
    ),
    503: error_response(
        "Too many connections.",
        too_many_connections="All 512 connections are at work: close some, or raise ...",
    ),
    500: error_response(
        "Kensa failed; its log says why.",
        internal_error="Kensa failed; its log says why, at request 5f0c8e6c0b1d4a6f.",
    ),
}
WITH_INPUT: Answers = {  # a body, or parameters
    422: error_response(
        "The request is malformed.",
        bad_request="The query parameter limit is wrong: Input should be greater than 0.",
    ),
}
SECURED: Answers = {  # a key is needed, where there are keys
    401: error_response(
        "No API key, or an unknown one.",
        unauthorized="This server wants an API key: send it as Authorization: Bearer KEY, or ...",
    ),
    403: error_response(
        "The key's role does not allow it, or the web page of another server asks.",
        forbidden="The key line-3 has the role line; this needs a key with the role operator.",
        foreign_origin="A web page of http://elsewhere asks for this: where that is wanted, ...",
    ),
    503: error_response(
        "The file of keys cannot be read.",
        bad_keys="The server's file of API keys cannot be read, so nobody is let in; ...",
    ),
}
WITH_JSON: Answers = {  # a body in JSON
    413: error_response(
        "The body is too large.",
        body_too_large="The body has more than the 1,048,576 bytes that are read here.",
    ),
    415: error_response(
        "The body is not JSON.",
        unsupported_body="Kensa does not read a body of type text/plain here: send JSON with"
        " Content-Type application/json.",
    ),
}
WITH_BODY: Answers = {
    415: error_response(
        "The body is compressed.",
        unsupported_body="Kensa does not read a body that is compressed as gzip: send it as it ...",
    ),
}


def _content(operation: Operation) -> dict[str, Any]:
    found: dict[str, Any] = operation.get("requestBody", {}).get("content", {})
    return found


_TABLES: list[tuple[Answers, Callable[[Operation], bool]]] = [
    (ANY, lambda _: True),
    (WITH_INPUT, lambda operation: bool(operation.get("parameters") or _content(operation))),
    (SECURED, lambda operation: "security" in operation),
    (WITH_BODY, lambda operation: bool(_content(operation))),
    (WITH_JSON, lambda operation: "application/json" in _content(operation)),
]


def operation_id(route: APIRoute) -> str:
    """`get_jobs_job_id_log`: from what clients rely on, so no change inside can rename it."""
    method = min(route.methods or {""}).lower()
    return re.sub(r"\W+", "_", f"{method} {route.path_format}").strip("_")


def describe(app: FastAPI) -> None:
    """Let the application's document name all answers.

    Where a route declares the same status, both meanings are told, and the codes of both.
    """
    of_routes = app.openapi

    def document() -> dict[str, Any]:
        whole = of_routes()
        for operation in operations(whole).values():
            _drop_fastapis_own(operation["responses"])
            for answers, may_have in _TABLES:
                if may_have(operation):
                    _add(operation["responses"], answers)
        for name in ("HTTPValidationError", "ValidationError"):
            whole["components"]["schemas"].pop(name, None)
        return whole

    app.openapi = document  # type: ignore[method-assign]  # as FastAPI's documentation does it


def operations(document: dict[str, Any]) -> dict[str, Operation]:
    """`GET /jobs` -> its operation, for all of an OpenAPI document."""
    return {
        f"{method.upper()} {path}": operation
        for path, item in document["paths"].items()
        for method, operation in item.items()
    }


def _drop_fastapis_own(responses: dict[str, Any]) -> None:
    """The 422 that FastAPI declares of itself, in a form that never leaves: see `app.main`."""
    if "HTTPValidationError" in str(responses.get("422")):
        del responses["422"]


def _add(responses: dict[str, Any], answers: Answers) -> None:
    for status, answer in answers.items():
        told = copy.deepcopy({key: answer[key] for key in ("description", "content")})
        _json(told)["schema"] = {"$ref": "#/components/schemas/ErrorBody"}
        known = responses.setdefault(str(status), told)
        if known is not told and told["description"] not in known["description"]:
            known["description"] += f" Or: {told['description']}"
        known["content"].setdefault("text/plain", told["content"]["text/plain"])
        examples = _json(known).setdefault("examples", {})
        for code, example in _json(told)["examples"].items():
            examples.setdefault(code, example)


def _json(answer: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = answer.setdefault("content", {}).setdefault("application/json", {})
    return found
