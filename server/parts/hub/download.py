"""Downloads a model or an adapter from the hub: says what it takes, checks that it fits, and returns its path.

A download continues what was begun, tries again when a connection breaks, and checks hashes.
"""

import dataclasses
import hashlib
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from http import HTTPStatus
from pathlib import Path

from engine.config import GGUF_ARCHITECTURES, load_model_config
from engine.shared.files import replace_durably
from engine.shared.gguf import read_partial_metadata
from server.format import format_bytes, home_relative
from server.parts.hub.memory import ModelShape, gguf_shape, memory_lines, model_shape
from server.parts.hub.names import GGUF_SUFFIX, HubError, HubName, select_files, select_gguf
from server.parts.hub.repository import (
    PassingError,
    RemoteFile,
    Repository,
    cached_repository,
    hub_folder,
    open_repository,
    read,
    request_file,
    size,
)

MAX_FAILURES = 5  # in a row, without a byte between them
MAX_WAIT = 30.0  # seconds between two attempts, unless the hub asks for more
GGUF_HEADER_BYTES = 1 << 18  # the architecture and its sizes come before the vocabulary
LINE_SECONDS = 5.0  # between lines about a download


class Progress:
    """Shows messages, and the files of a download one after the other; this one shows nothing."""

    def say(self, line: str) -> None: ...

    def start(self, name: str, num_done: int, num_bytes: int) -> None:
        """Begin with a file, of which `num_done` bytes are there already."""

    def advance(self, num_bytes: int) -> None: ...

    def close(self) -> None: ...


class Lines(Progress):
    """Prints a line every few seconds to standard error, and one at the end of each file."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now

    def say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def start(self, name: str, num_done: int, num_bytes: int) -> None:
        self._name, self._num_done, self._num_bytes = name, num_done, num_bytes
        self._num_new = 0
        self._started = self._printed = self._now()

    def advance(self, num_bytes: int) -> None:
        self._num_done += num_bytes
        self._num_new += num_bytes
        now = self._now()
        if now - self._printed >= LINE_SECONDS or self._num_done >= self._num_bytes:
            self._printed = now
            self.say(self._line(now - self._started))

    def _line(self, seconds: float) -> str:
        rate = self._num_new / max(seconds, 1e-3)
        remaining = (self._num_bytes - self._num_done) / max(rate, 1.0)
        end = f", {format_seconds(remaining)} left" if self._num_done < self._num_bytes else ""
        percent = 100 * self._num_done // max(self._num_bytes, 1)
        amount = f"{format_bytes(self._num_done)} of {format_bytes(self._num_bytes)}"
        return f"Downloading {self._name}: {percent} %, {amount}, {format_bytes(int(rate))}/s{end}"


class Bar(Progress):
    """Shows a bar in the terminal of standard error for each file."""

    def __init__(self) -> None:
        from rich import progress
        from rich.console import Console

        columns = (progress.DownloadColumn(), progress.TransferSpeedColumn(), progress.TimeRemainingColumn())
        console = Console(stderr=True, highlight=False)
        self._progress = progress.Progress(
            progress.TextColumn("{task.description}"), progress.BarColumn(), *columns, console=console
        )
        self._tasks: dict[str, progress.TaskID] = {}  # by the name of the file

    def say(self, line: str) -> None:
        from rich.text import Text

        self._progress.console.print(Text(line), soft_wrap=True)

    def start(self, name: str, num_done: int, num_bytes: int) -> None:
        if name in self._tasks:  # another attempt
            self._progress.remove_task(self._tasks[name])
        self._progress.start()
        self._task = self._tasks[name] = self._progress.add_task(name, total=num_bytes, completed=num_done)

    def advance(self, num_bytes: int) -> None:
        self._progress.advance(self._task, num_bytes)

    def close(self) -> None:
        if self._tasks:
            self._progress.stop()


def new_progress(is_shown: bool) -> Progress:
    """Return what suits standard error: a bar for a terminal, else lines; or nothing."""
    return Progress() if not is_shown else Bar() if sys.stderr.isatty() else Lines()


def fetch_model(name: HubName, progress: Progress, sleep: Callable[[float], None] = time.sleep) -> Path:
    """Return the path of a GGUF file (the first of its parts), or of a folder with safetensors.

    `sleep` waits before another attempt. Raises HubError, and OSError if the cache cannot be written.
    """
    with closing(progress):
        repository = open_repository(name, progress.say)
        files = repository.select(lambda paths: select_files(paths, name))
        downloader = Downloader(repository, progress, sleep)
        is_gguf = files[0].path.lower().endswith(GGUF_SUFFIX)
        if not all(map(repository.is_cached, files)):
            _check_disk(repository, files, progress.say)
            weights = files if is_gguf else [file for file in files if file.path.endswith(".safetensors")]
            if not is_gguf:
                downloader.download([file for file in files if file not in weights])
            shape = _gguf_shape(repository, files[0]) if is_gguf else _folder_shape(repository.path("."))
            for line in memory_lines(sum(file.num_bytes for file in weights), shape) if shape else ():
                progress.say(line)
        downloader.download(files)
        return repository.path(files[0].path if is_gguf else ".")


def fetch_adapter(name: HubName, adapter_files: Sequence[str], progress: Progress) -> Path:
    """Return the path of a GGUF file, or of a folder that has those of `adapter_files` that the repository has.

    Raises HubError, and OSError if the cache cannot be written.
    """
    is_gguf = bool(name.file or name.tag)
    with closing(progress):
        repository = open_repository(name, progress.say)
        files = repository.select(
            lambda paths: select_gguf(paths, name).paths if is_gguf else sorted({*paths} & {*adapter_files})
        )
        Downloader(repository, progress).download(files)
        return repository.path(files[0].path if is_gguf else ".")


def remove_model(name: HubName) -> int:
    """Remove a model from the cache, and return the bytes freed. Raises HubError, and OSError."""
    repository = cached_repository(name)
    return repository.remove(repository.select(lambda paths: select_files(paths, name)))


def _check_disk(repository: Repository, files: Sequence[RemoteFile], say: Callable[[str], None]) -> None:
    """Say what is downloaded to where. Raises HubError if the disk is too small."""
    folder = hub_folder()
    missing, total = repository.num_missing_bytes(files), sum(file.num_bytes for file in files)
    free = shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free
    rest = "" if missing == total else f", of which {format_bytes(total - missing)} are there already"
    what = files[0].path if len(files) == 1 else f"{len(files)} files, {files[0].path} ..."
    say(f"{repository.repo} at {repository.commit[:8]}: {what}, {format_bytes(total)}{rest}")
    say(f"Stored in {home_relative(str(folder))}, where {format_bytes(free)} are free")
    if missing > free:
        raise HubError(
            f"the disk is too full: {format_bytes(missing)} are needed, and {format_bytes(free)} are free "
            "(HF_HOME sets another folder)"
        )


def _gguf_shape(repository: Repository, first: RemoteFile) -> ModelShape | None:
    """Return the shape by the beginning of a GGUF file, if it is not there yet and the hub answers.

    Raises HubError if the architecture is not supported.
    """
    stop = min(GGUF_HEADER_BYTES, first.num_bytes)
    if not stop or repository.is_cached(first):
        return None
    try:
        with request_file(repository.repo, repository.commit, first.path, f"0-{stop - 1}") as response:
            header = read(response, stop)
        metadata = read_partial_metadata(Path(first.path), header, first.num_bytes)
    except PassingError:
        return None  # the download tries again
    except ValueError as error:
        raise HubError(str(error)) from None
    arch = metadata.get("general.architecture")
    if arch is not None and arch not in GGUF_ARCHITECTURES:
        supported = ", ".join(GGUF_ARCHITECTURES)
        raise HubError(f"{first.path} has the architecture {arch}, which is not supported (supported: {supported})")
    return gguf_shape(metadata)


def _folder_shape(folder: Path) -> ModelShape:
    """Return the shape by config.json. Raises HubError if the configuration is not supported."""
    try:
        return model_shape(load_model_config(folder))
    except ValueError as error:
        raise HubError(str(error).replace(f"{folder}/", "")) from None


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


def format_seconds(seconds: float) -> str:
    """Return a duration in its largest units: 48 s, 12 min, 3 h 20 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
