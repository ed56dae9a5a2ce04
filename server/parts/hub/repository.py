"""A repository at one commit: which files it has, and which of them are in the cache of huggingface_hub on disk.

models--org--name/
    refs/REVISION                the commit of a branch or tag
    blobs/ETAG                   contents; ETAG.incomplete is a download to be continued
    snapshots/COMMIT/path/file   links to blobs
.locks/models--org--name/ETAG.lock

The library's own search passes over a repository with one broken link, and its removal deletes what links lead to
outside of the cache.
"""

import dataclasses
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from server.parts.hub.client import HubError, PassingError, RemoteFile, list_files
from server.parts.hub.names import HubName, is_inside

MAIN = "main"
_COMMIT = re.compile(r"[0-9a-f]{40}")


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
    if not commit or not (paths := files_below(snapshot)):
        raise HubError(f"{reason}{name._replace(file=None, tag=None)} has not been downloaded")
    files = [RemoteFile(path, size(snapshot / path)) for path in paths]
    return Repository(name.repo, revision, commit, files, is_listed=False)


def hub_folder() -> Path:
    """Return the folder in which repositories are kept."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def files_below(folder: Path) -> list[str]:
    """Return the paths of the files in a folder and in those below."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


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
