"""The settings of the keys file."""

from server.settings.setting import ACCESS, Setting, text

GROUP = ACCESS
SETTINGS = {
    "api_keys_file": Setting(
        text("FILE"),
        "YAML file of clients, with hashes of their keys and limits (docs/tenants.md). SIGHUP reads it again.",
    )
}
