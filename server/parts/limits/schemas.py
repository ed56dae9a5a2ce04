"""The answer of `GET /v1/usage`."""

from typing import Literal

import msgspec

from server.parts.limits.rules import Limits


class TenantUsage(msgspec.Struct, frozen=True, kw_only=True, tag_field="object", tag="usage"):
    """Counts since the start of the server."""

    name: str | None  # of the tenant; None: all clients, of a server without keys
    num_requests: int
    num_running_requests: int
    prompt_tokens: int
    cached_tokens: int  # of the prompt tokens
    completion_tokens: int
    total_tokens_today: int  # prompt and output, since 00:00 UTC
    limits: Limits


class UsageList(msgspec.Struct, frozen=True, kw_only=True):
    object: Literal["list"] = "list"
    data: list[TenantUsage]
