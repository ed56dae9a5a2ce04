"""The code paths of the kernels, and those that this processor has."""

import contextlib
import ctypes
from dataclasses import dataclass
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")

# Numbers of x86-64 Linux: the system call by which a process asks for AMX's tile registers, which it may be refused.
SYS_ARCH_PRCTL = 158
ARCH_REQ_XCOMP_PERM = 0x1023
XFEATURE_XTILEDATA = 18


@dataclass(frozen=True)
class CodePath:
    """A set of instructions for which the kernels are compiled."""

    cpu_flags: frozenset[str]  # that the processor must have, as /proc/cpuinfo names them
    compiler_flags: tuple[str, ...]
    uses_tiles: bool = False


_AVX2 = CodePath(frozenset({"avx2", "fma", "f16c", "bmi1", "bmi2"}), ("-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2"))
_AVX512 = CodePath(
    _AVX2.cpu_flags | {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"},
    (*_AVX2.compiler_flags, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"),
)
_AVX512_BF16 = CodePath(_AVX512.cpu_flags | {"avx512_bf16"}, (*_AVX512.compiler_flags, "-mavx512bf16"))
_AMX = CodePath(
    _AVX512_BF16.cpu_flags | {"amx_tile", "amx_bf16"},
    (*_AVX512_BF16.compiler_flags, "-DLIGHTWELL_TILES"),  # the instructions are in assembly and need no flag
    uses_tiles=True,
)

CODE_PATHS = {"amx": _AMX, "avx512_bf16": _AVX512_BF16, "avx512": _AVX512, "avx2": _AVX2}  # best first


def available_code_paths() -> list[str]:
    """Return the code paths that this process may use, best first. None are left without AVX2."""
    flags = cpu_flags()
    return [
        name
        for name, code_path in CODE_PATHS.items()
        if code_path.cpu_flags <= flags and (not code_path.uses_tiles or _may_use_tiles())
    ]


def best_code_path() -> str:
    """Return the best code path for this process. Raises ValueError if there is none."""
    if available := available_code_paths():
        return available[0]
    raise ValueError("this processor has no AVX2")


def cpu_flags() -> set[str]:
    """Return the features of the processor that the system lets programs use."""
    with contextlib.suppress(OSError), CPU_INFO.open(encoding="utf-8", errors="replace") as file:
        for line in file:  # all cores have the same
            if line.startswith("flags"):
                return set(line.partition(":")[2].split())
    return set()


def _may_use_tiles() -> bool:
    system_call = ctypes.CDLL(None).syscall
    numbers = (SYS_ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
    return bool(system_call(*map(ctypes.c_long, numbers)) == 0)
