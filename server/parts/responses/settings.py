"""The settings of the Responses API."""

from server.settings.setting import LIMITS, Setting, integer, size

GROUP = LIMITS
SETTINGS = {
    "max_stored_responses": Setting(
        integer(0), "Maximum number of /v1/responses results kept in memory for later retrieval; 0 keeps none."
    ),
    "stored_responses_memory": Setting(
        size(0),
        "Memory limit for stored responses, including their conversations and events; the least recently used ones "
        "of the client that holds most are dropped first.",
    ),
}
