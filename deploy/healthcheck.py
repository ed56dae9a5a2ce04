"""The healthcheck of the image: exits with 0 if the server in this container accepts requests, else with 1."""

import http.client
import os
import socket
import ssl
import sys

TIMEOUT_SECONDS = 4


def server() -> http.client.HTTPConnection:
    """Return a connection to the server, which ignores proxy settings and does not check the certificate."""
    port = int(os.environ["LIGHTWELL_PORT"])
    if "LIGHTWELL_SSL_CERTFILE" not in os.environ:
        return http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_SECONDS)
    context = ssl.create_default_context()
    context.check_hostname = False  # of an address
    context.verify_mode = ssl.CERT_NONE
    return http.client.HTTPSConnection("127.0.0.1", port, timeout=TIMEOUT_SECONDS, context=context)


def main() -> int:
    connection = server()
    try:
        if path := os.environ.get("LIGHTWELL_UDS"):
            connection.sock = socket.socket(socket.AF_UNIX)
            connection.sock.settimeout(TIMEOUT_SECONDS)
            connection.sock.connect(path)
        connection.request("GET", "/readyz")
        response = connection.getresponse()
        print(response.status, response.read().decode(errors="replace"))
    except (OSError, http.client.HTTPException) as error:
        print(f"no answer: {error}")
        return 1
    return 0 if response.status == http.client.OK else 1


if __name__ == "__main__":
    sys.exit(main())
