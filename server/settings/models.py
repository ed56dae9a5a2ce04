"""The settings that say which models are served, and when they are in memory."""

from typing import Annotated, Any

from server.settings.access import AccessSettings
from server.settings.setting import Setting
from server.settings.value_types import choice, model_entries, seconds, text, texts

MODELS = "Models"


class ModelSettings(AccessSettings, frozen=True, kw_only=True):
    """Which models are served, and when they are in memory."""

    model: Annotated[
        str,
        Setting(
            MODELS,
            text("MODEL"),
            "Alias (smollm2-135m, qwen3:4b), GGUF file, folder with config.json and safetensors files, or Hugging Face "
            "id (org/name, org/name:Q4_K_M, org/name:file.gguf, org/name@revision).",
            positional=True,
        ),
    ] = "smollm2-135m"
    models: Annotated[
        tuple[dict[str, Any], ...],
        Setting(
            MODELS,
            model_entries("MODEL"),
            "Model to serve. Can be repeated: each model has its own engine. In a "
            "config file, the list `models` can give each its own settings (docs/models.md).",
            singular="model",
        ),
    ] = ()
    served_model_name: Annotated[
        tuple[str, ...],
        Setting(
            MODELS,
            texts("NAME"),
            "Name of the model in the API. Can be repeated. Unset: the alias, or the last part of MODEL.",
        ),
    ] = ()
    chat_template: Annotated[
        str | None, Setting(MODELS, text("FILE"), "Jinja chat template to use instead of the model's own.")
    ] = None
    load: Annotated[
        str,
        Setting(
            MODELS,
            choice("WHEN", "at-start", "on-first-use"),
            "When a model is loaded. Requests for a model that is not loaded wait until it is.",
        ),
    ] = "at-start"
    idle_unload: Annotated[
        float | None,
        Setting(
            MODELS,
            seconds(1, 30 * 86400),
            "Time without a request after which a model is unloaded, in seconds; the next request loads it again. "
            "Unset: models stay loaded, unless another one needs their memory.",
        ),
    ] = None
