"""Files whose paths clients choose: opening never blocks, and no more is read than requested."""

import os
from contextlib import closing
from pathlib import Path

import pytest

from engine.parts.lora.checkpoint import RegularFile


def test_pieces(tmp_path: Path) -> None:
    data = bytes(range(256)) * 1000
    (tmp_path / "file").write_bytes(data)
    with closing(RegularFile(tmp_path / "file")) as file:
        assert file.size == len(data)
        for start, num_bytes in ((0, 10), (70_000, 150_000), (5, 0), (255_999, 1), (0, 256_000)):
            assert file.read(start, num_bytes) == data[start : start + num_bytes]
        for start, num_bytes in ((255_999, 2), (256_000, 1), (300_000, 5)):
            with pytest.raises(ValueError, match=rf"file: ends at byte .*, though {start + num_bytes} were expected"):
                file.read(start, num_bytes)


def test_a_file_that_changes_its_length(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"a" * 100_000)
    with closing(RegularFile(path)) as file:
        assert file.read(0, 10) == b"a" * 10
        os.truncate(path, 50_000)
        with pytest.raises(ValueError, match="file: ends at byte 50000, though 100000 were expected"):
            file.read(0, 100_000)
        os.truncate(path, 2**40)
        assert file.size == 100_000
        assert file.read(49_999, 2) == b"a\0"


def test_paths_that_are_not_regular_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    num_open = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else None
    for path in (tmp_path / "pipe", tmp_path / "link", Path("/dev/zero"), Path("/dev/null")):
        with pytest.raises(ValueError, match=f"{path}: is not a regular file"):
            RegularFile(path)
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(OSError, match="directory"):
            RegularFile(path)
    assert num_open is None or len(os.listdir("/proc/self/fd")) == num_open
