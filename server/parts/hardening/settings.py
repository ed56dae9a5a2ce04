"""The settings of TLS."""

from collections.abc import Mapping

from server.settings.setting import API, Setting, text

SETTINGS: Mapping[str, Setting] = {
    "ssl_certfile": Setting(
        API,
        text("FILE"),
        "Certificate chain in PEM format: the server speaks HTTPS. It is read again when the file changes, without "
        "a restart.",
    ),
    "ssl_keyfile": Setting(
        API, text("FILE"), "Private key of --ssl-certfile, not encrypted. Unset: it is in the same file."
    ),
}
