"""What all bodies have in common, and the form of errors."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import Request, Response
from pydantic import BaseModel, ConfigDict, Field

Answer = Callable[[Request, Exception], Awaitable[Response]]  # how errors leave


class Body(BaseModel):
    """What all bodies have in common."""

    model_config = ConfigDict(protected_namespaces=())


class ErrorBody(Body):
    """Every answer that is not a success has this form."""

    error: str = Field(description="One sentence that a person can act on.")
    code: str = Field(description="What programs may rely on; it does not change.")


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
