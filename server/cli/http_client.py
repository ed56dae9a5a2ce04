"""The HTTP client of the commands that talk to an OpenAI-compatible server, and how they find one."""

import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import msgspec

from server.cli.parser import CommandError
from server.part_table import missing_command
from server.running_servers import DEFAULT_URL, registered_servers
from server.settings.load import is_loopback
from server.settings.table import Settings

if TYPE_CHECKING:
    import httpx

LOADING_POLL_SECONDS = 0.5
CONNECT_SECONDS = 1.0  # to servers on this machine


class LoadingError(CommandError):
    """The server is still loading its model."""


# The fields that are read from the events of a stream; others are ignored.


class StreamUsage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class StreamDelta(msgspec.Struct):
    content: str | None = None


class StreamChoice(msgspec.Struct):
    text: str | None = None  # completions
    delta: StreamDelta | None = None  # chat
    token_ids: list[int] | None = None
    finish_reason: str | None = None


class StreamChunk(msgspec.Struct):
    choices: list[StreamChoice] = []
    usage: StreamUsage | None = None
    error: dict[str, object] | None = None

    @property
    def text(self) -> str:
        """Text that the chunk adds to the first choice."""
        if not self.choices:
            return ""
        choice = self.choices[0]
        return choice.text or (choice.delta and choice.delta.content) or ""

    @property
    def is_cut_off(self) -> bool:
        """True if the first choice ends here because it reached its limit of tokens."""
        return bool(self.choices) and self.choices[0].finish_reason == "length"


_CHUNK_DECODER = msgspec.json.Decoder(StreamChunk)


def decode_chunk(data: str | bytes) -> StreamChunk:
    """Decode the data of one event. Raises CommandError if it is an error or not in OpenAI's format."""
    try:
        chunk = _CHUNK_DECODER.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise CommandError("the server sent an event that is not in the OpenAI format") from None
    if chunk.error:
        raise CommandError(f"the answer failed: {one_line(chunk.error.get('message'))}")
    return chunk


def one_line(text: object) -> str:
    """Return text from a server as one line without control characters, safe to print in a terminal."""
    return "".join(c for c in " ".join(str(text).split()) if c.isprintable())


def base_url(url: str) -> str:
    """Return the address of a server without a trailing /v1. Raises ValueError if it is not an http(s) address."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or parts.username:
        raise ValueError
    port = f":{parts.port}" if parts.port is not None else ""
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}{port}{parts.path.rstrip('/').removesuffix('/v1').rstrip('/')}"


def connect(url: str, api_key: str | None, *, read_timeout: float = 600.0) -> "httpx.Client":
    """Return a client for `url`, as returned by `base_url`. For loopback, it ignores proxies of the environment.

    Raises CommandError for a key that no header can carry, and for what the environment makes impossible.
    """
    import httpx

    if api_key and not (api_key.isascii() and api_key.isprintable()):
        raise CommandError("invalid API key: expected printable ASCII characters")
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    timeout = httpx.Timeout(read_timeout, connect=5.0)
    uses_proxies = not is_loopback(urlsplit(url).hostname or "")
    try:
        verify = httpx.create_ssl_context()  # which trusts what SSL_CERT_FILE names, on loopback too
        return httpx.Client(headers=headers, verify=verify, trust_env=uses_proxies, base_url=url, timeout=timeout)
    except (httpx.InvalidURL, ImportError, ValueError, OSError) as error:  # of a proxy, also one that needs a package
        raise CommandError(f"address, SSL_CERT_FILE or proxy of the environment: {one_line(error)}") from None


def not_connected(url: str, error: BaseException) -> CommandError:
    return CommandError(f"no server answers at {url} ({one_line(error)}): `lightwell serve` starts one")


@contextmanager
def plain_errors(url: str) -> Iterator[None]:
    """Convert httpx's errors to CommandErrors."""
    import httpx

    try:
        yield
    except (httpx.ConnectError, UnicodeError) as error:  # UnicodeError: of a host name that no DNS has
        raise not_connected(url, error) from None
    except httpx.HTTPError as error:
        raise CommandError(f"the server at {url}: {one_line(error)}") from None


def check_status(response: "httpx.Response") -> None:
    """Raise CommandError with the server's error message unless the status is 2xx."""
    if not response.is_success:
        response.read()
        message = _message(response)
        if response.status_code == 401:
            message += " (--api-key or LIGHTWELL_API_KEY is the key)"
        kind = LoadingError if response.status_code == 503 and "still being loaded" in message else CommandError
        raise kind(f"the server returned status {response.status_code}: {message}")


def _message(response: "httpx.Response") -> str:
    try:
        return one_line(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return response.reason_phrase or "no reason given"


def find_model(client: "httpx.Client") -> str:
    """Return the first model that the server lists, once it has loaded its model. Raises CommandError."""
    is_announced = False
    while True:
        try:
            return _first_model(client)
        except LoadingError:
            if not is_announced:
                print(f"{client.base_url} is still loading its model", file=sys.stderr, flush=True)
            is_announced = True
            time.sleep(LOADING_POLL_SECONDS)


def _first_model(client: "httpx.Client") -> str:
    with plain_errors(str(client.base_url)):
        response = client.get("/v1/models")
        check_status(response)
    try:
        return str(response.json()["data"][0]["id"])
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        raise CommandError("the server lists no models: set --model") from None


def find_server() -> str:
    """Return the URL of this user's server at the default port, or else of the one that started last.

    Without one, any server at the default port is taken. It is named on standard error, since it will get the user's
    key; so is every server that is not the only one and at the default port. No key is sent here. Raises CommandError.
    """
    registered = [server for server in registered_servers() if not server.url.startswith("unix:")]
    servers = {server.url: server.model for server in registered if accepts_connections(server.url)}
    is_own = DEFAULT_URL in servers
    if not is_own and is_model_server(DEFAULT_URL):
        servers[DEFAULT_URL] = "an unknown server"
    if not servers:
        run = "" if missing_command("run") else " `lightwell run` starts one and a chat,"
        hint = f"`lightwell serve` starts one,{run} and --url is the address of a server elsewhere"
        raise CommandError(f"no server is running here: {hint}")
    url = DEFAULT_URL if is_own else next(iter(servers))
    others = ", ".join(f"{model} at {other}" for other, model in servers.items() if other != url)
    if others or not is_own:
        choice = f" (--url chooses another: {others})" if others else ""
        print(f"lightwell: using {servers[url]} at {url}{choice}", file=sys.stderr, flush=True)
    return url


def local_url(settings: Settings) -> str:
    """Return the address of a server on this machine with these settings."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"http://{host}:{settings.port}"


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
    except (CommandError, ValueError, RecursionError):
        return False
    return isinstance(answer, dict) and bool(answer.keys() & {"data", "error"})
