"""The served models by their names."""

from collections.abc import Sequence
from itertools import chain

from server.http.errors import EngineUnavailableError, MissingParameterError, ModelNotFoundError
from server.models.served_model import ModelVariant, ServedModel
from server.models.slot import ModelSlot, ModelState
from server.tenants import Tenant


class ModelRegistry:
    """All models. If there is only one, it answers requests that name none, where that is allowed."""

    def __init__(self, slots: Sequence[ModelSlot]) -> None:
        self.slots = slots

    async def start(self) -> None:
        """Connect to the engines of the models that are loaded together with the server."""
        for model in self.loaded:
            await model.client.start()

    async def close(self) -> None:
        """Close the models that are loaded."""
        for model in self.loaded:
            await model.close()

    @property
    def loaded(self) -> list[ServedModel]:
        """The models that are in memory, or are being loaded together with the server."""
        return [slot.served for slot in self.slots if slot.served is not None]

    @property
    def default(self) -> ServedModel:
        """The first model. Raises EngineUnavailableError if it is not loaded."""
        return _served(self.slots[0])

    @property
    def name(self) -> str:
        """The name of the first model."""
        return self.slots[0].name

    def names(self, tenant: Tenant) -> list[str]:
        """Return the names that the tenant can use: those of each model, then those of its adapters."""
        return list(chain.from_iterable(_names(slot, tenant) for slot in self.slots))

    def variants(self, tenant: Tenant) -> list[ModelVariant]:
        """Return each loaded model under each of its names, then its loaded adapters that the tenant may use."""
        return list(chain.from_iterable(_variants(model, tenant) for model in self.loaded))

    def find_slot(self, name: str | None, tenant: Tenant) -> ModelSlot | None:
        """Return the slot of the model or adapter with this name, or None. A name of None is that of the first."""
        if name is None:
            return self.slots[0]
        return next((slot for slot in self.slots if name in _names(slot, tenant)), None)

    def find(self, name: str | None, tenant: Tenant) -> ModelVariant:
        """Return the model or adapter with this name, or the only model if it is None.

        Raises:
            MissingParameterError: The name is empty, or None although there are several models.
            ModelNotFoundError: There is no such model or adapter for the tenant.
            EngineUnavailableError: The model is not loaded, or the adapter is loaded together with it.
        """
        if name is None and len(self.slots) == 1:
            name = self.slots[0].config.names[0]
        if not name:
            raise MissingParameterError("model")
        for each in self.slots:
            if each.served is not None and name in each.served.variants:
                return each.served.variants[name]
        slot = self.find_slot(name, tenant)
        if slot is None:
            raise ModelNotFoundError(name, self.names(tenant))
        model = _served(slot)
        if name not in model.client.adapters:
            model.client.ready_info()
            raise ModelNotFoundError(name, self.names(tenant))
        return ModelVariant(name, model, model.client.adapters[name])

    def is_ambiguous(self, tenant: Tenant) -> bool:
        """Return whether a request of the tenant must name its model, since there are several, or adapters."""
        return len(self.slots) > 1 or len(self.names(tenant)) > len(self.slots[0].names)


def _served(slot: ModelSlot) -> ServedModel:
    if slot.served is None:
        is_loading = slot.state is ModelState.LOADING
        state = (
            "still being loaded. Please retry later." if is_loading else "not loaded. A request that runs it loads it."
        )
        raise EngineUnavailableError(f"The model `{slot.name}` is {state}")
    return slot.served


def _names(slot: ModelSlot, tenant: Tenant) -> list[str]:
    """Return the names of a model, and of its adapters: those that are loaded, or will be together with it."""
    client = None if slot.served is None else slot.served.client
    adapters = slot.config.settings.lora_names if client is None or client.info is None else client.adapters
    return [*slot.names, *(name for name in adapters if tenant.may_use(name))]


def _variants(model: ServedModel, tenant: Tenant) -> list[ModelVariant]:
    adapters = [(name, adapter) for name, adapter in model.client.adapters.items() if tenant.may_use(name)]
    return [*model.variants.values(), *(ModelVariant(name, model, adapter) for name, adapter in adapters)]
