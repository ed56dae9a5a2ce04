"""Downloads a model or an adapter from the hub: says what it takes, checks that it fits, and returns its path."""

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from engine.config import GGUF_ARCHITECTURES, load_model_config
from engine.config.fields import read_json_object
from engine.shared.gguf import read_partial_metadata
from server.format import format_bytes, home_relative
from server.parts.hub.client import RemoteFile, read, request_file
from server.parts.hub.download import Downloader
from server.parts.hub.errors import HubError, PassingError
from server.parts.hub.files import CONFIG, select_files, select_gguf
from server.parts.hub.memory import ModelShape, config_shape, gguf_shape, memory_lines
from server.parts.hub.names import GGUF_SUFFIX, HubName
from server.parts.hub.repository import Repository, cached_repository, hub_folder, open_repository
from server.progress import Progress

GGUF_HEADER_BYTES = 1 << 18  # the architecture and its sizes come before the vocabulary

Say = Callable[[str], None]


def fetch_model(name: HubName, progress: Progress, sleep: Callable[[float], None] = time.sleep) -> Path:
    """Return the path of a GGUF file (the first of its parts), or of a folder with safetensors.

    `sleep` waits before another attempt. Raises HubError, and OSError if the cache cannot be written.
    """
    with progress:
        repository = open_repository(name, progress.say)
        files = repository.select(lambda paths: select_files(paths, name))
        downloader = Downloader(repository, progress, sleep)
        is_gguf = files[0].path.lower().endswith(GGUF_SUFFIX)
        if not all(map(repository.is_cached, files)):
            _check_disk(repository, files, progress.say)
            weights = files if is_gguf else [file for file in files if file.path.endswith(".safetensors")]
            if not is_gguf:
                downloader.download([file for file in files if file not in weights])
            shape = _gguf_shape(repository, files[0]) if is_gguf else _config_shape(repository.path("."))
            for line in memory_lines(sum(file.num_bytes for file in weights), shape) if shape else ():
                progress.say(line)
        downloader.download(files)
        return repository.path(files[0].path if is_gguf else ".")


def fetch_adapter(name: HubName, adapter_files: Sequence[str], progress: Progress) -> Path:
    """Return the path of a GGUF file, or of a folder that has those of `adapter_files` that the repository has.

    Raises HubError, and OSError if the cache cannot be written.
    """
    is_gguf = bool(name.file or name.tag)

    def choose(paths: Sequence[str]) -> Sequence[str]:
        return select_gguf(paths, name).paths if is_gguf else [path for path in paths if path in adapter_files]

    with progress:
        repository = open_repository(name, progress.say)
        files = repository.select(choose)
        Downloader(repository, progress).download(files)
        return repository.path(files[0].path if is_gguf else ".")


def remove_model(name: HubName) -> int:
    """Remove a model from the cache, and return the bytes freed. Raises HubError, and OSError."""
    repository = cached_repository(name)
    return repository.remove(repository.select(lambda paths: select_files(paths, name)))


def _check_disk(repository: Repository, files: Sequence[RemoteFile], say: Say) -> None:
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


def _config_shape(folder: Path) -> ModelShape | None:
    """Return the shape by config.json. Raises HubError if the configuration is not supported."""
    try:
        load_model_config(folder)
        return config_shape(read_json_object(folder / CONFIG))
    except ValueError as error:
        raise HubError(str(error).replace(f"{folder}/", "")) from None
