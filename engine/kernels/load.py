"""Choose the kernels of a device, once at start."""

from __future__ import annotations

import logging
import subprocess

import torch

from engine.kernels.interface import KernelOptions, Kernels
from engine.kernels.triton.requirements import missing_requirement

NEEDED_KERNELS = {"int8": "the CPU or GPU kernels", "fp8": "the GPU kernels"}  # for a number format

logger = logging.getLogger("lightwell.engine")


def load_kernels(device: torch.device, options: KernelOptions) -> Kernels:
    """Return the kernels for a device: Triton on a GPU, C++ on a CPU, or plain torch if those cannot run.

    Raises:
        ValueError: plain torch lacks an option, or would run on a GPU without `allow_slow_kernels`.
    """
    kernels = _load_cpu_kernels(options) if device.type == "cpu" else _load_gpu_kernels(device, options)
    if not isinstance(kernels, str):
        return kernels
    if device.type != "cpu" and not options.allow_slow_kernels:
        raise ValueError(f"{kernels}. With --allow-slow-kernels, the much slower plain torch kernels are used instead")
    for flag, value in (("--quantization", options.quantization), ("--kv-cache-dtype", options.kv_cache_dtype)):
        if value in NEEDED_KERNELS:
            raise ValueError(f"{flag} {value} needs {NEEDED_KERNELS[value]}, but {kernels}")
    logger.warning("using the slower plain torch kernels: %s", kernels)
    from engine.kernels.torch.kernels import TorchKernels

    return TorchKernels(options, device)


def _load_gpu_kernels(device: torch.device, options: KernelOptions) -> Kernels | str:
    """Return the Triton kernels, or why they cannot be used."""
    if problem := missing_requirement():
        return problem
    torch.cuda.set_device(device)  # for this thread: kernels run on the current device, wherever their tensors are
    try:
        import triton

        from engine.kernels.triton.kernels import TritonKernels

        triton.runtime.driver.active.get_current_target()  # compiles the C module
    except (ImportError, OSError, RuntimeError, AssertionError, subprocess.SubprocessError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__  # some have several lines, or none
        return f"Triton does not work here: {reason}"
    return TritonKernels(options, device)


def _load_cpu_kernels(options: KernelOptions) -> Kernels | str:
    """Return the C++ kernels, or why they cannot be used."""
    from engine.kernels.cpu.build import build
    from engine.kernels.cpu.compiler_runs import BuildError
    from engine.kernels.cpu.kernels import CpuKernels, why_unsupported
    from engine.kernels.cpu.library import Library
    from engine.kernels.cpu.processor import best_code_path

    if reason := why_unsupported(options):
        return reason
    try:
        code_path = best_code_path()
        library = Library(build(code_path), code_path)
    except (BuildError, ValueError, OSError) as error:
        return str(error)
    return CpuKernels(library, options, torch.get_num_threads())
