"""HTTP clients, with the proxies and the certificate authorities that the environment names."""

import os
import ssl
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import httpx


def make_client(
    headers: Mapping[str, str], *, uses_tls: bool, uses_proxies: bool = True, **options: Any
) -> "httpx.Client":
    """Return a client. Raises ValueError, in one line, for what the environment makes impossible."""
    import httpx

    verify = tls_context() if uses_tls else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        return httpx.Client(headers=headers, verify=verify, trust_env=uses_proxies, **options)
    except (httpx.InvalidURL, ImportError, ValueError) as error:  # of a proxy, also one that needs a package
        raise ValueError(f"address or proxy of the environment: {' '.join(str(error).split())}") from None


def tls_context() -> ssl.SSLContext:
    """Return whom to trust: SSL_CERT_FILE, SSL_CERT_DIR, or else Mozilla's list. Raises ValueError."""
    import httpx

    try:
        return httpx.create_ssl_context()
    except ssl.SSLError:
        raise ValueError(
            f"SSL_CERT_FILE {os.environ.get('SSL_CERT_FILE')}: has no certificates in PEM format"
        ) from None
    except OSError as error:
        raise ValueError(f"SSL_CERT_FILE {os.environ.get('SSL_CERT_FILE')}: {error.strerror}") from None
