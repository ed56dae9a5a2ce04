"""The compiled library: its functions, and the check that Python and C++ agree on the layout of structs."""

from ctypes import Structure, c_double, c_int32, c_int64, c_void_p

import pytest

from engine.kernels.cpu import library as library_module
from engine.kernels.cpu.build import build
from engine.kernels.cpu.c_structs import STRUCTURES, GatherParameters, PrepareParameters
from engine.kernels.cpu.library import LayoutError, Library
from tests.support.kernel_choice import code_paths, load_library

pytestmark = pytest.mark.skipif(not code_paths(), reason="no kernels in C++ for this processor")


def test_an_unknown_code_path() -> None:
    with pytest.raises(ValueError, match=r"code path sse: this processor has .*avx2"):
        Library(build(code_paths()[0]), "sse")


def test_functions() -> None:
    library = load_library(code_paths()[0])
    assert library.function("gather")
    with pytest.raises(KeyError, match="scatter"):
        library.function("scatter")


def test_every_structure_is_checked() -> None:
    names = {kind.__name__ for kind in STRUCTURES}
    assert len(STRUCTURES) == 31
    assert {"Call", "RowCounts", "AttentionPlan", "SampledRow", "LinearParameters"} <= names


def structure(name: str, fields: list[tuple[str, type]]) -> type[Structure]:
    return type(name, (Structure,), {"_fields_": fields})


FIELDS: list[tuple[str, type]] = [(field[0], field[1]) for field in GatherParameters._fields_]
MISMATCHES = {
    "another name": ([("rows", c_void_p), *FIELDS[1:]], "fields that differ: num_rows, rows"),
    "another order": ([FIELDS[1], FIELDS[0], *FIELDS[2:]], "fields that differ: num_rows, row_index"),
    "a smaller field": ([*FIELDS[:3], ("table_stride", c_int32), ("size", c_int32), *FIELDS[5:]], "differ: .*size"),
    "a missing field": (FIELDS[:-1], "48 bytes .* and 56 in the compiled library; .*: output_stride"),
    "one field more": ([*FIELDS, ("scale", c_double)], "64 bytes .* and 56 in the compiled library; .*: scale"),
}


@pytest.mark.parametrize(("fields", "message"), MISMATCHES.values(), ids=MISMATCHES)
def test_a_struct_with_another_layout(
    fields: list[tuple[str, type]], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = structure("GatherParameters", fields)
    monkeypatch.setattr(library_module, "STRUCTURES", [PrepareParameters, changed])
    with pytest.raises(LayoutError, match=f"GatherParameters has .*{message}"):
        Library(build(code_paths()[0]), code_paths()[0])


def test_a_struct_that_the_library_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    scatter = structure("ScatterParameters", [("rows", c_int64)])
    monkeypatch.setattr(library_module, "STRUCTURES", [scatter])
    with pytest.raises(LayoutError, match=r"ScatterParameters has 8 bytes .* and 0 in the compiled library; .*: rows"):
        Library(build(code_paths()[0]), code_paths()[0])
