"""One value of a model's metadata is replaced with another plausible one, and requests run, under sanitizers.

Each model answers the same whether its requests run alone or together, with finite logits, or is refused in one line.
"""

import json
import lzma
import random
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz.conftest import Check
from tests.fuzz.hostile_values import GGUFImage, json_places, with_json_value
from tests.fuzz.plausible_values import encode, kind_of, numbers_of, other_values
from tests.fuzz.test_hostile_metadata import FIXTURES, GENERAL_KEYS, OPTIONAL_KEYS, fields_of
from tests.parity.make_fixtures import write_byte_level_tokenizer
from tests.support.family_models import save_family_model

NUM_OTHERS = 16  # changes of what all layers have in common
NUM_LISTS = 3  # of each key with an element for each layer
OF_LAYERS = (
    "head_count",
    "num_attention_heads",
    "key_value_heads",
    "key_length",
    "head_dim",
    "shared",
    "window",
    "types",
)
GGUF_MODELS = ("gemma4_e2b", "gpt_oss", "qwen3_moe")
JSON_MODELS = ("gemma4_e2b", "deepseek_v2", "gemma3_text")


@dataclass(frozen=True)
class Change:
    """One value of a model's metadata is another."""

    place: str  # the key, or the path to the value
    value: Any
    data: Callable[[], bytes]  # returns the whole file

    @property
    def kind(self) -> tuple[str, str]:
        return self.place, kind_of(self.value)

    @property
    def is_of_layers(self) -> bool:
        """True for what layers may differ in, which some take from each other."""
        return any(word in self.place for word in OF_LAYERS)

    def __str__(self) -> str:
        return f"{self.place} = {self.value!r}"


def changed_images(image: GGUFImage) -> Iterator[Change]:
    """Yield the changes of a GGUF file."""
    arch = image.metadata["general.architecture"]
    keys = dict.fromkeys([*image.keys(), *(f"{arch}.{key}" for key in OPTIONAL_KEYS), *GENERAL_KEYS])
    numbers, num_layers = numbers_of(image.metadata), image.metadata[f"{arch}.block_count"]
    for key in keys:
        for value in other_values(key, image.metadata.get(key), numbers, num_layers):
            if value is None or encode(value) is not None:
                yield Change(key, value, partial(image.with_value, key, encode(value)))


def changed_configs(folder: Path, keys: list[str]) -> Iterator[Change]:
    """Yield the changes of a config.json. Values may also be those of one layer."""
    text = (folder / "config.json").read_bytes()
    values = json.loads(text)
    num_layers, numbers = values["num_hidden_layers"], numbers_of(values)
    names = [(key,) for key, value in values.items() if isinstance(value, str)]
    for place in dict.fromkeys([*json_places(text), *names, *((key,) for key in keys)]):
        for value in other_values(str(place[-1]), value_at(values, place), numbers, num_layers):
            yield Change(".".join(map(str, place)), value, partial(with_json_value, text, place, value))
            if len(place) == 1:
                layers = values.get("per_layer_config", {}) | {str(num_layers - 1): {place[0]: value}}
                changed = partial(with_json_value, text, ("per_layer_config",), layers)
                yield Change(f"{place[0]} of the last layer", value, changed)


def value_at(values: Any, place: tuple[Any, ...]) -> Any:
    """Return the value at a path; None if there is none."""
    for key in place:
        values = values.get(key) if isinstance(values, dict) else values[key]
    return values


def some(changes: Iterable[Change], name: str) -> list[Change]:
    """Return changes of each kind of what layers may differ in, and some of the others; other ones for each file."""
    shuffled = list(changes)
    random.Random(name).shuffle(shuffled)
    by_kind: defaultdict[tuple[str, str], list[Change]] = defaultdict(list)
    for change in shuffled:
        by_kind[change.kind].append(change)
    of_layers, others = [], []
    for (_, kind), found in by_kind.items():
        if found[0].is_of_layers:
            of_layers += found[: NUM_LISTS if kind == "different elements" else 1]
        else:
            others.append(found[0])
    return of_layers + others[:NUM_OTHERS]


@pytest.mark.long
@pytest.mark.checklist("F11")
@pytest.mark.parametrize("name", GGUF_MODELS)
def test_gguf(sanitized_check: Check, tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(lzma.decompress((FIXTURES / f"{name}.gguf.xz").read_bytes()))
    assert sanitized_check(path, name)
    for change in some(changed_images(GGUFImage(path.read_bytes())), name):
        path.write_bytes(change.data())
        sanitized_check(path, f"{name}: {change}")


@pytest.mark.long
@pytest.mark.checklist("F11")
@pytest.mark.parametrize("name", JSON_MODELS)
def test_json(sanitized_check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    folder, changed = tmp_path / "model", tmp_path / "changed"
    save_family_model(name, folder)
    write_byte_level_tokenizer(folder)
    assert sanitized_check(folder, name)
    shutil.copytree(folder, changed)
    for change in some(changed_configs(folder, fields_of(folder, monkeypatch)), name):
        (changed / "config.json").write_bytes(change.data())
        sanitized_check(changed, f"{name}: {change}")
