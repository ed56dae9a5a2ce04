"""Make a wheel that contains the CPU kernels of all code paths. `make wheel` runs it.

The kernels are compiled by ziglang against an old glibc, so that the wheel can be installed on any Linux with at least
the glibc that its name says, and needs no compiler there.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ["pyproject.toml", "README.md", "LICENSE", "engine", "server"]
PREBUILT = "engine/kernels/cpu/prebuilt"
COMPILER = [sys.executable, "-P", "-m", "ziglang", "c++", "-target", "x86_64-linux-gnu.2.28"]
MAY_NEED = {b"libc.so.6", b"libpthread.so.0"}


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a wheel with compiled kernels.")
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="folder for the wheel")
    dist = parser.parse_args().dist.absolute()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        copy_sources(folder)
        environ = {**os.environ, "CXX": shlex.join(COMPILER)}
        build = [sys.executable, "-P", "-m", "engine.parts.build_kernels.build", "--all", "--in-package"]
        subprocess.run(build, cwd=folder, env=environ | {"PYTHONPATH": str(folder)}, check=True)
        platform = platform_tag((folder / PREBUILT).glob("*.so"))
        wheel = [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--disable-pip-version-check",
            "--no-deps",
            "--wheel-dir",
            str(dist),
        ]
        subprocess.run([*wheel, f"--config-settings=--build-option=--plat-name={platform}", str(folder)], check=True)


def copy_sources(folder: Path) -> None:
    leave_out = shutil.ignore_patterns("__pycache__", "prebuilt")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=leave_out)
        else:
            shutil.copy(ROOT / name, folder)


def platform_tag(libraries: Iterable[Path]) -> str:
    """Return the tag of the oldest glibc that has all that the libraries need (PEP 600).

    Raises:
        ValueError: a library needs more than glibc.
    """
    newest = (2, 5)
    for library in libraries:
        names = set(
            library.read_bytes().split(b"\0")
        )  # versions and names of needed libraries are strings of their own
        needed = {name for name in names if re.fullmatch(rb"lib[\w+-]+\.so[.\d]*", name)}
        if needed - MAY_NEED:
            raise ValueError(f"{library.name} needs {sorted(needed - MAY_NEED)}")
        versions = [match for name in names if (match := re.fullmatch(rb"GLIBC_(\d+)\.(\d+)(\.\d+)?", name))]
        newest = max([newest, *((int(match[1]), int(match[2])) for match in versions)])
    return "manylinux_{}_{}_x86_64".format(*newest)


if __name__ == "__main__":
    main()
