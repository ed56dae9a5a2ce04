"""`POST /v1/requests/{id}/cancel`."""

from typing import Literal

import msgspec


class CancelResponse(msgspec.Struct, frozen=True):
    id: str
    cancelled: Literal[True] = True
