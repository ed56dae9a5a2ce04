"""The settings of OpenTelemetry."""

import re
from urllib.parse import urlsplit

from server.settings.setting import LOGS, Setting, ValueType, non_empty_text


def _url(value: object) -> str:
    """Return an http or https URL without user, password, query and fragment."""
    text = non_empty_text(value)
    url = urlsplit(text)
    if url.scheme not in ("http", "https") or not url.hostname or url.port == 0 or re.search(r"[\s@?#]", text):
        raise ValueError
    return text


SETTINGS = {
    "otlp_endpoint": Setting(
        LOGS,
        ValueType("a URL such as http://localhost:4318, without user, query and fragment", _url, "URL"),
        "OpenTelemetry receiver (OTLP over HTTP) that gets a trace of each generation request; /v1/traces is "
        "appended. Needs lightwell[otel]. OTEL_* variables set headers, sampling and more (docs/metrics.md).",
    )
}
