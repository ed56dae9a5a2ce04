"""Downloads files into the cache: continues what was begun, tries again when a connection breaks, checks hashes."""

import dataclasses
import hashlib
import time
from collections.abc import Callable, Sequence
from http import HTTPStatus
from pathlib import Path

from engine.shared.durable_files import replace_durably
from server.format import format_bytes
from server.parts.hub.client import RemoteFile, request_file
from server.parts.hub.errors import HubError, PassingError
from server.parts.hub.repository import Repository, size
from server.progress import Progress

MAX_FAILURES = 5  # in a row, without a byte between them
MAX_WAIT = 30.0  # seconds between two attempts, unless the hub asks for more


@dataclasses.dataclass(frozen=True)
class Downloader:
    """Downloads files of one repository."""

    repository: Repository
    progress: Progress
    sleep: Callable[[float], None] = time.sleep  # between two attempts

    def download(self, files: Sequence[RemoteFile]) -> None:
        """Make files complete in the cache. Raises HubError, after which another attempt continues, and OSError."""
        for file in files:
            if not self.repository.is_cached(file):
                self._fetch(file)
        self.repository.remember_commit()

    def _fetch(self, file: RemoteFile) -> None:
        if not file.etag:
            raise HubError(f"the hub names no hash of {file.path}")
        blob, partial = self.repository.blob(file), self.repository.partial(file)
        blob.parent.mkdir(parents=True, exist_ok=True)
        waiting = f"Another process downloads {file.path}; waiting"
        with self.repository.lock(file, lambda: self.progress.say(waiting)):
            if size(blob) != file.num_bytes:
                self._complete(file, partial)
                _check(file, partial)
                replace_durably(partial, blob)
            self.repository.link(file)

    def _complete(self, file: RemoteFile, path: Path) -> None:
        """Download what is missing. Raises HubError after too many failures."""
        path.touch()
        if before := size(path):
            self.progress.say(f"Continuing {file.path} at {format_bytes(before)}")
        num_failures = 0
        while (before := size(path)) < file.num_bytes:
            error = self._append(file, path)
            num_failures = 1 if size(path) > before else num_failures + 1
            if error is not None:
                self._wait(error, num_failures, file)

    def _append(self, file: RemoteFile, path: Path) -> PassingError | None:
        """Download the rest of the file, or all of it from a server that ignores ranges. Return why it is not all."""
        repository = self.repository
        try:
            with request_file(repository.repo, repository.commit, file.path, f"{size(path)}-") as response:
                is_rest = response.status_code == HTTPStatus.PARTIAL_CONTENT
                with path.open("ab" if is_rest else "wb") as sink:
                    self.progress.start(Path(file.path).name, sink.tell(), file.num_bytes)
                    for chunk in response.iter_bytes():
                        sink.write(chunk)
                        self.progress.advance(len(chunk))
                        if sink.tell() > file.num_bytes:
                            break
        except PassingError as error:
            return error
        return PassingError("the connection was closed") if size(path) < file.num_bytes else None

    def _wait(self, error: PassingError, num_failures: int, file: RemoteFile) -> None:
        """Wait before the next attempt. Raises HubError if there have been too many."""
        if num_failures > MAX_FAILURES:
            raise HubError(f"{file.path}: {error}. What has arrived is kept: run the command again to continue")
        seconds = error.retry_after or min(2.0 ** (num_failures - 1), MAX_WAIT)
        self.progress.say(f"{file.path}: {error}; trying again in {seconds:.0f} s")
        self.sleep(seconds)


def _check(file: RemoteFile, path: Path) -> None:
    """Compare size and hash with what the hub announces. A file that differs is deleted. Raises HubError."""
    begin = hashlib.sha256 if file.lfs else lambda: hashlib.sha1(b"blob %d\0" % file.num_bytes, usedforsecurity=False)
    with path.open("rb") as source:
        digest = hashlib.file_digest(source, begin).hexdigest()
    if (size(path), digest) != (file.num_bytes, file.etag):
        path.unlink()
        raise HubError(
            f"{file.path} is not what the hub announced, {file.num_bytes} bytes with hash {file.etag}. "
            "It has been deleted: run the command again"
        )
