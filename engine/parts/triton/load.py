"""Load the Triton kernels."""

import subprocess

import torch

from engine.kernels.interface import KernelOptions, Kernels
from engine.parts.triton.requirements import missing_requirement


def load(device: torch.device, options: KernelOptions) -> Kernels | str:
    """Return the Triton kernels, or why they cannot be used."""
    if problem := missing_requirement():
        return problem
    torch.cuda.set_device(device)  # for this thread: kernels run on the current device, wherever their tensors are
    try:
        import triton

        from engine.parts.triton.kernels import TritonKernels

        triton.runtime.driver.active.get_current_target()  # compiles the C module
    except (ImportError, OSError, RuntimeError, AssertionError, subprocess.SubprocessError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__  # some have several lines, or none
        return f"Triton does not work here: {reason}"
    return TritonKernels(options, device)
