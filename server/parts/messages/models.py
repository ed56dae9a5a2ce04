"""`GET /v1/models` for Anthropic's clients."""

from datetime import UTC, datetime
from typing import Literal

import msgspec

from server.api.admin.schemas import Model


class AnthropicModel(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="model"):
    id: str
    display_name: str
    created_at: str  # RFC 3339
    lifecycle: Literal["active"] = "active"
    max_input_tokens: int | None  # None: not known before the model is loaded


class AnthropicModelList(msgspec.Struct, frozen=True, kw_only=True):
    data: list[AnthropicModel]
    has_more: Literal[False] = False
    first_id: str
    last_id: str


class AnthropicModels:
    """The models in Anthropic's format."""

    def of_model(self, model: Model) -> AnthropicModel:
        created_at = datetime.fromtimestamp(model.created, UTC).isoformat().replace("+00:00", "Z")
        return AnthropicModel(
            id=model.id, display_name=model.id, created_at=created_at, max_input_tokens=model.max_model_len
        )

    def of_list(self, models: list[Model]) -> AnthropicModelList:
        found = [self.of_model(model) for model in models]
        return AnthropicModelList(data=found, first_id=found[0].id, last_id=found[-1].id)
