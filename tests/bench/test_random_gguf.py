"""Files with random weights: types, sizes and distribution of the weights, and that the engine runs them."""

from collections import Counter
from pathlib import Path

import gguf
import numpy as np
import pytest

from engine.config import EngineConfig
from engine.core import Engine
from engine.loading import load_model
from engine.shared.messages import SamplingParams, Submit
from tests.bench.random_gguf import (
    MIXES,
    SHAPES,
    Shape,
    bytes_per_token,
    parse_shape,
    tensors_of,
    write_random_gguf,
)
from tests.support.gguf_files import write_gguf

TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": [f"t{number}" for number in range(512)],
    "tokenizer.ggml.token_type": [3] + [1] * 511,
    "tokenizer.ggml.merges": ["t 1"],
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.chat_template": "{{ messages }}",
    "general.name": "not copied",
}
TINY = {
    "dense": Shape("llama", 256, 2, 4, 2, 64, 512),
    "moe": Shape("qwen3moe", 256, 2, 4, 2, 64, 256, num_experts=8, num_experts_per_tok=2),
}


def write(folder: Path, shape: str, mix: str) -> Path:
    path = folder / f"{shape}-{mix}.gguf"
    tokenizer = write_gguf(folder / "tokenizer.gguf", TOKENIZER)
    write_random_gguf(path, TINY[shape], MIXES[mix], tokenizer)
    return path


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("shape", TINY)
def test_weights_as_the_gguf_package_reads_them(shape: str, mix: str, tmp_path: Path) -> None:
    """All matrices have a mean of 0 and a variance of 1 / inputs."""
    reader = gguf.GGUFReader(write(tmp_path, shape, mix))
    copied = {key: value for key, value in TOKENIZER.items() if key.startswith("tokenizer.")}
    fields = {
        key: reader.fields[key].contents() for key in reader.fields if key.startswith(("tokenizer.", "general.name"))
    }
    assert fields == copied
    assert reader.fields["general.architecture"].contents() == TINY[shape].architecture
    expected = {tensor.name: tensor for tensor in tensors_of(TINY[shape], 512)}
    assert [tensor.name for tensor in reader.tensors] == list(expected)
    for tensor in reader.tensors:
        weights = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert weights.shape == expected[tensor.name].shape
        if weights.ndim == 1:
            assert (weights == 1).all()
            continue
        assert abs(weights.mean()) * weights.shape[-1] ** 0.5 < 0.03, tensor.name
        assert abs(weights.std() * weights.shape[-1] ** 0.5 - 1) < 0.1, tensor.name
        assert np.abs(np.corrcoef(weights.reshape(-1, weights.shape[-1])[:4]) - np.eye(4)).max() < 0.3


# As llama.cpp lists the types of published files: Llama 3.2 1B and 3B, without `rope_freqs`.
@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("1b:q4_k_m", {"F32": 33, "Q4_K": 96, "Q6_K": 17}),
        ("3b:q4_k_m", {"F32": 57, "Q4_K": 168, "Q6_K": 29}),
        ("3b:q4_0", {"F32": 57, "Q4_0": 196, "Q6_K": 1}),
        ("moe:q4_0", {"F32": 61, "Q4_0": 84, "Q6_K": 1}),
    ],
)
def test_types(name: str, counts: dict[str, int]) -> None:
    shape, mix = parse_shape(name)
    assert Counter(mix.type_of(tensor, shape.num_layers) for tensor in tensors_of(shape, 49152)) == counts


def test_sizes() -> None:
    sizes = {name: [tensor.shape for tensor in tensors_of(shape, 49152)] for name, shape in SHAPES.items()}
    num_weights = {name: sum(np.prod(shape) for shape in shapes) / 1e9 for name, shapes in sizes.items()}
    assert {name: round(num, 2) for name, num in num_weights.items()} == {"1b": 1.07, "3b": 2.97, "moe": 5.16}


@pytest.mark.parametrize("name", ["1b", "2b:q4_0", "1b:q9", ""])
def test_unknown_shapes(name: str) -> None:
    with pytest.raises(ValueError, match=f"one of 1b, 3b, moe and one of q4_0, q4_k_m, got '{name}'"):
        parse_shape(name)


def test_bytes_per_token(tmp_path: Path) -> None:
    """A token reads two of eight experts, and all of the rest."""
    path = write(tmp_path, "moe", "q4_0")
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}
    experts = sum(num_bytes for name, num_bytes in sizes.items() if "_exps" in name)
    assert experts == 2 * 3 * 8 * 256 * 256 // 32 * 18
    assert bytes_per_token(path) == sum(sizes.values()) - experts * 6 // 8


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("shape", TINY)
def test_the_engine_runs_them(shape: str, mix: str, tmp_path: Path) -> None:
    """Different prompts have different answers: hidden states are finite and do not become alike."""
    loaded = load_model(EngineConfig(model_path=str(write(tmp_path, shape, mix)), speculative="off"))
    engine = Engine(EngineConfig(model_path="", speculative="off"), loaded)
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    for number in range(4):
        prompt = [100 * number + 3, 7 * number + 5]
        engine.add(Submit(request_id=str(number), prompt_token_ids=prompt, params=params, arrival=0.0))
    answers: dict[str, list[int]] = {}
    while engine.has_work:
        for event in engine.step()[1]:
            answers.setdefault(event.request_id, []).extend(event.token_ids)
    assert [len(answer) for answer in answers.values()] == [4] * 4
    assert len({tuple(answer) for answer in answers.values()}) == 4
