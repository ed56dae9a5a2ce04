"""The compiled library: its functions, and the team of threads that runs them."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterable
from pathlib import Path

from engine.kernels.cpu.c_structs import STRUCTURES, Call
from engine.kernels.cpu.processor import available_code_paths


class Field(ctypes.Structure):
    """An entry of the library's table of struct fields, which ends with an entry of null names."""

    _fields_ = [
        ("struct_name", ctypes.c_char_p),
        ("struct_size", ctypes.c_int64),
        ("name", ctypes.c_char_p),
        ("offset", ctypes.c_int64),
    ]


class LayoutError(RuntimeError):
    """A struct of the library has a different layout from its ctypes counterpart."""


class Library:
    """A library compiled for one code path.

    Raises:
        ValueError: this processor lacks the code path.
        LayoutError: the library does not fit engine/kernels/cpu/c_structs.py.
    """

    def __init__(self, path: Path, code_path: str) -> None:
        available = available_code_paths()
        if code_path not in available:
            raise ValueError(f"code path {code_path}: this processor has {', '.join(available) or 'none'}")
        self.code_path = code_path
        self._library = ctypes.CDLL(str(path))
        self._declare()
        check_layouts(self._library.lightwell_fields(), STRUCTURES)

    def _declare(self) -> None:
        library = self._library
        library.lightwell_fields.restype = ctypes.POINTER(Field)
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

    def run(self, calls: ctypes.Array[Call], durations: ctypes.Array[ctypes.c_int64] | None = None) -> None:
        """Run the calls in order, and add the nanoseconds that each takes to its entry of `durations`."""
        self._library.lightwell_run(self._handle, calls, len(calls), durations)


def check_layouts(fields: ctypes._Pointer[Field], structures: Iterable[type[ctypes.Structure]]) -> None:
    """Compare ctypes structures with the library's table of fields.

    Raises:
        LayoutError: the size of a structure, or a field's name or offset, differs from the library's.
    """
    compiled: dict[str, tuple[int, dict[str, int]]] = {}
    index = 0
    while (field := fields[index]).struct_name is not None:
        _, offsets = compiled.setdefault(field.struct_name.decode(), (field.struct_size, {}))
        offsets[field.name.decode()] = field.offset
        index += 1
    for kind in structures:
        size, offsets = compiled.get(kind.__name__, (0, {}))
        declared = {field[0]: getattr(kind, field[0]).offset for field in kind._fields_}
        if (size, offsets) != (ctypes.sizeof(kind), declared):
            differing = sorted(name for name, _ in offsets.items() ^ declared.items())
            raise LayoutError(
                f"{kind.__name__} has {ctypes.sizeof(kind)} bytes in engine/kernels/cpu/c_structs.py and {size} in the"
                f" compiled library; fields that differ: {', '.join(dict.fromkeys(differing)) or 'none'}"
            )
