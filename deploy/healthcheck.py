"""The healthcheck of the image: exits with 0 if the server in this container accepts requests, else with 1."""

import http.client
import os
import socket
import ssl
import sys

TIMEOUT_SECONDS = 4


def connect() -> socket.socket:
    """Return a connection to the server, which ignores proxy settings and does not check the certificate."""
    if path := os.environ.get("LIGHTWELL_UDS"):
        connected = socket.socket(socket.AF_UNIX)
        connected.settimeout(TIMEOUT_SECONDS)
        connected.connect(path)
    else:
        connected = socket.create_connection(("127.0.0.1", int(os.environ["LIGHTWELL_PORT"])), TIMEOUT_SECONDS)
    if "LIGHTWELL_SSL_CERTFILE" not in os.environ:
        return connected
    context = ssl.create_default_context()
    context.check_hostname = False  # of an address
    context.verify_mode = ssl.CERT_NONE
    return context.wrap_socket(connected)


def main() -> int:
    connection = http.client.HTTPConnection("127.0.0.1")
    try:
        connection.sock = connect()
        connection.request("GET", "/readyz")
        response = connection.getresponse()
        print(response.status, response.read().decode(errors="replace"))
    except (OSError, http.client.HTTPException) as error:
        print(f"no answer: {error}")
        return 1
    return 0 if response.status == http.client.OK else 1


if __name__ == "__main__":
    sys.exit(main())
