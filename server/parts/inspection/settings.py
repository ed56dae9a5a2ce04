"""The settings of the inspection."""

from typing import TYPE_CHECKING

from server.settings.setting import ACCESS, BOOLEAN, Setting

if TYPE_CHECKING:
    from server.settings.table import Settings

GROUP = ACCESS
SETTINGS = {
    "inspect": Setting(
        BOOLEAN,
        "Show under /lightwell/v1/ what the engine does (its steps, its requests, its KV blocks) and what happens "
        "inside the model. With API keys, a client sees its own requests and an admin key all.",
    ),
    "inspect_public": Setting(
        BOOLEAN,
        "Show it, with the texts of all requests, to everybody where there are no API keys. By default "
        "only clients on this machine see it: not through a proxy, not with --allowed-origins '*', and not if the "
        "server listens beyond loopback.",
    ),
}


def keeps_token_ids(settings: "Settings") -> bool:
    """Return whether the engine keeps tokens of prompts for those who may read what was cached of theirs.

    With keys, they stay as private as other texts: they are kept only where requests are recorded.
    """
    if settings.needs_key:
        return settings.inspect and settings.record_requests > 0
    return settings.inspect and hidden_without_keys(settings) is None


def hidden_without_keys(settings: "Settings") -> str | None:
    """Return why a server without API keys shows nobody what the engine does, or None if it may show it."""
    from server.settings.load import is_loopback

    if settings.inspect_public:
        return None
    if settings.uds is None and not is_loopback(settings.host):
        return "Without API keys, what the engine does is shown only by a server that listens on loopback"
    if "*" in settings.allowed_origins:
        return "Without API keys, what the engine does is not shown where all origins are allowed"
    return None
