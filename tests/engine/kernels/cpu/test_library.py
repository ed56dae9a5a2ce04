"""The compiled library: its functions, and the check that Python and C++ agree on the layout of structs."""

from ctypes import Structure, c_double, c_int32, c_int64, c_void_p

import pytest

from engine.kernels.cpu import library as library_module
from engine.kernels.cpu.build import build
from engine.kernels.cpu.c_structs import STRUCTURES, GatherParameters, PrepareParameters
from engine.kernels.cpu.library import LayoutError, Library
from tests.support.kernel_choice import code_paths

pytestmark = pytest.mark.skipif(not code_paths(), reason="no kernels in C++ for this processor")


def test_an_unknown_code_path() -> None:
    with pytest.raises(ValueError, match=r"code path sse: this processor has .*avx2"):
        Library(build(code_paths()[0]), "sse")


FIELDS: list[tuple[str, type]] = [(field[0], field[1]) for field in GatherParameters._fields_]
MISMATCHES = {
    "another name": ([("rows", c_void_p), *FIELDS[1:]], "fields that differ: num_rows, rows"),
    "another order": ([FIELDS[1], FIELDS[0], *FIELDS[2:]], "fields that differ: num_rows, row_index"),
    "a smaller field": ([*FIELDS[:3], ("table_stride", c_int32), ("size", c_int32), *FIELDS[5:]], "differ: .*size"),
    "a missing field": (FIELDS[:-1], "48 bytes .* and 56 in the compiled library; .*: output_stride"),
    "one field more": ([*FIELDS, ("scale", c_double)], "64 bytes .* and 56 in the compiled library; .*: scale"),
    "a struct more": ([("rows", c_int64)], "8 bytes .* and 0 in the compiled library; .*: rows"),
}


@pytest.mark.parametrize("case", MISMATCHES)
def test_a_struct_with_another_layout(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All structs are checked."""
    assert len(STRUCTURES) == 31
    fields, message = MISMATCHES[case]
    name = "ScatterParameters" if case == "a struct more" else "GatherParameters"
    changed = type(name, (Structure,), {"_fields_": fields})
    monkeypatch.setattr(library_module, "STRUCTURES", [PrepareParameters, changed])
    with pytest.raises(LayoutError, match=f"{name} has .*{message}"):
        Library(build(code_paths()[0]), code_paths()[0])
