"""From the tensors of checkpoints to those of the model: names, fused and stacked matrices, and the order of rows."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import transformers

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


def rotated(head: list[float], rotary_dim: int, *, is_interleaved: bool, angles: list[float]) -> list[float]:
    """Rotate the pairs of one head as the checkpoint orders them: (2i, 2i + 1), or (i, i + R / 2)."""
    out = list(head)
    for pair, angle in enumerate(angles[: rotary_dim // 2]):
        a, b = (2 * pair, 2 * pair + 1) if is_interleaved else (pair, pair + rotary_dim // 2)
        out[a] = head[a] * np.cos(angle) - head[b] * np.sin(angle)
        out[b] = head[b] * np.cos(angle) + head[a] * np.sin(angle)
    return out


@pytest.mark.parametrize("is_interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [2, 6, 8])
def test_rotated_pairs_are_half_a_head_apart(rotary_dim: int, is_interleaved: bool) -> None:
    """Rotating in the model's order, then going back, is the rotation of the checkpoint's order."""
    rng = np.random.default_rng(rotary_dim)
    head, angles = rng.standard_normal(HEAD).tolist(), rng.uniform(0, 6, HEAD // 2).tolist()
    order = head_order(HEAD, rotary_dim, is_interleaved)
    assert sorted(order) == list(range(HEAD))
    ours = [head[index] for index in order]
    turned = rotated(ours, HEAD, is_interleaved=False, angles=angles[: rotary_dim // 2] + [0.0] * HEAD)
    back = [0.0] * HEAD
    for index, value in zip(order, turned, strict=True):
        back[index] = value
    assert back == pytest.approx(rotated(head, rotary_dim, is_interleaved=is_interleaved, angles=angles))


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


def test_fused_rows_are_divided_and_those_that_rotate_reordered() -> None:
    q, k, v = (random_tensor(rows, rows, HIDDEN) for rows in (HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD))
    attention, layout = f"{LAYER}self_attn.", WeightLayout(is_interleaved=True)
    found = split(f"{attention}qkv_proj.weight", torch.cat((q, k, v)), layout=layout)
    rows = head_order(HEAD, HEAD, True)
    expected = [weight.view(-1, HEAD, HIDDEN)[:, rows].flatten(0, 1) for weight in (q, k)]
    for name, weight in zip("qkv", [*expected, v], strict=True):
        assert torch.equal(found[f"{attention}{name}_proj.weight"], weight)


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
    ("name", "parts"),
    [
        pytest.param("Gemma3", {}, marks=pytest.mark.long),
        ("Gemma4", PARTS),
        pytest.param("Gemma4Unified", PARTS, marks=pytest.mark.long),
    ],
)
def test_parts_for_images_and_sound_are_left_out(name: str, parts: dict[str, Any], tmp_path: Path) -> None:
    config = getattr(transformers, f"{name}Config")(**parts)
    config.save_pretrained(tmp_path)
    loaded = load_model_config(tmp_path)
    with torch.device("meta"):
        model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    left_out = [
        name
        for name, tensor in model.state_dict().items()
        if not list(model_tensors(name, tensor, loaded, loaded.weight_layout))
    ]
    text = {f"model.language_model.{name}" for name in model.model.language_model.state_dict()}
    assert {*left_out} == {*model.state_dict()} - text  # with the head, which is tied
