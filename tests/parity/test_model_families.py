"""Every family that the engine runs, compared with transformers on small random models.

Each model is read from the folder that transformers saves, and from the GGUF file that llama.cpp's converter made of
the same weights (tests/parity/make_fixtures.py). All in float32, with plain torch, C++ and some in Triton's
interpreter.
"""

import json
import lzma
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from _pytest.mark import ParameterSet
from msgspec.structs import replace
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from engine.config import EngineConfig, ModelConfig, load_model_config
from engine.config.huggingface import MULTIMODAL
from engine.loading import LoadedModel, load_model
from tests.parity.make_fixtures import FIXTURES
from tests.support.examples import num_examples
from tests.support.family_models import (
    EIGHT,
    FAMILIES,
    VOCAB_SIZE,
    family_config,
    read_config,
    save_family_model,
    save_model,
    save_variant,
    sizes_of,
    wrapped,
)
from tests.support.kernel_choice import choose_kernels, code_paths
from tests.support.older_configs import older_config
from tests.support.outputs import all_logits, greedy_outputs
from tests.support.tiny_models import SHAPE

NUM_OUTPUT_TOKENS = num_examples(6, 24)
NUM_INTERPRETED_TOKENS = 3
TOLERANCE = 1e-3  # of a log probability
SOURCES = ("folder", "gguf")
OTHER_SEEDS = {1: "torch", 2: "default"}  # seed of sizes and weights -> kernels
# Rows whose heads have sizes that the C++ kernels do not support: plain torch runs them.
NOT_IN_CPP = {"llama_odd", "qwen3_odd"}
IN_TRITON = {"llama3", "qwen3", "qwen3_moe", "gemma3_text", "gemma4_e2b", "gpt_oss", "phi4_mini", "deepseek_v2_lite"}
IN_TRITON |= {"qwen3_5", "lfm2"}


class Reference(NamedTuple):
    """A saved model, and as transformers loads it."""

    folder: Path
    model: Any

    def log_probabilities(self, token_ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return torch.log_softmax(self.model(torch.tensor([token_ids])).logits[0], dim=-1)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Reference]:
    """Return a function that saves the model of a row and a seed, once."""

    @cache
    def save(name: str, seed: int) -> Reference:
        folder = tmp_path_factory.mktemp(name)
        return Reference(folder, save_family_model(name, folder, seed))

    return save


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that unpacks the GGUF file of a row, once."""

    @cache
    def unpack(name: str) -> Path:
        path = tmp_path_factory.mktemp("gguf") / f"{name}.gguf"
        path.write_bytes(lzma.decompress((FIXTURES / f"{name}.gguf.xz").read_bytes()))
        return path

    return unpack


def cases() -> Iterator[ParameterSet]:
    """Yield (row, source, kernels) of every comparison; in `make test`, each source and each kernels of the EIGHT."""
    for name, family in FAMILIES.items():
        for source in SOURCES if family.gguf_architecture else SOURCES[:1]:
            for kernels in ("torch", "default", *(["triton"] if name in IN_TRITON and source == "folder" else [])):
                is_quick = name in EIGHT and (source, kernels) in (("folder", "torch"), ("gguf", "default"))
                marks = [] if is_quick or (name, kernels) == ("gpt_oss", "triton") else [pytest.mark.long]
                yield pytest.param(name, source, kernels, id=f"{name}-{source}-{kernels}", marks=marks)


def load(path: Path, kernels: str = "default") -> LoadedModel:
    with choose_kernels(kernels):
        return load_model(EngineConfig(model_path=str(path), dtype="float32", quantization="none"))


def assert_same_as_transformers(
    lengths: Sequence[int], reference: Reference, loaded: LoadedModel, num_tokens: int = NUM_OUTPUT_TOKENS
) -> None:
    """Compare the log probabilities of prompts, and each step of greedy decoding after them."""
    generator = torch.Generator().manual_seed(sum(lengths))
    prompts = [torch.randint(loaded.config.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    for prompt, output in zip(prompts, greedy_outputs(loaded, prompts, num_tokens), strict=True):
        expected = reference.log_probabilities(prompt + output)
        actual = torch.log_softmax(all_logits(loaded, prompt), dim=-1)
        torch.testing.assert_close(actual, expected[: len(prompt)], rtol=0, atol=TOLERANCE)
        steps = expected[len(prompt) - 1 : -1]
        of_outputs = steps.gather(1, torch.tensor(output)[:, None])[:, 0]
        # Equal to the most likely tokens, unless two are equally likely within the tolerance.
        torch.testing.assert_close(of_outputs, steps.max(dim=-1).values, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("name", "source", "kernels"), list(cases()))
def test_family(
    name: str, source: str, kernels: str, reference: Callable[[str, int], Reference], gguf_file: Callable[[str], Path]
) -> None:
    saved = reference(name, 0)
    if source == "gguf" and FAMILIES[name].not_in_gguf:
        changes = dict.fromkeys(FAMILIES[name].not_in_gguf)
        saved = saved._replace(model=type(saved.model).from_pretrained(saved.folder, **changes))
    loaded = load(saved.folder if source == "folder" else gguf_file(name), kernels)
    if kernels == "default":
        in_cpp = code_paths() and name not in NOT_IN_CPP
        assert loaded.runner.kernels.name == (f"cpu {code_paths()[0]}" if in_cpp else "torch")
    lengths = FAMILIES[name].lengths
    if kernels == "triton":
        assert_same_as_transformers(lengths[-2:-1], saved, loaded, NUM_INTERPRETED_TOKENS)
    else:
        assert_same_as_transformers(lengths, saved, loaded)


@pytest.mark.long
@pytest.mark.parametrize("seed", OTHER_SEEDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_other_sizes(name: str, seed: int, reference: Callable[[str, int], Reference]) -> None:
    print(f"seed {seed}")
    saved = reference(name, seed)
    assert_same_as_transformers(FAMILIES[name].lengths, saved, load(saved.folder, OTHER_SEEDS[seed]))


@pytest.mark.parametrize("name", FAMILIES)
def test_older_spelling_of_the_configuration(name: str, tmp_path: Path) -> None:
    """Most checkpoints on the hub have the spelling of older versions of transformers."""
    family_config(name)[1].save_pretrained(tmp_path)
    newer = used_fields(load_model_config(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(older_config(read_config(tmp_path))))
    assert used_fields(load_model_config(tmp_path)) == newer


def used_fields(config: ModelConfig) -> ModelConfig:
    """Return a configuration without the context of queries that are not scaled."""
    ropes = [rope if rope.query_beta else replace(rope, query_context=0) for rope in config.ropes]
    return replace(config, ropes=tuple(ropes))


LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 64}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
BOTH = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 16}
ODD = {"hidden_size": 36, "intermediate_size": 77, "vocab_size": 131, "num_hidden_layers": 3}
THREE = {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1}
SHAPES: dict[str, dict[str, Any]] = {
    "as many KV heads as heads": {"num_key_value_heads": 4, "attention_bias": True},
    "one KV head": {"num_key_value_heads": 1, "mlp_bias": True},
    "both biases, tied": BOTH | {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3},
    "odd sizes": ODD | {"head_dim": 10},
    "odd sizes, heads of whole vectors": ODD | {"head_dim": 48, "rope_parameters": LINEAR},
    "llama3 scaling, other epsilon": {"rope_parameters": LLAMA3, "rms_norm_eps": 0.1},
    "heads of 256, three to a KV head": THREE | {"head_dim": 256},
    "gelu": {"hidden_act": "gelu"},
    "gelu_pytorch_tanh": {"hidden_act": "gelu_pytorch_tanh"},
    "window of 1": {"sliding_window": 1},
    "window of 37, heads of whole vectors": {"sliding_window": 37, "head_dim": 80},
    "window over several key tiles": {"sliding_window": 300, "num_key_value_heads": 1},
    "window larger than the prompt": {"sliding_window": 5000},
}


@pytest.mark.parametrize("kernels", ["default", pytest.param("torch", marks=pytest.mark.long)])
@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_shapes(changes: dict[str, Any], kernels: str, tmp_path: Path) -> None:
    """Prompts of one token, a block, more than one tile of keys, and more than several."""
    model_type = "mistral" if "sliding_window" in changes else "llama"
    saved = Reference(tmp_path, save_variant(SHAPE | changes | {"model_type": model_type}, tmp_path))
    loaded = load(tmp_path, kernels)
    in_cpp = kernels == "default" and code_paths() and loaded.config.attentions[0].head_dim % 16 == 0
    assert loaded.runner.kernels.name == (f"cpu {code_paths()[0]}" if in_cpp else "torch")
    assert_same_as_transformers((1, 32, 100, 700), saved, loaded)


def layers(config: dict[str, Any], kind: str) -> list[str]:
    return [kind] * int(config["num_hidden_layers"])


def rope_scaling(config: dict[str, Any], kind: str) -> dict[str, Any]:
    """Return the changes to a configuration of LongRoPE that spell it as older files do, with another type."""
    rope = {key: value for key, value in config["rope_parameters"].items() if key != "rope_type"}
    return {"rope_parameters": ..., "rope_scaling": rope | {"type": kind}}


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
Changes = Callable[[dict[str, Any]], dict[str, Any]]
# (Row, changes to its config.json) for which transformers has a rule of its own; ... removes a key.
VARIANTS: tuple[tuple[str, Changes], ...] = (
    ("gpt_oss", lambda config: {"rope_parameters": ...}),
    ("gpt_oss", lambda config: {"rope_parameters": None, "rope_theta": 1234.0}),
    ("llama3", lambda config: {"rope_parameters": YARN, "original_max_position_embeddings": 16}),
    ("cohere2", lambda config: {"use_sliding_window": False}),
    ("gemma4_e2b", lambda config: {"vocab_size_per_layer_input": VOCAB_SIZE + 12}),
)
MORE_VARIANTS: tuple[tuple[str, Changes], ...] = (
    ("gpt_oss", lambda config: {"rope_parameters": {}}),
    ("ministral3", lambda config: {"rope_parameters": ..., "rms_norm_eps": ...}),
    ("phi3_longrope", lambda config: rope_scaling(config, "yarn")),
    ("phi3_longrope", lambda config: rope_scaling(config, "su")),
    ("cohere2", lambda config: {"layer_types": layers(config, "full_attention")}),
    ("exaone4", lambda config: {"layer_types": layers(config, "full_attention")}),
    ("exaone4", lambda config: {"layer_types": layers(config, "full_attention"), "sliding_window": None}),
    ("glm4_moe_lite", lambda config: {"mlp_layer_types": layers(config, "sparse"), "first_k_dense_replace": 1}),
    ("gemma4_e2b", lambda config: {"per_layer_config": {}}),
    ("gemma4_e2b", lambda config: {"layer_types": [*config["layer_types"][:-1], "sliding_attention"]}),
    ("gemma4_e2b", lambda config: {"use_bidirectional_attention": "vision"}),
)


@pytest.mark.parametrize(
    ("name", "changes"), [*VARIANTS, *(pytest.param(*variant, marks=pytest.mark.long) for variant in MORE_VARIANTS)]
)
def test_variants_of_the_configuration(
    name: str, changes: Changes, reference: Callable[[str, int], Reference], tmp_path: Path
) -> None:
    config = read_config(reference(name, 0).folder)
    config = {key: value for key, value in (config | changes(config)).items() if value is not ...}
    saved = Reference(tmp_path, save_variant(config, tmp_path))
    assert read_config(tmp_path) == config
    assert_same_as_transformers(FAMILIES[name].lengths[-1:], saved, load(tmp_path, "torch"), 1)


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        *(("cohere2", stored) for stored in ("equal", "rounded", "alone", "another")),
        *(pytest.param("gemma3", stored, marks=pytest.mark.long) for stored in ("equal", "alone", "another")),
    ],
)
def test_an_lm_head_beside_tied_embeddings(
    name: str, stored: str, reference: Callable[[str, int], Reference], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers keeps a head that differs, whatever config.json says, and takes one alone as the embedding."""
    folder = reference(name, 0).folder
    config = read_config(folder)
    assert config.get("tie_word_embeddings", config.get("text_config", {}).get("tie_word_embeddings"))
    tensors = load_file(folder / "model.safetensors")
    (key,) = (key for key in tensors if key.endswith(".embed_tokens.weight"))
    embedding = tensors.pop(key).bfloat16()
    head = embedding.flip(0) / 2 if stored == "another" else embedding.clone()
    tensors["lm_head.weight"] = head.float() if stored == "rounded" else head
    if stored != "alone":
        tensors[key] = embedding
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = type(reference(name, 0).model).from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert_same_as_transformers(FAMILIES[name].lengths[-1:], Reference(tmp_path, model), load(tmp_path, "torch"), 1)
    assert ("tie_word_embeddings is true, but the files have an LM head that differs" in caplog.text) == (
        stored == "another"
    )


# Row of the text part of each multimodal model.
TEXT_PARTS = {
    **{"gemma3": "gemma3_text", "gemma4": "gemma4_e2b", "gemma4_unified": "gemma4_31b"},
    **{"idefics3": "llama3", "internvl": "qwen2", "lfm2_vl": "lfm2", "llava": "llama3", "llava_next": "mistral_full"},
    **{"llava_onevision": "qwen2", "minicpmv4_6": "qwen3_5", "mistral3": "ministral3", "qwen3_5": "qwen3_5"},
    **{"qwen3_5_moe": "qwen3_5_moe", "smolvlm": "llama3"},
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.long] * (name not in ("qwen3_5_moe", "smolvlm"))) for name in MULTIMODAL],
)
def test_the_text_part_of_a_multimodal_model(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    row = TEXT_PARTS[name]
    model_type = "gemma4_unified_text" if name == "gemma4_unified" else FAMILIES[row].model_type
    config = wrapped(name, sizes_of(FAMILIES[row], f"{row} 0") | {"model_type": model_type})
    saved = Reference(tmp_path, save_model(AutoModelForImageTextToText, config, tmp_path, 0))
    assert_same_as_transformers(FAMILIES[row].lengths[-1:], saved, load(tmp_path, "torch"), 1)
    assert f"config.json: {name} loads the text part only; images are not supported" in caplog.text


def test_every_family_has_its_gguf_file() -> None:
    names = {name for name, family in FAMILIES.items() if family.gguf_architecture}
    assert {path.name for path in FIXTURES.glob("*.xz")} == {f"{name}.gguf.xz" for name in names}
