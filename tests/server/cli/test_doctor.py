"""`lightwell doctor`, for this machine and for others that are made up."""

import json
import os
import platform
import re
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import msgspec
import pytest

from engine.shared.machine import Gpu, Machine
from server.cli import doctor
from server.cli.doctor import Finding, examine
from server.cli.main import main

GOOD = Machine(
    processor="A Processor",
    has_avx2=True,
    num_cores=2,
    available_memory=8_000_000_000,
    torch="2.9.0+cpu",
    cuda=None,
    gpus=[],
    triton_problem=None,
    compiler="g++ 12",
    compiler_problem=None,
    code_path="avx2",
    kernel_problem=None,
)

H100 = Gpu("H100", 80_000_000_000)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Take the GPU's device file away; return the path at which the doctor looks for it."""
    monkeypatch.setattr(doctor, "NVIDIA_DEVICE", tmp_path / "nvidiactl")
    for name in [name for name in os.environ if name.startswith("LIGHTWELL_") and name != "LIGHTWELL_CACHE"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("LIGHTWELL_PORT", "9")
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path / "nvidiactl"


def findings(**changes: object) -> dict[str, Finding]:
    return {finding.name: finding for finding in examine(msgspec.structs.replace(GOOD, **changes))}


def test_this_machine() -> None:
    """In eleven lines and the remedies."""
    command = [sys.executable, "-m", "server.cli.main", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    lines = [line for line in done.stdout.splitlines() if not line.startswith(" ")]
    assert len(lines) == 11
    assert all(re.match(r"(ok|--|!!) [A-Z]\w+ +\S", line) for line in lines)
    assert platform.python_version() in lines[0]
    assert version("torch") in lines[1]
    assert done.returncode == (1 if "!! " in done.stdout else 0)


def test_a_good_machine_needs_nothing() -> None:
    found = findings()
    del found["Model"]  # depends on this machine's cache
    assert [finding.remedy for finding in found.values()] == [None] * 10


def test_what_is_missing() -> None:
    for changes, name, text, remedy in (
        ({"torch": None}, "PyTorch", "missing", "pip install torch"),
        ({"compiler": None, "code_path": None}, "Compiler", "none", "apt install g++"),
        ({"compiler": None, "code_path": None}, "Kernels", "need a C++ compiler", "build-kernels"),
        ({"compiler": None}, "Compiler", "none", None),  # the kernels are there already
        ({"code_path": None}, "Kernels", "not compiled yet", "lightwell build-kernels"),
        ({"code_path": None, "has_avx2": False}, "Kernels", "no AVX2", None),
        ({"code_path": None, "kernel_problem": "bad"}, "Kernels", "bad", "mend this, then: lightwell build-kernels"),
        ({"gpus": [H100], "triton_problem": "no gcc: install it"}, "GPU", "H100 (80 GB)", "no gcc: install it"),
        ({"gpus": [H100]}, "Result", "on H100", None),
        ({}, "Memory", "8.0 GB free: weights of up to about 4.0 GB", None),
        ({}, "Result", "`lightwell run` would run smollm2-135m on the processor, kernels: avx2", None),
    ):
        finding = findings(**changes)[name]
        assert text in finding.text
        assert (finding.remedy is None) == (remedy is None)
        assert (remedy or "") in (finding.remedy or "")


@pytest.mark.parametrize(("cuda", "remedy"), [(None, "build for CUDA"), ("12.8", "nvidia-smi")])
def test_a_gpu_that_torch_does_not_see(no_gpu: Path, cuda: str | None, remedy: str) -> None:
    no_gpu.touch()
    assert remedy in (findings(cuda=cuda)["GPU"].remedy or "")


def test_a_model_that_cannot_be_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LIGHTWELL_CACHE", str(tmp_path / "new" / "cache"))
    assert not findings()["Model"].is_fatal
    assert "will be downloaded" in findings()["Model"].text
    for folder, problem in (
        ("/proc/none", ": set LIGHTWELL_CACHE"),
        ("/dev/null", "/dev/null is no folder: set LIGHTWELL_CACHE"),
    ):
        monkeypatch.setenv("LIGHTWELL_CACHE", folder)
        found = findings()
        assert found["Model"].is_fatal
        assert problem in (found["Model"].remedy or "")
        assert found["Result"].is_fatal


def findings_with(variable: str, value: str, **changes: object) -> dict[str, Finding]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(f"LIGHTWELL_{variable}", value)
        return findings(**changes)


def test_settings_with_which_no_server_starts() -> None:
    for variable, value, name, text in (
        ("PORT", "tcp://1.2.3.4:80", "Settings", "LIGHTWELL_PORT: expected an integer"),
        ("CONFIG", "/nope.yaml", "Settings", "/nope.yaml: cannot be read"),
        ("DEVICE", "cuda:1", "Settings", "the device is cuda:1, but PyTorch can use no GPU"),
        ("MODEL", "/nope.gguf", "Model", "model '/nope.gguf' is neither"),
        ("MODEL", __file__, "Model", "not a GGUF file"),
    ):
        found = findings_with(variable, value)
        assert [finding for finding in found.values() if finding.is_fatal] == [found[name], found["Result"]]
        assert text in found[name].text


def test_a_gpu_without_triton() -> None:
    for variable, value in (("DEVICE", "auto"), ("DEVICE", "cuda:0"), ("DEVICE", "cpu"), ("ALLOW_SLOW_KERNELS", "1")):
        found = findings_with(variable, value, gpus=[H100], triton_problem="no gcc: install it")
        fatal = [finding.name for finding in found.values() if finding.is_fatal]
        starts = value in ("cpu", "1")
        assert fatal == ([] if starts else ["Settings", "Result"]), value
        assert starts or "allow_slow_kernels" in (found["Settings"].remedy or "")


def test_settings_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their values are in what would run; a key is not shown."""
    monkeypatch.setenv("LIGHTWELL_MODEL", "org/name")
    monkeypatch.setenv("LIGHTWELL_API_KEY", "canary")
    monkeypatch.setenv("LIGHTWELL_DEVICE", "cpu")
    found = findings(gpus=[H100])
    assert "LIGHTWELL_API_KEY, " in found["Settings"].text
    assert found["Result"].text.startswith("`lightwell run` would run org/name on the processor")
    assert "canary" not in str(found)


def test_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv("LIGHTWELL_PORT", str(port := listener.getsockname()[1]))
        monkeypatch.setattr(doctor, "is_model_server", lambda url: False)
        assert findings()["Port"].text == f"another program has {port}"
        monkeypatch.setattr(doctor, "is_model_server", lambda url: True)
        assert f"answers at http://127.0.0.1:{port}" in findings()["Port"].text
    assert findings()["Port"].text == f"{port} is free"
    monkeypatch.setenv("LIGHTWELL_PORT", "0")
    assert findings()["Port"].text == "any that is free"


def test_json_and_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LIGHTWELL_CACHE", "/proc/none")
    assert main(["doctor", "--json"]) == 1
    names = [finding["name"] for finding in json.loads(capsys.readouterr().out)]
    assert " ".join(names) == "Python PyTorch Processor GPU Compiler Kernels Memory Settings Model Port Result"
