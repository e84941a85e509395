"""What all bodies have in common, and the form of errors."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.http.part import visible
from engines.errors import BadRequest

MOST_REASON = 500  # characters
Answer = Callable[[Request, Exception], Awaitable[Response]]  # how errors leave


class Body(BaseModel):
    """What all bodies have in common."""

    model_config = ConfigDict(protected_namespaces=())


class ErrorBody(Body):
    """Every answer that is not a success has this form."""

    error: str = Field(description="One sentence that a person can act on.")
    code: str = Field(description="What programs may rely on; it does not change.")


Kind = TypeVar("Kind", bound=BaseModel)


def read_json(kind: type[Kind], data: bytes) -> Kind:
    """A body that may come in other forms as well, so that FastAPI does not read it.

    Raises:
        BadRequest: it is no JSON.
        RequestValidationError: it is another, as FastAPI would say it.
    """
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False, include_context=False)
        if problems[0]["type"] == "json_invalid":
            why = problems[0]["msg"].removeprefix("Invalid JSON: ")
            raise BadRequest(f"The body is not JSON: {why[:200]}.") from None
        raise RequestValidationError(
            [{**one, "loc": ("body", *one["loc"])} for one in problems]
        ) from None


def given_reason(reason: str | None) -> str:
    """Why something is changed. Raises BadRequest where nobody says it, or it cannot be seen."""
    if not (reason or "").strip():
        raise BadRequest("Say why, in reason: it stands in the audit trail.")
    return visible(str(reason), "reason", MOST_REASON)


def error_response(meaning: str, **examples: str) -> dict[str, Any]:
    """An OpenAPI response in the agreed form, with an example sentence for each code."""
    shown = {code: {"value": {"error": text, "code": code}} for code, text in examples.items()}
    content: dict[str, Any] = {"application/json": {"examples": shown}}
    line = f"ERR {next(iter(examples))}\n"
    content["text/plain"] = {"schema": {"type": "string"}, "example": line}
    return {"model": ErrorBody, "description": meaning, "content": content}


def whole_schema(kind: type[BaseModel]) -> Any:
    """The JSON schema of a body, without references: they would lead outside the document."""
    schema = kind.model_json_schema()
    kinds = schema.pop("$defs", {})

    def resolved(part: Any) -> Any:
        if isinstance(part, dict):
            name = part.get("$ref", "").removeprefix("#/$defs/")
            return {key: resolved(value) for key, value in kinds.get(name, part).items()}
        return [resolved(one) for one in part] if isinstance(part, list) else part

    return resolved(schema)
