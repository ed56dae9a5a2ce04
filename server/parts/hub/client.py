"""Requests to Hugging Face's hub: the files of a repository with their hashes, and the bytes of one file."""

from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from importlib.metadata import version
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, NamedTuple, Self
from urllib.parse import quote

import msgspec

from server.parts.hub.environment import endpoint, token
from server.parts.hub.errors import BrokenConnectionError, HubError, HubUnreachableError
from server.parts.hub.names import is_inside
from server.web_client import make_client

if TYPE_CHECKING:
    import httpx

CONNECT_SECONDS = 10.0
READ_SECONDS = 60.0  # without a byte
PASSING_STATUSES = (408, 429, 500, 502, 503, 504)
MAX_LISTING_BYTES = 64 << 20  # a repository of 100,000 files needs half of it
MAX_RETRY_AFTER = 300.0  # seconds
SHA256_HEX_DIGITS = 64


class RemoteFile(NamedTuple):
    """A file of a repository."""

    path: str
    num_bytes: int
    etag: str  # SHA-256 of its content, or the SHA-1 of its Git blob if it is small

    @property
    def is_sha256(self) -> bool:
        return len(self.etag) == SHA256_HEX_DIGITS


class Listing(NamedTuple):
    """The files of a repository at one commit."""

    commit: str
    files: tuple[RemoteFile, ...]


_Size = Annotated[int, msgspec.Meta(ge=0)]
_Hash = Annotated[str, msgspec.Meta(pattern=r"\A([0-9a-f]{40}|[0-9a-f]{64})\Z")]


class _LFS(msgspec.Struct):
    sha256: _Hash
    size: _Size


class _Entry(msgspec.Struct, rename="camel"):
    rfilename: str
    size: _Size | None = None
    blob_id: _Hash | None = None
    lfs: _LFS | None = None


class _ModelInfo(msgspec.Struct):
    sha: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{40}\Z")]
    entries: list[_Entry] = msgspec.field(default_factory=list, name="siblings")


class HubClient:
    """A client of the hub, with the address and the token of the environment."""

    def __init__(self) -> None:
        """Raises HubError for a token that no header can carry, and for what the environment makes impossible."""
        import httpx

        self._endpoint = endpoint()
        self._token = token()
        if self._token and not (self._token.isascii() and self._token.isprintable()):
            raise HubError("HF_TOKEN or the token of `hf auth login`: expected printable ASCII characters")
        headers = {"User-Agent": f"lightwell/{version('lightwell')}", "Accept-Encoding": "identity"}
        # A redirect to another host, which holds the large files, is followed without the token.
        headers |= {"Authorization": f"Bearer {self._token}"} if self._token else {}
        timeout = httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS)
        try:
            self._http = make_client(headers, uses_tls=True, timeout=timeout, follow_redirects=True)
        except ValueError as error:
            raise HubError(str(error)) from None

    def list_files(self, repo: str, revision: str) -> Listing:
        """Return the files of a repository. Raises HubError."""
        import httpx

        url = f"{self._endpoint}/api/models/{repo}/revision/{quote(revision, safe='')}"
        try:
            with self._http.stream("GET", url, params={"blobs": "true"}, timeout=CONNECT_SECONDS) as response:
                data = Content(response, 0).read(MAX_LISTING_BYTES)
        except httpx.HTTPError as error:
            raise HubUnreachableError(f"{self._endpoint} cannot be reached ({_reason(error)})") from None
        except (httpx.InvalidURL, UnicodeError) as error:
            raise HubError(f"HF_ENDPOINT {self._endpoint}: {error}") from None
        if response.status_code in PASSING_STATUSES:
            raise HubUnreachableError(self._passing(response).args[0])
        self._check(response, repo)
        try:
            info = msgspec.json.decode(data, type=_ModelInfo)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise HubUnreachableError(f"{self._endpoint} does not answer as Hugging Face's hub does") from None
        return Listing(info.sha, tuple(_remote_file(entry) for entry in info.entries if is_inside(entry.rfilename)))

    @contextmanager
    def open(self, repo: str, commit: str, path: str, start: int = 0, stop: int | None = None) -> Iterator["Content"]:
        """Request the bytes of a file from `start` up to `stop`.

        Raises HubError, and BrokenConnectionError also while the bytes arrive.
        """
        import httpx

        url = f"{self._endpoint}/{repo}/resolve/{commit}/{quote(path)}"
        is_partial = start > 0 or stop is not None
        headers = {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"} if is_partial else {}
        try:
            with self._http.stream("GET", url, headers=headers) as response:
                if response.status_code in PASSING_STATUSES:
                    raise self._passing(response)
                self._check(response, repo)
                yield Content(response, start if response.status_code == HTTPStatus.PARTIAL_CONTENT else 0)
        except httpx.HTTPError as error:
            raise BrokenConnectionError(_reason(error)) from None

    def _check(self, response: "httpx.Response", repo: str) -> None:
        """Raise HubError if the hub refuses."""
        if response.is_success:
            return
        code, status = response.headers.get("X-Error-Code", ""), response.status_code
        page = f"{self._endpoint}/{repo}"
        if code == "GatedRepo" or (status == HTTPStatus.FORBIDDEN and not code):
            raise HubError(self._how_to_get_access(page))
        if code == "RevisionNotFound":
            raise HubError("no such branch, tag or commit")
        if code == "EntryNotFound":
            raise HubError("no such file")
        if code == "RepoNotFound" or status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.NOT_FOUND):
            raise HubError(f"no such model, or a private one{self._about_token()}")
        message = response.headers.get("X-Error-Message", "")[:200]
        raise HubError(f"it answers {status} {message or response.reason_phrase}".strip())

    def _how_to_get_access(self, page: str) -> str:
        ask = f"access is restricted: accept the conditions at {page}"
        if self._token:
            return f"{ask} with the account of your token, which must be allowed to read gated repositories"
        return f"{ask}, then set HF_TOKEN to a token of {self._endpoint}/settings/tokens"

    def _about_token(self) -> str:
        return ", which your token may not read" if self._token else " (which needs HF_TOKEN)"

    def _passing(self, response: "httpx.Response") -> BrokenConnectionError:
        seconds = _retry_after(response)
        if response.status_code == HTTPStatus.TOO_MANY_REQUESTS:
            later = f" for {seconds:.0f} s" if seconds else ""
            hint = "" if self._token else "; with HF_TOKEN, more are allowed"
            return BrokenConnectionError(f"the hub accepts no more requests{later}{hint}", seconds)
        return BrokenConnectionError(f"the hub answers {response.status_code} {response.reason_phrase}", seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._http.close()


class Content:
    """The body of an answer, which begins at byte `start` of the file."""

    def __init__(self, response: "httpx.Response", start: int) -> None:
        self._response = response
        self.start = start

    def chunks(self) -> Iterator[bytes]:
        return self._response.iter_bytes()

    def read(self, num_bytes: int) -> bytearray:
        """Return the first `num_bytes` bytes, or all if there are fewer."""
        data = bytearray()
        for chunk in self.chunks():
            data += chunk
            if len(data) >= num_bytes:
                break
        return data[:num_bytes]


def _remote_file(entry: _Entry) -> RemoteFile:
    if entry.lfs is not None:
        return RemoteFile(entry.rfilename, entry.lfs.size, entry.lfs.sha256)
    return RemoteFile(entry.rfilename, entry.size or 0, entry.blob_id or "")


def _retry_after(response: "httpx.Response") -> float | None:
    text = response.headers.get("Retry-After", "")
    return min(float(text), MAX_RETRY_AFTER) if text.isdecimal() else None


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
