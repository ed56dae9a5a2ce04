"""The served models by their names."""

from collections.abc import Sequence
from itertools import chain

from server.http.errors import MissingParameterError, ModelNotFoundError
from server.models.served_model import ModelVariant, ServedModel
from server.tenants import Tenant


class ModelRegistry:
    """All served models. The first one answers requests that name none, where that is allowed."""

    def __init__(self, models: Sequence[ServedModel]) -> None:
        self.models = models

    @property
    def default(self) -> ServedModel:
        return self.models[0]

    def variants(self, tenant: Tenant) -> list[ModelVariant]:
        """Return each model under each of its names, then its loaded adapters that the tenant may use."""
        return list(chain.from_iterable(_variants(model, tenant) for model in self.models))

    def find(self, name: str, tenant: Tenant) -> ModelVariant:
        """Return the model or adapter with this name.

        Raises:
            MissingParameterError: The name is empty.
            ModelNotFoundError: There is no such model or adapter for the tenant.
            EngineUnavailableError: The adapter is loaded at start-up, and the engine is not ready yet.
        """
        if not name:
            raise MissingParameterError("model")
        variants = self.variants(tenant)
        for variant in variants:
            if variant.name == name:
                return variant
        for model in self.models:
            if model.client.info is None and name in model.settings.lora_paths and tenant.may_use(name):
                model.client.ready_info()
        raise ModelNotFoundError(name, [variant.name for variant in variants])

    def is_ambiguous(self, tenant: Tenant) -> bool:
        """Return whether a request of the tenant must name its model, since there are several, or adapters."""
        adapters = [name for model in self.models for name in (*model.settings.lora_paths, *model.client.adapters)]
        return len(self.models) > 1 or any(map(tenant.may_use, adapters))


def _variants(model: ServedModel, tenant: Tenant) -> list[ModelVariant]:
    adapters = [(name, adapter) for name, adapter in model.client.adapters.items() if tenant.may_use(name)]
    bases = [ModelVariant(name, model) for name in model.names]
    return [*bases, *(ModelVariant(name, model, adapter) for name, adapter in adapters)]
