"""The settings of several API processes."""

from server.settings.setting import API, Setting, integer

GROUP = API
SETTINGS = {
    "api_server_count": Setting(
        integer(1, 64),
        "Number of API processes, which share the connections. More than one are for many streams at a time.",
    )
}
