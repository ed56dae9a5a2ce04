"""The server's TLS certificate, which is read again when its files change."""

import logging
import os
import ssl
from pathlib import Path

logger = logging.getLogger(__name__)


class Certificate:
    """A certificate chain with its private key, in a context for servers.

    Raises ValueError with a message for the user if the files cannot be read, or do not fit together.
    """

    def __init__(self, certfile: str, keyfile: str | None) -> None:
        self._certfile = certfile
        self._keyfile = keyfile
        self._version = self._current_version()
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        load_chain(self.context, certfile, keyfile)

    def refresh(self) -> None:
        """Load the files if they have changed. Open connections are not affected.

        Files that are invalid are logged, and the certificate stays as it is until they change again.
        """
        version = self._current_version()
        if version == self._version:
            return
        self._version = version
        try:
            load_chain(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), self._certfile, self._keyfile)
            load_chain(self.context, self._certfile, self._keyfile)
        except ValueError as error:
            logger.warning("the certificate has changed, but is not used: %s", error)
        else:
            logger.info("the certificate has changed, and new connections get it")

    def _current_version(self) -> tuple[tuple[int, int, int] | None, ...]:
        """Return what changes when a file is written or replaced."""
        return tuple(_version(file) for file in (self._certfile, self._keyfile) if file is not None)


def _version(file: str) -> tuple[int, int, int] | None:
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def load_chain(context: ssl.SSLContext, certfile: str, keyfile: str | None) -> None:
    """Load a certificate chain and its key into a context. Raises ValueError with a message for the user."""
    _read("--ssl-certfile", certfile, "CERTIFICATE")
    flag, file = ("--ssl-certfile", certfile) if keyfile is None else ("--ssl-keyfile", keyfile)
    if b"ENCRYPTED" in _read(flag, file, "PRIVATE KEY"):
        raise ValueError(f"{flag} {file}: the private key is encrypted; decrypt it with `openssl pkey`")
    try:
        context.load_cert_chain(certfile, keyfile, password="")  # with None, OpenSSL would ask at the terminal
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ValueError(f"{flag} {file}: the private key does not belong to the certificate") from error
        raise ValueError(f"--ssl-certfile {certfile}: {_reason(error)}") from error


def _read(flag: str, file: str, label: str) -> bytes:
    """Return the content of a PEM file. Raises ValueError if it has nothing with this label."""
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        raise ValueError(f"{flag} {file}: {error.strerror}") from error
    if f"{label}-----".encode() not in content:
        hint = "; --ssl-keyfile names its file" if (flag, label) == ("--ssl-certfile", "PRIVATE KEY") else ""
        raise ValueError(f"{flag} {file}: has no {label.lower()} in PEM format{hint}")
    return content


def _reason(error: ssl.SSLError) -> str:
    return f"not a valid certificate and key ({(error.reason or 'unknown error').replace('_', ' ').lower()})"
