"""Answers that are whole when they are sent."""

from typing import Any

import msgspec
from starlette.responses import Response


class StructResponse(Response):
    """JSON of a msgspec struct, or of anything else that msgspec encodes."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return msgspec.json.encode(content)
