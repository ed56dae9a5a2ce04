"""The settings of several models: entries of the list `models`, and which settings one of them can have for itself."""

from collections import Counter
from collections.abc import Collection, Sequence
from functools import cache
from itertools import chain
from typing import Any

from server.settings.setting import ENGINE, LORA, MEMORY, ExplainedError, SettingsError, did_you_mean
from server.settings.table import SETTINGS


@cache
def settings_of_a_model() -> dict[str, str]:
    """Return the keys of the settings that a model can have for itself: of its engine, and how it is served."""
    names = [name for name, setting in SETTINGS.items() if setting.group in (ENGINE, MEMORY, LORA)]
    own = {*names, "model", "load", "served_model_name", "chat_template"}
    return {name: SETTINGS[name].key for name in own - {"data_parallel_size", "seed", "allow_runtime_lora_updating"}}


def parse(entries: Sequence[object]) -> tuple[dict[str, Any], ...]:
    """Parse entries, each of which is the name of a model, or a mapping with it and settings of its own."""
    return tuple(_parse_entry(index, entry) for index, entry in enumerate(entries))


def _parse_entry(index: int, entry: object) -> dict[str, Any]:
    parsed, known = {}, settings_of_a_model()
    fields = entry if isinstance(entry, dict) else {"model": entry}
    SETTINGS["model"].value_type.parse(fields.get("model"))
    for key, value in fields.items():
        name = str(key).replace("-", "_")
        if name not in known:
            is_shared = name in SETTINGS
            reason = (
                "applies to all models" if is_shared else f"unknown setting{did_you_mean(str(key), known.values())}"
            )
            raise ExplainedError(f"entry {index}: {key}: {reason}")
        try:
            if value is not None:
                parsed[name] = SETTINGS[name].parse(value, f"entry {index}: {key}")
        except SettingsError as error:
            raise ExplainedError(str(error)) from None
    return parsed


def check_names(names: Sequence[Collection[str]]) -> None:
    """Raise SettingsError if several models or adapters share a name. `names` are those of each model."""
    counts = Counter(chain.from_iterable(map(set, names)))
    if shared := [name for name, count in counts.items() if count > 1]:
        raise SettingsError(
            f"two models are named {shared[0]}; set served-model-name of one in the list models of the --config file"
        )
