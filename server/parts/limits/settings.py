"""The settings of the keys file."""

from collections.abc import Mapping

from server.settings.setting import ACCESS, Setting, text

SETTINGS: Mapping[str, Setting] = {
    "api_keys_file": Setting(
        ACCESS,
        text("FILE"),
        "YAML file of clients, with hashes of their keys and limits (docs/tenants.md). SIGHUP reads it again.",
    )
}
