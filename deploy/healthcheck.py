"""The healthcheck of the image: exits with 0 if the server in this container accepts requests, else with 1."""

import http.client
import os
import sys

TIMEOUT_SECONDS = 4


def main() -> int:
    port = int(os.environ["LIGHTWELL_PORT"])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_SECONDS)  # ignores proxy settings
    try:
        connection.request("GET", "/readyz")
        response = connection.getresponse()
        print(response.status, response.read().decode(errors="replace"))
    except (OSError, http.client.HTTPException) as error:
        print(f"no answer: {error}")
        return 1
    return 0 if response.status == http.client.OK else 1


if __name__ == "__main__":
    sys.exit(main())
