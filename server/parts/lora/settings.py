"""The settings of LoRA adapters."""

import re
from collections.abc import Collection
from typing import TYPE_CHECKING

import msgspec

from server.settings.setting import (
    ADAPTER_NAME,
    BOOLEAN,
    LORA,
    Setting,
    SettingsError,
    ValueType,
    integer,
    many,
    non_empty_text,
)

if TYPE_CHECKING:
    from server.settings.table import Settings


class _NamedPath(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    path: str
    base_model_name: str | None = None  # ignored: the server has one base model


def _named_path(value: object) -> str:
    """Return NAME=PATH, which may also be given as vLLM's JSON: {"name": NAME, "path": PATH}."""
    if isinstance(value, str) and not value.lstrip().startswith("{"):
        name, _, path = non_empty_text(value).partition("=")
    else:  # msgspec's errors are ValueErrors
        module = (
            msgspec.json.decode(value, type=_NamedPath)
            if isinstance(value, str)
            else msgspec.convert(value, _NamedPath)
        )
        name, path = module.name, module.path
    if re.fullmatch(ADAPTER_NAME, name) is None:
        raise ValueError
    return f"{name}={non_empty_text(path)}"


NAMED_PATHS = many(ValueType("NAME=PATH with a NAME of letters, digits and _./:@+-", _named_path, "NAME=PATH"))

GROUP = LORA
SETTINGS = {
    "lora_modules": Setting(
        NAMED_PATHS,
        "LoRA adapter to load at startup, as NAME=PATH or vLLM's JSON. NAME is its model name in the API; PATH is "
        "a folder in PEFT's format, a GGUF file, or the Hugging Face id of either. Can be repeated.",
    ),
    "max_loras": Setting(
        integer(1, 1024),
        "Maximum number of loaded adapters. One step can use all of them; in vLLM this limits the adapters of one "
        "step, and more can be kept on the CPU.",
    ),
    "max_lora_rank": Setting(
        integer(1, 4096), "Maximum rank of adapters. Unset: the largest of --lora-modules, at least 16."
    ),
    "allow_runtime_lora_updating": Setting(
        BOOLEAN,
        "Allow clients to load and unload adapters (/v1/load_lora_adapter, /v1/unload_lora_adapter) from any "
        "folder that the server can read, or from Hugging Face, where the server downloads them.",
    ),
}


def check(settings: "Settings") -> None:
    """Raise SettingsError for adapters of a model that share a name, or are too many."""
    for model in settings.each_model:
        check_names(model, model.served_model_name)
        if len(model.lora_modules) > model.max_loras:
            raise SettingsError(
                f"--lora-modules names {len(model.lora_modules)} adapters, but --max-loras is {model.max_loras}"
            )


def check_names(settings: "Settings", model_names: Collection[str]) -> None:
    """Raise SettingsError if an adapter of --lora-modules shares its name with another one or with the model."""
    names = settings.lora_names
    for index, name in enumerate(names):
        if name in names[:index]:
            raise SettingsError(f"--lora-modules: two adapters are named {name}")
        if name in model_names:
            raise SettingsError(f"--lora-modules: {name} is the name of the model; choose another adapter name")
