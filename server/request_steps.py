"""What parts do at certain points of a request's way. A part adds to the lists that it needs; most are empty."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from fastapi import Request

from engine.shared.messages import Submit, TokenEvent
from server.schemas.generation_request import GenerationRequest


@dataclass(slots=True)
class RequestSteps:
    """The steps of one request."""

    # Before the engine gets the messages of a `Job`, which may be replaced.
    on_submit: list[Callable[[Any, Sequence[Submit]], Sequence[Submit]]] = field(default_factory=list)
    on_submitted: list[Callable[[Any, Sequence[Submit]], None]] = field(default_factory=list)
    # With each event of the engine, and the number of its prompt.
    on_event: list[Callable[[int, TokenEvent], None]] = field(default_factory=list)
    on_failure: list[Callable[[BaseException], None]] = field(default_factory=list)
    on_end: list[Callable[[], None]] = field(default_factory=list)

    def fail(self, error: BaseException) -> None:
        """Note the error that ends the request."""
        for step in self.on_failure:
            step(error)

    def end(self) -> None:
        """End the request. May be called again."""
        for step in self.on_end:
            step()
        self.on_end.clear()


# Adds the steps of a part to those of a request to an `Endpoint`, which has just arrived and may be invalid.
Step: TypeAlias = Callable[[Request, GenerationRequest, Any, RequestSteps], None]
