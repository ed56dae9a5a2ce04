"""Describes the served models in the form of Ollama's API. File names and paths are not part of it."""

import hashlib
import json
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from server.api.ollama.conversion import OPTIONS, tagged_name
from server.api.ollama.schemas import OllamaModel, OllamaModelDetails, OllamaModelInfo, OllamaModelList
from server.api.ollama.writer import time_text
from server.models.served_model import ModelVariant, ServedModel

NEVER = "2318-01-01T00:00:00Z"  # when the model is unloaded
PARAMETERS = {**OPTIONS, "repeat_penalty": "repetition_penalty"}  # Ollama's name -> name in the default sampling
UNITS = ((10**9, "B", 1), (10**6, "M", 2), (10**3, "K", 0))  # size of a unit, its name, digits after the point


def list_models(models: Iterable[ModelVariant], created: int) -> OllamaModelList:
    """Return models for /api/tags. Raises EngineUnavailableError while an engine is not ready."""
    return OllamaModelList([_model(model, created) for model in models])


def list_loaded(models: Iterable[ModelVariant], created: int) -> OllamaModelList:
    """Return models, which are loaded, for /api/ps."""
    return OllamaModelList([_loaded(model, created) for model in models])


def show_model(model: ModelVariant, created: int) -> OllamaModelInfo:
    """Return the properties of a model for /api/show."""
    base = model.base
    defaults = base.default_sampling.values
    named = {name: defaults[field] for name, field in PARAMETERS.items() if field in defaults}
    return OllamaModelInfo(
        modelfile=f"FROM {tagged_name(model.name)}\n",
        parameters="\n".join(f"{name:30} {json.dumps(value)}" for name, value in named.items()),
        template="" if base.chat_template is None else base.chat_template.source,
        details=_details(model),
        model_info=_model_info(base),
        capabilities=_capabilities(base),
        modified_at=_time(created),
    )


def _model(model: ModelVariant, created: int) -> OllamaModel:
    name = tagged_name(model.name)
    return OllamaModel(
        name=name,
        model=name,
        modified_at=_time(created),
        size=model.base.weight_files.num_bytes,
        digest=hashlib.sha256(model.system_fingerprint.encode()).hexdigest(),
        details=_details(model),
        capabilities=_capabilities(model.base),
    )


def _loaded(model: ModelVariant, created: int) -> OllamaModel:
    entry = _model(model, created)
    entry.expires_at, entry.context_length = NEVER, model.base.max_model_len
    entry.size_vram = 0 if model.base.client.ready_info().device == "cpu" else entry.size
    return entry


def _details(model: ModelVariant) -> OllamaModelDetails:
    base = model.base
    files, config = base.weight_files, base.config
    return OllamaModelDetails(
        parent_model="" if model.adapter is None else tagged_name(base.name),
        format=files.format,
        family=config.architecture,
        families=[config.architecture],
        parameter_size=short_number(files.num_parameters),
        quantization_level=files.number_format,
        context_length=base.max_model_len,
        embedding_length=config.hidden_size,
    )


def _model_info(model: ServedModel) -> dict[str, Any]:
    """Return the metadata by their names in GGUF files. The context length is that of this server."""
    config = model.config
    all_experts = [layer.experts for layer in config.layers if layer.experts is not None]
    of_architecture = {
        "context_length": model.max_model_len,
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
        "general.parameter_count": model.weight_files.num_parameters,
        **{f"{config.architecture}.{name}": value for name, value in of_architecture.items() if value is not None},
    }


def _of_layers(numbers: Iterable[int]) -> int | list[int] | None:
    """Return one number if it is that of all layers, as GGUF files do, else one for each; None if there are none."""
    found = list(numbers)
    return found[0] if len(set(found)) == 1 else found or None


def _capabilities(model: ServedModel) -> list[str]:
    """Return what clients can ask of the model. Tools are described to models whose template does not know them."""
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
