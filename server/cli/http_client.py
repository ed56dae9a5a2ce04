"""Talking to an OpenAI-compatible server from the command line: where it is, which model it has, what went wrong."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import msgspec

from server.settings.table import is_loopback

if TYPE_CHECKING:
    import httpx

DEFAULT_URL = "http://127.0.0.1:8000"


class RemoteError(Exception):
    """The server cannot be used; the message is one line for the user."""


# What is read of the events of a stream; other fields are passed over.


class Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Delta(msgspec.Struct):
    content: str | None = None


class Choice(msgspec.Struct):
    text: str | None = None  # completions
    delta: Delta | None = None  # chat
    token_ids: list[int] | None = None


class Chunk(msgspec.Struct):
    choices: list[Choice] = []
    usage: Usage | None = None
    error: dict[str, object] | None = None

    @property
    def text(self) -> str:
        """What the first choice adds."""
        if not self.choices:
            return ""
        choice = self.choices[0]
        return choice.text or (choice.delta and choice.delta.content) or ""


_CHUNK_DECODER = msgspec.json.Decoder(Chunk)


def decode_chunk(data: str | bytes) -> Chunk:
    """The data of one event. Raises RemoteError where it reports a failure or is something else."""
    try:
        chunk = _CHUNK_DECODER.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise RemoteError("the server's events are not those of the OpenAI API") from None
    if chunk.error:
        raise RemoteError(f"the answer failed: {one_line(chunk.error.get('message'))}")
    return chunk


def one_line(text: object) -> str:
    """Foreign text, fit for a terminal."""
    return "".join(c for c in " ".join(str(text).split()) if c.isprintable())


def base_url(url: str) -> str:
    """The server's address without a path that ends in /v1. Raises ValueError where it is no http(s) address."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or parts.username:
        raise ValueError
    port = f":{parts.port}" if parts.port is not None else ""
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}{port}{parts.path.rstrip('/').removesuffix('/v1').rstrip('/')}"


def connect(url: str, api_key: str | None, *, read_timeout: float = 600.0) -> "httpx.Client":
    """A client for `url` as `base_url` returns it. A proxy of the environment is not asked for loopback addresses."""
    import httpx

    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    timeout = httpx.Timeout(read_timeout, connect=5.0)
    trust_env = not is_loopback(urlsplit(url).hostname or "")
    return httpx.Client(base_url=url, headers=headers, timeout=timeout, trust_env=trust_env)


@contextmanager
def plain_errors(url: str) -> Iterator[None]:
    """Turn httpx's errors into RemoteErrors."""
    import httpx

    try:
        yield
    except httpx.ConnectError:
        raise RemoteError(f"no server answers at {url} (`lightwell serve` starts one)") from None
    except httpx.TimeoutException:
        raise RemoteError(f"the server at {url} takes too long to answer") from None
    except httpx.RemoteProtocolError:
        raise RemoteError(f"the server at {url} broke the connection off") from None
    except httpx.HTTPError as error:
        raise RemoteError(f"the server at {url}: {error}") from None


def check_status(response: "httpx.Response") -> None:
    """Raise RemoteError with the server's own message unless the answer is a success."""
    if not response.is_success:
        response.read()
        raise RemoteError(f"the server answered {response.status_code}: {_message(response)}")


def _message(response: "httpx.Response") -> str:
    try:
        return one_line(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return response.reason_phrase or "no reason given"


def find_model(client: "httpx.Client") -> str:
    """The first model that the server offers. Raises RemoteError."""
    with plain_errors(str(client.base_url)):
        response = client.get("/v1/models")
        check_status(response)
    try:
        return str(response.json()["data"][0]["id"])
    except (ValueError, KeyError, TypeError, IndexError):
        raise RemoteError("the server does not say which models it has: give --model") from None
