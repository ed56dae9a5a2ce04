"""Contents for the repositories of a stub hub: files that are as long as a test wants, with valid headers."""

import random
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from server.parts.hub.download import Progress
from tests.support.gguf_files import LLAMA, write_gguf


def gguf_content(
    num_bytes: int = 1_000_000, seed: int = 0, arch: str = "llama", metadata: Mapping[str, Any] = LLAMA
) -> bytes:
    """Return a GGUF header followed by random bytes."""
    with tempfile.TemporaryDirectory() as folder:
        header = write_gguf(Path(folder) / "header.gguf", metadata, arch=arch).read_bytes()
    return header + random.Random(seed).randbytes(num_bytes - len(header))


class Recorder(Progress):
    """Keeps what is shown: the lines, and the bytes that each file began with and got."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.starts: list[tuple[str, int, int]] = []
        self.num_bytes = 0

    def say(self, line: str) -> None:
        self.lines.append(line)

    def start(self, name: str, num_done: int, num_bytes: int) -> None:
        self.starts.append((name, num_done, num_bytes))

    def advance(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes
