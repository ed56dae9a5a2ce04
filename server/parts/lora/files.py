"""The files of LoRA adapters: paths, or Hugging Face ids that are downloaded."""

from collections.abc import Sequence
from pathlib import Path

from engine.config.huggingface import PICKLE_SUFFIXES
from server.model_paths import (
    ADAPTER_FILES,
    GIVE_GGUF_FILE,
    ONLY_PICKLES,
    PICKLE_REFUSED,
    ModelError,
    existing_path,
    hub_module,
    problem_with_file,
)
from server.parts.lora.settings import check_names
from server.settings.table import Settings

_ADAPTER_FOLDER = f"for an adapter in safetensors, give the folder that contains {ADAPTER_FILES[0]}"


def resolve_modules(settings: Settings, model_names: Sequence[str]) -> dict[str, Path]:
    """Return the paths of the adapters of --lora-modules by name, downloading them if necessary.

    Raises ModelError, or SettingsError if one has a name of the model.
    """
    check_names(settings, model_names)
    paths = {}
    for module in settings.lora_modules:
        name, _, path = module.partition("=")
        try:
            paths[name] = resolve_adapter(path, shows_progress=True)
        except ModelError as error:
            raise ModelError(f"--lora-modules {name}: {error}") from None
    return paths


def resolve_adapter(name: str, *, shows_progress: bool = False) -> Path:
    """Return the path of an adapter, downloading it if necessary: a GGUF file, or a folder with `ADAPTER_FILES`.

    Raises ModelError.
    """
    label = name
    if (path := existing_path(name)) is None:
        path, label = hub_module(f"adapter {name}").fetch_adapter(name, shows_progress=shows_progress)
    assert path is not None
    try:
        problem = problem_with_file(path, _ADAPTER_FOLDER) if path.is_file() else _problem_with_folder(path)
    except OSError as error:
        problem = error.strerror or "cannot be read"
    if problem:
        raise ModelError(f"adapter {label}: {problem}")
    return path


def _problem_with_folder(path: Path) -> str | None:
    missing = [name for name in ADAPTER_FILES if not (path / name).is_file()]
    if not missing:
        return None
    if missing[0] == ADAPTER_FILES[1] and any(file.name.endswith(PICKLE_SUFFIXES) for file in path.iterdir()):
        return f"{ONLY_PICKLES}. {PICKLE_REFUSED}"
    return f"no {missing[0]} in the folder ({GIVE_GGUF_FILE})"
