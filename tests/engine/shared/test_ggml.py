"""The table of GGML types, compared with that of the `gguf` package."""

import gguf

from engine.shared.ggml import GGML_TYPES, GGML_TYPES_BY_NAME


def test_sizes() -> None:
    expected = {int(kind): (int(kind), kind.name, *size) for kind, size in gguf.GGML_QUANT_SIZES.items()}
    common = GGML_TYPES.keys() & expected.keys()
    assert len(common) > 25
    assert {key: tuple(GGML_TYPES[key])[:4] for key in common} == {key: expected[key] for key in common}
    assert len(GGML_TYPES_BY_NAME) == len(GGML_TYPES)
