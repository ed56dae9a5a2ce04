"""The settings of the inspection."""

from server.settings.setting import ACCESS, BOOLEAN, Setting

SETTINGS = {
    "inspect": Setting(
        ACCESS,
        BOOLEAN,
        "Show under /lightwell/v1/ what the engine does (its steps, its requests, its KV blocks) and what happens "
        "inside the model. With API keys, a client sees its own requests and an admin key all.",
    ),
    "inspect_public": Setting(
        ACCESS,
        BOOLEAN,
        "Show it, with the texts of all requests, to everybody where there are no API keys. By default "
        "only clients on this machine see it: not through a proxy, not with --allowed-origins '*', and not if the "
        "server listens beyond loopback.",
    ),
}
