"""Describes the served models in the form of Ollama's API. File names and paths are not part of it."""

import hashlib
import json
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from server.api.ollama.conversion import OPTIONS, tagged_name
from server.api.ollama.schemas import OllamaModel, OllamaModelDetails, OllamaModelInfo, OllamaModelList
from server.api.ollama.writer import time_text
from server.context import ServedModel, ServerContext
from server.tenants import Tenant

NEVER = "2318-01-01T00:00:00Z"  # when the model is unloaded
PARAMETERS = {**OPTIONS, "repeat_penalty": "repetition_penalty"}  # Ollama's name -> name in the default sampling
UNITS = ((10**9, "B", 1), (10**6, "M", 2), (10**3, "K", 0))  # size of a unit, its name, digits after the point


def list_models(context: ServerContext, tenant: Tenant) -> OllamaModelList:
    """Return the served models for /api/tags. Raises EngineUnavailableError while the engine is not ready."""
    return OllamaModelList([_model(context, model) for model in context.served_models(tenant)])


def list_loaded(context: ServerContext, tenant: Tenant) -> OllamaModelList:
    """Return the served models, which are always loaded, for /api/ps."""
    models = [_model(context, model) for model in context.served_models(tenant)]
    on_gpu = context.client.ready_info().device != "cpu"
    for model in models:
        model.expires_at, model.context_length = NEVER, context.max_model_len
        model.size_vram = model.size if on_gpu else 0
    return OllamaModelList(models)


def show_model(context: ServerContext, model: ServedModel) -> OllamaModelInfo:
    """Return the properties of a model for /api/show."""
    defaults = context.default_sampling.values
    named = {name: defaults[field] for name, field in PARAMETERS.items() if field in defaults}
    source = "" if context.chat_template is None else context.chat_template.source
    return OllamaModelInfo(
        modelfile=f"FROM {tagged_name(model.name)}\n",
        parameters="\n".join(f"{name:30} {json.dumps(value)}" for name, value in named.items()),
        template=source,
        details=_details(context, model),
        model_info=_model_info(context),
        capabilities=_capabilities(context),
        modified_at=_created(context),
    )


def _model(context: ServerContext, model: ServedModel) -> OllamaModel:
    name = tagged_name(model.name)
    return OllamaModel(
        name=name,
        model=name,
        modified_at=_created(context),
        size=context.weight_files.num_bytes,
        digest=hashlib.sha256(context.system_fingerprint(model).encode()).hexdigest(),
        details=_details(context, model),
        capabilities=_capabilities(context),
    )


def _details(context: ServerContext, model: ServedModel) -> OllamaModelDetails:
    files, config = context.weight_files, context.model_config
    return OllamaModelDetails(
        parent_model="" if model.adapter is None else tagged_name(context.model_names[0]),
        format=files.format,
        family=config.architecture,
        families=[config.architecture],
        parameter_size=short_number(files.num_parameters),
        quantization_level=files.number_format,
        context_length=context.max_model_len,
        embedding_length=config.hidden_size,
    )


def _model_info(context: ServerContext) -> dict[str, Any]:
    """Return the metadata by their names in GGUF files. The context length is that of this server."""
    config = context.model_config
    all_experts = [layer.experts for layer in config.layers if layer.experts is not None]
    of_architecture = {
        "context_length": context.max_model_len,
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
        "general.parameter_count": context.weight_files.num_parameters,
        **{f"{config.architecture}.{name}": value for name, value in of_architecture.items() if value is not None},
    }


def _of_layers(numbers: Iterable[int]) -> int | list[int] | None:
    """Return one number if it is that of all layers, as GGUF files do, else one for each; None if there are none."""
    found = list(numbers)
    return found[0] if len(set(found)) == 1 else found or None


def _capabilities(context: ServerContext) -> list[str]:
    """Return what clients can ask of the model. Tools are described to models whose template does not know them."""
    template = context.chat_template
    available = {
        "completion": True,
        "tools": template is not None,
        "thinking": template is not None and template.reasoning_tags is not None,
        "insert": context.tokenizer.fim is not None,
    }
    return [name for name, is_available in available.items() if is_available]


def _created(context: ServerContext) -> str:
    return time_text(datetime.fromtimestamp(context.created, UTC))


def short_number(number: int) -> str:
    """Return 134515008 as `134.52M`, as Ollama does."""
    for size, name, num_digits in UNITS:
        if number >= size:
            return f"{number / size:.{0 if number % size == 0 else num_digits}f}{name}"
    return str(number)
