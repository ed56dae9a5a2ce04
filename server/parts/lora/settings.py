"""The settings of LoRA adapters."""

import re

import msgspec

from server.settings.setting import ADAPTER_NAME, BOOLEAN, LORA, Setting, ValueType, integer, non_empty_text


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


def _named_paths(value: object) -> tuple[str, ...]:
    return tuple(_named_path(item) for item in (value if isinstance(value, list | tuple) else [value]))


NAMED_PATHS = ValueType("NAME=PATH with a NAME of letters, digits and _./:@+-", _named_paths, "NAME=PATH", is_list=True)

SETTINGS = {
    "lora_modules": Setting(
        LORA,
        NAMED_PATHS,
        "LoRA adapter to load at startup, as NAME=PATH or vLLM's JSON. NAME is its model name in the API; PATH is "
        "a folder in PEFT's format, a GGUF file, or the Hugging Face id of either. Can be repeated.",
    ),
    "max_loras": Setting(
        LORA,
        integer(1, 1024),
        "Maximum number of loaded adapters. One step can use all of them; in vLLM this limits the adapters of one "
        "step, and more can be kept on the CPU.",
    ),
    "max_lora_rank": Setting(
        LORA, integer(1, 4096), "Maximum rank of adapters. Unset: the largest of --lora-modules, at least 16."
    ),
    "allow_runtime_lora_updating": Setting(
        LORA,
        BOOLEAN,
        "Allow clients to load and unload adapters (/v1/load_lora_adapter, /v1/unload_lora_adapter) from any "
        "folder that the server can read, or from Hugging Face, where the server downloads them.",
    ),
}
