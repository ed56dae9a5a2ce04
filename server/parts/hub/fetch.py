"""Downloads a model or an adapter from the hub: says what it takes, checks that it fits, and returns its path."""

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from engine.config import GGUF_ARCHITECTURES, load_model_config
from engine.config.json_file import read_json_object
from engine.shared.gguf import read_partial_metadata
from server.format import format_bytes, home_relative
from server.parts.hub.client import HubClient, RemoteFile
from server.parts.hub.download import Downloader
from server.parts.hub.environment import hub_folder
from server.parts.hub.errors import BrokenConnectionError, HubError
from server.parts.hub.files import CONFIG, select_files, select_gguf
from server.parts.hub.memory import ModelShape, config_shape, gguf_shape, memory_lines
from server.parts.hub.names import GGUF_SUFFIX, HubName
from server.parts.hub.repository import Repository
from server.progress import Progress

GGUF_HEADER_BYTES = 1 << 18  # the architecture and its sizes come before the vocabulary


def fetch_model(name: HubName, progress: Progress, sleep: Callable[[float], None] = time.sleep) -> Path:
    """Return the path of a GGUF file (the first of its parts), or of a folder with safetensors.

    `sleep` waits before another attempt. Raises HubError, and OSError if the cache cannot be written.
    """
    with HubClient() as client, progress:
        repository = Repository.open(client, name.repo, name.revision, progress.say)
        files = repository.select(lambda paths: select_files(paths, name))
        fetch = _Fetch(client, repository, progress, sleep)
        is_gguf = files[0].path.lower().endswith(GGUF_SUFFIX)
        if not all(map(repository.is_cached, files)):
            fetch.check_disk(files)
            check = fetch.check_gguf if is_gguf else fetch.check_safetensors
            check(files)
        fetch.download(files)
        return repository.path(files[0].path if is_gguf else ".")


def fetch_adapter(name: HubName, adapter_files: Sequence[str], progress: Progress) -> Path:
    """Return the path of a GGUF file, or of a folder that has those of `adapter_files` that the repository has.

    Raises HubError, and OSError if the cache cannot be written.
    """

    def choose(paths: Sequence[str]) -> Sequence[str]:
        if name.file or name.tag:
            return select_gguf(paths, name).paths
        return [path for path in paths if path in adapter_files]

    with HubClient() as client, progress:
        repository = Repository.open(client, name.repo, name.revision, progress.say)
        files = repository.select(choose)
        _Fetch(client, repository, progress).download(files)
        is_gguf = bool(name.file or name.tag)
        return repository.path(files[0].path if is_gguf else ".")


def remove_model(name: HubName) -> int:
    """Remove a model from the cache, and return the bytes freed. Raises HubError, and OSError."""
    repository = Repository.in_cache(name.repo, name.revision)
    files = repository.select(lambda paths: select_files(paths, name))
    return repository.cache.remove(repository.commit, [file.path for file in files])


class _Fetch:
    """One download, in steps."""

    def __init__(
        self, client: HubClient, repository: Repository, progress: Progress, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._client = client
        self._repository = repository
        self._progress = progress
        self._sleep = sleep

    def check_disk(self, files: Sequence[RemoteFile]) -> None:
        """Say what is downloaded to where. Raises HubError if the disk is too small."""
        missing = self._repository.num_missing_bytes(files)
        free = shutil.disk_usage(_existing(hub_folder())).free
        total = sum(file.num_bytes for file in files)
        rest = "" if missing == total else f", of which {format_bytes(total - missing)} are there already"
        what = files[0].path if len(files) == 1 else f"{len(files)} files, {files[0].path} ..."
        self._progress.say(
            f"{self._repository.repo} at {self._repository.commit[:8]}: {what}, {format_bytes(total)}{rest}"
        )
        self._progress.say(f"Stored in {home_relative(str(hub_folder()))}, where {format_bytes(free)} are free")
        if missing > free:
            raise HubError(
                f"the disk is too full: {format_bytes(missing)} are needed, and {format_bytes(free)} are free "
                "(HF_HOME sets another folder)"
            )

    def check_gguf(self, files: Sequence[RemoteFile]) -> None:
        """Say whether the model fits in memory, by the metadata at the beginning of the file.

        Raises HubError if the architecture is not supported.
        """
        repository, first = self._repository, files[0]
        stop = min(GGUF_HEADER_BYTES, first.num_bytes)
        if not stop or repository.is_cached(first):
            return
        try:
            with self._client.open(repository.repo, repository.commit, first.path, 0, stop) as content:
                header = content.read(stop)
            metadata = read_partial_metadata(Path(first.path), header, first.num_bytes)
        except BrokenConnectionError:
            return  # the download tries again
        except ValueError as error:
            raise HubError(str(error)) from None
        arch = metadata.get("general.architecture")
        if arch is not None and arch not in GGUF_ARCHITECTURES:
            supported = ", ".join(GGUF_ARCHITECTURES)
            raise HubError(f"{first.path} has the architecture {arch}, which is not supported (supported: {supported})")
        self._say_memory(files, gguf_shape(metadata))

    def check_safetensors(self, files: Sequence[RemoteFile]) -> None:
        """Download all but the weights, and say whether the model fits in memory.

        Raises HubError if the configuration is not supported.
        """
        self.download([file for file in files if not file.path.endswith(".safetensors")])
        folder = self._repository.path(".")
        try:
            load_model_config(folder)
            shape = config_shape(read_json_object(folder / CONFIG))
        except ValueError as error:
            raise HubError(str(error).replace(f"{folder}/", "")) from None
        self._say_memory([file for file in files if file.path.endswith(".safetensors")], shape)

    def _say_memory(self, weights: Sequence[RemoteFile], shape: ModelShape | None) -> None:
        if shape is not None:
            for line in memory_lines(sum(file.num_bytes for file in weights), shape):
                self._progress.say(line)

    def download(self, files: Sequence[RemoteFile]) -> None:
        """Download the files that the cache lacks."""
        repository, progress = self._repository, self._progress
        downloader = Downloader(
            self._client, repository.cache, repository.repo, repository.commit, progress, self._sleep
        )
        for file in files:
            if not repository.is_cached(file):
                downloader.fetch(file)
        repository.cache.set_commit(repository.revision, repository.commit)


def _existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    return next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
