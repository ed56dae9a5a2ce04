"""LoRA adapters in PEFT's format and in GGUF files: compared with what PEFT computes, and what of them is refused."""

import json
import os
import struct
from dataclasses import fields
from pathlib import Path
from typing import Any

import gguf
import msgspec
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch.nn import Linear
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

from engine.config import load_model_config
from engine.parts.lora import formats
from engine.parts.lora.checkpoint import RegularFile, module_shapes
from engine.parts.lora.formats import read_lora_scales
from engine.parts.lora.slots import load_lora
from tests.support.gguf_files import interleave, write_gguf
from tests.support.lora_files import (
    CONFIG,
    FIELDS,
    MODULES,
    PEFT_WARNINGS,
    PROJECTIONS,
    SETTINGS,
    A,
    B,
    Tensors,
    new_model,
    refusal_of,
    save_adapter,
    small_adapter,
    write_folder,
)
from tests.support.model_configs import llama_config

pytestmark = PEFT_WARNINGS


PATTERNS = [
    "q_proj",
    "self_attn.k_proj",
    "proj",
    "model.layers.1.mlp.up_proj",
    "^model.layers.0.self_attn.v_proj",
    "^layers.0.self_attn.v_proj",
    r"layers\.1\.mlp\.up_proj",
    "v_pro",
]


# Patterns are in alphabetical order: PEFT sorts them when it saves, and the first match counts when it loads.
LORAS: list[dict[str, Any]] = [
    {"r": 1, "lora_alpha": 0.5, "target_modules": ["q_proj"]},
    {"r": 40, "lora_alpha": 3, "use_rslora": True, "target_modules": ["up_proj", "v_proj"], "layers_to_transform": 1},
    {
        "target_modules": PROJECTIONS,
        "rank_pattern": {"k_proj": 3, "q_proj": 2},
        "alpha_pattern": {"q_proj": 5, "self_attn.q_proj": 4},
    },
    {
        "target_modules": PROJECTIONS,
        "rank_pattern": {"down_proj": 5, "v_proj": 7},
        "use_rslora": True,
        "layers_to_transform": [0],
    },
    # An adapter of all modules shows which ones a pattern matches, and which not.
    *({"r": 2, "target_modules": PROJECTIONS, "alpha_pattern": {pattern: 99}} for pattern in PATTERNS),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_peft_adds(tmp_path: Path, dtype: torch.dtype) -> None:
    for number, settings in enumerate(LORAS):
        model = save_adapter(new_model(), tmp_path / str(number), LoraConfig(**settings), dtype)
        checkpoint, modules = load_lora(tmp_path / str(number), CONFIG), dict[str, Any](model.named_modules())
        layers = {name: module for name, module in modules.items() if isinstance(module, LoraLayer)}
        assert {f"base_model.model.{name}" for name in checkpoint.modules} == layers.keys()
        for name, matrices in checkpoint.modules.items():
            assert matrices.a.dtype == matrices.b.dtype == torch.float32
            expected = modules[f"base_model.model.{name}"].get_delta_weight("default").detach()
            torch.testing.assert_close(matrices.b @ matrices.a, expected, rtol=1e-4, atol=1e-4)
        assert checkpoint.rank == max(layer.r["default"] for layer in layers.values())


@pytest.mark.parametrize(
    ("part", "other"),
    [
        (".weight", ".default.weight"),
        ("model.model.layers", "model.model.language_model.layers"),  # in a multimodal model
        ("model.model.layers", "model.language_model.model.layers"),
    ],
)
def test_other_names(part: str, other: str, tmp_path: Path) -> None:
    renamed = {name.replace(part, other): tensor for name, tensor in small_adapter().items()}
    plain = load_lora(write_folder(tmp_path / "plain"), CONFIG)
    assert load_lora(write_folder(tmp_path / "renamed", renamed), CONFIG).fingerprint == plain.fingerprint
    both = write_folder(tmp_path / "both", small_adapter() | renamed)
    with pytest.raises(ValueError, match=r"lora_A\..*weight: is stored twice, also as base_model\."):
        load_lora(both, CONFIG)


# Adapters that are not plain LoRA: settings of PEFT, the error they cause, and the error that the tensors alone cause.
OTHER_METHODS: list[tuple[dict[str, Any], str, str | None]] = [
    ({"use_dora": True}, "use_dora: DoRA adapters", "lora_magnitude_vector: DoRA adapters"),
    ({"lora_bias": True}, "lora_bias: biases of LoRA matrices", r"lora_B\.bias: biases are not"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save: modules", r"lm_head\.weight: adapters of the output layer"),
    ({"trainable_token_indices": [1, 2]}, "trainable_token_indices: trained embeddings", "embed_tokens.*: trained emb"),
    ({"target_modules": ["embed_tokens"]}, "embed_tokens.*: (LoRA matrices of|trained) embeddings", None),
    ({"target_modules": ["lm_head"]}, r"lm_head\..*: adapters of the output layer", None),
    ({"layer_replication": [(0, 2), (0, 2)]}, "layer_replication: adapters that repeat", "there is no layer [23]: "),
    ({"init_lora_weights": "pissa"}, "init_lora_weights: 'pissa' changes the model's own weights", None),
    ({"alora_invocation_tokens": [1]}, r"alora_invocation_tokens: activated LoRA \(aLoRA\)", None),
    ({"kasa_config": {}}, "kasa_config: KaSA", "lora_diag.*: is neither lora_A nor lora_B"),
]


@pytest.mark.parametrize(("settings", "message", "tensor_message"), OTHER_METHODS)
def test_other_methods(settings: dict[str, Any], message: str, tensor_message: str | None, tmp_path: Path) -> None:
    lora = LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **settings})
    save_adapter(new_model(), tmp_path, lora)
    with pytest.raises(ValueError, match=message):
        load_lora(tmp_path, CONFIG)
    if tensor_message is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(SETTINGS))
        with pytest.raises(ValueError, match=rf"adapter_model\.safetensors: base_model\..*{tensor_message}"):
            load_lora(tmp_path, CONFIG)


def plus(name: str, tensor: torch.Tensor | None = None) -> Tensors:
    """Return the small adapter with an additional tensor."""
    return small_adapter() | {name: torch.ones(2, 2) if tensor is None else tensor}


LAYER_0 = "base_model.model.model.layers.0"
SHAPES = {"qkv_proj.lora_A": (2, 32), "qkv_proj.lora_B": (192, 2), "q_proj.lora_A": (2, 32), "q_proj.lora_B": (96, 2)}
TWICE = {f"{LAYER_0}.self_attn.{name}.weight": torch.ones(shape) for name, shape in SHAPES.items()}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "holds no LoRA matrices"),
        ({A: small_adapter()[A]}, f"{A}: has no lora_B beside it"),
        ({B: small_adapter()[B]}, f"{B}: has no lora_A beside it"),
        (small_adapter() | {A: torch.ones(3, 32)}, f"{B}: has rank 2, but its lora_A has rank 3"),
        (small_adapter() | {A: torch.ones(2, 31)}, rf"{A}: has shape \(2, 31\), but the model needs \(r, 32\)"),
        (small_adapter() | {B: torch.ones(64, 2)}, rf"{B}: has shape \(64, 2\), but the model needs \(48, r\)"),
        (small_adapter() | {B: torch.ones(48, 2, 1)}, rf"{B}: has shape \(48, 2, 1\), but the model needs"),
        (small_adapter(rank=0), r"has shape \(0, 32\), but|has shape \(48, 0\), but"),
        (small_adapter() | {A: torch.ones(2, 32, dtype=torch.int8)}, f"{A}: type I8 is not supported"),
        (small_adapter() | {A: torch.full((2, 32), torch.nan)}, f"{A}: holds numbers that are infinite or not a"),
        (small_adapter() | {B: torch.full((48, 2), 3e38)}, rf"{B}: becomes infinite when scaled by 2\.0"),
        (plus(f"{LAYER_0}.self_attn.qkv_proj.lora_B.weight"), r"qkv_proj.*has shape .*the model needs \(192, r\)"),
        (plus(f"{LAYER_0}.self_attn.q_proj.base_layer.weight"), "base_layer.weight: is neither lora_A nor lora_B"),
        (plus(A.replace("layers.1", "layers.2")), r"layers\.2\..*: there is no layer 2: the model has 2"),
        (plus(A.replace("layers.1", "layers.01")), r"layers\.01\..*: only adapters of"),
        (TWICE, r"qkv_proj\.lora_B\.weight: adapts model\.layers\.0\.self_attn\.q_proj, as another matrix does"),
        (plus(f"{LAYER_0}.self_attn.q_proj.bias"), r"q_proj\.bias: biases are not supported"),
    ],
)
def test_tensors_that_are_refused(tensors: Tensors, message: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path, tensors)
    with pytest.raises(ValueError, match=rf"adapter_model\.safetensors: .*{message}|safetensors: {message}"):
        load_lora(folder, CONFIG)


@pytest.mark.checklist("B10")
def test_files_that_are_missing_or_pickled(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    (folder / "training_args.bin").write_bytes(b"")  # which are not read
    load_lora(folder, CONFIG)
    (folder / "training_args.bin").unlink()
    for missing in ("adapter_model.safetensors", "adapter_config.json"):
        (folder / missing).unlink()
        with pytest.raises(ValueError, match=rf"{tmp_path.name}: no {missing} in this folder"):
            load_lora(folder, CONFIG)
    write_folder(tmp_path)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"the weights are pickle files \(adapter_model\.bin\)"):
        load_lora(folder, CONFIG)


@pytest.mark.parametrize(
    "changes",
    [
        {"r": ...},
        {"r": None, "rank_pattern": None, "alpha_pattern": None, "use_rslora": None, "bias": "none"},
        {"r": 7, "rank_pattern": {"k_proj": 2}},
        {"lora_alpha": 4.0, "use_dora": False, "modules_to_save": [], "layer_replication": None, "arrow_config": None},
        {"lora_alpha": 1, "alpha_pattern": {"q_proj": 9, "layers.1.self_attn.k_proj": 4, "k_proj": 7}},
        {"init_lora_weights": "gaussian", "loftq_config": {}, "corda_config": {"a": 1}, "lora_dropout": 0.5},
        {"init_lora_weights": "EVA"},
        {"megatron_config": {"a": 1}, "exclude_modules": ["x"], "eva_config": {}, "velora_config": {}, "unknown": [1]},
    ],
)
def test_settings_that_change_nothing(changes: dict[str, Any], tmp_path: Path) -> None:
    plain = load_lora(write_folder(tmp_path / "plain"), CONFIG)
    assert load_lora(write_folder(tmp_path / "changed", **changes), CONFIG).fingerprint == plain.fingerprint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type: 'IA3' is not supported, only 'LORA'"),
        ({"lora_alpha": ...}, "lora_alpha: is missing"),
        ({"lora_alpha": 0}, "lora_alpha: must be a number above 0"),
        ({"lora_alpha": "16"}, "lora_alpha: must be a number above 0, .*not '16'"),
        ({"r": 0}, "r: must be an integer from 1"),
        ({"r": 3}, r"r: is 3 for model\.layers\.1\.self_attn\.k_proj, whose matrices have rank 2"),
        ({"rank_pattern": {"k_proj": 5}}, "r: is 5 for model.*, whose matrices have rank 2"),
        ({"rank_pattern": [1]}, r"rank_pattern: must be an object, not \[1\]"),
        ({"alpha_pattern": "x"}, "alpha_pattern: must be an object, not 'x'"),
        ({"alpha_pattern": {"x": None}}, "alpha_pattern: x: must be a number above 0, not None"),
        ({"alpha_pattern": {".*": 1}}, r"alpha_pattern: '\.\*': is not the name of a module; regular expressions"),
        ({"rank_pattern": {"k|q_proj": 1}}, r"rank_pattern: 'k\|q_proj': is not the name of a module"),
        ({"use_rslora": "yes"}, "use_rslora: must be true or false"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out: adapters of transposed weights"),
        ({"use_qalora": True}, "use_qalora: QA-LoRA"),
        ({"bias": "lora_only"}, "bias: 'lora_only' is not supported"),
        ({"target_parameters": ["x"]}, "target_parameters: only adapters of modules"),
        ({"monteclora_config": {"num_samples": 8}}, "monteclora_config: MonteCLoRA"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights: 'loftq' changes the model's own weights"),
    ],
)
def test_settings_that_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path, **changes)
    with pytest.raises(ValueError, match=rf"adapter_config\.json: {message}"):
        load_lora(folder, CONFIG)


@pytest.mark.parametrize("content", ["", "[]", "[" * 5000, b"\xff\xfe{}", "{}"])
def test_malformed_settings(content: str | bytes, tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    (folder / "adapter_config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"adapter_config\.json: (not valid JSON|must hold|peft_type: 'not named')"):
        load_lora(folder, CONFIG)


def test_the_kinds_of_lora_that_are_known() -> None:
    """PEFT marks the settings of variants, of which only VeLoRA is plain LoRA: it differs in training alone."""
    variants = {field.name for field in fields(LoraConfig) if field.metadata.get("is_lora_variant")}
    assert "use_dora" in variants
    assert variants <= formats.REFUSED_KEYS.keys() | {"velora_config"}


# Limits of patterns.

LARGE_MODEL = {f"model.layers.{layer}.self_attn.{part}_proj": 2 for layer in range(140) for part in "qkvo"}
PLAIN = [f"model.layers.{index}.self_attn.z_proj" for index in range(4097)]


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_how_many_patterns(key: str, tmp_path: Path) -> None:
    def refusal(patterns: list[str]) -> str | None:
        changes: dict[str, Any] = {key: dict.fromkeys(patterns, 2)}
        return refusal_of(write_folder(tmp_path, **changes))

    assert refusal(PLAIN[:4096]) is None
    assert f"{key}: has 4097 patterns, more than 4096" in str(refusal(PLAIN))


def test_names_of_all_modules_as_patterns(tmp_path: Path) -> None:
    """EVA writes a pattern for each module; even for a large model they are matched in time."""
    alphas = {name: index + 1 for index, name in enumerate(LARGE_MODEL)}
    ranks = {name: index % 5 + 1 for index, name in enumerate(LARGE_MODEL)}
    folder = write_folder(tmp_path, rank_pattern=ranks, alpha_pattern=alphas)
    scales = read_lora_scales(folder / "adapter_config.json").scales(ranks)
    assert scales == {name: alphas[name] / ranks[name] for name in LARGE_MODEL}


# Limits of the file.


def test_texts_that_no_message_can_hold(tmp_path: Path) -> None:
    """JSON can escape half of a surrogate pair, which UTF-8 cannot encode."""
    for changes in ({"alpha_pattern": {"\ud800": None}}, {"bias": "\ud800"}, {"peft_type": "\ud800"}):
        refusal = refusal_of(write_folder(tmp_path, **changes))
        assert refusal is not None
        assert "ud800" in refusal.encode().decode()


def test_a_long_file_of_settings(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    path = folder / "adapter_config.json"
    text = path.read_text()
    path.write_text(text + " " * (2**20 - len(text)))
    assert refusal_of(folder) is None
    path.write_text(text + " " * (2**20 - len(text) + 1))
    assert "adapter_config.json: has 1048577 bytes, more than the 1048576" in str(refusal_of(folder))


def test_fingerprints_name_the_numbers(tmp_path: Path) -> None:
    tensors = small_adapter()
    one_bit = tensors[A].clone()
    one_bit.view(torch.int32)[1, 3] ^= 1
    other_module = {name.replace("k_proj", "v_proj"): tensor.clone() for name, tensor in tensors.items()}
    variants: list[tuple[Tensors, dict[str, Any]]] = [
        (tensors, {}),
        (tensors, {"lora_alpha": 5}),
        (tensors, {"use_rslora": True}),
        (tensors | {A: one_bit}, {}),
        (other_module, {}),
        (tensors | other_module, {}),
        ({A: tensors[A][:1], B: tensors[B][:, :1].contiguous()}, {"r": 1}),
    ]
    fingerprints = [
        load_lora(write_folder(tmp_path / str(index), variant, **changes), CONFIG).fingerprint
        for index, (variant, changes) in enumerate(variants)
    ]
    assert len(set(fingerprints)) == len(variants)
    assert all(len(bytes.fromhex(fingerprint)) == 32 for fingerprint in fingerprints)
    half = load_lora(write_folder(tmp_path / "half", {A: tensors[A], B: tensors[B] * 2}, lora_alpha=2), CONFIG)
    assert half.fingerprint == fingerprints[0]  # the same matrices once they are scaled
    assert load_lora(tmp_path / "0", CONFIG).fingerprint == fingerprints[0]


@pytest.mark.parametrize("path", ["nowhere", "x" * 300, "a\0b"])
def test_no_such_file(path: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no such adapter \(expected a GGUF file, or a folder with|cannot be read"):
        load_lora(tmp_path / path, CONFIG)


def test_neither_gguf_nor_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: not a GGUF file"):
        load_lora(write_folder(tmp_path) / "adapter_model.safetensors", CONFIG)


@pytest.mark.parametrize("error", [MemoryError, RecursionError, KeyError, OSError])
def test_other_exceptions(error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise error("deep inside")

    folder = write_folder(tmp_path)
    monkeypatch.setattr(RegularFile, "read", fail)
    with pytest.raises(ValueError, match=r"cannot be read \(.*deep inside"):
        load_lora(folder, CONFIG)


# GGUF files.

GGUF_NAMES = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
GGUF_NAMES |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
NUM_HEADS = {"q_proj": FIELDS["num_attention_heads"], "k_proj": FIELDS["num_key_value_heads"]}


def gguf_tensors(tensors: Tensors) -> dict[str, np.ndarray[Any, Any]]:
    """Convert PEFT's tensors as llama.cpp does: with other names, and the rows of q and k in another order."""
    converted = {}
    for name, tensor in tensors.items():
        *_, layer, _, part, half, _ = name.split(".")
        rows = tensor.float().numpy()
        if part in NUM_HEADS and half == "lora_B":
            rows = interleave(rows, NUM_HEADS[part])
        converted[f"blk.{layer}.{GGUF_NAMES[part]}.weight.{half.lower()}"] = rows
    return converted


ADAPTER = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 4.0}


def write_adapter(path: Path, tensors: Any, types: Any = None, arch: str = "llama", **changes: Any) -> Path:
    values = {key: value for key, value in {**ADAPTER, **changes}.items() if value is not ...}
    return write_gguf(path, values, tensors, types, arch)


def test_the_same_adapter_in_gguf(tmp_path: Path) -> None:
    """In GGUF files, the architecture of a Mistral model is called llama."""
    whole_adapter = tmp_path / "whole"
    save_adapter(new_model(), whole_adapter, LoraConfig(r=32, lora_alpha=4, target_modules=PROJECTIONS))
    tensors = gguf_tensors(load_file(whole_adapter / "adapter_model.safetensors"))
    expected = load_lora(whole_adapter, CONFIG)
    mistral = msgspec.structs.replace(CONFIG, architecture="mistral")
    actual = load_lora(write_adapter(tmp_path / "adapter.gguf", tensors), mistral)
    assert sorted(actual.modules) == sorted(MODULES)
    assert actual.fingerprint == expected.fingerprint


@pytest.mark.parametrize(
    ("ggml_type", "rank"),
    [(GGMLQuantizationType.BF16, 3), (GGMLQuantizationType.Q8_0, 32), (GGMLQuantizationType.Q4_1, 64)],
)
def test_packed_gguf(ggml_type: GGMLQuantizationType, rank: int, tmp_path: Path) -> None:
    tensors = gguf_tensors(small_adapter(rank))
    packed = {name: gguf.quantize(tensor, ggml_type) for name, tensor in tensors.items()}
    path = write_adapter(tmp_path / "packed.gguf", packed, dict.fromkeys(packed, ggml_type))
    (matrices,) = load_lora(path, CONFIG).modules.values()
    for half, actual, scale in ((A, matrices.a, 1), (B, matrices.b, np.float32(4 / rank))):
        expected = gguf.dequantize(gguf.quantize(small_adapter(rank)[half].numpy(), ggml_type), ggml_type)
        np.testing.assert_allclose(actual.numpy(), expected * scale, rtol=1e-6)


@pytest.mark.parametrize(("alpha", "scale"), [(6.0, 3.0), (2, 1.0), (0.0, 1.0), (..., 1.0)])
def test_alpha_in_gguf(alpha: Any, scale: float, tmp_path: Path) -> None:
    """Like llama.cpp, take a missing alpha, or 0, as a scale of 1."""
    path = write_adapter(tmp_path / "a.gguf", gguf_tensors(small_adapter()), **{"adapter.lora.alpha": alpha})
    (matrices,) = load_lora(path, CONFIG).modules.values()
    assert torch.equal(matrices.b, small_adapter()[B] * scale)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.type": "model"}, "general.type: must be 'adapter', not 'model'"),
        ({"adapter.type": "cvec"}, "adapter.type: must be 'lora', not 'cvec'"),
        ({"arch": "gemma"}, "general.architecture: is 'gemma', but the model's is 'llama'"),
        ({"adapter.lora.alpha": float("nan")}, "adapter.lora.alpha: must be a number from 0"),
        ({"adapter.alora.invocation_tokens": [1, 2]}, r"adapter.alora.invocation_tokens: activated LoRA \(aLoRA\)"),
    ],
)
def test_gguf_metadata_that_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "odd.gguf", gguf_tensors(small_adapter()), **changes)
    with pytest.raises(ValueError, match=rf"odd\.gguf: {message}"):
        load_lora(path, CONFIG)


GGUF_A, GGUF_B = "blk.1.attn_k.weight.lora_a", "blk.1.attn_k.weight.lora_b"
ONES = np.ones((2, 32), dtype=np.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({GGUF_A: None}, f"{GGUF_B}: has no lora_A beside it"),
        ({GGUF_A: ONES.T.copy()}, rf"{GGUF_A}: has shape \(32, 2\), but the model needs \(r, 32\)"),
        ({GGUF_A: ONES.astype(np.int32)}, f"{GGUF_A}: .*I32"),
        ({"blk.2.attn_q.weight.lora_a": ONES}, "blk.2.attn_q.weight.lora_a: there is no layer 2: the model has 2"),
        ({"output.weight.lora_a": ONES}, "output.weight.lora_a: only adapters of self_attn.q_proj, "),
        ({"blk.0.attn_qkv.weight.lora_a": ONES}, "blk.0.attn_qkv.weight.lora_a: has no lora_B beside it"),
        ({"blk.0.attn_q.weight": ONES}, "blk.0.attn_q.weight: is neither lora_a nor lora_b"),
        ({"blk.0.ssm_in.weight.lora_a": ONES}, "blk.0.ssm_in.weight.lora_a: no supported model has such a tensor"),
    ],
)
def test_gguf_tensors_that_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in (gguf_tensors(small_adapter()) | changes).items() if tensor is not None}
    path = write_adapter(tmp_path / "odd.gguf", tensors)
    with pytest.raises(ValueError, match=rf"odd\.gguf: {message}"):
        load_lora(path, CONFIG)


# Damaged files.


def test_headers_that_lie(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    path = folder / "adapter_model.safetensors"
    for shape, offsets in (([2**40, 32], [0, 2**47]), ([2, 32], [0, 2**40]), ([2**62, 32], [0, 256]), ([-2], [0, 8])):
        header = json.dumps({A: {"dtype": "F32", "shape": shape, "data_offsets": offsets}}).encode()
        for size in (len(header), 2**63, 2**30):
            path.write_bytes(size.to_bytes(8, "little") + header + bytes(256))
            with pytest.raises(ValueError, match=r"adapter_model\.safetensors: not a valid safetensors file"):
                load_lora(folder, CONFIG)


def write(form: str, folder: Path, tensors: Tensors) -> tuple[Path, Path]:
    """Write an adapter. Return its path and that of the file with its tensors."""
    if form == "gguf":
        path = write_adapter(folder / "adapter.gguf", gguf_tensors(tensors))
        return path, path
    rank = next(iter(tensors.values())).shape[0]
    return write_folder(folder / "adapter", tensors, r=rank), folder / "adapter" / "adapter_model.safetensors"


# Too large.


@pytest.mark.parametrize("form", ["safetensors", "gguf"])
def test_the_rank_is_checked_before_the_numbers(form: str, tmp_path: Path) -> None:
    whole = small_adapter(3)
    adapter, path = write(form, tmp_path, whole | {A: whole[A] * torch.nan})
    with pytest.raises(ValueError, match=rf"{path.name}: rank 3 is more than the 2 of --max-lora-rank"):
        load_lora(adapter, CONFIG, 2)
    for max_rank in (3, None):
        with pytest.raises(ValueError, match="holds numbers that are infinite or not a number"):
            load_lora(adapter, CONFIG, max_rank)
    adapter, _ = write(form, tmp_path, whole)
    (matrices,) = load_lora(adapter, CONFIG, 3).modules.values()
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))  # it may change afterwards
    assert torch.equal(matrices.a, whole[A])
    torch.testing.assert_close(matrices.b, whole[B] * (4 / 3))


@pytest.mark.parametrize("max_rank", [200, None])
def test_the_largest_adapter_is_read(max_rank: int | None, tmp_path: Path) -> None:
    """The limit on the file's size is that of an adapter of all modules in float64, and 4 MiB for the header."""
    config = llama_config(**FIELDS | {"hidden_size": 320, "intermediate_size": 400})
    tensors: Tensors = {}
    for name in MODULES:
        rows, columns = module_shapes(config, 0)[name.split(".", 3)[3]]
        rank = max_rank or min(rows, columns)
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.ones(rank, columns, dtype=torch.float64)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.ones(rows, rank, dtype=torch.float64)
    folder = write_folder(tmp_path, tensors, r=None)
    assert (folder / "adapter_model.safetensors").stat().st_size > 2**22
    assert len(load_lora(folder, config, max_rank).modules) == len(MODULES)

    largest = 2**22 + sum(tensor.nbytes for tensor in tensors.values())
    small = {GGUF_A: np.ones((2, 320), dtype=np.float32), GGUF_B: np.ones((48, 2), dtype=np.float32)}
    path = write_adapter(tmp_path / "adapter.gguf", small)
    os.truncate(path, largest)
    load_lora(path, config, max_rank)
    os.truncate(path, largest + 1)
    with pytest.raises(ValueError, match=rf"has {largest + 1} bytes, but adapters of this model at most {largest}"):
        load_lora(path, config, max_rank)


def test_long_headers(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    save_file(small_adapter(), folder / "adapter_model.safetensors", {"text": "x" * 2**22})
    assert "; at most 4194304 are allowed" in str(refusal_of(folder))
    tensors = gguf_tensors(small_adapter())
    path = write_adapter(tmp_path / "a.gguf", tensors, **{"general.description": "x" * 2**22})
    assert "string 0 is longer than the rest: the header may only reach byte 4194304" in str(refusal_of(path))


def test_long_names_make_no_long_messages(tmp_path: Path) -> None:
    name = "blk." + "x" * 10**6
    folder = write_folder(tmp_path, small_adapter() | {name: torch.ones(1)})
    path = write_adapter(tmp_path / "a.gguf", {"blk.short": np.ones(4, dtype=np.float32)})
    short_name, long_name = (struct.pack("<Q", len(text)) + text.encode() for text in ("blk.short", name))
    path.write_bytes(path.read_bytes().replace(short_name, long_name) + bytes(100))
    for adapter in (folder, path):
        refusal = refusal_of(adapter)
        assert refusal is not None
        assert "blk.xxx" in refusal
        assert len(refusal) < 600


# Not regular files.


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "adapter.gguf"])
def test_paths_that_are_not_regular_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do they block if they become pipes between the check and the opening."""
    folder = write_folder(tmp_path)
    path = folder / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    for message in ("no such adapter|in this folder", "is not a regular file"):
        with pytest.raises(ValueError, match=message):
            load_lora(path if name.endswith("gguf") else folder, CONFIG)
        monkeypatch.setattr(Path, "is_dir", lambda self: self == folder)
        monkeypatch.setattr(Path, "is_file", lambda self: self != folder)


@pytest.mark.parametrize("q_lora_rank", [None, 24])
def test_shapes_of_latent_attention(q_lora_rank: int | None, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"kv_lora_rank": 8, "qk_nope_head_dim": 12, "qk_rope_head_dim": 4, "v_head_dim": 10}
    sizes |= {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 4}
    sizes |= {"num_hidden_layers": 1, "first_k_dense_replace": 1, "q_lora_rank": q_lora_rank, "vocab_size": 64}
    values = DeepseekV2Config(**sizes)
    values.save_pretrained(tmp_path)
    layer: Any = DeepseekV2ForCausalLM(values).model.layers[0]
    expected = {
        name: tuple(module.weight.shape) for name, module in layer.named_modules() if isinstance(module, Linear)
    }
    del expected["self_attn.kv_b_proj"]  # becomes a part of others
    assert module_shapes(load_model_config(tmp_path), 0) == expected
