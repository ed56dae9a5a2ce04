"""From the tensors of checkpoints to those of the model: names, fused and stacked matrices, and the order of rows."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4UnifiedConfig,
    Gemma4UnifiedForConditionalGeneration,
)

from engine.config import (
    AttentionSpec,
    ExpertsSpec,
    LatentSpec,
    LayerSpec,
    MLPSpec,
    ModelConfig,
    RopeSpec,
    RouterSpec,
    WeightLayout,
    load_model_config,
)
from engine.weights import Weight
from engine.weights.layout import head_order, model_tensors
from tests.support.packed_weights import random_packed
from tests.support.tensors import random_tensor

HEAD, HEADS, KV_HEADS, HIDDEN = 8, 4, 2, 32
LAYER = "model.layers.0."
PLAIN = WeightLayout()


def config_of(
    rope: RopeSpec | None = None, experts: ExpertsSpec | None = None, num_ignored_layers: int = 0, **attention: Any
) -> ModelConfig:
    fields: dict[str, Any] = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": HEAD, "scale": 1.0}
    spec = AttentionSpec(**fields | attention)
    mlp = MLPSpec(intermediate_size=6) if experts is None else None
    return ModelConfig(
        architecture="x",
        vocab_size=9,
        num_token_ids=9,
        hidden_size=HIDDEN,
        layers=(LayerSpec(attention=spec, mlp=mlp, experts=experts),),
        ropes=(rope or RopeSpec(head_dim=HEAD, rotary_dim=HEAD),),
        max_position_embeddings=64,
        num_ignored_layers=num_ignored_layers,
    )


def split(name: str, weight: Weight, config: ModelConfig | None = None, layout: WeightLayout = PLAIN) -> dict[str, Any]:
    found = list(model_tensors(name, weight, config or config_of(), layout))
    assert len(dict(found)) == len(found)
    return dict(found)


@pytest.mark.parametrize("rotary_dim", [4, 8])
@pytest.mark.parametrize("part", ["q_proj", "k_proj", "q_norm", "k_norm"])
def test_rows_of_queries_and_keys(part: str, rotary_dim: int) -> None:
    """Each head is reordered by itself: weights, biases, and norms of one head or of all."""
    config = config_of(RopeSpec(head_dim=HEAD, rotary_dim=rotary_dim))
    layout = WeightLayout(is_interleaved=True)
    order = head_order(HEAD, rotary_dim, True)
    num_heads = HEADS if part.startswith("q") else KV_HEADS
    for heads, shape in ((num_heads, (num_heads * HEAD, HIDDEN)), (num_heads, (num_heads * HEAD,)), (1, (HEAD,))):
        weight = random_tensor(1, *shape)
        expected = [weight[head * HEAD + index] for head in range(heads) for index in order]
        (found,) = split(f"{LAYER}self_attn.{part}.weight", weight, config, layout).values()
        assert torch.equal(found, torch.stack(expected))
    for other in ("v_proj", "o_proj"):
        weight = random_tensor(1, HEADS * HEAD, HIDDEN)
        (found,) = split(f"{LAYER}self_attn.{other}.weight", weight, config, layout).values()
        assert torch.equal(found, weight)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("q_proj.weight", (12, HIDDEN), "12 rows do not divide into heads of 8"),
        ("qkv_proj.weight", (60, HIDDEN), "has 60 rows, but its parts q_proj, k_proj, v_proj have 64"),
        ("kv_b_proj.weight", (63, 16), "has 63 rows, but 4 heads have 64"),
        ("k_b_proj.transposed", (63, 6), "has 378 numbers, but 4 heads have 384"),
    ],
)
def test_what_does_not_divide(name: str, shape: tuple[int, int], message: str) -> None:
    config = config_of()
    if "b_proj" in name:
        latent = LatentSpec(q_lora_rank=None, kv_lora_rank=16, nope_head_dim=6, rope_head_dim=4, v_head_dim=10)
        rope = RopeSpec(head_dim=20, rotary_dim=4, first_pair=8)
        config = config_of(rope, num_kv_heads=1, head_dim=20, values_are_keys=True, latent=latent)
    with pytest.raises(ValueError, match=message):
        split(f"{LAYER}self_attn.{name}", torch.zeros(*shape), config, WeightLayout(is_interleaved=True))


NUM_EXPERTS, SIZE = 3, 6
EXPERTS = config_of(
    experts=ExpertsSpec(router=RouterSpec(num_experts=NUM_EXPERTS, num_experts_per_tok=2), intermediate_size=SIZE)
)


def test_packed_stacked_experts() -> None:
    packed = random_packed("Q4_0", NUM_EXPERTS * 2 * SIZE, 32, 1)
    prefix = f"{LAYER}mlp.experts."
    found = split(f"{prefix}gate_up_proj.weight", packed, EXPERTS)
    rows = packed.data.reshape(NUM_EXPERTS, 2, SIZE, -1)
    for expert in range(NUM_EXPERTS):
        for index, name in enumerate(("gate", "up")):
            weight = found[f"{prefix}{expert}.{name}_proj.weight"]
            assert weight.shape == (SIZE, 32)
            np.testing.assert_array_equal(weight.data, rows[expert, index].reshape(-1))
    with pytest.raises(ValueError, match="has 10 rows, which do not divide into 3 experts"):
        split(f"{prefix}gate_up_proj.weight", torch.zeros(10, 32), EXPERTS)


# Names, norms, and what is left out.


def test_norms_whose_weights_are_stored_less_one() -> None:
    layout, weight = WeightLayout(norm_offset=1.0), random_tensor(1, HEADS * HEAD)
    names = ("model.norm", f"{LAYER}input_layernorm", f"{LAYER}self_attn.q_norm")
    for name in (*names, f"{LAYER}self_attn.o_proj"):
        (found,) = split(f"{name}.weight", weight, layout=layout).values()
        assert torch.equal(found, weight + 1 if name in names else weight)


def test_what_is_left_out() -> None:
    weight = torch.zeros(2)
    tied, shared = msgspec.structs.replace(config_of(), tie_word_embeddings=True), config_of(kv_source=0)
    for config, left_out, kept in (
        (None, ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.vision_tower.b"), "lm_head.weight"),
        (tied, ("lm_head.weight",), "model.norm.weight"),
        (
            shared,
            [f"{LAYER}self_attn.{name}.weight" for name in ("k_proj", "v_norm")],
            f"{LAYER}self_attn.o_proj.weight",
        ),
        (config_of(num_ignored_layers=1), ("model.layers.1.mlp.up_proj.weight",), "model.layers.0.mlp.up_proj.weight"),
        (None, (), "model.layers.1.mlp.up_proj.weight"),  # the model then says that it has no use for it
    ):
        assert [split(name, weight, config) for name in left_out] == [{}] * len(left_out)
        assert list(split(kept, weight, config)) == [kept]


PARTS: dict[str, Any] = {"audio_config": {}, "vision_config": {}, "text_config": {"num_hidden_layers": 6}}


@pytest.mark.parametrize(
    ("config", "model_class"),
    [
        pytest.param(Gemma3Config(), Gemma3ForConditionalGeneration, marks=pytest.mark.long),
        (Gemma4Config(**PARTS), Gemma4ForConditionalGeneration),
        pytest.param(Gemma4UnifiedConfig(**PARTS), Gemma4UnifiedForConditionalGeneration, marks=pytest.mark.long),
    ],
)
def test_parts_for_images_and_sound_are_left_out(config: Any, model_class: Any, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    loaded = load_model_config(tmp_path)
    with torch.device("meta"):
        model = model_class(config)
    left_out = [
        name
        for name, tensor in model.state_dict().items()
        if not list(model_tensors(name, tensor, loaded, loaded.weight_layout))
    ]
    text = {f"model.language_model.{name}" for name in model.model.language_model.state_dict()}
    assert {*left_out} == {*model.state_dict()} - text  # with the head, which is tied
