"""`JsonSerializer`: in which form the rows of the queue are written."""

from __future__ import annotations

import json
from typing import Any

from dbos import Serializer


class JsonSerializer(Serializer):
    """The queue holds JSON. DBOS's own choice is pickle, which would run what others wrote."""

    def serialize(self, data: Any) -> str:
        return json.dumps(data, default=_as_text)

    def deserialize(cls, serialized_data: str) -> Any:  # noqa: N805 (as DBOS declares it)
        return json.loads(serialized_data)

    def name(self) -> str:
        return "kensa_json"


def _as_text(value: Any) -> str:
    return f"{type(value).__name__}: {value}"
