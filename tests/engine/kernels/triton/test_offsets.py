"""No offset of a kernel overflows 32 bits: with a KV cache of 192 GB, 256 rows of 256k logits, prompts of 64k rows.

`tests/support/triton_offsets.py` bounds the integers of each kernel's intermediate form.
"""

import json
import os
import subprocess
import sys

import pytest

KERNELS = {"linear", "add_splits", "attend", "reduce", "norm", "act_and_mul", "rope_and_store_kv"}
KERNELS |= {"shrink", "expand", "top", "forbid", "add_biases", "penalise", "collect", "draw"}


@pytest.mark.long
def test_no_kernel_has_an_offset_that_overflows() -> None:
    """In a process of its own, in which kernels are compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.triton_offsets"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, list[str]] = json.loads(done.stdout)
    assert {name for name, texts in found.items() if texts} == set(), found
    assert found.keys() >= KERNELS
