"""The settings that say when models are in memory."""

from server.settings.setting import MODELS, Setting, choice, seconds

SETTINGS = {
    "load": Setting(
        MODELS,
        choice("WHEN", "at-start", "on-first-use"),
        "When a model is loaded. Requests for a model that is not loaded wait until it is.",
    ),
    "idle_unload": Setting(
        MODELS,
        seconds(1, 30 * 86400),
        "Time without a request after which a model is unloaded, in seconds; the next request loads it again. "
        "Unset: models stay loaded, unless another one needs their memory.",
    ),
}
