"""What is said if Triton cannot compile its C module."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import triton

from engine.kernels.interface import KernelOptions
from engine.kernels.load import load_kernels
from engine.kernels.triton import requirements
from engine.kernels.triton.requirements import missing_requirement
from tests.support.paths import ROOT

CUDA = torch.device("cuda:0")


def new_folder(tmp_path: Path, *programs: str) -> Path:
    """Return a folder with programs of these names."""
    for name in programs:
        (tmp_path / name).touch(mode=0o755)
    return tmp_path


@pytest.mark.long
def test_what_triton_itself_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is missing, Triton compiles; `deploy/check_triton.py` shows it in an image."""
    if not shutil.which("gcc"):
        pytest.skip("no gcc")
    monkeypatch.delenv("CC", raising=False)
    done = subprocess.run(
        [sys.executable, str(ROOT / "deploy/check_triton.py")], capture_output=True, text=True, check=False
    )
    assert (missing_requirement() is None) == (done.returncode == 0), done.stderr


@pytest.mark.parametrize("programs", [["gcc"], ["clang"], ["gcc", "clang"]], ids=str)
def test_either_compiler_will_do(programs: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(new_folder(tmp_path, *programs)))
    assert missing_requirement() is None


def test_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert missing_requirement() == "Triton is not installed: pip install triton"


@pytest.mark.parametrize("programs", [[], ["g++", "cc"]], ids=str)
def test_no_compiler(programs: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Triton looks for two names only."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(new_folder(tmp_path, *programs)))
    assert (missing_requirement() or "").endswith("there is no gcc or clang: apt install gcc libc6-dev")


def test_a_compiler_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "/nonexistent/cc")
    assert "there is no CC=/nonexistent/cc: unset CC" in (missing_requirement() or "")
    monkeypatch.setenv("CC", sys.executable)
    assert missing_requirement() is None


def test_no_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", sys.executable)
    monkeypatch.setattr(requirements, "python_include", lambda: tmp_path)
    problem = missing_requirement() or ""
    assert f"there is no {tmp_path}/Python.h: apt install python3-dev" in problem
    assert "\n" not in problem


def test_a_gpu_without_triton_is_refused(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(requirements, "python_include", lambda: Path("/nonexistent"))
    with pytest.raises(ValueError, match=r"/nonexistent/Python.h: .*python3-dev\. With --allow-slow-kernels") as error:
        load_kernels(CUDA, KernelOptions(torch.bfloat16))
    assert "\n" not in str(error.value)
    assert not caplog.messages


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (AssertionError("libcuda.so cannot found!\nPlease make sure"), "libcuda.so cannot found! Please make sure"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_a_problem_that_triton_itself_finds(error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.kernels.load.missing_requirement", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(triton.runtime, "driver", driver := Mock())
    driver.active.get_current_target.side_effect = error
    with pytest.raises(ValueError, match="slow-kernels") as refused:
        load_kernels(CUDA, KernelOptions(torch.bfloat16))
    assert str(refused.value).startswith(f"Triton does not work here: {reason}. With ")


@pytest.mark.parametrize("int8", [False, True])
def test_slow_kernels_must_be_allowed(
    int8: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They still lack what they lack."""
    monkeypatch.setattr(requirements, "python_include", lambda: Path("/nonexistent"))
    options = KernelOptions(torch.bfloat16, quantization="int8" if int8 else "auto", allow_slow_kernels=True)
    if int8:
        with pytest.raises(ValueError, match=r"--quantization int8 needs the CPU or GPU kernels, but .*python3-dev"):
            load_kernels(CUDA, options)
    else:
        assert load_kernels(CUDA, options).name == "torch"
        (message,) = caplog.messages
        assert message.endswith("python3-dev")
        assert message.startswith("using the slower plain torch kernels: Triton needs the headers of Python")
