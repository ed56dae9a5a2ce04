"""Damaged model files, and metadata with a hostile or a plausible value in place of one of theirs.

Each model is loaded or refused in one line, in bounded time and memory, however much its metadata ask for.
"""

import random
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from engine.config import load_model_config
from engine.config.decoder import NAMES
from engine.config.fields import Fields
from engine.config.gguf import DEFAULTED_KEYS, KEYS, SAMPLING_FIELDS, YARN_KEYS
from engine.config.huggingface import load_folder
from tests.fuzz.conftest import Check, quick
from tests.fuzz.hostile_values import GGUF_VALUES, JSON_VALUES, GGUFImage, encode, json_places, with_json_value
from tests.fuzz.mutations import mutate_gguf, mutate_json, mutate_safetensors
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
    *("attention.temperature_scale", "vocab_size", "ssm.inner_size"),
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
    [
        *quick("gemma4_e2b", "llama3", "qwen3_yarn", "qwen3_moe", "deepseek_v2", "gpt_oss", "phi3_longrope"),
        *quick("qwen3_5", "granite4", "qwen3_next", "lfm2_moe"),
    ],
)
def test_hostile_gguf(check: Check, tmp_path: Path, name: str) -> None:
    image = GGUFImage(name, path := tmp_path / "model.gguf")
    for key, (shown, value) in some([(key, value) for key in keys_of(image) for value in GGUF_VALUES.items()], name):
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
ADAPTER_FIELDS = (
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "target_modules",
    "layers_to_transform",
    "modules_to_save",
)
PATTERNS: dict[str, Any] = {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"k_proj": 4}}


def fields_of(folder: Path) -> list[str]:
    """Return the keys of config.json that are read, there or not."""
    read: dict[str, None] = {}
    get = Fields.get

    def noted(fields: Fields, key: str) -> Any:
        if fields.source == str(folder / "config.json"):
            read.update(dict.fromkeys((*NAMES.get(key, ()), key)))
        return get(fields, key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fields, "get", noted)
        load_folder(folder)
    return list(read)


@pytest.mark.drawn
@pytest.mark.checklist("F11")
@pytest.mark.parametrize(
    "name",
    [
        "adapter",
        *quick("gemma4_e2b", "llama3", "phi3_longrope", "qwen3_moe", "gemma3", "deepseek_v2", "qwen3_next"),
        *quick("lfm2_moe", "qwen3_5"),
        *quick("awq 4 bits of 32", "gptq 4 bits of 128", "compressed-tensors 4 bits of 128", "float8 of blocks"),
    ],
)
def test_hostile_json(check: Check, tmp_path: Path, name: str) -> None:
    folder, work = tmp_path / "model", tmp_path / "changed"
    if name in SCHEMES:
        folder.mkdir()
        save_quantized_model(folder, SCHEMES[name], 0, vocab_size=VOCAB_SIZE)
    else:
        save_family_model("llama3" if name == "adapter" else name, folder)
    write_byte_level_tokenizer(folder)
    files: dict[str, Sequence[str]] = {"config.json": ()}
    if name == "adapter":
        save_random_adapter(folder / "adapter", load_model_config(folder), 0, ranks={"": 2}, **PATTERNS)
        files = {"adapter/adapter_config.json": ADAPTER_FIELDS}
    elif name not in SCHEMES:
        files = {"config.json": fields_of(folder), **OPTIONAL_FIELDS}
    assert check(folder, name)
    for file, more in files.items():
        text = (folder / file).read_bytes()
        places = dict.fromkeys([*json_places(text), *((key,) for key in more)])
        for place, value in some([(place, value) for place in places for value in JSON_VALUES], f"{name} {file}"):
            shutil.rmtree(work, ignore_errors=True)
            shutil.copytree(folder, work)
            (work / file).write_bytes(with_json_value(text, place, value))
            check(work, f"{name}: {file}: {place} = {value!r}")


@pytest.mark.drawn
@pytest.mark.checklist("F11")
@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.long) for part in range(1, 20))])
def test_damaged_gguf(check: Check, tmp_path: Path, part: int) -> None:
    rng = random.Random(part)
    path = tmp_path / "model.gguf"
    for fixture in rng.choices(sorted(FIXTURES.glob("*.xz")), k=num_examples(2, 5)):
        image = GGUFImage(fixture.name.removesuffix(".gguf.xz"), path)
        assert check(path, fixture.name)
        for case in range(num_examples(3, 50)):
            path.write_bytes(mutate_gguf(image, rng))
            check(path, f"part {part}, {fixture.name}, case {case}")


@pytest.mark.drawn
@pytest.mark.checklist("F11")
@pytest.mark.parametrize("name", quick("gpt_oss_mxfp4", "llama3", "qwen3_moe", "gemma3", "deepseek_v2", "qwen3_next"))
def test_damaged_folder(check: Check, tmp_path: Path, name: str) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "folder"
    save_family_model(name, whole)
    write_byte_level_tokenizer(whole)
    assert check(whole, name)
    files = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
    rng = random.Random(name)
    for case in range(num_examples(6, 1000)):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        file = folder / rng.choices(files, weights=[4, 4, 2, 1, 1])[0]
        mutate = mutate_safetensors if file.suffix == ".safetensors" else mutate_json
        file.write_bytes(mutate(file.read_bytes(), rng))
        check(folder, f"{name}, case {case}, {file.name}")


# Each of these values is fine by itself, but may not fit the rest. Each model answers the same whether its requests run
# alone or together, with finite logits, or is refused.

NUM_OTHERS = 16  # changes of what all layers have in common
NUM_LISTS = 3  # of each key with an element for each layer
OF_LAYERS = ("head_count", "key_length", "shared", "window", "ssm", "recurrent")  # in keys of what layers may differ in
HUGE = (2**20, 2**31 - 1)
FLOATS = (0.0, -1.0, 1e-6, 0.5, 1.0, 1e4, 1e30)


def other_values(key: str, value: Any, numbers: Iterable[int], num_layers: int) -> Iterator[Any]:
    """Yield other values for a key, which may have none (None): of its type, of others, and lists for all layers.

    `numbers` are those of the whole file. A list has another value for the last layer, or for the last half of them.
    """
    first, half = value or 1, num_layers // 2
    near: list[Any] = []
    if key.endswith("scaling.type"):
        yield from ("none", "linear", "yarn", "longrope")
    elif isinstance(value, bool):
        near = [not value]
    elif isinstance(value, int | None):
        near = [first - 1, first + 1, 2 * first, first // 2, 3 * first, 4 * first, 1, 2]
        yield from (*sorted(numbers), -1, 0, *HUGE)
    elif isinstance(value, float):
        yield from (2 * value, value / 2, *FLOATS)
    elif isinstance(value, list):
        yield from (value[:-1], [*value, *value[-1:]], value[::-1], value[:1] * len(value))
        for index, old in enumerate(value[:8]):
            others = value[:8] + ([0, -1, 2 * old, HUGE[1]] if isinstance(old, int | float) else [])
            yield from ([*value[:index], other, *value[index + 1 :]] for other in dict.fromkeys(others))
    for other in near:
        yield other
        yield [first] * (num_layers - 1) + [other]
        yield [first] * half + [other] * (num_layers - half)
    if value is None:
        yield from (True, False, *FLOATS)
    yield from ("full_attention", None)


def kind_of(value: Any) -> str:
    """Return a name for values that are likely to have the same effect."""
    match value:
        case list() if len(set(map(repr, value))) > 1:
            return "different elements"
        case int() | float() if not isinstance(value, bool):
            return "negative" if value < 0 else "small" if value < 8 else "huge" if value in HUGE else "large"
    return type(value).__name__


def changes(image: GGUFImage, name: str) -> Iterator[tuple[str, Any]]:
    """Yield a key and another value for each kind of what layers may differ in, and for some of the other kinds."""
    num_layers = image.metadata[f"{image.metadata['general.architecture']}.block_count"]
    lists = [value if isinstance(value, list) else [value] for value in image.metadata.values()]
    numbers = {one for values in lists for one in values[:64] if type(one) is int and 0 < one <= 4096}  # may be sizes
    found: defaultdict[tuple[str, str], list[Any]] = defaultdict(list)
    for key in keys_of(image):
        for value in other_values(key, image.metadata.get(key), numbers, num_layers):
            if value is None or encode(value) is not None:
                found[key, kind_of(value)].append(value)
    rng, of_layers = random.Random(name), [each for each in found if any(word in each[0] for word in OF_LAYERS)]
    for key, kind in (*of_layers, *rng.sample([each for each in found if each not in of_layers], NUM_OTHERS)):
        values = found[key, kind]
        num_values = min(NUM_LISTS if kind == "different elements" else 1, len(values))
        yield from ((key, value) for value in rng.sample(values, num_values))


@pytest.mark.long
@pytest.mark.checklist("F11")
@pytest.mark.parametrize("name", ["gemma4_e2b", "gpt_oss", "qwen3_moe", "deepseek_v2", "qwen3_5", "lfm2_moe"])
def test_plausible_gguf(sanitized_check: Check, tmp_path: Path, name: str) -> None:
    image = GGUFImage(name, path := tmp_path / "model.gguf")
    assert sanitized_check(path, name)
    for key, value in changes(image, name):
        path.write_bytes(image.with_value(key, encode(value)))
        sanitized_check(path, f"{name}: {key} = {value!r}")
