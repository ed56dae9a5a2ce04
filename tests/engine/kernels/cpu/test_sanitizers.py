"""The tests of the C++ kernels under sanitizers, which see each access beyond a buffer, and all undefined behaviour.

Every buffer is an allocation of its own, of exactly the size that an operation may touch: in the large mappings that
the server uses, the sanitizer would not see an access one byte too far.
"""

from pathlib import Path

import pytest

from tests.support.kernel_choice import code_paths
from tests.support.sanitizer import run_sanitized, sanitized_library

pytestmark = [pytest.mark.long, pytest.mark.skipif(not code_paths(), reason="no kernels in C++ for this processor")]

RUN = """
import os
import sys
from pathlib import Path

os.environ.pop("TEST_LONG", None)

import pytest
import torch
from engine.kernels import lazy_memory
from engine.kernels.cpu import processor
from tests.support import kernel_choice, recorded_kernels


def some_rows(rows, num_rows=recorded_kernels.MAX_ROWS):
    for num in (1, 5, 13, 45):
        rows(range(num), num // 2)
    return rows(range(num_rows))


recorded_kernels.assert_rows_are_independent = some_rows  # which would take ten times as long here
lazy_memory._huge_pages = lambda num_bytes: torch.zeros(num_bytes, dtype=torch.uint8)
lazy_memory.ARENA_BYTES = 0
processor.available_code_paths = lambda: [{code_path!r}]
kernel_choice.build = lambda code_path: Path(library_path)
files = ["cpu/test_kernels.py", "cpu/test_attention.py", "test_rows.py", "test_experts.py", "test_lora.py"]
paths = ["tests/engine/kernels/" + name for name in files] + ["tests/engine/sampling/test_sampler.py"]
sys.exit(pytest.main(["-q", "-o", "cache_dir={folder}", "-k", "{code_path}", *paths]))
"""


@pytest.mark.parametrize("code_path", code_paths())
def test_no_operation_leaves_its_buffers(code_path: str, tmp_path: Path) -> None:
    done = run_sanitized(RUN.format(code_path=code_path, folder=tmp_path), sanitized_library(code_path))
    assert done.returncode == 0, (done.stdout[-3000:], done.stderr[-6000:])
