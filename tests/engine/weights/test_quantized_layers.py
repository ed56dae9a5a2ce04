"""Layers of quantised checkpoints: which stay packed, and the lines that say what is not as in the file."""

import logging
from pathlib import Path

import pytest
import torch

from engine.config import load_model_config
from engine.weights import GroupQuantized, load_weights
from tests.support.quantized_files import FP8, SCHEMES, Scheme, Tensors, float8_scheme, save_quantized_model

KEPT = frozenset({"int4", "int8"})


def load(folder: Path, keep_packed: frozenset[str] = KEPT) -> dict[str, object]:
    return dict(load_weights(folder, load_model_config(folder), torch.bfloat16, keep_packed=keep_packed))


def test_packed_weights_need_no_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_quantized_model(tmp_path, SCHEMES["awq 4 bits of 128"], seed=1)
    with caplog.at_level(logging.INFO):
        weights = load(tmp_path)
    assert sum(isinstance(weight, GroupQuantized) for weight in weights.values()) == 14
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("name", "keep_packed", "line"),
    [
        (
            "gptq 4 bits, act-order",
            KEPT,
            "14 of 14 quantised matrices are unpacked to bfloat16 (act-order or a short last group): 4.8 bits a weight "
            "in the files become 16 in memory, 0 MiB become 0 MiB, unless",
        ),
        ("awq 4 bits of 128", frozenset(), "(int4 is not kept packed): 4.2 bits a weight in the files"),
        (
            "float8 of blocks",
            KEPT,
            "(float8 is not kept packed): 8.0 bits a weight in the files",
        ),
    ],
)
def test_unpacked_weights(
    name: str, keep_packed: frozenset[str], line: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_quantized_model(tmp_path, SCHEMES[name], seed=1)
    weights = load(tmp_path, keep_packed)
    assert {type(weight) for weight in weights.values()} == {torch.Tensor}
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert line in warnings[0]


def test_scales_of_activations(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    static = float8_scheme(FP8 | {"activation_scheme": "static", "weight_block_size": None}, "tensor", "weight_scale")

    def layer(*arguments: object) -> tuple[Tensors, object]:
        tensors, numbers = static.layer(*arguments)  # type: ignore[arg-type]
        return tensors | {"k_scale": torch.ones(1)}, numbers

    save_quantized_model(tmp_path, Scheme(static.config, layer), seed=1)  # type: ignore[arg-type]
    with caplog.at_level(logging.INFO):
        load(tmp_path, frozenset({"float8"}))
    assert caplog.messages == [
        "activations are not quantised, though the checkpoint was made for it; 28 scales of activations and of the KV "
        "cache are not used"
    ]


def test_an_error_names_file_and_layer(tmp_path: Path) -> None:
    broken = SCHEMES["awq 4 bits of 128"]

    def layer(*arguments: object) -> tuple[Tensors, object]:
        tensors, numbers = broken.layer(*arguments)  # type: ignore[arg-type]
        return {name: tensor for name, tensor in tensors.items() if name != "qzeros"}, numbers

    save_quantized_model(tmp_path, Scheme(broken.config, layer), seed=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"model\.safetensors: model\.layers\.0\..*proj: qzeros is missing"):
        load(tmp_path)


def test_types_of_other_tensors(tmp_path: Path) -> None:
    """Codes in tensors that the format does not have are no numbers."""
    scheme = SCHEMES["awq 4 bits of 128"]

    def layer(*arguments: object) -> tuple[Tensors, object]:
        tensors, numbers = scheme.layer(*arguments)  # type: ignore[arg-type]
        return tensors | {"something": torch.ones(3, dtype=torch.int32)}, numbers

    save_quantized_model(tmp_path, Scheme(scheme.config, layer), seed=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"proj\.something: type int32 is not supported"):
        load(tmp_path)
