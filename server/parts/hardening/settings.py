"""The settings of TLS."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from server.settings.setting import API, Setting, SettingsError, text

if TYPE_CHECKING:
    from server.settings.table import Settings

GROUP = API
SETTINGS: Mapping[str, Setting] = {
    "ssl_certfile": Setting(
        text("FILE"),
        "Certificate chain in PEM format: the server speaks HTTPS. It is read again when the file changes, without "
        "a restart.",
    ),
    "ssl_keyfile": Setting(
        text("FILE"), "Private key of --ssl-certfile, not encrypted. Unset: it is in the same file."
    ),
}


def check(settings: "Settings") -> None:
    """Raise SettingsError if there is a private key without a certificate."""
    if settings.ssl_keyfile is not None and settings.ssl_certfile is None:
        raise SettingsError("--ssl-keyfile: set --ssl-certfile too, the file of its certificate")
