"""The cache of huggingface_hub on disk, so that files are shared with other programs.

models--org--name/
    refs/REVISION                the commit of a branch or tag
    blobs/ETAG                   contents; ETAG.incomplete is a download to be continued
    snapshots/COMMIT/path/file   links to blobs
.locks/models--org--name/ETAG.lock
"""

import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from server.parts.hub.environment import hub_folder

MAX_REF_BYTES = 100
_COMMIT = re.compile(r"[0-9a-f]{40}")


class RepositoryCache:
    """The cached files of one repository."""

    def __init__(self, repo: str) -> None:
        name = f"models--{repo.replace('/', '--')}"
        self.folder = hub_folder() / name
        self._locks = hub_folder() / ".locks" / name

    def commit(self, revision: str) -> str | None:
        """Return the commit of a branch, tag or commit as last seen, or None if it has not been."""
        with suppress(OSError), (self.folder / "refs" / revision).open("rb") as ref:
            commit = ref.read(MAX_REF_BYTES).decode("ascii", "replace").strip()
            return commit if _COMMIT.fullmatch(commit) else None
        return revision if _COMMIT.fullmatch(revision) and self.snapshot(revision).is_dir() else None

    def set_commit(self, revision: str, commit: str) -> None:
        """Remember the commit of a branch or tag. A cache that cannot be written is left as it is."""
        ref = self.folder / "refs" / revision
        if _COMMIT.fullmatch(revision) or self.commit(revision) == commit:
            return
        with suppress(OSError):
            ref.parent.mkdir(parents=True, exist_ok=True)
            new = ref.with_name(f"{ref.name}.{os.getpid()}")
            new.write_text(commit, encoding="utf-8")
            new.replace(ref)

    def snapshot(self, commit: str) -> Path:
        return self.folder / "snapshots" / commit

    def paths(self, commit: str) -> list[str]:
        """Return the paths of the files of a commit that are complete."""
        snapshot = self.snapshot(commit)
        return sorted(path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file())

    def has(self, commit: str, path: str, num_bytes: int) -> bool:
        """Return whether a file of a commit is complete: after a crash of the machine, another program's may be cut."""
        return _has_size(self.snapshot(commit) / path, num_bytes)

    def has_blob(self, etag: str, num_bytes: int) -> bool:
        return _has_size(self.blob(etag), num_bytes)

    def blob(self, etag: str) -> Path:
        return self.folder / "blobs" / etag

    def partial(self, etag: str) -> Path:
        return self.folder / "blobs" / f"{etag}.incomplete"

    def partial_bytes(self, etag: str) -> int:
        """Return the size of a download to be continued."""
        with suppress(OSError):
            return self.partial(etag).stat().st_size
        return 0

    def link(self, commit: str, path: str, etag: str) -> None:
        """Make the blob a file of the snapshot."""
        link = self.snapshot(commit) / path
        link.parent.mkdir(parents=True, exist_ok=True)
        new = link.with_name(f".{link.name}.{os.getpid()}")
        new.unlink(missing_ok=True)
        new.symlink_to(os.path.relpath(self.blob(etag), link.parent))
        new.replace(link)

    def remove(self, commit: str, paths: Iterable[str]) -> int:
        """Remove files of a commit, and their blobs unless other commits have them too. Return the bytes freed."""
        num_bytes = 0
        for path in paths:
            link = self.snapshot(commit) / path
            blob, size = _target(link), link.stat().st_size
            link.unlink()
            is_own = blob.is_relative_to(self.folder)  # not a file that somebody has put in place of one
            if is_own and blob not in map(_target, self.folder.glob("snapshots/**/*")):
                num_bytes += size
                blob.unlink(missing_ok=True)
        if not any(path.is_file() for path in self.folder.glob("snapshots/**/*")):
            shutil.rmtree(self.folder)
        return num_bytes

    @contextmanager
    def lock(self, etag: str, on_wait: Callable[[], None]) -> Iterator[None]:
        """Hold the lock of a blob, as huggingface_hub does. `on_wait` is called if another process has it."""
        self._locks.mkdir(parents=True, exist_ok=True)
        with (self._locks / f"{etag}.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                on_wait()
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _has_size(path: Path, num_bytes: int) -> bool:
    return path.is_file() and path.stat().st_size == num_bytes


def _target(link: Path) -> Path:
    """Return the blob of a link, which may itself be a link into a store that repositories share."""
    return Path(os.path.normpath(link.parent / os.readlink(link))) if link.is_symlink() else link
