"""Scripts of `make install` and `make wheel`, and the commands that make would run."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.make_wheel import platform_tag
from deploy.torch_build import main
from engine.kernels.cpu.library import CODE_PATHS
from tests.support.paths import ROOT

has_make = pytest.mark.skipif(not shutil.which("make"), reason="needs make")


def dry_run(*arguments: str) -> subprocess.CompletedProcess[str]:
    # Without the variables of a make that runs the tests.
    environ = {name: value for name, value in os.environ.items() if name not in ("TORCH", "MAKEFLAGS", "MAKELEVEL")}
    command = ["make", "--dry-run", "install", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)


@pytest.mark.long
@has_make
def test_a_build_of_torch_is_installed_before_the_project() -> None:
    kernels, first, second, third, *_ = dry_run("TORCH=cpu").stdout.splitlines()
    assert "engine.parts.build_kernels.build" in kernels
    assert kernels.endswith("&")
    requirement = first[first.index('"') :]
    echoed = subprocess.run(["sh", "-c", f"echo {requirement}"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.fullmatch(r"torch>=[\d.]+\n", echoed.stdout)
    assert "--index-url https://download.pytorch.org/whl/cpu" in first
    assert second.endswith("--editable .")
    assert third.endswith("deploy/torch_build.py cpu")


@has_make
def test_without_a_choice_and_with_a_wrong_one() -> None:
    assert "download.pytorch.org" not in dry_run().stdout + dry_run("TORCH=cuda").stdout
    wrong = dry_run("TORCH=rocm")
    assert wrong.returncode != 0
    assert "TORCH is rocm, but must be cpu or cuda" in wrong.stderr


@pytest.mark.parametrize(
    ("version", "line", "build"),
    [("2.13.0+cpu", "cuda: Optional[str] = None", "cpu"), ("2.13.0", "cuda: Optional[str] = '13.0'", "cuda")],
)
def test_the_build_of_torch(
    version: str,
    line: str,
    build: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake_package(tmp_path, "torch", version, "torch/version.py", f"__version__ = {version!r}\n{line}\nhip = None\n")
    fake_package(tmp_path, "nvidia-cublas", "13.1", "nvidia/lib.so", "x" * 2_000_000)
    fake_package(tmp_path, "numpy", "2.0", "numpy/lib.so", "x" * 5_000_000)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert main([build]) == main([]) == 0
    assert f"torch {version}, for {build}, 2 MB" in capsys.readouterr().out
    other = "cuda" if build == "cpu" else "cpu"
    assert main([other]) == 1
    assert f"TORCH={other} was asked for" in capsys.readouterr().err


def fake_package(folder: Path, name: str, version: str, file: str, content: str) -> None:
    information = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (information / "RECORD").write_text(f"{file},,\n")
    (folder / file).parent.mkdir()
    (folder / file).write_text(content)


def test_the_tag_names_the_newest_glibc_that_a_library_needs(tmp_path: Path) -> None:
    (tmp_path / "a.so").write_bytes(b"\x7fELF\0libc.so.6\0GLIBC_2.2.5\0GLIBC_2.17\0memcpy\0GLIBC_2.9\0")
    (tmp_path / "b.so").write_bytes(b"\x7fELF\0libc.so.6\0libpthread.so.0\0GLIBC_2.14\0")
    assert platform_tag(tmp_path.glob("*.so")) == "manylinux_2_17_x86_64"
    (tmp_path / "b.so").write_bytes(b"\x7fELF\0libc.so.6\0libstdc++.so.6\0GLIBCXX_3.4\0")
    with pytest.raises(ValueError, match=r"b\.so needs .*libstdc\+\+"):
        platform_tag(tmp_path.glob("*.so"))


@pytest.mark.long
@pytest.mark.skipif(not importlib.util.find_spec("ziglang"), reason="needs ziglang")
def test_a_wheel_needs_no_compiler(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "deploy/make_wheel.py", "--dist", tmp_path], cwd=ROOT, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert re.fullmatch(r"lightwell-[\d.]+-py3-none-manylinux_2_\d+_x86_64\.whl", wheel.name)
    installed = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(installed), str(wheel)]
    subprocess.run(pip, check=True)
    command = [sys.executable, "-P", "-m", "engine.parts.build_kernels.build", "--all"]
    environ = {"PATH": str(tmp_path), "PYTHONPATH": str(installed), "LIGHTWELL_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=True)
    assert re.findall(rf"{installed}/engine/kernels/cpu/prebuilt/(\w+)-", done.stdout) == list(CODE_PATHS)
    assert not (tmp_path / "cache").exists()
