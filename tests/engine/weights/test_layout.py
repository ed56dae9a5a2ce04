"""From the tensors of checkpoints to those of the model: names, fused and stacked matrices, and the order of rows."""

from pathlib import Path
from typing import Any

import gguf
import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor
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
from engine.weights import PackedTensor, Weight
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


# Order of rows.


def rotated(head: list[float], rotary_dim: int, *, is_interleaved: bool, angles: list[float]) -> list[float]:
    """Rotate the pairs of one head as the checkpoint orders them: (2i, 2i + 1), or (i, i + R / 2)."""
    out = list(head)
    for pair, angle in enumerate(angles[: rotary_dim // 2]):
        a, b = (2 * pair, 2 * pair + 1) if is_interleaved else (pair, pair + rotary_dim // 2)
        out[a] = head[a] * np.cos(angle) - head[b] * np.sin(angle)
        out[b] = head[b] * np.cos(angle) + head[a] * np.sin(angle)
    return out


@pytest.mark.parametrize("is_interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [2, 4, 6, 8])
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


def test_proportional_rotation_has_the_order_of_a_whole_head() -> None:
    assert head_order(HEAD, 4, False, is_proportional=True).tolist() == list(range(HEAD))


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


def test_rows_of_packed_weights() -> None:
    """Whole rows move, bytes and all."""
    packed = random_packed("Q4_0", HEADS * HEAD, 64, seed=1)
    name = f"{LAYER}self_attn.q_proj.weight"
    found = split(name, packed, layout=WeightLayout(is_interleaved=True))[name]
    assert isinstance(found, PackedTensor)
    order = head_order(HEAD, HEAD, True)
    rows = packed.data.reshape(HEADS, HEAD, -1)[:, order].reshape(-1)
    np.testing.assert_array_equal(found.data, rows)
    numbers = gguf.dequantize(rows.reshape(HEADS * HEAD, -1), gguf.GGMLQuantizationType.Q4_0)
    assert torch.equal(found.dequantize(torch.float32), torch.from_numpy(numbers))


def test_rows_that_are_no_heads() -> None:
    with pytest.raises(ValueError, match="12 rows do not divide into heads of 8"):
        split(f"{LAYER}self_attn.q_proj.weight", torch.zeros(12, HIDDEN), layout=WeightLayout(is_interleaved=True))


# Fused and stacked tensors.


def test_fused_queries_keys_and_values() -> None:
    """The rows of queries and keys are then reordered."""
    sizes = {"q": HEADS * HEAD, "k": KV_HEADS * HEAD, "v": KV_HEADS * HEAD}
    parts = {name: random_tensor(size, size, HIDDEN) for name, size in sizes.items()}
    fused = torch.cat(list(parts.values()))
    for kind, weight in (("weight", fused), ("bias", fused[:, 0])):
        found = split(f"{LAYER}self_attn.qkv_proj.{kind}", weight)
        assert list(found) == [f"{LAYER}self_attn.{name}_proj.{kind}" for name in "qkv"]
        for part, expected in zip(found.values(), parts.values(), strict=True):
            assert torch.equal(part, expected if kind == "weight" else expected[:, 0])
    found = split(f"{LAYER}self_attn.qkv_proj.weight", fused, layout=WeightLayout(is_interleaved=True))
    alone = split(f"{LAYER}self_attn.k_proj.weight", parts["k"], layout=WeightLayout(is_interleaved=True))
    assert torch.equal(found[f"{LAYER}self_attn.k_proj.weight"], alone[f"{LAYER}self_attn.k_proj.weight"])
    with pytest.raises(ValueError, match="has 60 rows, but its parts q_proj, k_proj, v_proj have 64"):
        split(f"{LAYER}self_attn.qkv_proj.weight", torch.zeros(60, HIDDEN))


@pytest.mark.parametrize("prefix", ["mlp", "mlp.shared_experts"])
def test_fused_gate_and_up(prefix: str) -> None:
    gate, up = random_packed("Q8_0", 6, 32, 1), random_packed("Q8_0", 6, 32, 2)
    fused = PackedTensor("Q8_0", (12, 32), np.concatenate((gate.data, up.data)))
    found = split(f"{LAYER}{prefix}.gate_up_proj.weight", fused)
    for name, expected in (("gate", gate), ("up", up)):
        part = found.pop(f"{LAYER}{prefix}.{name}_proj.weight")
        assert part.shape == (6, 32)
        np.testing.assert_array_equal(part.data, expected.data)
    assert not found


NUM_EXPERTS, SIZE = 3, 6
EXPERTS = config_of(
    experts=ExpertsSpec(router=RouterSpec(num_experts=NUM_EXPERTS, num_experts_per_tok=2), intermediate_size=SIZE)
)


def expert_weights(layout: WeightLayout, tensors: dict[str, Weight]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        found |= split(f"{LAYER}mlp.experts.{name}", tensor, EXPERTS, layout)
    return {name.removeprefix(f"{LAYER}mlp.experts."): weight for name, weight in found.items()}


@pytest.mark.parametrize("is_flat", [False, True], ids=["stacked", "flat"])
def test_stacked_experts(is_flat: bool) -> None:
    """As [E, M, K], or [E * M, K] of GGUF files; gate and up in one tensor or in two."""
    gate, up, down = (random_tensor(s, NUM_EXPERTS, *shape) for s, shape in enumerate([(SIZE, 32)] * 2 + [(32, SIZE)]))

    def stored(x: Tensor) -> Tensor:
        return x.flatten(0, 1) if is_flat else x

    fused = expert_weights(PLAIN, {"gate_up_proj": stored(torch.cat((gate, up), dim=1)), "down_proj": stored(down)})
    apart = expert_weights(
        PLAIN,
        {"gate_proj.weight": stored(gate), "up_proj.weight": stored(up), "down_proj.weight": stored(down)},
    )
    for found in (fused, apart):
        assert len(found) == 3 * NUM_EXPERTS
        for expert in range(NUM_EXPERTS):
            for name, weights in (("gate", gate), ("up", up), ("down", down)):
                assert torch.equal(found[f"{expert}.{name}_proj.weight"], weights[expert])


def test_interleaved_experts() -> None:
    """As in gpt-oss: [E, inputs, outputs], with the outputs of gate and up alternating, and their biases too."""
    gate_up, down = random_tensor(1, NUM_EXPERTS, 32, 2 * SIZE), random_tensor(2, NUM_EXPERTS, SIZE, 32)
    gate_up_bias, down_bias = random_tensor(3, NUM_EXPERTS, 2 * SIZE), random_tensor(4, NUM_EXPERTS, 32)
    tensors: dict[str, Weight] = {"gate_up_proj": gate_up, "down_proj": down}
    tensors |= {"gate_up_proj_bias": gate_up_bias, "down_proj_bias": down_bias}
    found = expert_weights(WeightLayout(has_interleaved_experts=True), tensors)
    for expert in range(NUM_EXPERTS):
        for output in range(SIZE):
            assert torch.equal(found[f"{expert}.gate_proj.weight"][output], gate_up[expert, :, 2 * output])
            assert torch.equal(found[f"{expert}.up_proj.weight"][output], gate_up[expert, :, 2 * output + 1])
            assert found["gate_proj.bias"][expert, output] == gate_up_bias[expert, 2 * output]
            assert found["up_proj.bias"][expert, output] == gate_up_bias[expert, 2 * output + 1]
        assert torch.equal(found[f"{expert}.down_proj.weight"], down[expert].T)
    assert torch.equal(found["down_proj.bias"], down_bias)


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


def test_latent_keys_and_values() -> None:
    """Heads of keys and values follow each other in one matrix."""
    latent = LatentSpec(q_lora_rank=None, kv_lora_rank=16, nope_head_dim=6, rope_head_dim=4, v_head_dim=10)
    rope = RopeSpec(head_dim=20, rotary_dim=4, first_pair=8)
    config = config_of(rope, num_kv_heads=1, head_dim=20, values_are_keys=True, latent=latent)
    weight = random_tensor(1, HEADS, 6 + 10, 16)
    found = split(f"{LAYER}self_attn.kv_b_proj.weight", weight.flatten(0, 1), config)
    assert torch.equal(found[f"{LAYER}self_attn.k_b_proj.weight"], weight[:, :6].flatten(0, 1))
    assert torch.equal(found[f"{LAYER}self_attn.v_b_proj.weight"], weight[:, 6:].flatten(0, 1))
    with pytest.raises(ValueError, match="has 63 rows, but 4 heads have 64"):
        split(f"{LAYER}self_attn.kv_b_proj.weight", torch.zeros(63, 16), config)
    with pytest.raises(ValueError, match="has 378 numbers, but 4 heads have 384"):
        split(f"{LAYER}self_attn.k_b_proj.transposed", torch.zeros(63, 6), config)
    # The rotated rows are the last ones: of each head of queries, and after the latent vector.
    order = [0, 2, 1, 3]
    queries = random_tensor(2, HEADS, 10, HIDDEN)
    name, layout = f"{LAYER}self_attn.q_proj.weight", WeightLayout(is_interleaved=True)
    expected = torch.cat((queries[:, :6], queries[:, 6:][:, order]), dim=1)
    assert torch.equal(split(name, queries.flatten(0, 1), config, layout)[name], expected.flatten(0, 1))
    compressed = random_tensor(3, 20, HIDDEN)
    name = f"{LAYER}self_attn.kv_a_proj_with_mqa.weight"
    expected = torch.cat((compressed[:16], compressed[16:][order]))
    assert torch.equal(split(name, compressed, config, layout)[name], expected)


# Names, norms, and what is left out.


def test_names_are_replaced_in_order() -> None:
    layout = WeightLayout(
        names=((r"^transformer\.", "model."), (r"\.attn\.", ".self_attn."), (r"attn\.out", "attn.o_proj"))
    )
    assert list(split("transformer.layers.0.attn.out.weight", torch.zeros(2, 2), layout=layout)) == [
        f"{LAYER}self_attn.o_proj.weight"
    ]


def test_norms_whose_weights_are_stored_less_one() -> None:
    layout = WeightLayout(norm_offset=1.0)
    for name in ("model.norm.weight", f"{LAYER}input_layernorm.weight", f"{LAYER}self_attn.q_norm.weight"):
        weight = random_tensor(1, HEAD)
        assert torch.equal(split(name, weight, layout=layout)[name], weight + 1)
    for name in (f"{LAYER}self_attn.o_proj.weight", f"{LAYER}self_attn.q_proj.bias"):
        weight = random_tensor(1, HEADS * HEAD)
        assert torch.equal(split(name, weight, layout=layout)[name], weight)


def test_what_is_left_out() -> None:
    weight = torch.zeros(2)
    for name in ("model.layers.0.self_attn.rotary_emb.inv_freq", "vision_tower.a.weight", "model.vision_tower.b"):
        assert split(name, weight) == {}
    tied = msgspec.structs.replace(config_of(), tie_word_embeddings=True)
    assert split("lm_head.weight", weight, tied) == {}
    assert list(split("lm_head.weight", weight)) == ["lm_head.weight"]
    shared = config_of(kv_source=0)
    assert split(f"{LAYER}self_attn.k_proj.weight", weight, shared) == {}
    assert split(f"{LAYER}self_attn.v_norm.weight", weight, shared) == {}
    assert list(split(f"{LAYER}self_attn.o_proj.weight", weight, shared)) == [f"{LAYER}self_attn.o_proj.weight"]


def test_further_layers_are_ignored_only_if_the_model_says_so() -> None:
    name, weight = "model.layers.1.mlp.up_proj.weight", torch.zeros(2)
    assert list(split(name, weight)) == [name]  # the model then says that it has no use for it
    assert split(name, weight, config_of(num_ignored_layers=1)) == {}


PARTS: dict[str, Any] = {"audio_config": {}, "vision_config": {}, "text_config": {"num_hidden_layers": 6}}


@pytest.mark.parametrize(
    ("config", "model_class"),
    [
        (Gemma3Config(), Gemma3ForConditionalGeneration),
        (Gemma4Config(**PARTS), Gemma4ForConditionalGeneration),
        (Gemma4UnifiedConfig(**PARTS), Gemma4UnifiedForConditionalGeneration),
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
