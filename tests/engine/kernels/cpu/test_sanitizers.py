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
from engine.kernels.cpu import library
from tests.support import kernel_choice, recorded_kernels


def some_rows(rows, num_rows=recorded_kernels.MAX_ROWS):
    for num in (1, 5, 13, 45):
        rows(range(num), num // 2)
    return rows(range(num_rows))


recorded_kernels.assert_rows_are_independent = some_rows  # which would take ten times as long here
lazy_memory._huge_pages = lambda num_bytes: torch.zeros(num_bytes, dtype=torch.uint8)
lazy_memory.ARENA_BYTES = 0
library.available_code_paths = lambda: {names}
kernel_choice.library_path = lambda code_path: Path(library_path)
files = ["cpu/test_kernels.py"]
files += [f"test_{{subject}}.py" for subject in ("attention", "kv_cache", "rows", "experts")]
paths = ["tests/engine/kernels/" + name for name in files]
paths += ["tests/engine/sampling/test_sampler.py", "tests/engine/parts/lora/test_layers.py"]
sys.exit(pytest.main(["-q", "-o", "cache_dir={folder}", "-k", "{chosen}", *paths]))
"""


# Code paths in between read and write the same memory as the last, with the instructions of the best. What compares
# bits of the same attention, cut in other ways, takes as long as all the rest.
@pytest.mark.parametrize("code_path", dict.fromkeys(code_paths()[:1] + code_paths()[-1:]))
def test_no_operation_leaves_its_buffers(code_path: str, tmp_path: Path) -> None:
    names = [code_path] if code_path in ("avx2", "avx512") else [code_path, "avx512"]  # the sampler has these two
    chosen = f"({code_path} or test_sampler) and not (test_it_does_not or test_what_lies_before)"
    code = RUN.format(code_path=code_path, folder=tmp_path, names=names, chosen=chosen)
    done = run_sanitized(code, sanitized_library(code_path))
    assert done.returncode == 0, (done.stdout[-3000:], done.stderr[-6000:])
