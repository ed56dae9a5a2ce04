"""The compiled library, and the structs that Python and C++ share."""

import ctypes
import subprocess
from pathlib import Path

import pytest

from engine.kernels.cpu.c_structs import HEADER, STRUCTS, STRUCTS_H, read_structs
from engine.kernels.cpu.library import LayoutError, Library
from engine.parts.build_kernels.build import build, find_compiler
from tests.support.kernel_choice import code_paths

pytestmark = pytest.mark.skipif(not code_paths(), reason="no kernels in C++ for this processor")


def test_libraries_that_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    best = code_paths()[0]
    with pytest.raises(ValueError, match=r"code path sse: this processor has .*avx2"):
        Library(build(best), "sse")
    with pytest.raises(LayoutError, match=r"libc.so.6 is not a library of these kernels"):
        Library(Path("libc.so.6"), best)
    monkeypatch.setattr("engine.kernels.cpu.library.STRUCTS_H", STRUCTS_H.replace("* row_index;", "* rows;"))
    with pytest.raises(LayoutError, match=r"another engine/.*structs.h, where '.* row_index;' stands for '.* rows;'"):
        Library(build(best), best)


def test_the_compiler_lays_structs_out_in_the_same_way() -> None:
    source = '#include <stddef.h>\n#include "structs.h"\nusing lightwell::Call;\n'
    for name, struct in STRUCTS.items():
        assert not hasattr(struct(), "__dict__")  # so a field that it lacks cannot be set
        source += f"static_assert(sizeof({name}) == {ctypes.sizeof(struct)});\n"
        for field, *_ in struct._fields_:
            source += f"static_assert(offsetof({name}, {field}) == {getattr(struct, field).offset});\n"
    command = [*find_compiler(), "-std=c++20", "-fsyntax-only", "-x", "c++", "-I", str(HEADER.parent), "-"]
    subprocess.run(command, input=source, text=True, check=True)


@pytest.mark.parametrize("line", ["int32_t x;", "int64_t x, y;", "float const x;", "int x{};", ""])
def test_fields_that_python_cannot_fill_in(line: str) -> None:
    with pytest.raises(ValueError, match=f"Rows: {line}$"):
        read_structs(f"struct Rows {{\n    {line}\n}};\n")
