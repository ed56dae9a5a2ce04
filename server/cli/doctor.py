"""`lightwell doctor`: what this machine has, what would run on it, and how to mend what is missing.

The engine's part comes from a process of its own, since this one must not import torch.
"""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import msgspec

from engine.shared.machine import Machine
from engine.shared.paths import cache_folder
from server.cli.discovery import accepts_connections, is_model_server
from server.cli.parser import fail
from server.format import format_bytes, home_relative
from server.model_paths import ModelError, describe_model
from server.package_aliases import PACKAGE_ALIASES, alias_path
from server.settings.load import load_settings
from server.settings.setting import ENV_PREFIX, SettingsError
from server.settings.table import Settings

COMMAND = (sys.executable, "-P", "-m", "engine.doctor")
NVIDIA_DEVICE = Path("/dev/nvidiactl")


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the report."""

    name: str
    text: str
    remedy: str | None = None  # what mends it; None: nothing needs to be mended
    is_fatal: bool = False  # the server cannot start


CANNOT_START = Finding(name="Result", text="the server cannot start: see above", is_fatal=True)


def doctor(*, as_json: bool) -> int:
    """Print the report. Return 1 if the server cannot start, else 0."""
    done = subprocess.run(COMMAND, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return fail(f"the engine cannot be examined: {done.stderr.strip().rpartition(chr(10))[2]}")
    findings = examine(msgspec.json.decode(done.stdout, type=Machine))
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(findings)).decode())
    else:
        for finding in findings:
            print(f"{_mark(finding)} {finding.name:<10} {finding.text}")
            if finding.remedy:
                print(f"{'':<14}-> {finding.remedy}")
    return 1 if any(finding.is_fatal for finding in findings) else 0


def _mark(finding: Finding) -> str:
    return "!!" if finding.is_fatal else "--" if finding.remedy else "ok"


def examine(machine: Machine) -> list[Finding]:
    """Return the findings in the order of the report. The last says what would run."""
    findings = [_python(), _torch(machine), _processor(machine), _gpu(machine), _compiler(machine), _kernels(machine)]
    findings.append(_memory(machine))
    try:
        settings = load_settings(environ=os.environ)
    except SettingsError as error:
        return [*findings, Finding(name="Settings", text=str(error), is_fatal=True), CANNOT_START]
    findings += [_settings(machine, settings), _model(settings.model), _port(settings)]
    is_possible = not any(finding.is_fatal for finding in findings)
    return [*findings, _summary(machine, settings) if is_possible else CANNOT_START]


def _python() -> Finding:
    text = f"{platform.python_version()}, {sys.executable}; Lightwell {version('lightwell')}"
    return Finding(name="Python", text=text)


def _torch(machine: Machine) -> Finding:
    if machine.torch is None:
        return Finding(name="PyTorch", text="missing", remedy="pip install torch", is_fatal=True)
    build = f"for CUDA {machine.cuda}" if machine.cuda else "for CPUs"
    return Finding(name="PyTorch", text=f"{machine.torch}, built {build}")


def _processor(machine: Machine) -> Finding:
    return Finding(name="Processor", text=f"{machine.processor}, {machine.num_cores} cores for this process")


def _gpu(machine: Machine) -> Finding:
    if machine.gpus:
        names = ", ".join(f"{gpu.name} ({format_bytes(gpu.num_bytes)})" for gpu in machine.gpus)
        return Finding(name="GPU", text=names, remedy=machine.triton_problem)
    if not NVIDIA_DEVICE.exists():
        return Finding(name="GPU", text="none: models run on the processor")
    if machine.cuda:
        return Finding(name="GPU", text="there is one, but CUDA cannot use it", remedy="look at what nvidia-smi says")
    remedy = "install PyTorch's build for CUDA (https://pytorch.org)"
    return Finding(name="GPU", text="there is one, but this PyTorch is built for CPUs", remedy=remedy)


def _compiler(machine: Machine) -> Finding:
    if machine.compiler is not None:
        return Finding(name="Compiler", text=machine.compiler)
    needs_one = machine.code_path is None and machine.has_avx2
    is_chosen = "CXX" in os.environ
    install = "unset CXX, or name one that exists" if is_chosen else "install one, for example: apt install g++"
    text = machine.compiler_problem or "none"
    return Finding(name="Compiler", text=text, remedy=install if needs_one else None)


def _kernels(machine: Machine) -> Finding:
    if machine.code_path is not None:
        return Finding(name="Kernels", text=f"compiled, code path {machine.code_path}")
    if not machine.has_avx2:
        return Finding(name="Kernels", text="plain PyTorch: this processor has no AVX2")
    if machine.compiler is not None and machine.kernel_problem is None:
        text = "not compiled yet: the first start does it, once"
        return Finding(name="Kernels", text=text, remedy="lightwell build-kernels does it now")
    reason = machine.kernel_problem if machine.compiler else "those for this processor need a C++ compiler"
    text = f"plain PyTorch, several times slower: {reason}"
    return Finding(name="Kernels", text=text, remedy="mend this, then: lightwell build-kernels")


def _memory(machine: Machine) -> Finding:
    free = machine.available_memory
    text = f"{format_bytes(free)} free: weights of up to about {format_bytes(free // 2)} and a KV cache beside them"
    return Finding(name="Memory", text=text)


def _settings(machine: Machine, settings: Settings) -> Finding:
    """Report on the environment, which may name a config file. Values are not shown, since some are secret."""
    if settings.device.startswith("cuda") and not machine.gpus:
        text = f"the device is {settings.device}, but PyTorch can use no GPU"
        return Finding(name="Settings", text=text, remedy="set device to auto or cpu", is_fatal=True)
    if _uses_gpu(machine, settings) and machine.triton_problem and not settings.allow_slow_kernels:
        remedy = "mend this, or set allow_slow_kernels to use the much slower plain PyTorch kernels"
        return Finding(name="Settings", text="the GPU needs Triton, see above", remedy=remedy, is_fatal=True)
    names = sorted(name for name in os.environ if name.startswith(ENV_PREFIX))
    return Finding(name="Settings", text=", ".join(names) or "none in the environment")


def _model(name: str) -> Finding:
    """Report on the model, and for an alias on the folder for models and kernels."""
    if name in PACKAGE_ALIASES:
        return _alias(name)
    try:
        return Finding(name="Model", text=describe_model(name))
    except ModelError as error:
        return Finding(name="Model", text=str(error), is_fatal=True)


def _alias(name: str) -> Finding:
    alias, folder = PACKAGE_ALIASES[name], cache_folder()
    disk = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(disk).free
    place = f"{home_relative(str(folder))} ({format_bytes(free)} free)"
    if alias_path(name, alias).is_file():
        return Finding(name="Model", text=f"{name} is in {place}")
    text = f"{name} will be downloaded to {place}: {format_bytes(alias.num_bytes)}"
    problems = list(_download_problems(disk, free - alias.num_bytes))
    return Finding(name="Model", text=text, remedy=problems[0] if problems else None, is_fatal=bool(problems))


def _download_problems(disk: Path, bytes_left: int) -> Iterator[str]:
    if not disk.is_dir():
        yield f"{disk} is no folder: set LIGHTWELL_CACHE to one"
    elif not os.access(disk, os.W_OK | os.X_OK):
        yield f"{disk} cannot be written: set LIGHTWELL_CACHE to a folder that can"
    if bytes_left < 0:
        yield "the disk is full: set LIGHTWELL_CACHE to a folder on another"
    if importlib.util.find_spec("pip") is None:
        yield f"pip downloads it, and is missing: {sys.executable} -m ensurepip"


def _port(settings: Settings) -> Finding:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"http://{host}:{settings.port}"
    if settings.port == 0:
        return Finding(name="Port", text="any that is free")
    if not accepts_connections(url):
        return Finding(name="Port", text=f"{settings.port} is free")
    if is_model_server(url):
        text = f"a server answers at {url}: `lightwell chat` talks to it"
        return Finding(name="Port", text=text, remedy="for a second one: lightwell serve --port 0")
    return Finding(name="Port", text=f"another program has {settings.port}", remedy="lightwell serve --port 0")


def _uses_gpu(machine: Machine, settings: Settings) -> bool:
    return bool(machine.gpus) and settings.device != "cpu"


def _summary(machine: Machine, settings: Settings) -> Finding:
    kernels = machine.code_path or ("compiled at the first start" if machine.compiler and machine.has_avx2 else "torch")
    device = machine.gpus[0].name if _uses_gpu(machine, settings) else f"the processor, kernels: {kernels}"
    return Finding(name="Result", text=f"`lightwell run` would run {settings.model} on {device}")
