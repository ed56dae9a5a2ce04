"""The compiled library: its functions, and the team of threads that runs them."""

import ctypes
import weakref
from pathlib import Path

CODE_PATHS = ("amx", "avx512_bf16", "avx512", "avx2")  # best first


class Call(ctypes.Structure):
    """`Call` of team.h: a function and its parameters."""

    _fields_ = [("function", ctypes.c_void_p), ("parameters", ctypes.c_void_p)]


class Library:
    """One code path of a compiled library.

    Raises:
        ValueError: this processor lacks the code path, or has none of them.
    """

    def __init__(self, path: Path, code_path: str | None = None) -> None:
        self._library = ctypes.CDLL(str(path))
        self._declare()
        best: str = self._library.lightwell_best_isa().decode()
        available = CODE_PATHS[CODE_PATHS.index(best) :] if best else ()
        if not available:
            raise ValueError("this processor has no AVX2")
        self.code_path = code_path or best
        if self.code_path not in available:
            raise ValueError(f"code path {self.code_path}: this processor has {', '.join(available)}")

    def _declare(self) -> None:
        library = self._library
        library.lightwell_best_isa.restype = ctypes.c_char_p
        library.lightwell_function.argtypes = [ctypes.c_char_p, ctypes.c_char_p]
        library.lightwell_function.restype = ctypes.c_void_p
        library.lightwell_new_team.argtypes = [ctypes.c_int]
        library.lightwell_new_team.restype = ctypes.c_void_p
        library.lightwell_team_size.argtypes = [ctypes.c_void_p]
        library.lightwell_delete_team.argtypes = [ctypes.c_void_p]
        library.lightwell_delete_team.restype = None
        library.lightwell_run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
        library.lightwell_run.restype = None

    def function(self, name: str) -> int:
        """The address of a function of the code path; KeyError if there is none of that name."""
        address: int | None = self._library.lightwell_function(self.code_path.encode(), name.encode())
        if address is None:
            raise KeyError(name)
        return address

    def new_team(self, num_threads: int) -> "Team":
        return Team(self._library, num_threads)


class Team:
    """Threads that run the calls of a program together, the calling thread among them."""

    def __init__(self, library: ctypes.CDLL, num_threads: int) -> None:
        self._library = library
        self._handle = library.lightwell_new_team(num_threads)
        self.num_threads: int = library.lightwell_team_size(self._handle)
        self.close = weakref.finalize(self, library.lightwell_delete_team, self._handle)

    def run(self, calls: "ctypes.Array[Call]", durations: "ctypes.Array[ctypes.c_int64] | None" = None) -> None:
        """Run the calls in order. `durations`, one for each, grow by the nanoseconds that they take."""
        self._library.lightwell_run(self._handle, calls, len(calls), durations)
