"""What every handler needs, made once at start and handed to `create_app`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from starlette.requests import Request

if TYPE_CHECKING:
    from engine.config import ModelConfig
    from server.client import EngineClient
    from server.metrics import Metrics
    from server.settings import Settings
    from server.text.chat_template import ChatTemplate
    from server.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class ServerContext:
    settings: Settings
    client: EngineClient
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None  # None: the model has none, and chat is refused
    model_config: ModelConfig
    model_names: tuple[str, ...]  # what the API calls the model; the first is its id
    created: int  # seconds since the epoch
    metrics: Metrics

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and completion together; EngineUnavailableError before the engine is ready."""
        return self.client.ready_info().max_model_len


def get_context(request: Request) -> ServerContext:
    return cast("ServerContext", request.app.state.context)
