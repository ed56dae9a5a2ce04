"""LoRA adapters in PEFT's format, compared with what PEFT computes from them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from engine.lora.checkpoint import LoraCheckpoint
from engine.lora.reader import load_lora
from tests.support.examples import num_examples
from tests.support.lora_files import (
    ATTENTION,
    CONFIG,
    MLP,
    PEFT_WARNINGS,
    SETTINGS,
    A,
    B,
    Tensors,
    new_model,
    save_adapter,
    small_adapter,
    write_folder,
)

pytestmark = PEFT_WARNINGS


def deltas(model: Any) -> Tensors:
    """Return the update that PEFT adds to the weights of each module."""
    modules: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for name, module in modules.items()
    }


def assert_adds(checkpoint: LoraCheckpoint, expected: Tensors) -> None:
    assert set(checkpoint.modules) == set(expected)
    for name, matrices in checkpoint.modules.items():
        assert matrices.a.dtype == matrices.b.dtype == torch.float32
        torch.testing.assert_close(matrices.b @ matrices.a, expected[name], rtol=1e-4, atol=1e-4)


PATTERNS = [
    "q_proj",
    "self_attn.k_proj",
    "proj",
    "model.layers.1.mlp.up_proj",
    "^model.layers.0.self_attn.v_proj",
    "^layers.0.self_attn.v_proj",
    ".*",
    r".*\.1\..*",
    r"layers\.[0-9]+\.mlp\.(gate|up)_proj",
    r"layers.\d.self_attn.(?:k|o)_proj$",
    "q_proj|down_proj",
    "v_pro",
]


def patterns(maximum: int) -> st.SearchStrategy[dict[str, int]]:
    """Patterns in alphabetical order: PEFT sorts them when it saves, and the first match counts when it loads."""
    numbers = st.dictionaries(st.sampled_from(PATTERNS), st.integers(1, maximum), max_size=3)
    return numbers.map(lambda values: dict(sorted(values.items())))


LORA_SETTINGS = st.fixed_dictionaries(
    {
        "r": st.integers(1, 40),
        "lora_alpha": st.one_of(st.integers(1, 64), st.floats(0.01, 64)),
        "use_rslora": st.booleans(),
        "target_modules": st.lists(st.sampled_from(ATTENTION + MLP), min_size=1, unique=True),
        "rank_pattern": patterns(9),
        "alpha_pattern": patterns(99),
        "layers_to_transform": st.sampled_from([None, 1, [0], [0, 1]]),
    }
)


@settings(
    max_examples=num_examples(30, 450),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(LORA_SETTINGS, st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]))
@example(
    {
        "lora_alpha": 16,
        "use_rslora": True,
        "target_modules": [*ATTENTION, *MLP],
        "rank_pattern": {".*": 3, "q_proj": 2},
        "alpha_pattern": {"q_proj": 5, "self_attn.q_proj": 4},
    },
    torch.bfloat16,
)
def test_what_peft_adds(tmp_path: Path, settings: dict[str, Any], dtype: torch.dtype) -> None:
    model = save_adapter(tmp_path, LoraConfig(**settings), dtype)
    checkpoint = load_lora(tmp_path, CONFIG)
    assert_adds(checkpoint, deltas(model))
    assert checkpoint.rank == max(module.r["default"] for module in model.modules() if isinstance(module, LoraLayer))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns(pattern: str, tmp_path: Path) -> None:
    """An adapter of all modules shows which ones a pattern matches, and which not."""
    lora = LoraConfig(r=2, target_modules=[*ATTENTION, *MLP], alpha_pattern={pattern: 99})
    model = save_adapter(tmp_path, lora)
    assert_adds(load_lora(tmp_path, CONFIG), deltas(model))


@pytest.mark.parametrize("init", [False, "gaussian", "orthogonal", "eva", "mica"])
def test_ways_to_begin_that_leave_the_model_as_it_is(init: Any, tmp_path: Path) -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=init, eva_config={} if init == "eva" else None)  # type: ignore[arg-type]
    model = save_adapter(tmp_path, lora)
    assert_adds(load_lora(tmp_path, CONFIG), deltas(model))


@pytest.mark.parametrize("use_rslora", [False, True])
def test_pissa_that_peft_converted_to_lora(use_rslora: bool, tmp_path: Path) -> None:
    """The converted adapter is the difference to the initial weights, and has twice the rank."""
    base = new_model()
    plain = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    lora = LoraConfig(r=4, target_modules=["up_proj"], init_lora_weights="pissa", use_rslora=use_rslora)
    model: Any = get_peft_model(base, lora)
    model.save_pretrained(tmp_path / "initial")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1
    model.save_pretrained(tmp_path / "raw")
    merged = model.get_base_model().model.layers[1].mlp.up_proj
    expected = merged.get_base_layer().weight + merged.get_delta_weight("default")
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    with pytest.raises(ValueError, match="init_lora_weights: 'pissa' changes the model's own weights"):
        load_lora(tmp_path / "raw", CONFIG)
    checkpoint = load_lora(tmp_path / "converted", CONFIG)
    matrices = checkpoint.modules["model.layers.1.mlp.up_proj"]
    assert checkpoint.rank == 8
    actual = plain["model.layers.1.mlp.up_proj.weight"] + matrices.b @ matrices.a
    torch.testing.assert_close(actual, expected.detach(), rtol=1e-4, atol=1e-4)


def test_numbers_of_a_small_adapter(tmp_path: Path) -> None:
    checkpoint = load_lora(write_folder(tmp_path), CONFIG)
    ((name, matrices),) = checkpoint.modules.items()
    assert name == "model.layers.1.self_attn.k_proj"
    assert torch.equal(matrices.a, small_adapter()[A])
    assert torch.equal(matrices.b, small_adapter()[B] * 2)
    assert checkpoint.rank == 2


def test_names_with_that_of_the_adapter(tmp_path: Path) -> None:
    renamed = {name.replace(".weight", ".default.weight"): tensor for name, tensor in small_adapter().items()}
    plain = load_lora(write_folder(tmp_path / "plain"), CONFIG)
    assert load_lora(write_folder(tmp_path / "renamed", renamed), CONFIG).fingerprint == plain.fingerprint
    both = write_folder(tmp_path / "both", small_adapter() | renamed)
    with pytest.raises(ValueError, match=r"lora_A\..*weight: is stored twice, also as base_model\."):
        load_lora(both, CONFIG)


@pytest.mark.parametrize("text_model", ["model.language_model.layers", "language_model.model.layers"])
def test_names_in_a_multimodal_model(text_model: str, tmp_path: Path) -> None:
    renamed = {
        name.replace("model.model.layers", f"model.{text_model}"): some for name, some in small_adapter().items()
    }
    assert not renamed.keys() & small_adapter().keys()
    plain = load_lora(write_folder(tmp_path / "plain"), CONFIG)
    assert load_lora(write_folder(tmp_path / "renamed", renamed), CONFIG).fingerprint == plain.fingerprint


def test_the_file_may_change_afterwards(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    matrices = load_lora(folder, CONFIG).modules["model.layers.1.self_attn.k_proj"]
    size = (folder / "adapter_model.safetensors").stat().st_size
    with (folder / "adapter_model.safetensors").open("r+b") as file:
        file.write(bytes(size))
    assert torch.equal(matrices.a, small_adapter()[A])
    assert torch.equal(matrices.b, small_adapter()[B] * 2)


# Adapters that are not plain LoRA: settings of PEFT, the error they cause, and the error that the tensors alone cause.
OTHER_METHODS: list[tuple[dict[str, Any], str, str | None]] = [
    ({"use_dora": True}, "use_dora: DoRA adapters", "lora_magnitude_vector: DoRA adapters"),
    ({"lora_bias": True}, "lora_bias: biases of LoRA matrices", r"lora_B\.bias: biases are not"),
    ({"bias": "all"}, "bias: 'all' is not supported", None),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save: modules", r"lm_head\.weight: adapters of the output layer"),
    ({"modules_to_save": ["norm"]}, "modules_to_save: modules", r"norm\.weight: is neither lora_A nor lora_B"),
    ({"modules_to_save": ["embed_tokens"]}, "modules_to_save: modules", "embed_tokens.weight: trained embeddings"),
    ({"trainable_token_indices": [1, 2]}, "trainable_token_indices: trained embeddings", "embed_tokens.*: trained emb"),
    ({"target_modules": ["embed_tokens"]}, "embed_tokens.*: (LoRA matrices of|trained) embeddings", None),
    ({"target_modules": ["lm_head"]}, r"lm_head\..*: adapters of the output layer", None),
    ({"layer_replication": [(0, 2), (0, 2)]}, "layer_replication: adapters that repeat", "there is no layer [23]: "),
    ({"init_lora_weights": "pissa"}, "init_lora_weights: 'pissa' changes the model's own weights", None),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: 'pissa_niter_4' changes", None),
    ({"init_lora_weights": "olora"}, "init_lora_weights: 'olora' changes", None),
    ({"alora_invocation_tokens": [1]}, r"alora_invocation_tokens: activated LoRA \(aLoRA\)", None),
    ({"kasa_config": {}}, "kasa_config: KaSA", "lora_diag.*: is neither lora_A nor lora_B"),
]


@pytest.mark.parametrize(("settings", "message", "tensor_message"), OTHER_METHODS)
def test_other_methods(settings: dict[str, Any], message: str, tensor_message: str | None, tmp_path: Path) -> None:
    lora = LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **settings})
    save_adapter(tmp_path, lora)
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


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "holds no LoRA matrices"),
        ({A: small_adapter()[A]}, f"{A}: has no lora_B beside it"),
        ({B: small_adapter()[B]}, f"{B}: has no lora_A beside it"),
        (small_adapter() | {A: torch.ones(3, 32)}, f"{B}: has rank 2, but its lora_A has rank 3"),
        (small_adapter() | {A: torch.ones(2, 31)}, rf"{A}: has shape \(2, 31\), but the model needs \(r, 32\)"),
        (small_adapter() | {B: torch.ones(64, 2)}, rf"{B}: has shape \(64, 2\), but the model needs \(48, r\)"),
        (small_adapter() | {A: torch.ones(32)}, rf"{A}: has shape \(32,\), but the model needs \(r, 32\)"),
        (small_adapter() | {A: torch.ones(1, 2, 32)}, rf"{A}: has shape \(1, 2, 32\), but the model needs"),
        (small_adapter() | {B: torch.ones(48, 2, 1)}, rf"{B}: has shape \(48, 2, 1\), but the model needs"),
        (small_adapter() | {A: torch.tensor(1.0)}, rf"{A}: has shape \(\), but the model needs"),
        (small_adapter(rank=0), r"has shape \(0, 32\), but|has shape \(48, 0\), but"),
        (small_adapter() | {A: torch.ones(2, 32, dtype=torch.int8)}, f"{A}: type I8 is not supported"),
        (small_adapter() | {A: torch.full((2, 32), torch.nan)}, f"{A}: holds numbers that are infinite or not a"),
        (small_adapter() | {B: torch.full((48, 2), -torch.inf)}, f"{B}: holds numbers that are infinite or not a"),
        (
            small_adapter() | {B: torch.full((48, 2), 3e38)},
            rf"{B}: becomes infinite when scaled by 2\.0",
        ),
        (small_adapter() | {A: torch.full((2, 32), 1e300, dtype=torch.float64)}, f"{A}: holds numbers that are"),
        (
            plus(f"{LAYER_0}.self_attn.qkv_proj.lora_B.weight"),
            r"qkv_proj.*has shape \(.*\), but the model needs \(192, r\)",
        ),
        (plus(f"{LAYER_0}.mlp.q_proj.lora_A.weight"), r"mlp\.q_proj.*only adapters of self_attn\.q_proj"),
        (
            plus(f"{LAYER_0}.self_attn.q_proj.base_layer.weight"),
            "base_layer.weight: is neither lora_A nor lora_B",
        ),
        (plus(f"{LAYER_0}.self_attn.q_proj.lora_C.weight"), "lora_C.weight: is neither lora_A nor lora_B"),
        (plus("base_model.model.model.norm.lora_A.weight"), r"norm\.lora_A\.weight: is neither"),
        (plus("model.layers.0.self_attn.q_proj.lora_A.weight"), r"model\.layers\.0.*: is neither"),
        (plus(A.replace("layers.1", "layers.2")), r"layers\.2\..*: there is no layer 2: the model has 2"),
        (plus(A.replace("layers.1", "layers.01")), r"layers\.01\..*: only adapters of"),
        (plus(A.replace("layers.1", "layers." + "9" * 5000)), "only adapters of"),
        (plus(A.replace("layers.1", "layers.-1")), "only adapters of"),
        (plus(A.replace("layers.1", "layers.\u0661")), "only adapters of"),
        (
            plus("base_model.model.model.embed_tokens.lora_embedding_A"),
            "lora_embedding_A: LoRA matrices of embedd",
        ),
        (
            plus("base_model.model.lm_head.lora_A.weight"),
            r"lm_head\.lora_A\.weight: adapters of the output layer",
        ),
        (plus(f"{LAYER_0}.self_attn.q_proj.bias"), r"q_proj\.bias: biases are not supported"),
    ],
)
def test_tensors_that_are_refused(tensors: Tensors, message: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path, tensors)
    with pytest.raises(ValueError, match=rf"adapter_model\.safetensors: .*{message}|safetensors: {message}"):
        load_lora(folder, CONFIG)


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_missing_files(missing: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    (folder / missing).unlink()
    with pytest.raises(ValueError, match=rf"{tmp_path.name}: no {missing} in this folder"):
        load_lora(folder, CONFIG)


@pytest.mark.checklist("B10")
def test_pickle_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    (folder / "adapter_model.safetensors").unlink()
    torch.save(small_adapter(), folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"the weights are pickle files \(adapter_model\.bin\)"):
        load_lora(folder, CONFIG)


def test_files_of_training_beside_it(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    (folder / "training_args.bin").write_bytes(b"")
    load_lora(folder, CONFIG)
