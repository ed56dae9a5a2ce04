"""The settings of recordings."""

from server.settings.setting import LIMITS, Setting, integer

GROUP = LIMITS
SETTINGS = {
    "record_requests": Setting(
        integer(0),
        "Number of finished requests kept in memory for /v1/requests/{id}/replay; 0 keeps none. Recording computes "
        "log probabilities for every request, even if the client does not ask for them.",
    )
}
