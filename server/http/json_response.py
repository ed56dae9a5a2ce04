"""JSON responses that are sent as a whole."""

from typing import Any

import msgspec
from starlette.responses import Response


class StructResponse(Response):
    """A JSON response whose content is a msgspec struct, or any other value that msgspec encodes."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return msgspec.json.encode(content)
