"""A repository at one commit: which files it has, and which of them are in the cache of huggingface_hub on disk.

models--org--name/
    refs/REVISION                the commit of a branch or tag
    blobs/ETAG                   contents; ETAG.incomplete is a download to be continued
    snapshots/COMMIT/path/file   links to blobs
.locks/models--org--name/ETAG.lock

Requests go to the hub with the session, the address and the token of huggingface_hub. The library's own downloads
begin anew after an interruption (huggingface_hub#4196) and are not hashed; its requests read lists and errors of any
size, and wait for as long as a server asks; its search passes over a repository with one broken link, and its removal
deletes what links lead to outside of the cache.
"""

import dataclasses
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from http import HTTPStatus
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import msgspec

from server.parts.hub.names import HubError, HubName, is_inside

if TYPE_CHECKING:
    import httpx2

CONNECT_SECONDS = 10.0
READ_SECONDS = 60.0  # without a byte
PASSING_STATUSES = (408, 429, 500, 502, 503, 504)
MAX_LISTING_BYTES = 64 << 20  # a repository of 100,000 files needs half of it
MAX_RETRY_AFTER = 300.0  # seconds
REFUSALS = {"RevisionNotFound": "no such branch, tag or commit", "EntryNotFound": "no such file"}  # by X-Error-Code
MAIN = "main"
_COMMIT = re.compile(r"[0-9a-f]{40}")


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


@dataclasses.dataclass(frozen=True)
class Repository:
    """The files of one commit."""

    repo: str
    revision: str
    commit: str
    files: Sequence[RemoteFile]
    is_listed: bool = True  # by the hub; False: these are only the files in the cache

    @property
    def folder(self) -> Path:
        return _folder(self.repo)

    def path(self, path: str) -> Path:
        return self.folder / "snapshots" / self.commit / path

    def blob(self, file: RemoteFile) -> Path:
        return self.folder / "blobs" / file.etag

    def partial(self, file: RemoteFile) -> Path:
        """Return the path of a download to be continued."""
        return self.folder / "blobs" / f"{file.etag}.incomplete"

    def is_cached(self, file: RemoteFile) -> bool:
        return size(self.path(file.path)) == file.num_bytes

    def num_missing_bytes(self, files: Sequence[RemoteFile]) -> int:
        """Return how many bytes of these files are not on disk yet."""
        missing = [file for file in files if not self.is_cached(file)]
        return sum(max(0, file.num_bytes - max(size(self.blob(file)), size(self.partial(file)), 0)) for file in missing)

    def select(self, choose: Callable[[Sequence[str]], Sequence[str]]) -> list[RemoteFile]:
        """Return the files that `choose` selects among all paths. Raises HubError."""
        files = {file.path: file for file in self.files}
        try:
            return [files[path] for path in choose(list(files))]
        except HubError as error:
            raise error if self.is_listed else HubError(f"of what has been downloaded: {error}") from None

    def remember_commit(self) -> None:
        """Keep the commit of the branch or tag. A cache that cannot be written is left as it is."""
        ref = self.folder / "refs" / self.revision
        with suppress(OSError):
            if self.commit not in (self.revision, _cached_commit(self.repo, self.revision)):
                ref.parent.mkdir(parents=True, exist_ok=True)
                new = ref.with_name(f"{ref.name}.{os.getpid()}")
                new.write_text(self.commit, encoding="ascii")
                new.replace(ref)

    def link(self, file: RemoteFile) -> None:
        """Make the blob a file of the snapshot."""
        link = self.path(file.path)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(self.blob(file), link.parent))

    def remove(self, files: Sequence[RemoteFile]) -> int:
        """Remove files, and their blobs unless other commits have them too. Return the bytes freed."""
        num_bytes = 0
        for file in files:
            link = self.path(file.path)
            blob = _target(link)
            link.unlink()
            is_own = blob.is_relative_to(self.folder)  # not a file that somebody has put in place of one
            if is_own and blob not in map(_target, self.folder.glob("snapshots/**/*")):
                num_bytes += file.num_bytes
                blob.unlink(missing_ok=True)
        if not any(path.is_file() for path in self.folder.glob("snapshots/**/*")):
            shutil.rmtree(self.folder)
        return num_bytes

    @contextmanager
    def lock(self, file: RemoteFile, on_wait: Callable[[], None]) -> Iterator[None]:
        """Hold the lock of a blob, as huggingface_hub does. `on_wait` is called if another process has it."""
        path = hub_folder() / ".locks" / self.folder.name / f"{file.etag}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                on_wait()
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def open_repository(name: HubName, say: Callable[[str], None]) -> Repository:
    """Ask the hub for a repository, or else the cache. Raises HubError."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return cached_repository(name, "HF_HUB_OFFLINE is set, and ")
    revision = name.revision or MAIN
    try:
        listing = list_files(name.repo, revision)
    except PassingError as error:
        found = cached_repository(name, f"{error}, and ")
        say(f"{name.repo}: {error}; using what has been downloaded")
        return found
    return Repository(name.repo, revision, listing.commit, [file for file in listing.files if is_inside(file.path)])


def cached_repository(name: HubName, reason: str = "") -> Repository:
    """Return what has been downloaded. Raises HubError, which begins with the reason, if there is nothing."""
    revision = name.revision or MAIN
    commit = _cached_commit(name.repo, revision)
    snapshot = _folder(name.repo) / "snapshots" / commit
    paths = sorted(path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file())
    if not commit or not paths:
        raise HubError(f"{reason}{name._replace(file=None, tag=None)} has not been downloaded")
    files = [RemoteFile(path, size(snapshot / path)) for path in paths]
    return Repository(name.repo, revision, commit, files, is_listed=False)


def hub_folder() -> Path:
    """Return the folder in which repositories are kept."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def size(path: Path) -> int:
    """Return the size of a file, or -1 if there is none."""
    return path.stat().st_size if path.is_file() else -1


def _folder(repo: str) -> Path:
    return hub_folder() / f"models--{repo.replace('/', '--')}"


def _cached_commit(repo: str, revision: str) -> str:
    """Return the commit of a branch, tag or commit as last seen, or "" if it has not been."""
    commit = revision
    with suppress(OSError, UnicodeDecodeError):
        commit = (_folder(repo) / "refs" / revision).read_text(encoding="ascii").strip()
    return commit if _COMMIT.fullmatch(commit) else ""


def _target(link: Path) -> Path:
    """Return the blob of a link, which may itself be a link into a store that repositories share."""
    return Path(os.path.normpath(link.parent / os.readlink(link))) if link.is_symlink() else link
