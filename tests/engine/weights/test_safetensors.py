"""Weights from safetensors files, most of them written by transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from engine.config import ModelConfig, load_model_config
from engine.weights import has_own_head, load_weights
from tests.support.model_configs import TINY, llama_config, model_names


def save_model(folder: Path, *, tied: bool = False, max_shard_size: str = "1GB") -> dict[str, torch.Tensor]:
    """Save a tiny random model and return its tensors, under the names of the model here."""
    sizes = {name: value for name, value in TINY.items() if name != "num_token_ids"}
    model: Any = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=tied, attention_bias=True))
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tensors = model_names(model.state_dict())
    return {name: tensor for name, tensor in tensors.items() if not (tied and name == "lm_head.weight")}


def load(folder: Path, *, tied: bool = False) -> dict[str, torch.Tensor]:
    """Load the weights of a folder; without a config.json, as those of a tiny Llama."""
    config = load_model_config(folder) if (folder / "config.json").is_file() else tiny_config(tied=tied)
    weights = load_weights(folder, config, torch.float32)
    return {name: tensor for name, tensor in weights if isinstance(tensor, torch.Tensor)}


def tiny_config(*, tied: bool = False) -> ModelConfig:
    return llama_config(**TINY | {"hidden_size": 2, "vocab_size": 2}, tie_word_embeddings=tied)


@pytest.mark.parametrize(("tied", "max_shard_size"), [(False, "1GB"), (True, "20KB")])
def test_as_transformers_wrote_it(tied: bool, max_shard_size: str, tmp_path: Path) -> None:
    expected = save_model(tmp_path, tied=tied, max_shard_size=max_shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (max_shard_size == "20KB")
    found = load(tmp_path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_rounding_and_progress(tmp_path: Path) -> None:
    expected = save_model(tmp_path, max_shard_size="20KB")
    calls: list[tuple[int, int]] = []
    weights = load_weights(
        tmp_path,
        load_model_config(tmp_path),
        torch.bfloat16,
        lambda done, total: calls.append((done, total)),
        vector_dtype=torch.float32,
    )
    for name, tensor in weights:
        dtype = torch.bfloat16 if expected[name].ndim > 1 else torch.float32
        assert isinstance(tensor, torch.Tensor)
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected[name].to(dtype))
    num_bytes = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert {total for _, total in calls} == {num_bytes}
    assert calls == sorted(calls)
    assert calls[-1] == (num_bytes, num_bytes)


INV_FREQ = "model.layers.0.self_attn.rotary_emb.inv_freq"


def save_shards(folder: Path, weight_map: dict[str, int], *shards: dict[str, torch.Tensor]) -> None:
    """Save the shards 1, 2, ... with an index that names one of them for each name of `weight_map`."""
    for number, tensors in enumerate(shards, start=1):
        save_file(tensors, folder / f"{number}.safetensors")
    index = {"weight_map": {name: f"{number}.safetensors" for name, number in weight_map.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_shard_or_a_tensor_that_is_missing(tmp_path: Path) -> None:
    save_shards(tmp_path, {"a": 1, "b": 1}, {"a": torch.ones(2)})
    with pytest.raises(ValueError, match=r"1\.safetensors: b is missing"):
        load(tmp_path)
    (tmp_path / "1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"1\.safetensors: the file is missing"):
        load(tmp_path)


@pytest.mark.parametrize("chosen", [1, 2])
def test_a_tensor_in_two_shards_is_taken_from_that_of_the_index(chosen: int, tmp_path: Path) -> None:
    shards = [{"b": torch.full((2,), float(number)), f"a{number}": torch.ones(2)} for number in (1, 2)]
    save_shards(tmp_path, {"a1": 1, "a2": 2, "b": chosen}, *shards)
    assert {name: tensor[0] for name, tensor in load(tmp_path).items()} == {"a1": 1, "a2": 1, "b": chosen}


def test_a_tensor_in_two_shards_that_the_index_does_not_list(tmp_path: Path) -> None:
    """It is refused unless it is not used."""
    for name in ("b", INV_FREQ):
        save_shards(tmp_path, {"a1": 1, "a2": 2}, *({f"a{n}": torch.ones(2), name: torch.ones(2)} for n in (1, 2)))
        if name == "b":
            with pytest.raises(ValueError, match=r"2\.safetensors: b: the tensor is in 1\.safetensors too"):
                load(tmp_path)
    assert sorted(load(tmp_path)) == ["a1", "a2"]


@pytest.mark.parametrize("num_bytes", [7, 100, -1])
def test_truncated(num_bytes: int, tmp_path: Path) -> None:
    save_model(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a valid safetensors file"):
        load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float8_e4m3fn])
def test_unsupported_type(dtype: torch.dtype, tmp_path: Path) -> None:
    save_file({"packed": torch.ones(2).to(dtype)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: packed: type .* is not supported"):
        load(tmp_path)


@pytest.mark.parametrize("file_name", ["../other.safetensors", "/etc/passwd", 7])
def test_index_that_points_elsewhere(file_name: object, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file_name}}))
    with pytest.raises(ValueError, match=r"weight_map: a: .* is not the name of a file in this folder"):
        load(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": 3}'])
def test_malformed_index(content: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"index\.json: .*(must hold a JSON object|weight_map: must map tensor names)"):
        load(tmp_path)


@pytest.mark.checklist("B10")
def test_pickle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor"):
        load(tmp_path)
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickle files \(pytorch_model\.bin\)"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["model.embed_tokens.weight", "lm_head.bias"], False),
        (["model.embed_tokens.weight", "lm_head.qweight"], True),
        (["model.embed_tokens.weight", "lm_head.weight_packed"], True),
        (["lm_head.weight"], False),
    ],
)
def test_which_tensors_are_a_head(names: list[str], expected: bool, tmp_path: Path) -> None:
    save_file({name: torch.ones(2, 2) for name in names}, tmp_path / "model.safetensors")
    assert has_own_head(tmp_path, tiny_config(tied=True)) == expected


@pytest.mark.parametrize("head", [torch.ones(2, 2).to(torch.float8_e4m3fn), torch.ones(2, 2).int(), torch.ones(4)])
def test_a_head_of_another_kind_is_not_that_of_the_embedding(head: torch.Tensor, tmp_path: Path) -> None:
    tensors = {"model.embed_tokens.weight": torch.ones(2, 2), "lm_head.weight": head}
    save_file(tensors, tmp_path / "model.safetensors")
    assert has_own_head(tmp_path, tiny_config(tied=True))
