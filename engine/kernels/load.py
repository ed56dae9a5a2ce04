"""Choose the kernels of a device, once at start."""

from __future__ import annotations

import logging

import torch

from engine.kernels.interface import KernelOptions, Kernels
from engine.shared.parts import MissingPartError, engine_part

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
    try:
        load = engine_part("triton", "load").load
    except MissingPartError as error:
        return str(error)
    kernels: Kernels | str = load(device, options)
    return kernels


def _load_cpu_kernels(options: KernelOptions) -> Kernels | str:
    """Return the C++ kernels, or why they cannot be used."""
    from engine.kernels.cpu.kernels import CpuKernels, why_unsupported
    from engine.kernels.cpu.library import Library, best_code_path, find_library

    if reason := why_unsupported(options):
        return reason
    try:
        code_path = best_code_path()
        path = find_library(code_path) or engine_part("build_kernels", "build").build(code_path)
        library = Library(path, code_path)
    except (ValueError, OSError) as error:  # there is none, and none can be compiled
        return str(error)
    return CpuKernels(library, options, torch.get_num_threads())
