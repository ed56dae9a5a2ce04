"""A program: calls of C++ functions, recorded once and run once a step."""

from __future__ import annotations

import ctypes
from ctypes import Structure, c_int64
from typing import Any

from engine.kernels.cpu.c_structs import Call
from engine.kernels.cpu.library import Library, Team


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
