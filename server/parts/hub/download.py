"""Downloads files into the cache: continues what was begun, tries again when a connection breaks, checks hashes."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

from engine.shared.durable_files import replace_durably
from server.format import format_bytes
from server.parts.hub.cache import RepositoryCache
from server.parts.hub.client import HubClient, RemoteFile
from server.parts.hub.errors import BrokenConnectionError, HubError
from server.progress import Progress

CHUNK_BYTES = 1 << 20
MAX_FAILURES = 5  # in a row, without a byte between them
MAX_WAIT = 30.0  # seconds between two attempts, unless the hub asks for more


class PartialFile:
    """The beginning of a file on disk, with the hash of it."""

    def __init__(self, path: Path, file: RemoteFile) -> None:
        """Take what is there already."""
        self.path = path
        self._file = file
        self.clear()
        if path.exists():
            with path.open("rb") as source:
                while chunk := source.read(CHUNK_BYTES):
                    self._count(chunk)

    def clear(self) -> None:
        self.num_bytes = 0
        git_header = b"" if self._file.is_sha256 else b"blob %d\0" % self._file.num_bytes
        self._hash = hashlib.new("sha256" if self._file.is_sha256 else "sha1", git_header, usedforsecurity=False)

    def write(self, start: int, chunks: Iterator[bytes], on_chunk: Callable[[int], None]) -> None:
        """Write chunks that begin at byte `start`: at the end of what is there, or at the beginning of the file."""
        if start == 0:
            self.clear()
        with self.path.open("ab" if start else "wb") as sink:
            for chunk in chunks:
                sink.write(chunk)
                self._count(chunk)
                on_chunk(len(chunk))

    @property
    def is_right(self) -> bool:
        return self.num_bytes == self._file.num_bytes and self.hash == self._file.etag

    @property
    def hash(self) -> str:
        return self._hash.hexdigest()

    def _count(self, chunk: bytes) -> None:
        self.num_bytes += len(chunk)
        self._hash.update(chunk)


class Downloader:
    """Downloads files of one commit of a repository."""

    def __init__(
        self,
        client: HubClient,
        cache: RepositoryCache,
        repo: str,
        commit: str,
        progress: Progress,
        sleep: Callable[[float], None],
    ) -> None:
        """`sleep` waits between two attempts."""
        self._client = client
        self._cache = cache
        self._repo = repo
        self._commit = commit
        self._progress = progress
        self._sleep = sleep

    def fetch(self, file: RemoteFile) -> None:
        """Make a file complete in the cache. Raises HubError, after which another attempt continues, and OSError."""
        if not file.etag:
            raise HubError(f"the hub names no hash of {file.path}")
        blob = self._cache.blob(file.etag)
        blob.parent.mkdir(parents=True, exist_ok=True)
        with self._cache.lock(file.etag, lambda: self._progress.say(f"Another process downloads {file.path}; waiting")):
            if not self._cache.has_blob(file.etag, file.num_bytes):
                replace_durably(self._complete(file, self._cache.partial(file.etag)), blob)
            self._cache.link(self._commit, file.path, file.etag)

    def _complete(self, file: RemoteFile, path: Path) -> Path:
        """Download what is missing, check size and hash, and return `path`. A file that is wrong is deleted."""
        path.touch()
        partial = PartialFile(path, file)
        if partial.num_bytes:
            self._progress.say(f"Continuing {file.path} at {format_bytes(partial.num_bytes)}")
        num_failures = 0
        while partial.num_bytes < file.num_bytes:
            before, error = partial.num_bytes, BrokenConnectionError("the connection was closed")
            try:
                self._append(file, partial)
            except BrokenConnectionError as broken:
                error = broken
            num_failures = 1 if partial.num_bytes > before else num_failures + 1
            if partial.num_bytes < file.num_bytes:
                self._wait(error, num_failures, file)
        if not partial.is_right:
            path.unlink()
            raise HubError(
                f"{file.path} has {partial.num_bytes} bytes with hash {partial.hash}, but the hub announced "
                f"{file.num_bytes} with {file.etag}. It has been deleted: run the command again"
            )
        return path

    def _append(self, file: RemoteFile, partial: PartialFile) -> None:
        """Download the rest of the file, or all of it from a server that ignores ranges."""
        with self._client.open(self._repo, self._commit, file.path, partial.num_bytes) as content:
            self._progress.start(Path(file.path).name, content.start, file.num_bytes)
            partial.write(content.start, content.chunks(), self._progress.advance)

    def _wait(self, error: BrokenConnectionError, num_failures: int, file: RemoteFile) -> None:
        """Wait before the next attempt. Raises HubError if there have been too many."""
        if num_failures > MAX_FAILURES:
            raise HubError(f"{file.path}: {error}. What has arrived is kept: run the command again to continue")
        seconds = error.retry_after or min(2.0 ** (num_failures - 1), MAX_WAIT)
        self._progress.say(f"{file.path}: {error}; trying again in {seconds:.0f} s")
        self._sleep(seconds)
