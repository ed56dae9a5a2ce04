"""Install the project into fresh environments and start the server: each Python, with and without compiler and pip.

    python -m tests.install.try_install python3.11 python3.13 [--wheel dist/lightwell-....whl] [--pip-args "..."]

It prints a row for each case: how long the installation takes and how large it is, how long the first start takes from
an empty cache of kernels until a request is answered, and which kernels run. Not a test, because it takes minutes and
gigabytes. `LIGHTWELL_CACHE` names a folder that has the default model already, so that it is not downloaded each time.
"""

import argparse
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

from engine.shared.files import cache_folder
from tests.bench.serve import MODEL_NAME, running_server
from tests.support.paths import ROOT

MODEL = "smollm2-135m"
START_SECONDS = 300.0
BODY = {"model": MODEL_NAME, "prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}


def main() -> None:
    parser = argparse.ArgumentParser(description="Try fresh installations.")
    parser.add_argument("pythons", nargs="+")
    parser.add_argument("--wheel", type=Path, help="install this instead of the sources")
    parser.add_argument("--pip-args", default="", help="arguments of pip, such as those that choose an index")
    arguments = parser.parse_args()
    print("| Python | compiler | pip | installed in | size | first answer after | kernels |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for python, has_compiler, has_pip in itertools.product(arguments.pythons, (True, False), (True, False)):
        with tempfile.TemporaryDirectory() as folder:
            what = arguments.wheel.absolute() if arguments.wheel else sources(Path(folder))
            pip_args = [*shlex.split(arguments.pip_args), str(what)]
            row = case(python, has_compiler, has_pip, Path(folder), pip_args)
        print("| " + " | ".join(row) + " |", flush=True)


def sources(folder: Path) -> Path:
    """Return a copy of the files that git tracks."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        (folder / "sources" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "sources" / name)
    return folder / "sources"


def case(python: str, has_compiler: bool, has_pip: bool, folder: Path, pip_args: list[str]) -> list[str]:
    environment = folder / "venv"
    began = time.monotonic()
    # uv makes environments without pip and installs from outside; so does pip --python.
    subprocess.run([python, "-m", "venv", *([] if has_pip else ["--without-pip"]), str(environment)], check=True)
    pip = [str(environment / "bin/pip")] if has_pip else [sys.executable, "-m", "pip", "--python", str(environment)]
    install = [*pip, "install", "--quiet", "--disable-pip-version-check", *pip_args]
    subprocess.run(install, check=True, env=environ(has_compiler, folder))
    installed = time.monotonic() - began
    size = sum(path.lstat().st_size for path in environment.rglob("*"))
    seconds, kernels = first_answer(environment, environ(has_compiler, folder), folder)
    yes_no = ["yes" if value else "no" for value in (has_compiler, has_pip)]
    return [python, *yes_no, f"{installed:.0f} s", f"{size / 1e6:,.0f} MB", f"{seconds:.1f} s", kernels]


def environ(has_compiler: bool, folder: Path) -> dict[str, str]:
    """Return variables with an empty cache of kernels and, without a compiler, a PATH that has no programs."""
    cache = folder / "cache"
    if not cache.exists():
        shutil.copytree(cache_folder() / MODEL, cache / MODEL)
    variables = {**os.environ, "LIGHTWELL_CACHE": str(cache)}
    for name in ("CXX", "PYTHONPATH", "VIRTUAL_ENV"):
        variables.pop(name, None)
    return variables if has_compiler else variables | {"PATH": str(folder / "empty")}


def first_answer(environment: Path, variables: dict[str, str], folder: Path) -> tuple[float, str]:
    """Return the seconds from the start of the server to an answer, and the kernels that its log names."""
    with (folder / "log").open("wb") as log:
        options = {"env": variables, "cwd": folder, "stdout": log, "stderr": log}
        began = time.monotonic()
        with running_server(["--log-level=info"], environment / "bin/lightwell", **options) as (url, _):
            httpx.post(f"{url}/v1/completions", json=BODY, timeout=START_SECONDS).raise_for_status()
            seconds = time.monotonic() - began
    kernels = re.search(r"threads, kernels: ([\w ]+)", (folder / "log").read_text(encoding="utf-8"))
    return seconds, kernels[1] if kernels else "?"


if __name__ == "__main__":
    main()
