"""`lightwell doctor`: what this machine has, what would run on it, and how to mend what is missing.

The engine's part comes from a process of its own, since this one must not import torch.
"""

import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import msgspec

from engine.shared.machine import Machine
from server.cli.http_client import accepts_connections, is_model_server, local_url
from server.cli.parser import fail
from server.format import format_bytes
from server.model_paths import ModelError, describe_model
from server.part_table import missing_command
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
            mark = "!!" if finding.is_fatal else "--" if finding.remedy else "ok"
            print(f"{mark} {finding.name:<10} {finding.text}")
            if finding.remedy:
                print(f"{'':<14}-> {finding.remedy}")
    return 1 if any(finding.is_fatal for finding in findings) else 0


def examine(machine: Machine) -> list[Finding]:
    """Return the findings in the order of the report. The last says what would run."""
    python = f"{platform.python_version()}, {sys.executable}; Lightwell {version('lightwell')}"
    processor = f"{machine.processor}, {machine.num_cores} cores for this process"
    findings = [Finding(name="Python", text=python), _torch(machine), Finding(name="Processor", text=processor)]
    findings += [_gpu(machine), _compiler(machine), _kernels(machine), _memory(machine)]
    try:
        settings = load_settings(environ=os.environ)
    except SettingsError as error:
        return [*findings, Finding(name="Settings", text=str(error), is_fatal=True), CANNOT_START]
    findings += [_settings(machine, settings), _model(settings.model), _port(settings)]
    is_possible = not any(finding.is_fatal for finding in findings)
    return [*findings, _summary(machine, settings) if is_possible else CANNOT_START]


def _torch(machine: Machine) -> Finding:
    if machine.torch is None:
        return Finding(name="PyTorch", text="missing", remedy="pip install torch", is_fatal=True)
    build = f"for CUDA {machine.cuda}" if machine.cuda else "for CPUs"
    return Finding(name="PyTorch", text=f"{machine.torch}, built {build}")


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
        remedy = None if missing_command("build-kernels") else "lightwell build-kernels does it now"
        return Finding(name="Kernels", text=text, remedy=remedy)
    reason = machine.kernel_problem if machine.compiler else "those for this processor need a C++ compiler"
    text = f"plain PyTorch, several times slower: {reason}"
    command = "" if missing_command("build-kernels") else ", then: lightwell build-kernels"
    return Finding(name="Kernels", text=text, remedy=f"mend this{command}")


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
    try:
        text, problem = describe_model(name)
    except ModelError as error:
        return Finding(name="Model", text=str(error), is_fatal=True)
    return Finding(name="Model", text=text, remedy=problem, is_fatal=problem is not None)


def _port(settings: Settings) -> Finding:
    url = local_url(settings)
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
    command = "serve" if missing_command("run") else "run"
    return Finding(name="Result", text=f"`lightwell {command}` would run {settings.model} on {device}")
