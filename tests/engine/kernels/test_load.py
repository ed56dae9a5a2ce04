"""Which kernels are loaded, and the message if the C++ kernels cannot be used."""

import importlib.util
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import triton

from engine.kernels.cpu import library
from engine.kernels.interface import KernelOptions
from engine.kernels.load import load_kernels
from engine.parts.triton import load as triton_load
from engine.parts.triton.load import missing_requirement
from engine.shared.parts import engine_part
from tests.support.kernel_choice import choose_kernels, code_paths
from tests.support.paths import ROOT

CPU = torch.device("cpu")

has_library = pytest.mark.skipif(not code_paths(), reason="no kernels in C++ for this processor")


@has_library
@pytest.mark.parametrize("name", ["default", *code_paths()])
def test_code_path(name: str, caplog: pytest.LogCaptureFixture) -> None:
    for dtype, num_threads in ((torch.float32, 1), (torch.bfloat16, 2)):
        with choose_kernels(name, num_threads):
            kernels = load_kernels(CPU, KernelOptions(dtype, max_num_rows=512))
        assert kernels.name == f"cpu {code_paths()[0] if name == 'default' else name}"
        assert kernels.deterministic
        assert kernels.num_threads == num_threads
    assert not caplog.messages


UNSUPPORTED = [
    (KernelOptions(torch.float16), "do not compute in float16"),
    (KernelOptions(torch.float32, head_dims=frozenset({40, 64})), "multiple of 16 up to 576, not 40"),
    (KernelOptions(torch.float32, head_dims=frozenset({592})), "multiple of 16 up to 576, not 592"),
    (KernelOptions(torch.float32, block_size=8), "--block-size of .*, not 8"),
    (KernelOptions(torch.float32, block_size=48), "--block-size of .*, not 48"),
    (KernelOptions(torch.float32, block_size=512), "--block-size of .*, not 512"),
]


@pytest.mark.parametrize(("options", "reason"), UNSUPPORTED)
def test_what_they_lack_is_said_and_done_by_torch(
    options: KernelOptions, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    kernels = load_kernels(CPU, options)
    assert kernels.name == "torch"
    assert kernels.keep_packed == frozenset()
    (message,) = caplog.messages
    assert re.match(f"using the slower plain torch kernels: .*{reason}", message)


@pytest.mark.parametrize(
    ("find", "reason"),
    [
        pytest.param(lambda code_path: None, "the C++ compiler named by CXX does not exist: /no", marks=has_library),
        pytest.param(lambda code_path: Path("/nonexistent/k.so"), "/nonexistent/k.so: cannot open", marks=has_library),
        (None, "this processor has no AVX2"),
    ],
)
def test_where_they_cannot_be_used(
    find: Any, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Number formats that only they have are not left out in silence."""
    engine_part("build_kernels", "build")  # which finds libraries itself, not as `find` does
    if find:
        monkeypatch.setenv("CXX", "/no")
        monkeypatch.setenv("LIGHTWELL_CACHE", str(tmp_path))
        monkeypatch.setattr(library, "find_library", find)
    else:
        monkeypatch.setattr(library, "cpu_flags", lambda: {"sse4_2", "avx"})
    assert load_kernels(CPU, KernelOptions(torch.bfloat16)).name == "torch"
    (message,) = caplog.messages
    assert f"kernels: {reason}" in message
    for options, flag in (
        (KernelOptions(torch.bfloat16, quantization="int8"), "--quantization"),
        (KernelOptions(torch.bfloat16, kv_cache_dtype="int8"), "--kv-cache-dtype"),
    ):
        with pytest.raises(ValueError, match=f"{flag} int8 needs the CPU or GPU kernels, but {re.escape(reason)}"):
            load_kernels(CPU, options)


def test_float8_needs_a_gpu() -> None:
    options = KernelOptions(torch.bfloat16, kv_cache_dtype="fp8")
    with pytest.raises(ValueError, match="--kv-cache-dtype fp8 needs the GPU kernels, but the device is a CPU, where"):
        load_kernels(CPU, options)


# On a GPU: what is said if Triton cannot compile its C module.


CUDA = torch.device("cuda:0")


@pytest.mark.long
def test_what_triton_itself_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is missing, Triton compiles; `deploy/check_triton.py` shows it in an image."""
    if not shutil.which("gcc"):
        pytest.skip("no gcc")
    monkeypatch.delenv("CC", raising=False)
    command = [sys.executable, str(ROOT / "deploy/check_triton.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (missing_requirement() is None) == (done.returncode == 0), done.stderr


def test_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert missing_requirement() == "Triton is not installed: pip install triton"


def test_compilers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Triton looks for two names only."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("g++", "cc"):
        (tmp_path / name).touch(mode=0o755)
    assert (missing_requirement() or "").endswith("there is no gcc or clang: apt install gcc libc6-dev")
    for name in ("gcc", "clang"):
        (tmp_path / name).touch(mode=0o755)
        assert missing_requirement() is None
        (tmp_path / name).unlink()


def test_what_is_said_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", "/nonexistent/cc")
    assert "there is no CC=/nonexistent/cc: unset CC" in (missing_requirement() or "")
    monkeypatch.setenv("CC", sys.executable)
    assert missing_requirement() is None
    monkeypatch.setattr(triton_load, "python_include", lambda: tmp_path)
    problem = missing_requirement() or ""
    assert f"there is no {tmp_path}/Python.h: apt install python3-dev" in problem
    assert "\n" not in problem


def test_a_gpu_without_triton(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """It is refused unless slow kernels are allowed, which still lack what they lack."""
    monkeypatch.setattr(triton_load, "python_include", lambda: Path("/nonexistent"))
    options = KernelOptions(torch.bfloat16)
    with pytest.raises(ValueError, match=r"/nonexistent/Python.h: .*python3-dev\. With --allow-slow-kernels") as error:
        load_kernels(CUDA, options)
    assert "\n" not in str(error.value)
    assert not caplog.messages
    options = replace(options, allow_slow_kernels=True)
    assert load_kernels(CUDA, options).name == "torch"
    (message,) = caplog.messages
    assert re.match("using the slower plain torch kernels: Triton needs the headers of Python.*python3-dev$", message)
    with pytest.raises(ValueError, match=r"--quantization int8 needs the CPU or GPU kernels, but .*python3-dev"):
        load_kernels(CUDA, replace(options, quantization="int8"))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (AssertionError("libcuda.so cannot found!\nPlease make sure"), "libcuda.so cannot found! Please make sure"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_a_problem_that_triton_itself_finds(error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.parts.triton.load.missing_requirement", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(triton.runtime, "driver", driver := Mock())
    driver.active.get_current_target.side_effect = error
    with pytest.raises(ValueError, match="slow-kernels") as refused:
        load_kernels(CUDA, KernelOptions(torch.bfloat16))
    assert str(refused.value).startswith(f"Triton does not work here: {reason}. With ")
