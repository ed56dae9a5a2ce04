"""Describes the served models in the form of Ollama's API. File names and paths are not part of it."""

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from server.http.errors import EngineUnavailableError, ModelNotFoundError
from server.models.registry import ModelRegistry, ModelSlot
from server.models.served_model import ServedModel
from server.parts.ollama.conversion import MAX_DURATION, OPTIONS, tagged_name
from server.parts.ollama.writer import OllamaModel, OllamaModelDetails, OllamaModelInfo, OllamaModelList, time_text
from server.tenants import Tenant

NEVER = "2318-01-01T00:00:00Z"  # when the model is unloaded
PARAMETERS = {**OPTIONS, "repeat_penalty": "repetition_penalty"}  # Ollama's name -> name in the default sampling
UNITS = ((10**9, "B", 1), (10**6, "M", 2), (10**3, "K", 0))  # size of a unit, its name, digits after the point


def list_models(models: ModelRegistry, tenant: Tenant, created: int) -> OllamaModelList:
    """Return all models for /api/tags. Raises EngineUnavailableError while the only model is being loaded."""
    return OllamaModelList([_model(models, name, tenant, created) for name in models.names(tenant)])


def list_loaded(
    models: ModelRegistry, tenant: Tenant, created: int, idle_limits: Mapping[str, float | None]
) -> OllamaModelList:
    """Return the models in memory, for /api/ps. `idle_limits`: seconds after which a model is unloaded, by its name."""
    loaded = []
    for variant in models.variants(tenant):
        if variant.base.client.dead_reason is not None:
            continue
        slot = models.find_slot(variant.name, tenant)
        entry = _model(models, variant.name, tenant, created)
        entry.expires_at = NEVER if slot is None else _expiry(slot, idle_limits[slot.name])
        entry.context_length = variant.base.max_model_len
        entry.size_vram = 0 if variant.base.client.ready_info().device == "cpu" else entry.size
        loaded.append(entry)
    return OllamaModelList(loaded)


def _expiry(slot: ModelSlot, limit: float | None) -> str:
    """Return when a model is unloaded if no other request comes."""
    if limit is None or limit > MAX_DURATION:
        return NEVER
    left = max(0.0, slot.last_used + limit - slot.now()) if slot.is_idle else limit
    return time_text(datetime.fromtimestamp(time.time() + left, UTC))


def show_model(models: ModelRegistry, name: str, tenant: Tenant, created: int) -> OllamaModelInfo:
    """Return the properties of a model for /api/show: those in its files, and if it is loaded, all.

    Raises EngineUnavailableError if its files cannot be read.
    """
    entry = _model(models, name, tenant, created)
    slot = find_slot(models, name, tenant)
    if not entry.details.format:
        raise EngineUnavailableError(f"The files of the model `{name}` cannot be read.")
    info = OllamaModelInfo(
        modelfile=f"FROM {tagged_name(name)}\n",
        parameters="",
        template="",
        details=entry.details,
        model_info=_model_info(slot),
        capabilities=_capabilities(slot.served),
        modified_at=_time(created),
    )
    if slot.served is not None:
        defaults, template = slot.served.default_sampling.values, slot.served.chat_template
        named = {name: defaults[field] for name, field in PARAMETERS.items() if field in defaults}
        info.parameters = "\n".join(f"{name:30} {json.dumps(value)}" for name, value in named.items())
        info.template = "" if template is None else template.source
    return info


def find_slot(models: ModelRegistry, name: str, tenant: Tenant) -> ModelSlot:
    """Return the slot of a model. Raises ModelNotFoundError, or MissingParameterError for an empty name."""
    if (slot := models.find_slot(name, tenant)) is None:
        models.find(name, tenant)
        raise ModelNotFoundError(name)
    return slot


def _model(models: ModelRegistry, name: str, tenant: Tenant, created: int) -> OllamaModel:
    slot, tag = find_slot(models, name, tenant), tagged_name(name)
    served = slot.served
    try:
        size, details = slot.weight_files.num_bytes, _details(slot, name)
    except (OSError, ValueError):  # a file that cannot be read must not hide the other models
        size, details = 0, OllamaModelDetails()
    identity = slot.config.path
    if served is not None:
        identity = models.find(name, tenant).system_fingerprint(served.client.ready_info())
    return OllamaModel(
        name=tag,
        model=tag,
        modified_at=_time(created),
        size=size,
        digest=hashlib.sha256(identity.encode()).hexdigest(),
        details=details,
        capabilities=_capabilities(served),
    )


def _details(slot: ModelSlot, name: str) -> OllamaModelDetails:
    files, config = slot.weight_files, slot.model_config
    return OllamaModelDetails(
        parent_model="" if name in slot.names else tagged_name(slot.name),
        format=files.format,
        family=config.architecture,
        families=[config.architecture],
        parameter_size=short_number(files.num_parameters),
        quantization_level=files.number_format,
        context_length=_context_length(slot),
        embedding_length=config.hidden_size,
    )


def _context_length(slot: ModelSlot) -> int:
    """Return the maximum length of the context; before the model is loaded, that of the settings or of its files."""
    if slot.served is not None:
        return slot.served.max_model_len
    return slot.config.settings.max_model_len or slot.model_config.max_position_embeddings


def _model_info(slot: ModelSlot) -> dict[str, Any]:
    """Return the metadata by their names in GGUF files. The context length is that of this server."""
    config = slot.model_config
    all_experts = [layer.experts for layer in config.layers if layer.experts is not None]
    of_architecture = {
        "context_length": _context_length(slot),
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": _of_layers(layer.mlp.intermediate_size for layer in config.layers if layer.mlp),
        "expert_feed_forward_length": _of_layers(experts.intermediate_size for experts in all_experts),
        "expert_count": _of_layers(experts.router.num_experts for experts in all_experts),
        "expert_used_count": _of_layers(experts.router.num_experts_per_tok for experts in all_experts),
        "attention.head_count": _of_layers(layer.attention.num_heads for layer in config.layers),
        "attention.head_count_kv": _of_layers(layer.attention.num_kv_heads for layer in config.layers),
        "attention.key_length": _of_layers(layer.attention.head_dim for layer in config.layers),
        "vocab_size": config.vocab_size,
    }
    return {
        "general.architecture": config.architecture,
        "general.parameter_count": slot.weight_files.num_parameters,
        **{f"{config.architecture}.{name}": value for name, value in of_architecture.items() if value is not None},
    }


def _of_layers(numbers: Iterable[int]) -> int | list[int] | None:
    """Return one number if it is that of all layers, as GGUF files do, else one for each; None if there are none."""
    found = list(numbers)
    return found[0] if len(set(found)) == 1 else found or None


def _capabilities(model: ServedModel | None) -> list[str]:
    """Return what clients can ask of the model; before it is loaded, what they can ask of every model.

    Tools are described to models whose template does not know them.
    """
    if model is None:
        return ["completion"]
    template = model.chat_template
    available = {
        "completion": True,
        "tools": template is not None,
        "thinking": template is not None and template.reasoning_tags is not None,
        "insert": model.tokenizer.fim is not None,
    }
    return [name for name, is_available in available.items() if is_available]


def _time(created: int) -> str:
    return time_text(datetime.fromtimestamp(created, UTC))


def short_number(number: int) -> str:
    """Return 134515008 as `134.52M`, as Ollama does."""
    for size, name, num_digits in UNITS:
        if number >= size:
            return f"{number / size:.{0 if number % size == 0 else num_digits}f}{name}"
    return str(number)
