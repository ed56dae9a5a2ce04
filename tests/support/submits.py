"""Requests for tests. All fields of `Submit` and of its `SamplingParams` have a default."""

from collections.abc import Iterable
from typing import Any

from engine.scheduling.request import Request, new_request
from engine.shared.messages import SamplingParams, Submit


def new_submit(prompt: Iterable[int] = (1,), request_id: str = "r", **fields: Any) -> Submit:
    own = {name: fields.pop(name) for name in Submit.__struct_fields__ if name in fields}
    params = own.pop("params", None) or SamplingParams(**{"max_tokens": 8} | fields)
    return Submit(**{"arrival": 0.0} | own, request_id=request_id, prompt_token_ids=list(prompt), params=params)


def request_for(
    prompt: Iterable[int] = (1,), *, salt: bytes = b"", number: int = 0, now: float = 0.0, **fields: Any
) -> Request:
    return new_request(new_submit(prompt, **fields), salt=salt, arrival_number=number, now=now)
