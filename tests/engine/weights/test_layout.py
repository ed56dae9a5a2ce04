"""From the tensors of checkpoints to those of the model: names, fused and stacked matrices, and the order of rows."""

from typing import Any

import msgspec
import numpy as np
import pytest
import torch

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
    config = LATENT if "b_proj" in name else config_of()
    with pytest.raises(ValueError, match=message):
        split(f"{LAYER}self_attn.{name}", torch.zeros(*shape), config, WeightLayout(is_interleaved=True))


LATENT = config_of(
    RopeSpec(head_dim=20, rotary_dim=4, first_pair=8),
    num_kv_heads=1,
    head_dim=20,
    values_are_keys=True,
    latent=LatentSpec(q_lora_rank=None, kv_lora_rank=16, nope_head_dim=6, rope_head_dim=4, v_head_dim=10),
)
NUM_EXPERTS, SIZE = 3, 6
EXPERTS = config_of(
    experts=ExpertsSpec(router=RouterSpec(num_experts=NUM_EXPERTS, num_experts_per_tok=2), intermediate_size=SIZE)
)


def expert_weights(layout: WeightLayout, tensors: dict[str, Weight]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        found |= split(f"{LAYER}mlp.experts.{name}", tensor, EXPERTS, layout)
    return {name.removeprefix(f"{LAYER}mlp.experts."): weight for name, weight in found.items()}


def test_packed_stacked_experts() -> None:
    packed = random_packed("Q4_0", NUM_EXPERTS * 2 * SIZE, 32, 1)
    found = expert_weights(PLAIN, {"gate_up_proj.weight": packed})
    rows = packed.data.reshape(NUM_EXPERTS, 2, SIZE, -1)
    for expert in range(NUM_EXPERTS):
        for index, name in enumerate(("gate", "up")):
            weight = found[f"{expert}.{name}_proj.weight"]
            assert weight.shape == (SIZE, 32)
            np.testing.assert_array_equal(weight.data, rows[expert, index].reshape(-1))
    with pytest.raises(ValueError, match="has 10 rows, which do not divide into 3 experts"):
        expert_weights(PLAIN, {"gate_up_proj.weight": torch.zeros(10, 32)})


# Names, norms, and what is left out.


def test_what_is_left_out() -> None:
    weight = torch.zeros(2)
    tied, shared = msgspec.structs.replace(config_of(), tie_word_embeddings=True), config_of(kv_source=0)
    for config, left_out, kept in (
        (None, ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.embed_audio.b"), "lm_head.weight"),
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
