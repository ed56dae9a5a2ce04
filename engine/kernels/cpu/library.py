"""The compiled library: its functions, and the team of threads that runs them."""

from __future__ import annotations

import ctypes
import weakref
from itertools import zip_longest
from pathlib import Path

from engine.kernels.cpu.c_structs import STRUCTS_H
from engine.kernels.cpu.processor import available_code_paths


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
