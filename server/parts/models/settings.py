"""The settings that say when models are in memory."""

from typing import TYPE_CHECKING

from server.settings.setting import MODELS, Setting, SettingsError, choice, seconds

if TYPE_CHECKING:
    from server.settings.table import Settings

GROUP = MODELS
SETTINGS = {
    "load": Setting(
        choice("WHEN", "at-start", "on-first-use"),
        "When a model is loaded. Requests for a model that is not loaded wait until it is.",
    ),
    "idle_unload": Setting(
        seconds(1, 30 * 86400),
        "Time without a request after which a model is unloaded, in seconds; the next request loads it again. "
        "Unset: models stay loaded, unless another one needs their memory.",
    ),
}


def check(settings: "Settings") -> None:
    """Raise SettingsError for settings that are not for models that are loaded and unloaded."""
    for name in ("data-parallel-size", "api-server-count"):
        if settings.unloads_models and getattr(settings, name.replace("-", "_")) > 1:
            raise SettingsError(f"--{name}: not with several models, --load on-first-use or --idle-unload")
    if settings.models and (settings.served_model_name or settings.lora_modules):
        name = "served-model-name" if settings.served_model_name else "lora-modules"
        raise SettingsError(
            f"--{name}: there are several models; set {name} of its model in the list models of the --config file"
        )
