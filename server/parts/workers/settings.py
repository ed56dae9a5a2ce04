"""The settings of several API processes."""

from collections.abc import Mapping

from server.settings.setting import API, Setting, integer

SETTINGS: Mapping[str, Setting] = {
    "api_server_count": Setting(
        API,
        integer(1, 64),
        "Number of API processes, which share the connections. More than one are for many streams at a time.",
    )
}
