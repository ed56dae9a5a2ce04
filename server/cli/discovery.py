"""Finds a running server for the commands that are clients of one."""

import socket
import sys
from urllib.parse import urlsplit

from server.cli.http_client import RemoteError, connect, plain_errors
from server.part_table import missing_command
from server.running_servers import DEFAULT_URL, registered_servers

CONNECT_SECONDS = 1.0


def find_server() -> str:
    """Return the URL of this user's server at the default port, or else of the one that started last.

    Without one, any server at the default port is taken. It is named on standard error, since it will get the user's
    key; so is every server that is not the only one and at the default port. No key is sent here. Raises RemoteError.
    """
    registered = [server for server in registered_servers() if not server.url.startswith("unix:")]
    servers = {server.url: server.model for server in registered if accepts_connections(server.url)}
    url = DEFAULT_URL if DEFAULT_URL in servers else next(iter(servers), DEFAULT_URL)
    is_silent = list(servers) == [DEFAULT_URL]
    if DEFAULT_URL not in servers and is_model_server(DEFAULT_URL):
        servers[DEFAULT_URL] = "an unknown server"
    if not servers:
        run = "" if missing_command("run") else " `lightwell run` starts one and a chat,"
        hint = f"`lightwell serve` starts one,{run} and --url is the address of a server elsewhere"
        raise RemoteError(f"no server is running here: {hint}")
    if len(servers) > 1:
        others = ", ".join(f"{model} at {other}" for other, model in servers.items() if other != url)
        _say(f"using {servers[url]} at {url} (--url chooses another: {others})")
    elif not is_silent:
        _say(f"using {servers[url]} at {url}")
    return url


def _say(text: str) -> None:
    print(f"lightwell: {text}", file=sys.stderr, flush=True)


def accepts_connections(url: str) -> bool:
    parts = urlsplit(url)
    try:
        socket.create_connection((parts.hostname or "", parts.port or 80), CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def is_model_server(url: str) -> bool:
    """Return whether an OpenAI-compatible server answers, even if it is loading its model or requires a key."""
    if not accepts_connections(url):
        return False
    try:
        with connect(url, api_key=None, read_timeout=CONNECT_SECONDS) as client, plain_errors(url):
            answer = client.get("/v1/models").json()
    except (RemoteError, ValueError, RecursionError):
        return False
    return isinstance(answer, dict) and bool(answer.keys() & {"data", "error"})
