"""The cache folder, files that a crash of the machine leaves whole, and files that show whether they are."""

import contextlib
import hashlib
import os
from pathlib import Path

SEAL_BYTES = hashlib.sha256().digest_size


def cache_folder() -> Path:
    """Return the folder of fetched models and compiled kernels.

    It is $LIGHTWELL_CACHE, or else the folder `lightwell` in the user's cache ($XDG_CACHE_HOME or ~/.cache).
    """
    if chosen := os.environ.get("LIGHTWELL_CACHE"):
        return Path(os.path.expanduser(chosen))
    return Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "lightwell"


def replace_durably(new: Path, target: Path) -> None:
    """Rename a file when its contents are on the disk. Raises OSError.

    Otherwise the name can be on the disk before the contents: after a crash, the file would be empty or cut.
    """
    with new.open("rb") as file:
        os.fsync(file.fileno())
    new.replace(target)
    with contextlib.suppress(OSError):  # some file systems cannot; then the name may be lost, not the contents
        _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def seal(path: Path) -> None:
    """Append the hash of its contents to a file, of a kind whose readers ignore what follows, such as ELF."""
    with path.open("r+b") as file:
        file.write(hashlib.sha256(file.read()).digest())


def is_sealed(path: Path) -> bool:
    """Return whether a file can be read and ends with the hash of what comes before."""
    try:
        contents = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(contents[:-SEAL_BYTES]).digest() == contents[-SEAL_BYTES:]
