"""The table of GGML types, compared with that of the `gguf` package."""

import gguf
import pytest

from engine.shared.ggml import GGML_TYPES, GGML_TYPES_BY_NAME

# Fields of the structs in ggml-common.h of llama.cpp, in their order: name -> offset and size in bytes.
FIELDS = {
    "Q4_0": {"d": (0, 2), "qs": (2, 16)},
    "Q4_1": {"d": (0, 2), "m": (2, 2), "qs": (4, 16)},
    "Q5_0": {"d": (0, 2), "qh": (2, 4), "qs": (6, 16)},
    "Q5_1": {"d": (0, 2), "m": (2, 2), "qh": (4, 4), "qs": (8, 16)},
    "Q8_0": {"d": (0, 2), "qs": (2, 32)},
    "Q2_K": {"scales": (0, 16), "qs": (16, 64), "d": (80, 2), "dmin": (82, 2)},
    "Q3_K": {"hmask": (0, 32), "qs": (32, 64), "scales": (96, 12), "d": (108, 2)},
    "Q4_K": {"d": (0, 2), "dmin": (2, 2), "scales": (4, 12), "qs": (16, 128)},
    "Q5_K": {"d": (0, 2), "dmin": (2, 2), "scales": (4, 12), "qh": (16, 32), "qs": (48, 128)},
    "Q6_K": {"ql": (0, 128), "qh": (128, 64), "scales": (192, 16), "d": (208, 2)},
    "IQ4_NL": {"d": (0, 2), "qs": (2, 16)},
    "IQ4_XS": {"d": (0, 2), "scales_h": (2, 2), "scales_l": (4, 4), "qs": (8, 128)},
    "MXFP4": {"e": (0, 1), "qs": (1, 16)},
}


def test_sizes() -> None:
    expected = {int(kind): (int(kind), kind.name, *size) for kind, size in gguf.GGML_QUANT_SIZES.items()}
    common = GGML_TYPES.keys() & expected.keys()
    assert len(common) > 25
    assert {key: tuple(GGML_TYPES[key])[:4] for key in common} == {key: expected[key] for key in common}
    assert len(GGML_TYPES_BY_NAME) == len(GGML_TYPES)


@pytest.mark.parametrize("name", FIELDS)
def test_fields(name: str) -> None:
    fields = GGML_TYPES_BY_NAME[name].fields
    assert {field: (where.start, where.stop - where.start) for field, where in fields.items()} == FIELDS[name]
