"""The settings of OpenTelemetry."""

import re
from importlib.util import find_spec
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from server.settings.setting import LOGS, Setting, SettingsError, ValueType, non_empty_text

if TYPE_CHECKING:
    from server.settings.table import Settings


def _url(value: object) -> str:
    """Return an http or https URL without user, password, query and fragment."""
    text = non_empty_text(value)
    url = urlsplit(text)
    if url.scheme not in ("http", "https") or not url.hostname or url.port == 0 or re.search(r"[\s@?#]", text):
        raise ValueError
    return text


GROUP = LOGS
SETTINGS = {
    "otlp_endpoint": Setting(
        ValueType("a URL such as http://localhost:4318, without user, query and fragment", _url, "URL"),
        "OpenTelemetry receiver (OTLP over HTTP) that gets a trace of each generation request; /v1/traces is "
        "appended. Needs lightwell[otel]. OTEL_* variables set headers, sampling and more (docs/metrics.md).",
    )
}


def check(settings: "Settings") -> None:
    """Raise SettingsError if the packages are missing that --otlp-endpoint needs."""
    if settings.otlp_endpoint is None:
        return
    try:
        is_installed = find_spec("opentelemetry.exporter.otlp.proto.http") is not None
    except ModuleNotFoundError:  # a package around it is missing
        is_installed = False
    if not is_installed:
        raise SettingsError("--otlp-endpoint needs more packages: pip install 'lightwell[otel]'")
