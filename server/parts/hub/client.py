"""Requests to Hugging Face's hub with the session, the address and the token of huggingface_hub.

The library's own downloads begin anew after an interruption (huggingface_hub#4196) and are not hashed. Its requests
read lists and errors of any size, and wait for as long as a server asks.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from http import HTTPStatus
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import msgspec

if TYPE_CHECKING:
    import httpx2

CONNECT_SECONDS = 10.0
READ_SECONDS = 60.0  # without a byte
PASSING_STATUSES = (408, 429, 500, 502, 503, 504)
MAX_LISTING_BYTES = 64 << 20  # a repository of 100,000 files needs half of it
MAX_RETRY_AFTER = 300.0  # seconds
REFUSALS = {"RevisionNotFound": "no such branch, tag or commit", "EntryNotFound": "no such file"}  # by X-Error-Code


class HubError(Exception):
    """A model on the hub that cannot be found or downloaded. The message is one line for the user."""


class PassingError(HubError):
    """The hub does not answer, or not now: a download may be continued later, and what the cache holds can be used."""

    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after  # seconds that the hub asks to wait


_Size = Annotated[int, msgspec.Meta(ge=0)]
_Hash = Annotated[str, msgspec.Meta(pattern=r"\A([0-9a-f]{40}|[0-9a-f]{64})\Z")]


class _LFS(msgspec.Struct, frozen=True):
    sha256: _Hash
    size: _Size


class RemoteFile(msgspec.Struct, frozen=True):
    """A file of a repository."""

    path: str = msgspec.field(name="rfilename")
    size: _Size | None = None
    blob_id: _Hash | None = msgspec.field(default=None, name="blobId")
    lfs: _LFS | None = None

    @property
    def num_bytes(self) -> int:
        return self.lfs.size if self.lfs else self.size or 0

    @property
    def etag(self) -> str:
        """The SHA-256 of its content, or the SHA-1 of its Git blob if it is small, or "" if the hub says neither."""
        return self.lfs.sha256 if self.lfs else self.blob_id or ""


class Listing(msgspec.Struct):
    """The files of a repository at one commit."""

    commit: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{40}\Z")] = msgspec.field(name="sha")
    files: list[RemoteFile] = msgspec.field(default_factory=list, name="siblings")


def list_files(repo: str, revision: str) -> Listing:
    """Return the files of a repository. Raises HubError."""
    path = f"api/models/{repo}/revision/{quote(revision, safe='')}"
    with request(repo, path, params={"blobs": "true"}, timeout=CONNECT_SECONDS) as response:
        data = read(response, MAX_LISTING_BYTES)
    try:
        return msgspec.json.decode(data, type=Listing)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise PassingError("the hub does not answer as Hugging Face's does") from None


def request_file(repo: str, commit: str, path: str, span: str = "0-") -> AbstractContextManager["httpx2.Response"]:
    """Request bytes of a file, as `request` does: `200-` are all but the first 200."""
    headers = {"Range": f"bytes={span}"} if span != "0-" else {}
    return request(repo, f"{repo}/resolve/{commit}/{quote(path)}", headers=headers)


@contextmanager
def request(
    repo: str, path: str, headers: dict[str, str] | None = None, timeout: float = READ_SECONDS, **options: Any
) -> Iterator["httpx2.Response"]:
    """Request something of a repository. Raises HubError, also while the answer is read."""
    import httpx2
    from huggingface_hub import constants, get_session, get_token

    # Those of the library name what is installed, after asking the hub for names of agents.
    headers = {"User-Agent": f"lightwell/{version('lightwell')}", "Accept-Encoding": "identity"} | (headers or {})
    try:
        session, token = get_session(), get_token()
    except (ImportError, OSError, ValueError, httpx2.InvalidURL) as error:
        raise HubError(f"SSL_CERT_FILE, proxy or token of the environment: {_one_line(error)}") from None
    if token:  # which is not sent along when a redirect leads to another host
        headers["Authorization"] = f"Bearer {token}"
    url, seconds = f"{constants.ENDPOINT}/{path}", httpx2.Timeout(timeout, connect=CONNECT_SECONDS)
    try:
        with session.stream("GET", url, headers=headers, timeout=seconds, **options) as response:
            _check(response, constants.ENDPOINT, repo, has_token=token is not None)
            yield response
    except httpx2.HTTPError as error:
        raise PassingError(f"the connection to {constants.ENDPOINT} failed ({_one_line(error)})") from None
    except (httpx2.InvalidURL, UnicodeError) as error:
        raise HubError(f"HF_ENDPOINT {constants.ENDPOINT}, or HF_TOKEN: {_one_line(error)}") from None


def _check(response: "httpx2.Response", endpoint: str, repo: str, *, has_token: bool) -> None:
    """Raise HubError if the hub refuses."""
    code, status = response.headers.get("X-Error-Code", ""), response.status_code
    if response.is_success:
        return
    if status in PASSING_STATUSES:
        raise _passing(response, has_token=has_token)
    if code == "GatedRepo" or (status == HTTPStatus.FORBIDDEN and not code):
        how = "with the account of your token, which must be allowed to read gated repositories"
        how = how if has_token else f"then set HF_TOKEN to a token of {endpoint}/settings/tokens"
        raise HubError(f"access is restricted: accept the conditions at {endpoint}/{repo}, {how}")
    if code == "RepoNotFound" or (not code and status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.NOT_FOUND)):
        about_token = ", which your token may not read" if has_token else " (which needs HF_TOKEN)"
        raise HubError(f"no such model, or a private one{about_token}")
    message = response.headers.get("X-Error-Message") or response.reason_phrase
    raise HubError(REFUSALS.get(code) or f"the hub answers {status} {_one_line(message)}")


def _passing(response: "httpx2.Response", *, has_token: bool) -> PassingError:
    text = response.headers.get("Retry-After", "")
    seconds = min(float(text), MAX_RETRY_AFTER) if text.isdecimal() else None
    if response.status_code != HTTPStatus.TOO_MANY_REQUESTS:
        return PassingError(f"the hub answers {response.status_code} {response.reason_phrase}", seconds)
    later = f" for {seconds:.0f} s" if seconds else ""
    hint = "" if has_token else "; with HF_TOKEN, more are allowed"
    return PassingError(f"the hub accepts no more requests{later}{hint}", seconds)


def read(response: "httpx2.Response", num_bytes: int) -> bytearray:
    """Return the first `num_bytes` bytes of an answer, or all if there are fewer."""
    data = bytearray()
    for chunk in response.iter_bytes():
        data += chunk
        if len(data) >= num_bytes:
            break
    return data[:num_bytes]


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
