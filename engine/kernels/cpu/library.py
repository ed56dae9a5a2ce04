"""The compiled library: where it is, its functions, its code paths, and programs that a team of threads runs."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import logging
import weakref
from collections.abc import Sequence
from ctypes import Structure, c_int64
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from engine.kernels.cpu.c_structs import STRUCTS_H, Call
from engine.shared.files import cache_folder, is_sealed

logger = logging.getLogger(__name__)


class LayoutError(RuntimeError):
    """The structs of the library may have other layouts than those that Python fills in."""


class Library:
    """A library compiled for one code path.

    Raises:
        ValueError: this processor lacks the code path.
        LayoutError: the library does not fit engine/kernels/cpu/src/structs.h.
    """

    def __init__(self, path: Path, code_path: str) -> None:
        available = available_code_paths()
        if code_path not in available:
            raise ValueError(f"code path {code_path}: this processor has {', '.join(available) or 'none'}")
        self.code_path = code_path
        self._library = ctypes.CDLL(str(path))
        check_layouts(self._library, STRUCTS_H)
        self._declare()

    def _declare(self) -> None:
        library = self._library
        library.lightwell_function.argtypes = [ctypes.c_char_p]
        library.lightwell_function.restype = ctypes.c_void_p
        library.lightwell_new_team.argtypes = [ctypes.c_int]
        library.lightwell_new_team.restype = ctypes.c_void_p
        library.lightwell_team_size.argtypes = [ctypes.c_void_p]
        library.lightwell_delete_team.argtypes = [ctypes.c_void_p]
        library.lightwell_delete_team.restype = None
        library.lightwell_run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
        library.lightwell_run.restype = None

    def function(self, name: str) -> int:
        """Return the address of a function. Raises KeyError if there is none of that name."""
        address: int | None = self._library.lightwell_function(name.encode())
        if address is None:
            raise KeyError(name)
        return address

    def new_team(self, num_threads: int) -> Team:
        return Team(self._library, num_threads)


class Team:
    """Threads that run the calls of a program together, the calling thread among them."""

    def __init__(self, library: ctypes.CDLL, num_threads: int) -> None:
        self._library = library
        self._handle = library.lightwell_new_team(num_threads)
        self.num_threads: int = library.lightwell_team_size(self._handle)
        self.close = weakref.finalize(self, library.lightwell_delete_team, self._handle)

    def run(self, calls: ctypes.Array[ctypes.Structure], durations: ctypes.Array[ctypes.c_int64] | None = None) -> None:
        """Run the calls in order, and add the nanoseconds that each takes to its entry of `durations`."""
        self._library.lightwell_run(self._handle, calls, len(calls), durations)


def check_layouts(library: ctypes.CDLL, header: str) -> None:
    """Compare the structs.h that a library was compiled from, whose text it contains, with the one here.

    Raises:
        LayoutError: they differ, or the library has none.
    """
    try:
        text = ctypes.c_char.in_dll(library, "lightwell_structs")
    except ValueError:
        raise LayoutError(f"{library._name} is not a library of these kernels") from None
    compiled = ctypes.string_at(ctypes.addressof(text)).decode()
    for there, here in zip_longest(compiled.splitlines(), header.splitlines(), fillvalue=""):
        if there != here:
            raise LayoutError(
                f"{library._name} was compiled from another engine/kernels/cpu/src/structs.h,"
                f" where {there.strip()!r} stands for {here.strip()!r}"
            )


# Code paths.

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


# Libraries. The part `build_kernels` compiles them.

PACKAGE = Path(__file__).parent
# Products and sums are fused only where the source says so, because all code paths and compilers must round alike,
# except in bfloat16 products, for which code paths have different instructions.
COMMON_FLAGS = [
    *("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-exceptions", "-fno-rtti"),
    *("-Wall", "-Wextra", "-Werror=return-type"),
]
LINK_FLAGS = ["-shared", "-pthread", "-Wl,--no-undefined", "-Wl,--as-needed"]


def compiler_flags(code_path: str, extra: Sequence[str] = ()) -> list[str]:
    return [*COMMON_FLAGS, *CODE_PATHS[code_path].compiler_flags, *extra]


def kernels_folder() -> Path:
    """Return the cache folder of libraries."""
    return cache_folder().absolute() / "kernels"


def library_name(code_path: str, extra_flags: Sequence[str] = (), package: Path = PACKAGE) -> str:
    """Return the name of a library: its code path and the hash of all sources and flags, so that others are ignored."""
    files = sorted(path for path in (package / "src").glob("*") if path.suffix in (".cpp", ".h"))
    contents = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    key = hashlib.sha256(
        json.dumps([contents, compiler_flags(code_path, extra_flags), LINK_FLAGS]).encode()
    ).hexdigest()
    return f"{code_path}-{key}.so"


def find_library(code_path: str, extra_flags: Sequence[str] = (), package: Path = PACKAGE) -> Path | None:
    """Return the library of a code path, beside the sources or in the cache folder; None if there is none.

    One that is damaged is not used: loading it could end the process.
    """
    name = library_name(code_path, extra_flags, package)
    for library in (package / "prebuilt" / name, kernels_folder() / name):
        if is_sealed(library):
            return library
        with contextlib.suppress(OSError):  # of a folder that may not be read
            if library.is_file():
                logger.warning("%s is damaged: it is not used", library)
    return None


# Programs.


class Program:
    """Calls in the order in which they run, and in `keep` whatever their parameters point to."""

    def __init__(self, library: Library, team: Team) -> None:
        self.library = library
        self.team = team
        self.names: list[str] = []
        self.parameters: list[Structure] = []
        self.keep: list[Any] = []
        self.durations: ctypes.Array[c_int64] | None = None
        self._calls: ctypes.Array[Structure] | None = None

    def add(self, name: str, parameters: Structure) -> None:
        """Append a call of a function, one of those in the tables of src/functions.h."""
        self.names.append(name)
        self.parameters.append(parameters)
        self._calls = None

    def without(self, prefix: str) -> Program:
        """Return the same program on the same buffers, except for the functions whose name begins with `prefix`."""
        program = Program(self.library, self.team)
        for name, parameters in zip(self.names, self.parameters, strict=True):
            if not name.startswith(prefix):
                program.add(name, parameters)
        program.keep = self.keep
        return program

    def part(self, calls: range) -> Program:
        """Return some of the calls as a program on the same buffers."""
        program = Program(self.library, self.team)
        for index in calls:
            program.add(self.names[index], self.parameters[index])
        program.keep = self.keep
        return program

    def measure(self) -> None:
        """Start to add up in `durations` the nanoseconds that each call takes, from zero."""
        self.durations = (c_int64 * len(self.names))()

    def run(self) -> None:
        if self._calls is None:
            calls = [
                Call(self.library.function(name), ctypes.addressof(parameters))
                for name, parameters in zip(self.names, self.parameters, strict=True)
            ]
            self._calls = (Call * len(calls))(*calls)
        self.team.run(self._calls, self.durations)
