"""Each number and list of a model's metadata is replaced with values that no file should have.

Each model is loaded or refused in one line, in bounded time and memory, however much its metadata ask for.
"""

import lzma
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from engine.config import load_model_config
from engine.config.decoder import NAMES
from engine.config.fields import Fields
from engine.config.gguf import DEFAULTED_KEYS, KEYS, SAMPLING_FIELDS, YARN_KEYS
from engine.config.huggingface import load_folder
from tests.fuzz.conftest import Check, quick
from tests.fuzz.hostile_values import GGUF_VALUES, JSON_VALUES, GGUFImage, json_places, with_json_value
from tests.parity.make_fixtures import FIXTURES, write_byte_level_tokenizer
from tests.support.examples import num_examples
from tests.support.family_models import VOCAB_SIZE, save_family_model
from tests.support.lora_adapters import save_random_adapter
from tests.support.quantized_files import SCHEMES, save_quantized_model

# Keys that are read although the files here may lack them, after the architecture.
OPTIONAL_KEYS = (
    *KEYS.values(),
    *DEFAULTED_KEYS.values(),
    *(f"rope.scaling.{name}" for name in YARN_KEYS.values()),
    *("rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.attn_factor", "rope.scale_linear"),
    *("attention.value_length", "attention.key_length_mla", "attention.value_length_mla", "expert_gating_func"),
    *("attention.temperature_scale", "vocab_size"),
)
GENERAL_KEYS = (
    *("general.alignment", "split.count", "split.no", "split.tensors.count"),
    *(f"general.sampling.{name}" for name in SAMPLING_FIELDS),
    *(f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "eot", "eom", "unknown", "padding", "fim_pre")),
    *(f"tokenizer.ggml.{name}" for name in ("token_type", "scores", "merges", "add_bos_token", "precompiled_charsmap")),
)


def keys_of(image: GGUFImage) -> list[str]:
    """Return the keys of a file, and those that it may lack."""
    arch = image.metadata["general.architecture"]
    return list(dict.fromkeys([*image.keys(), *(f"{arch}.{key}" for key in OPTIONAL_KEYS), *GENERAL_KEYS]))


def some(cases: list[Any], name: str) -> list[Any]:
    """Return some of the cases, which differ from file to file."""
    return random.Random(name).sample(cases, min(num_examples(3, 100), len(cases)))


@pytest.mark.drawn
@pytest.mark.checklist("F11")
@pytest.mark.parametrize(
    "name",
    quick("gemma4_e2b", "llama3", "qwen3_yarn", "qwen3_moe", "deepseek_v2", "gpt_oss", "phi3_longrope", "granite4"),
)
def test_gguf(check: Check, tmp_path: Path, name: str) -> None:
    image = GGUFImage(lzma.decompress((FIXTURES / f"{name}.gguf.xz").read_bytes()))
    path = tmp_path / "model.gguf"
    cases = [(key, value) for key in keys_of(image) for value in (*GGUF_VALUES.items(), ("missing", None))]
    for key, (shown, value) in some(cases, name):
        path.write_bytes(image.with_value(key, value))
        check(path, f"{name}: {key} = {shown}")


OPTIONAL_FIELDS: dict[str, tuple[str, ...]] = {
    "tokenizer.json": (),
    "tokenizer_config.json": (
        *("model_max_length", "added_tokens_decoder", "additional_special_tokens", "extra_special_tokens"),
        *("add_bos_token", "add_eos_token", "bos_token", "eos_token", "unk_token", "chat_template", "tokenizer_class"),
    ),
    "generation_config.json": (
        *("eos_token_id", "bos_token_id", "pad_token_id", "do_sample", "max_length", "max_new_tokens", "min_length"),
        *("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty"),
    ),
}


def fields_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the keys of config.json that are read, there or not."""
    read: dict[str, None] = {}
    get = Fields.get

    def noted(fields: Fields, key: str) -> Any:
        if fields.source == str(folder / "config.json"):
            read.update(dict.fromkeys((*NAMES.get(key, ()), key)))
        return get(fields, key)

    with monkeypatch.context() as patch:
        patch.setattr(Fields, "get", noted)
        load_folder(folder)
    return list(read)


def check_json(check: Check, folder: Path, work: Path, file: str, name: str, more: Sequence[str] = ()) -> None:
    text = (folder / file).read_bytes()
    places = dict.fromkeys([*json_places(text), *((key,) for key in more)])
    for place, value in some([(place, value) for place in places for value in JSON_VALUES], f"{name} {file}"):
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(folder, work)
        (work / file).write_bytes(with_json_value(text, place, value))
        check(work, f"{name}: {file}: {place} = {value!r}")


@pytest.mark.drawn
@pytest.mark.checklist("F11")
@pytest.mark.parametrize("name", quick("gemma4_e2b", "llama3", "phi3_longrope", "qwen3_moe", "gemma3", "deepseek_v2"))
def test_json(check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    folder = tmp_path / "model"
    save_family_model(name, folder)
    write_byte_level_tokenizer(folder)
    assert check(folder, name)
    check_json(check, folder, tmp_path / "changed", "config.json", name, fields_of(folder, monkeypatch))
    for file, keys in OPTIONAL_FIELDS.items():
        check_json(check, folder, tmp_path / "changed", file, name, keys)


@pytest.mark.drawn
@pytest.mark.checklist("F11")
@pytest.mark.parametrize(
    "name", quick("awq 4 bits of 32", "gptq 4 bits of 128", "compressed-tensors 4 bits of 128", "float8 of blocks")
)
def test_quantization_config(check: Check, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_quantized_model(folder, SCHEMES[name], 0, vocab_size=VOCAB_SIZE)
    write_byte_level_tokenizer(folder)
    assert check(folder, name)
    check_json(check, folder, tmp_path / "changed", "config.json", name)


@pytest.mark.drawn
@pytest.mark.checklist("F11")
def test_adapter_config(check: Check, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_family_model("llama3", folder)
    write_byte_level_tokenizer(folder)
    patterns: dict[str, Any] = {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"k_proj": 4}}
    save_random_adapter(folder / "adapter", load_model_config(folder), 0, ranks={"": 2}, **patterns)
    assert check(folder, "adapter")
    keys = ("r", "lora_alpha", "use_rslora", "use_dora", "target_modules", "layers_to_transform", "modules_to_save")
    check_json(check, folder, tmp_path / "changed", "adapter/adapter_config.json", "adapter", keys)
